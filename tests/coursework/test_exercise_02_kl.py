import math

import pytest
import torch

import grpo
from tests.coursework.checks import close

pytestmark = pytest.mark.exercise_2

POLICY = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.99, 0.01], dtype=torch.float64).log()


def test_the_expectation_is_the_exact_kl():
    # KL = 0.5 log(0.5 / 0.99) + 0.5 log(0.5 / 0.01), all by hand.
    exact = 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)
    mean = (POLICY.exp() * grpo.kl_estimate(POLICY, REFERENCE)).sum()
    close(mean, exact, "the mean over the policy (.5, .5), reference (.99, .01)")


def test_the_ratio_is_reference_over_policy():
    # pi_ref / pi is 1.98 and 0.02.
    wanted = [1.98 - math.log(1.98) - 1, 0.02 - math.log(0.02) - 1]
    close(grpo.kl_estimate(POLICY, REFERENCE), wanted, "pi_ref / pi of 1.98 and 0.02")


def test_it_is_never_negative():
    values = grpo.kl_estimate(POLICY, REFERENCE)
    assert bool((values >= 0).all()), f"an estimate is negative: {values.tolist()}"


def test_it_is_largest_where_the_reference_finds_a_token_likelier():
    often, rarely = torch.tensor([0.99, 0.01], dtype=torch.float64).log()
    missed, overdone = grpo.kl_estimate(rarely, often), grpo.kl_estimate(often, rarely)
    assert bool(missed >= overdone), (
        f"pi .01, pi_ref .99 has {missed.item():.3f}; pi .99, pi_ref .01 {overdone.item():.3f}"
    )


def test_it_is_0_where_the_two_agree():
    close(grpo.kl_estimate(REFERENCE, REFERENCE), [0, 0], "equal log-probs")


def test_the_gradient_is_1_minus_the_ratio():
    logprobs = POLICY.clone().requires_grad_()
    grpo.kl_estimate(logprobs, REFERENCE).sum().backward()
    close(logprobs.grad, [1 - 1.98, 1 - 0.02], "the gradient with respect to log pi")
