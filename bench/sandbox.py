"""Programs per second of runtime/sandbox.py beside bare `subprocess.run([python, "-c", program])`.

    python -m bench.sandbox                                          takes a minute or two
    python -m bench.sandbox --out bench/results/sandbox.json         writes the results too

Each of the programs is run on ten tests, every test in a fresh process, half of the programs by a
call and half by input and output. The bare runs get the program and the input and are compared with
nothing; they protect nothing. "lean" are bare runs with -ISB: Python without site-packages, as in a
jail. All run as many processes at a time and take turns, a tenth of the programs each; a ratio is
the median over neighbouring turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from platform import machine, platform, python_version

from runtime.sandbox import Pool

TURNS = 10
CALLED = "def solve(n):\n    return sum(i * i for i in range(n))\n"
PRINTING = CALLED + "print(solve(int(input())))\n"


def problems(programs: int, tests: int) -> list[tuple[str, list[dict]]]:
    """Programs, half of each kind, with their tests."""
    made = []
    for i in range(programs):
        inputs = [100 + i + test for test in range(tests)]
        answers = [sum(k * k for k in range(n)) for n in inputs]
        pairs = list(zip(inputs, answers))
        called = [{"call": "solve", "args": [n], "expected": answer} for n, answer in pairs]
        printed = [{"input": f"{n}\n", "output": f"{answer}\n"} for n, answer in pairs]
        made.append((PRINTING, printed) if i % 2 else (CALLED, called))
    return made


def ours(work: list, pool: Pool, at_a_time: int) -> None:
    words = pool.map(work, at_a_time)
    wrong = [words for words, (_, tests) in zip(words, work) if words != ["passed"] * len(tests)]
    if wrong:
        raise SystemExit(f"{len(wrong)} right programs did not pass: {wrong[0]}")


def bare(work: list, at_a_time: int, *flags: str) -> None:
    def run(problem: tuple) -> None:
        program, tests = problem
        for test in tests:
            code = program if "input" in test else f"{program}print(solve(*{test['args']}))\n"
            subprocess.run(
                [sys.executable, *flags, "-c", code], input=test.get("input", ""), text=True,
                stdout=subprocess.PIPE, check=True,
            )  # fmt: skip

    with ThreadPoolExecutor(at_a_time) as threads:
        list(threads.map(run, work))


def seconds(run: Callable, *arguments) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def cpu() -> str:
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0].partition(":")[2].strip() if names else machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="programs in jails beside bare subprocesses")
    parser.add_argument("--programs", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--tests", type=int, default=10, help="of each program (default: 10)")
    parser.add_argument("--at-a-time", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", metavar="FILE", help="write the results here too")
    given = parser.parse_args()
    work = problems(given.programs, given.tests)
    load, turns = os.getloadavg()[0], []
    with Pool() as pool:
        ours(work[:10], pool, given.at_a_time)  # opens the jails
        bare(work[:2], given.at_a_time)
        for i in range(TURNS):
            part = work[i::TURNS]
            turns.append((
                seconds(ours, part, pool, given.at_a_time),
                seconds(bare, part, given.at_a_time),
                seconds(bare, part, given.at_a_time, "-ISB"),
            ))  # fmt: skip
        protection = pool.protection
    speeds = [len(work) / sum(times) for times in zip(*turns)]
    ratios = [statistics.median(turn[i] / turn[0] for turn in turns) for i in (1, 2)]
    print(f"{speeds[0]:.1f} programs/s of {given.tests} tests: {ratios[0]:.2f} x bare"
          f" ({speeds[1]:.1f}), {ratios[1]:.2f} x lean ({speeds[2]:.1f})")  # fmt: skip
    result = {
        "command": " ".join(["python -m bench.sandbox", *sys.argv[1:]]),
        "machine": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hardware": f"{os.cpu_count()} x {cpu()}",
            "load before, after": [round(load, 2), round(os.getloadavg()[0], 2)],
            "system": platform(),
            "python": python_version(),
        },
        "protection": protection,
        "programs": given.programs, "tests": given.tests, "at a time": given.at_a_time,
        "programs/s": dict(zip(("jail", "bare", "lean"), (round(x, 1) for x in speeds))),
        "ratio": dict(zip(("bare", "lean"), (round(x, 2) for x in ratios))),
        "seconds of each turn": [[round(x, 3) for x in turn] for turn in turns],
    }  # fmt: skip
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
