"""What a run of RL says of itself when the questions arise that everybody asks: why is my loss 0,
why is my reward flat, how long will it take. Each of its answers comes once, with the figures.

It is no part of the method. (Out of memory: launch.py.)
"""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean as mean

from tqdm import tqdm

from runtime import parallel

SILENT = 5  # rollouts in a row with next to no signal, before that is said
WINDOW = 20  # rollouts: a reward is flat where its last so many earned no more than its first
SOLVED = 0.9  # accuracy from which on a reward has little room to rise
BY_CHANCE = 2.0  # standard errors that two means of the same are apart


class Advice:
    """Told of each update, it prints on rank 0 what a reader should know by then."""

    def __init__(self, steps: int, done: int = 0, say: Callable[[str], None] | None = None):
        self.steps = steps
        self.say = say or (lambda line: tqdm.write(line) if parallel.is_main() else None)
        self.said: set[str] = set()
        self.begins: list[tuple[int, float]] = []  # of the rollouts: the updates done, the time
        self.last = done, time.monotonic()  # when the last update ended, where the next begins
        self.rewards: list[float] = []  # of each rollout
        self.recent: deque[dict] = deque(maxlen=WINDOW)

    def update(self, done: int, stats: dict, sampled: dict, beta: float) -> None:
        """After update `done`. stats: of the update; sampled: of the rollout, on its first update
        alone, when the policy is still the one that sampled."""
        if sampled:
            self.begins.append(self.last)
            self._time(done)
            self._loss(stats, sampled, beta)
            self._flat()
            self.recent.append(dict(sampled))
            self.rewards.append(sampled["reward"])
        for key in ("kl", "clip_fraction"):  # they grow from update to update of a rollout
            known = self.recent[-1] if self.recent else {}
            known[key] = max(known.get(key, 0.0), stats.get(key, 0.0))
        self.last = done, time.monotonic()

    def _once(self, topic: str, line: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            self.say(line)

    def _time(self, done: int) -> None:
        """From the beginning of the second rollout, for the first also compiles and warms up, to
        that of the newest: each has one rollout and all updates that follow it."""
        if len(self.begins) < 3 or done - self.begins[0][0] <= 4 or done >= self.steps:
            return
        (first, began), (now, at) = self.begins[1], self.begins[-1]
        each = (at - began) / (now - first)
        left = each * (self.steps - now) - (time.monotonic() - at)
        length = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        length = length if left < 7200 else f"{left / 3600:.1f} h"
        self._once("time", (
            f"an update takes {each:.2g} s so far, with its share of the rollout:"
            f" {self.steps - done} more take {length}, without the evaluation that follows"
        ))  # fmt: skip

    def _loss(self, stats: dict, sampled: dict, beta: float) -> None:
        loss, norm, alike = stats["loss"], stats["grad_norm"], sampled["groups_without_signal"]
        if abs(loss) >= 0.01:
            return
        if alike > 0.999 or norm < 1e-6:
            where = "of this rollout" if alike > 0.999 else "that this update is about"
            solved = sampled.get("accuracy")
            right = "" if solved is None else f", {solved:.0%} right"
            self._once("nothing", (
                f"the loss is {loss:.1e} because all outputs of every question {where} earned the"
                f" same: nothing is learned from them (groups without signal {alike:.0%}, grad_norm"
                f" {norm:.2g}, reward {sampled['reward']:.3f}{right})"
            ))  # fmt: skip
            return
        self._once("loss", (
            f"the loss is {loss:.1e}: on a rollout's first update it is about beta KL"
            f" ({beta:g} x {stats['kl']:.1e}), for a group's advantages add up to 0. It"
            f" teaches all the same (grad_norm {norm:.2g}): watch the reward,"
            f" {sampled['reward']:.3f}"
        ))  # fmt: skip

    # ---- a reward that does not rise ----

    def _flat(self) -> None:
        """Before a new rollout is counted, when all updates of the last one have been seen."""
        last = self._means(SILENT)
        if len(self.recent) >= SILENT and last["groups_without_signal"] > 0.9:
            if self._stands(SILENT, last):
                self._once("flat", _reason(last))
        means = self._means(WINDOW)
        if len(self.rewards) >= 2 * WINDOW and self._stands(WINDOW, means):
            begin, end, chance = self._rise(WINDOW)
            self._once("flat", (
                f"the reward does not rise: {begin:.3f} over the first {WINDOW} rollouts since this"
                f" start, {end:.3f} over the last {WINDOW} of {len(self.rewards)}; chance alone"
                f" moves it by up to {BY_CHANCE * chance:.2g}. {_reason(means)}"
            ))  # fmt: skip

    def _stands(self, window: int, means: dict[str, float]) -> bool:
        """Whether the reward is where it began, although it has room to rise."""
        begin, end, chance = self._rise(window)
        return end - begin <= BY_CHANCE * chance and means.get("accuracy", 0.0) <= SOLVED

    def _rise(self, window: int) -> tuple[float, float, float]:
        """The mean reward of the first and of the last rollouts, and by how much two such means of
        the same differ. The noise is taken from neighbours: a steady rise is none."""
        pairs = zip(self.rewards, self.rewards[1:])
        noise = math.sqrt(mean((b - a) ** 2 for a, b in pairs) / 2)
        begin, end = mean(self.rewards[:window]), mean(self.rewards[-window:])
        return begin, end, noise * math.sqrt(2 / window)

    def _means(self, count: int) -> dict[str, float]:
        """Over the last so many rollouts, of what is known; of KL and clip what was highest."""
        rollouts, means = list(self.recent)[-count:], {}
        for key in {key for rollout in rollouts for key in rollout}:
            values = [r[key] for r in rollouts if isinstance(r.get(key), (int, float))]
            if values:
                means[key] = max(values) if key in ("kl", "clip_fraction") else mean(values)
        return means


def _reason(means: dict[str, float]) -> str:
    """Why a reward does not move: what these figures support."""
    silent, solved = means["groups_without_signal"], means.get("accuracy")
    begin = ""
    if silent > 0.5:
        begin = (
            f"In {silent:.0%} of the groups all outputs earned the same: nothing to learn from. "
        )
    if means["truncated"] > 0.5:
        return begin + (f"{means['truncated']:.0%} were cut off after {means['tokens']:.0f} tokens"
                        " on average: raise --max-new-tokens")  # fmt: skip
    if means["unparsed"] > 0.5:
        return begin + (f"In {means['unparsed']:.0%} no answer could be read: see what they look"
                        " like (python rewards.py --audit RUN), and whether --template is the"
                        " base's own")  # fmt: skip
    if solved is not None and solved < 0.05:
        return begin + (f"{solved:.1%} are right: RL reinforces what the base sometimes does; take"
                        " easier questions, a larger --group-size or a better base")  # fmt: skip
    if silent > 0.5:
        right = "" if solved is None else f" and {solved:.0%} are right"
        return begin + (f"The mean reward is {means['reward']:.3f}{right}: take questions that it"
                        " solves now and then, or a larger --group-size; see what is paid (python"
                        " rewards.py --audit RUN)")  # fmt: skip
    if means["clip_fraction"] > 0.2:
        return (f"The clip holds back up to {means['clip_fraction']:.0%} of the tokens: a lower"
                " learning rate, or fewer --minibatches")  # fmt: skip
    if means["kl"] > 1:
        return (f"The KL to the reference is up to {means['kl']:.2g} per token: the policy has left"
                " what it knew; a lower learning rate, or a higher --beta")  # fmt: skip
    if 0 < means["kl"] < 1e-4:  # 0: without a reference it is not known
        return (f"The KL to the reference is {means['kl']:.1e} per token at most: the policy has"
                " hardly moved; a higher learning rate, or more updates")  # fmt: skip
    return (f"Outputs of a question do earn differently (in {1 - silent:.0%} of the groups), and"
            f" the policy moves (KL {means['kl']:.2g}), but not to where more is paid: does the"
            " reward tell good from bad? See what is paid"
            " (python rewards.py --audit RUN)")  # fmt: skip
