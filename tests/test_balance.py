"""runtime/balance.py: who samples which questions."""

import random

import pytest

from data.problems import Problem
from grpo import Questions
from runtime import parallel
from runtime.balance import Lengths, shares


def asked(levels: list[int]) -> Questions:
    problems = [Problem(f"q{i}", "1", level=level) for i, level in enumerate(levels)]
    return Questions(list(range(len(levels))), problems, [[1]] * len(levels))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_place_is_dealt_once_and_nobody_has_a_third_more_than_needed(ranks):
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.expovariate(0.01) for _ in range(rng.randint(0, 40))]
        dealt = shares(costs, ranks)
        assert sorted(place for places in dealt for place in places) == list(range(len(costs)))
        longest = max(sum(costs[place] for place in places) for places in dealt)
        least = max([sum(costs) / ranks, *costs])  # no way of dealing is better
        assert longest <= least * 4 / 3 + 1e-9 or len(costs) <= 2 * ranks + 1


def test_equal_costs_go_round_as_shard_deals_them():
    assert shares([5.0] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]


def test_long_questions_are_spread_where_dealing_in_order_would_heap_them(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    questions, lengths = asked([2, 1] * 8), Lengths()  # in order, rank 0 would have all of level 2
    lengths.note(asked([2, 1]), {0: 90.0, 1: 10.0})
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        levels = [questions.problems[n].level for n in lengths.share(questions)]
        assert levels.count(2) == levels.count(1) == 4


def test_a_question_is_expected_to_be_answered_as_last_time_a_new_one_as_its_level():
    lengths = Lengths()
    known, new = Problem("q0", "1", level=3), Problem("other", "1", level=3)
    assert lengths.expect(known) == lengths.expect(new)
    lengths.note(asked([3, 3]), {0: 10.0, 1: 50.0})
    assert lengths.expect(known) == 10 and 10 < lengths.expect(new) < 50
    assert 10 < lengths.expect(Problem("other", "1", level=9)) < 50  # as all of them


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("runtime.balance.REMEMBERED", 3)
    lengths = Lengths()
    lengths.note(asked([1] * 5), dict.fromkeys(range(5), 7.0))
    assert list(lengths.questions) == ["q2", "q3", "q4"]
