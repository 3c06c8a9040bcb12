from unittest.mock import patch

import pytest
import torch

import grpo
from tests.coursework.checks import close, refused

pytestmark = pytest.mark.exercise_3


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss(ratios, advantages, *, eps=0.2, beta=0.0, weights=None, outputs=None, ref=None, **rest):
    """Of tokens whose probability is `ratios` times that of when they were drawn: 0.3."""
    old_N = numbers(*[0.3] * len(ratios)).log()
    logprobs_N = (old_N + numbers(*ratios).log()).requires_grad_()
    weights_N = numbers(*(weights or [1.0] * len(ratios)))
    output_N = torch.tensor(outputs or [0] * len(ratios))
    value, stats = grpo.grpo_loss(
        logprobs_N, old_N, ref, numbers(*advantages), weights_N, output_N, eps=eps, beta=beta,
        **rest,
    )  # fmt: skip
    return value, stats, logprobs_N


def test_the_ratio_is_new_over_old():
    ratio_N = grpo.importance_ratio(
        numbers(0.6).log(), numbers(0.3).log(), torch.tensor([0]), "token"
    )
    close(ratio_N, [2], "log-probs of 0.6 now and 0.3 when drawn")


def test_the_ratio_of_an_output_is_the_product_of_its_tokens():
    ratio_N = grpo.importance_ratio(
        numbers(2, 3, 5).log(), numbers(1, 1, 1).log(), torch.tensor([0, 0, 1]), "sequence"
    )
    close(ratio_N, [6, 6, 5], "level 'sequence', ratios 2 and 3 in one output, 5 in another")


def test_another_level_is_refused():
    one = numbers(1)
    refused(lambda: grpo.importance_ratio(one, one, torch.tensor([0]), "word"), "level 'word'")


def test_the_min_is_taken_where_the_advantage_is_negative():
    # R1 Eq. 1 at eps 0.2: min(0.5 x -1, 0.8 x -1) = -0.8, min(2 x -1, 1.2 x -1) = -2.
    for ratio, gain in ((0.5, -0.8), (2.0, -2.0)):
        close(loss([ratio], [-1])[0], -gain, f"the loss for A = -1 at a ratio of {ratio}")


def test_the_min_is_taken_where_the_advantage_is_positive():
    for ratio, gain in ((2.0, 1.2), (0.5, 0.5)):
        close(loss([ratio], [1])[0], -gain, f"the loss for A = 1 at a ratio of {ratio}")


def test_on_policy_the_gradient_is_minus_the_advantage():
    value, _, logprobs_N = loss([1, 1], [2, -3])
    value.backward()
    close(logprobs_N.grad, [-2, 3], "the loss's gradient for A = 2 and -3 at a ratio of 1")


def test_a_move_the_wrong_way_still_gets_its_gradient():
    value, _, logprobs_N = loss([0.5, 2.0], [1, -1])
    value.backward()
    close(logprobs_N.grad, [-0.5, 2], "A = 1 at a ratio of 0.5, A = -1 at 2: not clipped")


def test_a_clipped_token_gets_no_gradient():
    value, _, logprobs_N = loss([2.0, 0.5], [1, -1])
    value.backward()
    close(logprobs_N.grad, [0, 0], "A = 1 at a ratio of 2, A = -1 at 0.5: clipped")


def test_eps_high_is_the_upper_bound():
    close(loss([2.0], [1], eps_high=0.5)[0], -1.5, "a ratio of 2 with eps_high 0.5")
    close(loss([0.5], [-1], eps_high=0.5)[0], 0.8, "a ratio of 0.5 with eps 0.2, eps_high 0.5")


def kl_is(kl):
    """In the place of exercise 2, which is not needed here."""
    return patch.object(grpo, "kl_estimate", lambda logprobs, ref_logprobs: kl(logprobs))


def test_the_kl_adds_to_the_loss():
    with kl_is(lambda logprobs: numbers(3, 5)):
        value, stats, _ = loss([1, 1], [1, 0], beta=0.1, ref=numbers(0, 0))
    close(value, -1 + 0.1 * 8, "gains of 1 and 0, KL of 3 and 5, beta 0.1")
    close(stats["kl"], 8, "stats['kl'], the sum over tokens")


def test_the_kl_counts_by_the_weights_too():
    with kl_is(lambda logprobs: numbers(3, 5)):
        value, _, _ = loss([1, 1], [1, 0], beta=0.1, ref=numbers(0, 0), weights=[0.5, 0.2])
    close(value, -0.5 + 0.1 * 2.5, "the same with weights of 0.5 and 0.2")


def test_the_kl_has_its_gradient():
    with kl_is(lambda logprobs: 7 * logprobs):
        value, _, logprobs_N = loss([1], [2], beta=0.1, ref=numbers(0))
        value.backward()
    close(logprobs_N.grad, [-2 + 0.1 * 7], "A = 2, and a KL whose gradient is 7, with beta 0.1")


def test_the_kl_is_of_the_policy_against_the_reference():
    asked = []

    def kl_estimate(logprobs, ref_logprobs):
        asked.append((logprobs, ref_logprobs))
        return torch.zeros_like(logprobs)

    with patch.object(grpo, "kl_estimate", kl_estimate):
        _, _, logprobs_N = loss([2.0], [1], beta=0.1, ref=numbers(-5))
    assert len(asked) == 1, f"kl_estimate was called {len(asked)} times, not once"
    close(asked[0][0], logprobs_N.detach(), "what kl_estimate is given as logprobs")
    close(asked[0][1], [-5], "what kl_estimate is given as ref_logprobs")


def test_without_a_reference_the_kl_is_0():
    value, stats, _ = loss([1], [2], beta=0.1)
    close(value, -2, "A = 2 at a ratio of 1, beta 0.1, ref None")
    close(stats["kl"], 0, "stats['kl'] where ref is None")


def test_the_loss_takes_the_ratio_that_it_is_told():
    # Ratios of 2 and 0.45 make 0.9 for the output; by itself the first is clipped.
    value = loss([2.0, 0.45, 1.1], [1, 1, 1], outputs=[0, 0, 1], ratio="sequence")[0]
    close(value, -(0.9 + 0.9 + 1.1), "ratio='sequence', 2 and 0.45 in one output, 1.1 in another")


def test_each_token_counts_by_its_weight():
    value = loss([1, 1, 1], [1, 2, 4], weights=[0.5, 0.25, 0.125])[0]
    close(value, -1.5, "A of 1, 2, 4 with weights 1/2, 1/4, 1/8, summed")


def test_clip_fraction_counts_the_tokens_that_the_clip_stopped():
    _, stats, _ = loss([2.0, 0.5, 2.0, 1.0], [1, 1, -1, 1])
    close(stats["clip_fraction"], 1, "one of four tokens is stopped by the clip")
