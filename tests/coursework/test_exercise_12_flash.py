import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


PRODUCTS = ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm")
TOTALS = ("sum", "mean", "prod", "max", "amax", "logsumexp")
ALONG = ("_softmax", "_log_softmax", "cumsum", "logcumsumexp", "cummax")


class Watch(TorchDispatchMode):
    """What is computed meanwhile: the most numbers that a tensor has, and the most that a sum, a
    maximum, a softmax or a product goes over."""

    numbers = length = 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # to skip the compiler, torch imports it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        results = made if isinstance(made, (tuple, list)) else [made]
        tensors = [x for x in results if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *[x.numel() for x in tensors]])
        if tensors:
            length = over(function.overloadpacket.__name__, args, tensors[0].numel())
            self.length = max(self.length, length)
        return made


def over(name, args, numbers):
    """How many numbers each of an operation's `numbers` results is made from."""
    given = [x for x in args if isinstance(x, torch.Tensor)]
    if name in PRODUCTS:
        return given[-2].shape[-1]
    if name in TOTALS:
        return given[0].numel() // max(1, numbers)
    if name in ALONG:
        return given[0].shape[args[1]]
    return given[1].shape[-2] if name.startswith("_scaled_dot_product") else 0


def watched(T, tile):
    with Watch() as watch:
        flash.flash_attention(*inputs(T), 0.5, tile)
    return watch


def test_no_tensor_has_more_numbers_than_t_times_tile():
    most = watched(64, 8).numbers
    assert most <= 64 * 8, f"a tensor has {most} numbers; T x tile is 64 x 8 = 512"


def test_no_sum_goes_over_more_than_a_tile():
    most = watched(64, 8).length
    assert most <= 8, f"a sum, maximum or product goes over {most} numbers, with a tile of 8 keys"
