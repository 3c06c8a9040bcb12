import pytest
import torch

import model
from tests.coursework.checks import close, same

pytestmark = pytest.mark.exercise_7

E, A = 8, 2


def gate(bias=None, **changes):
    """A router of 8 experts whose scores are chosen by its input: see `route`."""
    settings = dict(n_group=1, topk_group=1, routed_scaling_factor=2.5) | changes
    router = model.Gate(
        model.Config(hidden_size=E, n_routed_experts=E, num_experts_per_tok=A, **settings)
    ).double()
    router.weight.data = torch.eye(E, dtype=torch.float64)
    if bias is not None:
        router.e_score_correction_bias.data = torch.tensor(bias, dtype=torch.float64)
    return router


def route(router, scores, route_BTA=None):
    """What one token with these scores is given: its experts, ascending, and their weights."""
    x_BTD = torch.tensor(scores, dtype=torch.float64).logit().view(1, 1, E)
    routing = router(x_BTD, route_BTA)
    order_A = routing.experts_BTA[0, 0].argsort()
    return routing.experts_BTA[0, 0][order_A].tolist(), routing.weights_BTA[0, 0][order_A], routing


SCORES = [0.1, 0.6, 0.2, 0.2, 0.1, 0.3, 0.2, 0.1]


def test_the_scores_are_sigmoids():
    _, _, routing = route(gate(), SCORES)
    close(routing.scores_BTE[0, 0], SCORES, "sigmoid(u . e) of each expert")


def test_the_best_experts_share_the_scaling_factor_by_their_scores():
    experts, weights_A, _ = route(gate(), SCORES)
    same(experts, [1, 5], "the two largest scores of 8")
    close(weights_A, [2.5 * 0.6 / 0.9, 2.5 * 0.3 / 0.9], "2.5 s / (0.6 + 0.3)")


def test_the_bias_takes_part_in_the_selection():
    experts, _, _ = route(gate(bias=[0.45, 0, 0, 0, 0, 0, 0, 0]), SCORES)
    same(experts, [0, 1], "expert 0 is selected for its bias: 0.1 + 0.45 against 0.3")


def test_the_bias_is_not_in_the_weights():
    _, weights_A, _ = route(gate(bias=[0, 0.2, 0, 0, 0, 0.2, 0, 0]), SCORES)
    close(weights_A, [2.5 * 0.6 / 0.9, 2.5 * 0.3 / 0.9], "weights with biases of 0.2")


def test_a_group_is_as_good_as_its_two_best():
    # Groups of two: the best expert is in (0.6, 0.1), and (0.4, 0.4) is the better group.
    scores = [0.6, 0.1, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]
    experts, _, _ = route(gate(n_group=4, topk_group=1), scores)
    same(experts, [2, 3], "one group of four, by the sum of its two best: 0.7 against 0.8")


def test_in_a_larger_group_only_its_two_best_count():
    # Groups of four: all of the second add up to more, its two best to less.
    scores = [0.5, 0.4, 0.1, 0.1, 0.4, 0.4, 0.4, 0.4]
    experts, _, _ = route(gate(n_group=2, topk_group=1), scores)
    same(experts, [0, 1], "one group of two: 0.5 + 0.4 against 0.4 + 0.4, with four experts each")


def test_a_token_may_use_as_many_groups_as_topk_group_says():
    # Groups of two, which are worth 0.9, 0.6, 0.75 and 0.4: the first and the third may be used.
    scores = [0.6, 0.3, 0.5, 0.1, 0.4, 0.35, 0.2, 0.2]
    experts, weights_A, _ = route(gate(n_group=4, topk_group=2), scores)
    same(experts, [0, 4], "two groups of four: the best expert of the first and of the third")
    close(weights_A, [2.5 * 0.6, 2.5 * 0.4], "their weights, of 0.6 and 0.4")


def test_an_expert_of_a_losing_group_never_wins():
    # All that is selected from is negative, so a loser that is set to 0 would win.
    scores = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    experts, _, _ = route(gate(bias=[-0.9] * E, n_group=4, topk_group=1), scores)
    same(experts, [0, 1], "the best group's two experts, where all biases are -0.9")


def test_without_norm_topk_prob_the_weights_are_the_scores():
    _, weights_A, _ = route(gate(norm_topk_prob=False), SCORES)
    close(weights_A, [2.5 * 0.6, 2.5 * 0.3], "2.5 s, not shared out")


def test_a_route_is_taken_as_it_is_where_it_is_not_minus_1():
    given = torch.tensor([[[6, -1]]], dtype=torch.int16)
    _, _, routing = route(gate(), SCORES, given)
    same(routing.experts_BTA[0, 0].tolist(), [6, 5], "route 6, -1: expert 6, and the own second")


def test_the_gradient_reaches_the_scores_through_the_weights():
    router = gate()
    _, weights_A, _ = route(router, SCORES)
    weights_A[0].backward()
    got = router.weight.grad
    assert got is not None and bool(got[1].any()), "no gradient reached the selected expert's row"
