"""data/packing.py: documents in rows, whole, with little padding."""

import math
import random

import pytest
import torch

from data.packing import Packed, best_fit, pack


def random_lengths(seed: int, count: int, longest: int) -> list[int]:
    rng = random.Random(seed)
    return [min(longest, 1 + int(rng.expovariate(4 / longest))) for _ in range(count)]


def first_fit(lengths: list[int], capacity: int) -> int:
    """How many rows, when each document in turn goes into the first row that has room."""
    rows: list[int] = []
    for length in lengths:
        place = next((i for i, used in enumerate(rows) if used + length <= capacity), None)
        if place is None:
            rows.append(length)
        else:
            rows[place] += length
    return len(rows)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying everything."""
    best = len(lengths)

    def place(i: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if i == len(lengths):
            best = len(rows)
            return
        for r in range(len(rows)):
            if rows[r] + lengths[i] <= capacity:
                place(i + 1, [*rows[:r], rows[r] + lengths[i], *rows[r + 1 :]])
        place(i + 1, [*rows, lengths[i]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(6))
def test_every_document_appears_once_and_whole(seed):
    rng = random.Random(seed)
    lengths = random_lengths(seed, 60, 25)
    documents = [[rng.randrange(1000) for _ in range(n)] for n in lengths]
    packed = pack(documents, 25)
    assert packed.tokens_BT.shape == packed.positions_BT.shape == packed.documents_BT.shape
    assert packed.tokens_BT.dtype == packed.positions_BT.dtype == torch.long
    found: dict[int, list[int]] = {}
    for tokens, positions, numbers in zip(*(part.tolist() for part in tuple(packed))):
        for t, (token, position, number) in enumerate(zip(tokens, positions, numbers)):
            assert (position == -1) == (number == -1)
            if number == -1:
                assert set(numbers[t:]) == {-1}, "padding between documents"
                break
            document = found.setdefault(number, [])
            assert position == len(document), "a document is cut, doubled or out of order"
            assert position == 0 or numbers[t - 1] == number, "documents are interleaved"
            document.append(token)
    assert [found[i] for i in range(60)] == documents


@pytest.mark.parametrize("seed", range(20))
def test_no_row_exceeds_the_capacity_and_every_number_is_placed_once(seed):
    lengths = random_lengths(seed, 200, 40)
    rows = best_fit(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(200))
    assert all(0 < sum(lengths[i] for i in row) <= 64 for row in rows)


def test_rows_are_as_long_as_the_fullest_one():
    packed = pack([[1] * 6, [2] * 5, [3] * 4], 12)
    assert packed.tokens_BT.shape == (2, 11)
    assert pack([[1, 2, 3]], 100).tokens_BT.tolist() == [[1, 2, 3]]


def test_the_longest_goes_first_and_where_it_leaves_the_least_room():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    # The last one fits both rows: the first has 7 places left, the second 1.
    assert best_fit([13, 11, 8, 1], 20) == [[0], [1, 2, 3]]
    assert best_fit([1, 8, 11, 13], 20) == [[3], [2, 1, 0]]


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_needs_no_more_rows_than_first_fit(seed):
    lengths = random_lengths(seed, 150, 50)
    assert len(best_fit(lengths, 50)) <= first_fit(lengths, 50)


def test_best_fit_saves_rows_over_first_fit():
    cases = [random_lengths(seed, 150, 50) for seed in range(30)]
    ours = sum(len(best_fit(lengths, 50)) for lengths in cases)
    assert ours < sum(first_fit(lengths, 50) for lengths in cases)
    # Of many documents next to nothing is padding.
    filled = sum(sum(lengths) for lengths in cases)
    assert filled / (50 * ours) > 0.97


@pytest.mark.parametrize("seed", range(60))
def test_best_fit_decreasing_keeps_its_proven_bound(seed):
    """At most 11/9 of the fewest rows, and 6/9 (Dosa 2007, for first fit decreasing)."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 20) for _ in range(8)]
    rows = len(best_fit(lengths, 20))
    assert fewest_rows(lengths, 20) <= rows <= 11 / 9 * fewest_rows(lengths, 20) + 6 / 9


def test_a_document_may_fill_a_row_and_one_token_more_is_refused():
    assert best_fit([10, 10], 10) == [[0], [1]]
    for function in (lambda: best_fit([3, 11], 10), lambda: pack([[1] * 3, [1] * 11], 10)):
        with pytest.raises(ValueError, match="11.*10"):
            function()


def test_nothing_packs_to_nothing():
    assert best_fit([], 10) == []
    assert pack([], 10).tokens_BT.numel() == 0


def test_rows_can_be_picked_from_all_parts_together():
    packed = pack([[1] * 6, [2] * 5, [3] * 4, [4] * 9], 10)
    some = packed[1:3]
    assert isinstance(some, Packed)
    assert torch.equal(some.tokens_BT, packed.tokens_BT[1:3])
    assert torch.equal(some.positions_BT, packed.positions_BT[1:3])
    picked = packed[torch.tensor([2, 0])]
    assert torch.equal(picked.documents_BT, packed.documents_BT[[2, 0]])
    assert math.prod(packed.tokens_BT.shape) == 30
