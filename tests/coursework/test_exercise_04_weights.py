import pytest
import torch

import grpo
from tests.coursework.checks import close, refused

pytestmark = pytest.mark.exercise_4


def weights(lengths, aggregation, *, outputs=2, tokens=6, longest=10):
    lengths_O = torch.tensor(lengths, dtype=torch.float64)
    return grpo.token_weights(
        lengths_O, aggregation, outputs=outputs, tokens=tokens, longest=longest
    )


def test_each_output_counts_the_same_whatever_its_length():
    close(weights([2, 4], "output"), [1 / 4, 1 / 8], "'output': 1/G 1/|o| for lengths 2 and 4")


def test_each_token_counts_the_same_with_token():
    close(weights([2, 4], "token"), [1 / 6, 1 / 6], "'token': 1 / 6 tokens in all")


def test_constant_divides_by_the_longest_output_allowed():
    close(weights([2, 4], "constant"), [1 / 20, 1 / 20], "'constant': 2 outputs, up to 10 tokens")


def test_a_part_of_the_batch_has_the_weights_of_the_whole():
    whole = dict(outputs=4, tokens=20)
    for aggregation in ("output", "token", "constant"):
        together = weights([2, 4, 6, 8], aggregation, **whole)
        halves = [weights(half, aggregation, **whole) for half in ([2, 4], [6, 8])]
        close(torch.cat(halves), together, f"{aggregation!r}: two halves of a batch and the whole")


def test_with_output_the_mean_over_outputs_comes_out():
    # Token losses 3 3 and 1 1 1 1: the outputs' means are 3 and 1, and theirs is 2.
    w_O = weights([2, 4], "output")
    close((w_O * torch.tensor([6.0, 4.0])).sum(), 2, "outputs with mean losses of 3 and 1")


def test_there_may_be_no_outputs():
    for aggregation in ("output", "token", "constant"):
        empty = weights([], aggregation, outputs=0, tokens=0)
        close(empty, torch.zeros(0), f"{aggregation!r} without outputs")


def test_another_aggregation_is_refused():
    refused(lambda: weights([2, 4], "mean"), "aggregation 'mean'")
