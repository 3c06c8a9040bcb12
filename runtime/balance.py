"""Which process samples which questions: a rollout takes as long as the process with most to write.

How long an output will be is guessed from the last ones to the same question or, where it is new,
to questions of its level. Which process draws an output changes nothing about it (sample.py), so a
wrong guess costs time only. It is no part of the method. Read next: workers.py.
"""

import heapq
from collections.abc import Sequence
from statistics import fmean as mean

from runtime import parallel

REMEMBERED = 2**17  # questions


def shares(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Places of the costs for each rank: the dearest first, each to the rank that has least to do
    so far (Graham 1969: at most a third longer than the best). Equal costs go round in order."""
    heap, dealt = [(0.0, 0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        cost, count, rank = heapq.heappop(heap)
        dealt[rank].append(place)
        heapq.heappush(heap, (cost + costs[place], count + 1, rank))
    return [sorted(places) for places in dealt]


class Lengths:
    """What all ranks have seen of the lengths of outputs. They note the same, and so share alike
    without a word."""

    def __init__(self):
        self.questions: dict[str, float] = {}
        self.levels: dict[int, float] = {}

    def expect(self, problem) -> float:
        """In tokens; the same for all as long as nothing is known."""
        known = self.questions.get(problem.question, self.levels.get(problem.level))
        if known is None:
            return mean(self.levels.values()) if self.levels else 1.0
        return known

    def share(self, asked) -> list[int]:
        """The numbers of this process's questions, of those of the whole batch."""
        costs = [self.expect(problem) for problem in asked.problems]
        return [asked.numbers[i] for i in shares(costs, parallel.world_size())[parallel.rank()]]

    def note(self, asked, lengths: dict[int, float]) -> None:
        """The mean length of the outputs to each question, by its number."""
        by_level: dict[int, list[float]] = {}
        for number, problem in zip(asked.numbers, asked.problems):
            self.questions.pop(problem.question, None)  # the newest last
            self.questions[problem.question] = lengths[number]
            by_level.setdefault(problem.level, []).append(lengths[number])
        for level, values in by_level.items():
            self.levels[level] = mean([*values, self.levels.get(level, values[0])])
        while len(self.questions) > REMEMBERED:
            del self.questions[next(iter(self.questions))]
