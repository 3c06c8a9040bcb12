import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.coursework import flash
from tests.coursework.checks import close

pytestmark = pytest.mark.exercise_12


def inputs(T, K=4, U=3, size=1.0):
    generator = torch.Generator().manual_seed(5)
    shapes = ((T, K), (T, K), (T, U))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q * size, k * size, v


def expected(q, k, v, scale):
    """Row by row, from each query's own keys."""
    out, lse = [], []
    for t in range(len(q)):
        scores = scale * (k[: t + 1] @ q[t])
        lse.append(scores.logsumexp(0))
        out.append((scores - lse[-1]).exp() @ v[: t + 1])
    return torch.stack(out), torch.stack(lse)


def test_one_tile_is_plain_causal_attention():
    q, k, v = inputs(6)
    close(flash.flash_attention(q, k, v, 0.5, 6)[0], expected(q, k, v, 0.5)[0], "6 keys at once")


def test_the_output_does_not_depend_on_the_tile():
    q, k, v = inputs(12)
    for tile in (1, 2, 4):
        got = flash.flash_attention(q, k, v, 0.5, tile)[0]
        close(got, expected(q, k, v, 0.5)[0], f"12 keys, {tile} at a time")


def test_a_larger_maximum_shrinks_what_was_summed():
    q, k, v = torch.ones(2, 1), torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.0]])
    out, _ = flash.flash_attention(q, k, v, 1.0, 1)
    # Scores 0, then 2: the first value's share is 1 / (1 + e^2).
    close(out, [[1.0], [0.11920292]], "scores of 0 and 2, a key at a time")


def test_the_last_tile_may_be_shorter():
    q, k, v = inputs(7)
    got = flash.flash_attention(q, k, v, 0.5, 3)[0]
    close(got, expected(q, k, v, 0.5)[0], "7 keys, 3 at a time")


def test_no_query_sees_the_future():
    q, k, v = inputs(8)
    before, _ = flash.flash_attention(q, k, v, 0.5, 4)
    k[5:], v[5:] = 100, 100
    after, _ = flash.flash_attention(q, k, v, 0.5, 4)
    close(after[:5], before[:5], "outputs 0 to 4 after the keys from 5 on have changed")


def test_large_scores_do_not_overflow():
    q, k, v = inputs(9, size=40.0)
    close(flash.flash_attention(q, k, v, 1.0, 2)[0], expected(q, k, v, 1.0)[0], "scores of 1000s")


def test_the_log_of_the_sums_comes_with_it():
    q, k, v = inputs(9)
    close(flash.flash_attention(q, k, v, 0.5, 4)[1], expected(q, k, v, 0.5)[1], "lse, log base e")


class Largest(TorchFunctionMode):
    """The most numbers that any tensor had which was made meanwhile."""

    numbers = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_tensor_has_t_times_t_numbers():
    T, q_k_v = 64, inputs(64)
    with Largest() as largest:
        flash.flash_attention(*q_k_v, 0.5, 8)
    assert largest.numbers < T * T, f"a tensor has {largest.numbers} numbers, {T} x {T} or more"
