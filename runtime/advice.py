"""What a run of RL says of itself when the questions arise that everybody asks: why is my loss 0,
why is my reward flat, how long will it take. Each answer comes once, with the figures behind it.

It is no part of the method. (Out of memory: launch.py.)
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import fmean as mean

from tqdm import tqdm

from runtime import parallel

FLAT = 5  # rollouts in a row, before a flat reward is called one


class Advice:
    """Told of each update, it prints on rank 0 what a reader should know by then."""

    def __init__(self, steps: int, done: int = 0, say: Callable[[str], None] | None = None):
        self.steps, self.first, self.began = steps, done, time.monotonic()
        self.say = say or (lambda line: tqdm.write(line) if parallel.is_main() else None)
        self.said: set[str] = set()
        self.recent: deque[dict] = deque(maxlen=FLAT)

    def update(self, done: int, stats: dict, sampled: dict, beta: float) -> None:
        """After update `done`. stats: of the update; sampled: of the rollout, on its first update
        alone, when the policy is still the one that sampled."""
        if not sampled:
            return
        self.recent.append(sampled)
        if done > self.first + 1 and (done - self.first > 4 or done == self.steps):
            self._once("time", self._time(done))
        if abs(stats["loss"]) < 0.01:
            self._once("loss", (
                f"the loss is {stats['loss']:.1e}: on a rollout's first update it is about beta KL"
                f" ({beta:g} x {stats['kl']:.1e}), for a group's advantages add up to 0. It"
                f" teaches all the same (grad_norm {stats['grad_norm']:.2g}): watch the reward,"
                f" {sampled['reward']:.3f}"
            ))  # fmt: skip
        if len(self.recent) == FLAT:
            means = {key: mean(known) for key in sampled if (known := self._known(key))}
            if means["groups_without_signal"] > 0.9:
                self._once("flat", self._flat(means))

    def _known(self, key: str) -> list[float]:
        values = [rollout.get(key) for rollout in self.recent]
        return [value for value in values if isinstance(value, (int, float))]

    def _once(self, topic: str, line: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            self.say(line)

    def _time(self, done: int) -> str:
        each = (time.monotonic() - self.began) / (done - self.first)
        left = each * (self.steps - done)
        length = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        length = length if left < 7200 else f"{left / 3600:.1f} h"
        return f"an update takes {each:.2g} s so far: {self.steps - done} more take {length}"

    def _flat(self, means: dict[str, float]) -> str:
        """Why a reward does not move: in nearly all groups, all outputs earn the same."""
        share = means["groups_without_signal"]
        begin = f"in {share:.0%} of the groups all outputs earned the same: nothing to learn from. "
        solved = means.get("accuracy")
        if means["truncated"] > 0.5:
            return begin + (f"{means['truncated']:.0%} were cut off after {means['tokens']:.0f}"
                            " tokens on average: raise --max-new-tokens")  # fmt: skip
        if means["unparsed"] > 0.5:
            return begin + (f"In {means['unparsed']:.0%} no answer could be read: see what they"
                            " look like (python rewards.py --audit RUN), and whether --template is"
                            " the base's own")  # fmt: skip
        if solved is not None and solved > 0.9:
            return begin + f"{solved:.0%} are right: take harder questions"
        if solved is not None and solved < 0.02:
            return begin + (
                f"{solved:.1%} are right: RL reinforces what the base sometimes does; take easier"
                " questions, a larger --group-size or a better base"
            )
        return begin + (f"The mean reward is {means['reward']:.3f}: see what is paid"
                        " (python rewards.py --audit RUN)")  # fmt: skip
