import pytest
import torch

import grpo
from tests.coursework.checks import close

pytestmark = pytest.mark.exercise_1


def rewards(*groups):
    return torch.tensor(groups, dtype=torch.float64)


def test_each_group_is_compared_with_its_own_mean_and_std():
    advantages_PG = grpo.group_advantages(rewards([0, 0, 0, 1], [2, 2, 2, 3]))
    alike = [-(3**-0.5)] * 3 + [3**0.5]
    close(advantages_PG, [alike, alike], "groups that differ by 2 have the same advantages")


def test_the_std_is_the_populations():
    # Mean 0.5 and std sqrt(1/4); mean 1 and std sqrt(2/4).
    for group, wanted in (
        ([1, 0, 0, 1], [1, -1, -1, 1]),
        ([2, 1, 0, 1], [2**0.5, 0, -(2**0.5), 0]),
    ):
        close(grpo.group_advantages(rewards(group)), [wanted], f"rewards {group}, std with ddof 0")


def test_a_group_that_agrees_has_advantages_of_0():
    for reward in (0, 1):
        advantages_PG = grpo.group_advantages(rewards([reward] * 3))
        close(advantages_PG, [[0, 0, 0]], f"three rewards of {reward}")


def test_rounding_is_no_disagreement():
    advantages_PG = grpo.group_advantages(rewards([0.1 + 0.2, 0.3]))
    close(advantages_PG, [[0, 0]], "0.1 + 0.2 and 0.3 are equal rewards")


def test_nothing_is_added_to_the_std():
    advantages_PG = grpo.group_advantages(rewards([0, 1e-4]))
    close(advantages_PG, [[-1, 1]], "rewards 0 and 0.0001 are one std from their mean")


def test_without_normalize_std_they_are_only_centred():
    advantages_PG = grpo.group_advantages(rewards([0, 0, 0, 4]), normalize_std=False)
    close(advantages_PG, [[-1, -1, -1, 3]], "rewards 0 0 0 4 with normalize_std=False")


def test_there_may_be_no_questions():
    close(grpo.group_advantages(torch.zeros(0, 4)), torch.zeros(0, 4), "no groups")
