import operator

import pytest

import rewards
from tests.coursework.checks import same

pytestmark = pytest.mark.exercise_13


def wins(answers, wanted, *rest):
    same(rewards.majority(answers, *rest), wanted, f"the vote of {answers}")


def test_the_most_frequent_answer_wins():
    wins(["3", "4", "4"], "4")
    wins(["4", "4", "3"], "4")


def test_equal_answers_vote_together():
    wins(["3", "0.5", "3", "1/2", r"\frac{1}{2}"], "0.5")


def test_the_first_answer_of_the_group_is_returned():
    wins(["3", "1/2", "0.5", "0.5"], "1/2")


def test_a_tie_goes_to_the_earliest():
    wins(["7", "8"], "7")
    wins(["9", "8", "7", "7", "8"], "8")


def test_none_does_not_vote():
    wins([None, None, "7"], "7")
    wins([None, "7", None, None], "7")


def test_a_blank_does_not_vote():
    wins(["", "", " ", " ", "7"], "7")


def test_without_votes_nothing_wins():
    wins([], None)
    wins([None, "", None], None)


def test_check_says_what_is_equal():
    wins(["1/2", "3", "3", "0.5"], "3", operator.eq)
    wins(["ab", "c", "d", "ba"], "ab", lambda a, b: sorted(a) == sorted(b))
