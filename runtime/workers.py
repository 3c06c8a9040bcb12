"""Rewards in processes of their own, from the moment that an output is written: while the sampler
goes on with the others, a slow rule (a program to run, an equation to solve) costs no time.

    reward = Workers(rule, processes=4)        rule(problem, text, finished) -> float
    reward.begin(problem, text, finished)      as each output ends; returns at once
    reward(problems, texts, finished)          a Reward of grpo.py: waits for what is missing

It is no part of the method. Read next: spool.py.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

ATTEMPTS = 3  # to get an output's reward from a worker that dies


class Workers:
    """A reward whose rule is applied by other processes. The rule is pickled: a function at the top
    level of a module, or a `partial` of one. What takes it longer than `seconds` is worth 0, except
    for programs: each of their tests has a limit of its own, and there may be many.

    Calling it raises what the rule raised, and RuntimeError where workers die again and again.
    """

    def __init__(
        self, rule: Callable[[Any, str, bool], float], processes: int, seconds: float = 30.0
    ):
        pickle.dumps(rule)  # else each call would fail, and not say why
        self.rule, self.processes, self.seconds = rule, processes, seconds
        self.pool: ProcessPoolExecutor | None = None
        self.begun: dict[tuple, Future] = {}

    def begin(self, problem: Any, text: str, finished: bool) -> None:
        """Have an output's reward computed; the same output is not computed twice."""
        key = problem, text, finished
        if key not in self.begun:
            seconds = 0 if getattr(problem, "checker", None) == "code" else self.seconds
            try:
                self.begun[key] = self._open().submit(limited, self.rule, key, seconds)
            except BrokenProcessPool:  # found out later, when the result is asked for
                self.begun[key] = Future()
                self.begun[key].set_exception(BrokenProcessPool())

    def __call__(
        self, problems: Sequence[Any], texts: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        keys = list(zip(problems, texts, finished))
        for attempt in range(ATTEMPTS):
            for key in keys:
                self.begin(*key)
            try:
                values = [value_of(self.begun[key]) for key in keys]
                self.begun.clear()
                return values
            except BrokenProcessPool:
                print("a reward worker died; starting others", file=sys.stderr)
                self._forget_lost()
        raise RuntimeError(
            f"reward workers died {ATTEMPTS} times in one rollout: is there enough memory? The rule"
            f" is {self.rule}"
        )

    def close(self) -> None:
        """End the workers, whatever they are at."""
        if self.pool is not None:
            for process in list((self.pool._processes or {}).values()):
                process.kill()
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None

    def _open(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # Not forked: a child would hold the parent's sockets open, and may deadlock on a lock
            # that one of its threads had.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, context, initializer=begin_worker)
        return self.pool

    def _forget_lost(self) -> None:
        self.close()
        self.begun = {
            key: future
            for key, future in self.begun.items()
            if future.done() and not future.cancelled() and future.exception() is None
        }


def begin_worker() -> None:
    """In a new worker: leave Ctrl-C to the parent, and end when it does, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limited(rule: Callable, output: tuple, seconds: float) -> float:
    """In a worker: the rule's value, or 0 where it takes longer than that. 0 seconds: no limit."""
    if not hasattr(signal, "setitimer"):  # Windows
        return float(rule(*output))

    def give_up(number: int, frame: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, for a rule that forgives it
    try:
        return float(rule(*output))
    except OutOfTime:
        print(f"a reward took longer than {seconds} s; it counts 0", file=sys.stderr)
        return 0.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def value_of(future: Future) -> float:
    try:
        return future.result()
    except OutOfTime:  # the alarm rang while the rule's value was on its way
        return 0.0


class OutOfTime(BaseException):
    """Not an Exception: a rule that forgives all of those must not forgive this one."""


@contextmanager
def closing(reward: Callable) -> Iterator[Callable]:
    """A Reward for a `with`, at whose end its workers, if it has any, are no more."""
    try:
        yield reward
    finally:
        if isinstance(reward, Workers):
            reward.close()


def with_workers(rule: Callable[[Any, str, bool], float], processes: int) -> Callable:
    """A Reward of grpo.py from a rule for one output: here and now, or by workers."""
    if processes:
        return Workers(rule, processes)
    return lambda *batch: [rule(*output) for output in zip(*batch)]
