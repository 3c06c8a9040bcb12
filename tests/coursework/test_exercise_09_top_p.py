import math

import pytest
import torch

import sample
from tests.coursework.checks import close, same

pytestmark = pytest.mark.exercise_9

PROBS = [0.25, 0.5, 0.05, 0.2]  # not in order: a filter has to find its way back


def draw(uniform, temperature=1.0, top_p=1.0, probs=PROBS):
    logits_BV = torch.tensor([probs], dtype=torch.float64).log() + 3
    uniform_B = torch.tensor([uniform], dtype=torch.float64)
    return sample.choose(logits_BV, uniform_B, temperature, top_p)


def test_the_token_that_crosses_top_p_is_kept():
    # .5, then .75 > .6: two tokens.
    tokens_B, _ = draw(0.1, top_p=0.6)
    same(tokens_B.tolist(), [0], "token 0 (.25) comes first, and makes .75 with token 1 (.5)")


def test_a_token_is_kept_whatever_its_probability():
    for top_p in (0.1, 0.4):
        tokens_B, _ = draw(0.7, top_p=top_p)
        same(tokens_B.tolist(), [1], f"the best token (.5) under top_p {top_p}")


def test_what_is_dropped_is_never_drawn():
    drawn = {draw(i / 50, top_p=0.6)[0].item() for i in range(50)}
    same(sorted(drawn), [0, 1], "the tokens drawn with top_p 0.6")


def test_the_log_prob_is_of_what_was_drawn_from():
    tokens_B, logprob_B = draw(0.9, top_p=0.9)
    same(tokens_B.tolist(), [3], "uniform 0.9 over .25, .5 and .2, renormalised")
    close(logprob_B, [math.log(0.2 / 0.95)], "token 3 (.2) where .95 are kept")
    close(draw(0.7, top_p=0.1)[1], [0], "the only token that is kept")


def test_the_temperature_comes_before_top_p():
    # At T = 2 the probabilities go as their roots: .707, .5, .447, .224 of 1.878, and the first two
    # make .643; at T = 1 they made .75.
    _, logprob_B = draw(0.0, temperature=2.0, top_p=0.7)
    kept = 0.25**0.5 + 0.5**0.5 + 0.2**0.5
    close(logprob_B, [math.log(0.25**0.5 / kept)], "T = 2, top_p 0.7: three tokens are kept")


def test_a_token_is_drawn_by_inversion():
    for uniform, token in ((0.0, 0), (0.24, 0), (0.26, 1), (0.74, 1), (0.79, 2), (0.81, 3)):
        tokens_B, logprob_B = draw(uniform)
        same(tokens_B.tolist(), [token], f"uniform {uniform} over {PROBS}")
        close(logprob_B, [math.log(PROBS[token])], f"the log-prob of token {token}")


def test_temperature_0_takes_the_best():
    tokens_B, logprob_B = draw(0.99, temperature=0.0)
    same(tokens_B.tolist(), [1], "the best token at T = 0")
    close(logprob_B, [0], "its log-prob at T = 0")


def test_each_row_has_its_own_filter():
    logits_BV = torch.tensor([[0.9, 0.06, 0.04], [0.04, 0.48, 0.48]], dtype=torch.float64).log()
    uniform_B = torch.tensor([0.99, 0.99], dtype=torch.float64)
    tokens_B, logprobs_B = sample.choose(logits_BV, uniform_B, 1.0, 0.8)
    same(tokens_B.tolist(), [0, 2], "rows of which one and two tokens are kept")
    close(logprobs_B, [0, math.log(0.5)], "their log-probs")
