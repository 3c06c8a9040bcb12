import math

import pytest
import torch

import model
from tests.coursework.checks import close

pytestmark = pytest.mark.exercise_5


def at(angles_BTr):
    """Rows whose pairs of dimensions turn by these angles."""
    angles_BTr = torch.as_tensor(angles_BTr, dtype=torch.float64)
    positions_BT = torch.zeros(angles_BTr.shape[:2], dtype=torch.long)
    return model.Rows(positions_BT, torch.polar(torch.ones_like(angles_BTr), angles_BTr))


def one(values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


QUARTER_AND_HALF = at([[[math.pi / 2, math.pi]]])


def test_deepseeks_pairs_are_neighbours():
    # (1, 0) by a quarter turn is (0, 1); (0, 1) by half a turn is (0, -1).
    turned = model.rotate(one([1, 0, 0, 1]), QUARTER_AND_HALF, interleaved=True)
    close(turned, one([0, 1, 0, -1]), "pairs (0, 1) and (2, 3), a quarter and half a turn")


def test_qwens_pairs_are_half_the_dimensions_apart():
    # Pairs (0, 2) and (1, 3): (1, 0) becomes (0, 1), and (0, 1) becomes (0, -1).
    turned = model.rotate(one([1, 0, 0, 1]), QUARTER_AND_HALF, interleaved=False)
    close(turned, one([0, 0, 1, -1]), "pairs (0, 2) and (1, 3), a quarter and half a turn")


def test_it_turns_forward():
    turned = model.rotate(one([1, 0]), at([[[math.pi / 6]]]), interleaved=True)
    close(turned, one([math.cos(math.pi / 6), 0.5]), "(1, 0) by 30 degrees")


def test_every_position_and_row_has_its_own_angle_and_all_heads_the_same():
    x_BTHR, angles_BTr = random(2, 3, 2, 6), random(2, 3, 3)
    for interleaved in (True, False):
        wanted = torch.empty_like(x_BTHR)
        for b in range(2):
            for t in range(3):
                for h in range(2):
                    for r in range(3):
                        i, j = (2 * r, 2 * r + 1) if interleaved else (r, r + 3)
                        c, s = angles_BTr[b, t, r].cos(), angles_BTr[b, t, r].sin()
                        x, y = x_BTHR[b, t, h, i], x_BTHR[b, t, h, j]
                        wanted[b, t, h, i], wanted[b, t, h, j] = c * x - s * y, s * x + c * y
        turned = model.rotate(x_BTHR, at(angles_BTr), interleaved)
        close(turned, wanted, f"a loop over rows, positions and heads, {interleaved=}")


def test_a_score_depends_on_the_distance_only():
    q, k = random(2, 1, 1, 1, 8)
    speed_r = torch.tensor([1, 0.3, 0.1, 0.03], dtype=torch.float64)

    def score(query, key):
        rows = [at((place * speed_r).view(1, 1, 4)) for place in (query, key)]
        turned = [model.rotate(x, row, interleaved=True) for x, row in zip((q, k), rows)]
        return (turned[0] * turned[1]).sum()

    close(score(7, 5), score(3, 1), "the scores of positions 7, 5 and 3, 1")


def test_bf16_is_rounded_once_at_the_end():
    # Numbers of about 100: half a unit of bf16's last place, and no more, may be lost of each.
    x_BTHR, angles_BTr = 100 * random(1, 8, 4, 8).bfloat16(), 10 * random(1, 8, 4)
    for interleaved in (True, False):
        exact = model.rotate(x_BTHR.double(), at(angles_BTr), interleaved)
        got = model.rotate(x_BTHR, at(angles_BTr), interleaved)
        close(got, exact, f"bf16 numbers, multiplied in fp32 or more, {interleaved=}", 2**-8)


def test_the_dtype_stays():
    for dtype in (torch.bfloat16, torch.float64):
        for interleaved in (True, False):
            got = model.rotate(random(1, 1, 1, 4).to(dtype), QUARTER_AND_HALF, interleaved).dtype
            assert got is dtype, f"{dtype} became {got}, {interleaved=}"
