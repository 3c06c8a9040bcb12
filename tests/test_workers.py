"""runtime/workers.py: rewards in other processes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data.problems import Problem
from runtime.flags import UserError
from runtime.workers import Workers, closing, with_workers

ROOT = Path(__file__).parent.parent
PROBLEM = Problem("1 + 1", "2")
RIGHT = "<think> easy </think> <answer> 2 </answer>"


def slow(problem: Problem, text: str, finished: bool) -> float:
    time.sleep(float(text))
    return float(finished)


def forgiving(problem: Problem, text: str, finished: bool) -> float:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def failing(problem: Problem, text: str, finished: bool) -> float:
    raise KeyError(f"no {text}")


def fatal(problem: Problem, text: str, finished: bool) -> float:
    """Dies on the first attempt, if the file is not there yet."""
    if text != "safe" and not os.path.exists(text):
        Path(text).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def always_fatal(problem: Problem, text: str, finished: bool) -> float:
    os._exit(1)


def parent_of(problem: Problem, text: str, finished: bool) -> float:
    return float(os.getpid())


def test_they_earn_what_the_rule_gives_here():
    import rewards  # here: the workers of the other tests, which read this file, do without torch

    outputs = [PROBLEM] * 4, [RIGHT, "no", RIGHT, "<think>"], [True, True, False, False]
    here = with_workers(rewards.rule_reward, 0)
    with closing(with_workers(partial(rewards.rule_reward, format_weight=1.0), 2)) as there:
        assert isinstance(there, Workers) and there(*outputs) == here(*outputs) == [2, 0, 0, 0]
        assert there(*outputs) == [2, 0, 0, 0] and there([], [], []) == []
    assert there.pool is None


def test_to_begin_returns_at_once_and_the_sampler_goes_on():
    with closing(Workers(slow, processes=2)) as reward:
        reward([PROBLEM] * 2, ["0", "0.01"], [True] * 2)  # both have started
        start = time.monotonic()
        for text in ("0.8", "0.81", "0.82", "0.83"):
            reward.begin(PROBLEM, text, True)
        assert time.monotonic() - start < 0.3
        time.sleep(1.0)  # in which the sampler writes other outputs
        assert reward([PROBLEM] * 4, ["0.8", "0.81", "0.82", "0.83"], [True] * 4) == [1] * 4
        assert time.monotonic() - start < 2.6  # and not 3.3 + 1


def test_the_same_output_is_judged_once():
    with closing(Workers(slow, processes=1)) as reward:
        reward([PROBLEM], ["0"], [True])
        start = time.monotonic()
        assert reward([PROBLEM] * 10, ["0.3"] * 10, [True] * 10) == [1] * 10
        assert time.monotonic() - start < 2


def test_what_takes_too_long_earns_nothing_and_holds_up_nobody():
    with closing(Workers(slow, processes=1, seconds=0.3)) as reward:
        assert reward([PROBLEM] * 3, ["0", "60", "0.01"], [True] * 3) == [1, 0, 1]
    with closing(Workers(forgiving, processes=1, seconds=0.3)) as reward:
        assert reward([PROBLEM], ["x"], [True]) == [0]


def test_programs_have_the_limits_of_their_tests_only():
    with closing(Workers(slow, processes=1, seconds=0.1)) as reward:
        assert reward([Problem("Write add.", "[]", "code")], ["0.5"], [True]) == [1]


def test_an_error_of_the_rule_is_raised_here():
    with closing(Workers(failing, processes=1)) as reward:
        with pytest.raises(KeyError, match="no x"):
            reward([PROBLEM], ["x"], [True])


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(tmp_path, capfd):
    with closing(Workers(fatal, processes=2)) as reward:
        texts = ["safe", str(tmp_path / "once"), "safe"]
        assert reward([PROBLEM] * 3, texts, [True] * 3) == [1, 1, 1]
    assert "a reward worker died" in capfd.readouterr().err


def test_workers_that_die_again_and_again_are_an_error():
    with closing(Workers(always_fatal, processes=1)) as reward:
        with pytest.raises(RuntimeError, match="died 3 times .* always_fatal"):
            reward([PROBLEM], ["x"], [True])


def test_a_rule_that_no_other_process_can_have_is_refused_at_once():
    import train_r1  # here: the workers, which read this file, do without torch
    import train_zero

    with pytest.raises(Exception, match="[Pp]ickle|local object"):
        Workers(lambda *output: 1.0, processes=1)
    for config in (train_zero.Config, train_r1.Config):
        with pytest.raises(UserError, match="--reward-workers -1: 0 or more"):
            config(reward_workers=-1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_they_end_with_the_process_that_started_them(tmp_path):
    script = (
        "import sys, time; sys.path[:0] = sys.argv[1:]\n"
        "from test_workers import PROBLEM, parent_of\n"
        "from runtime.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    [pid] = Workers(parent_of, processes=1)([PROBLEM], ['x'], [True])\n"
        "    print(int(pid), flush=True)\n"
        "    time.sleep(100)\n"
    )
    (tmp_path / "program.py").write_text(script)
    command = [sys.executable, tmp_path / "program.py", ROOT, ROOT / "tests"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(program.stdout.readline())
    program.kill()
    program.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")
