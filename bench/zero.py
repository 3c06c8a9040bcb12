"""README's table of R1-Zero at toy scale: five seeds and two controls, one command.

    python -m bench.zero             run what is not there yet, and print
    python -m bench.zero --jobs 2    two runs at a time, each on one thread

The controls start from seed 0's base and train as long, with a reward that says nothing of the
answer: a coin, or the format alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path("bench/results/zero")
SEEDS = range(5)
CONTROLS = ("random", "format")


def commands(threads: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Run name -> command: first the seeds, then what needs seed 0's base."""
    train = [sys.executable, "train_zero.py", "--threads", str(threads), "--out"]
    seeds = {f"seed-{s}": [*train, f"runs/zero-{s}", "--seed", str(s)] for s in SEEDS}
    controls = {
        f"control-{c}": [*train, f"runs/control-{c}", "--model", "runs/zero-0/base", "--reward", c]
        for c in CONTROLS
    }
    return seeds, controls


def run(name: str, command: list[str], results: Path = RESULTS, resume: str = "--resume") -> None:
    """Run the command unless its result is there, and keep what the table is made of."""
    out = Path(command[command.index("--out") + 1])
    if not (out / "result.json").exists():
        if (out / "config.json").exists() and resume:
            command = [*command, resume]
        print("+", " ".join(command[1:]), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        print(
            f"{name}: exit code {done.returncode} {done.stderr[-300:] if done.returncode else ''}"
        )
    for file in ("result.json", "metrics.jsonl", "config.json", "curve.png"):
        if (out / file).exists():
            (results / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(out / file, results / name / file)


def first_half_solved(metrics: Path) -> tuple[int, int]:
    """The update from which on short (2-4) and long (8-10) problems are solved half of the time, as
    the mean of five rollouts."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "rl" and "by_level" in line]
    found = []
    for levels in (("2", "3", "4"), ("8", "9", "10")):
        known = [
            (
                line["step"],
                [line["by_level"][level] for level in levels if level in line["by_level"]],
            )
            for line in lines
        ]
        means = [(step, sum(values) / len(values)) for step, values in known if values]
        smooth = [
            (means[i][0], sum(mean for _, mean in means[i : i + 5]) / 5)
            for i in range(len(means) - 4)
        ]
        found.append(next((step for step, mean in smooth if mean >= 0.5), -1))
    return found[0], found[1]


def table() -> str:
    """What is there, as Markdown."""
    lines = [
        "| run | pass@1 | cons@16 | pass@16 | greedy | format | tokens "
        "| 50 % right at update: short / long | pretrain + RL + eval, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [f"seed-{s}" for s in SEEDS] + [f"control-{c}" for c in CONTROLS]:
        if not (RESULTS / name / "result.json").exists():
            lines.append(f"| {name} | no result" + " |" * 8)
            continue
        result = json.loads((RESULTS / name / "result.json").read_text())
        base, zero, seconds = result["base"], result["zero"], result["seconds"]

        def change(key: str, digits: int = 3) -> str:
            return f"{base[key]:.{digits}f} → {zero[key]:.{digits}f}"

        half = {
            which: (r["interval"][1] - r["interval"][0]) / 2
            for which, r in (("b", base), ("z", zero))
        }
        passed = f"{base['pass@1']:.3f} ± {half['b']:.3f} → {zero['pass@1']:.3f} ± {half['z']:.3f}"
        tokens = f"{change('tokens', 1)} ({zero['tokens'] / base['tokens']:.2f}x)"
        short, long = first_half_solved(RESULTS / name / "metrics.jsonl")
        solved = " / ".join("never" if step < 0 else str(step) for step in (short, long))
        times = f"{seconds['pretrain']:.0f} + {seconds['rl']:.0f} + {seconds['eval']:.0f}"
        cells = [
            name,
            passed,
            change("cons@16"),
            change("pass@16"),
            change("greedy"),
            change("format"),
            tokens,
            solved,
            times,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phases(name: str) -> str:
    """Time, speed and memory of a run by phase, as Markdown."""
    seconds: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    peaks: dict[str, float] = {}
    for row in (RESULTS / name / "metrics.jsonl").read_text().splitlines():
        line = json.loads(row)
        for key, value in line.items():
            if key.startswith("seconds_"):
                phase = key.removeprefix("seconds_")
                seconds[phase] += value
                tokens[phase] += value * line.get(f"tokens_per_second_{phase}", 0)
                peaks[phase] = max(peaks.get(phase, 0), line[f"peak_mb_{phase}"])
    lines = ["| phase | seconds | tokens/s | peak memory, MB |", "|---|---|---|---|"]
    for phase in seconds:
        speed = f"{tokens[phase] / seconds[phase]:,.0f}" if tokens[phase] else ""
        lines.append(f"| {phase} | {seconds[phase]:.0f} | {speed} | {peaks[phase]:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="README's table of R1-Zero at toy scale")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of each run; 0: torch's choice"
    )
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    if not given.table:
        threads = given.threads or (1 if given.jobs > 1 else 0)
        for stage in commands(threads):
            with ThreadPoolExecutor(given.jobs) as pool:
                list(pool.map(lambda item: run(*item), stage.items()))
    print(table())
    print()
    print(phases("seed-0"))


if __name__ == "__main__":
    main()
