"""One process against several on the same machine: updates per second, and where the time goes.

    python -m bench.scaling --model runs/zero/base

Runs in turn the same few updates of train_zero.py with one process and with several, each on one
thread, so many times; the medians are compared. The first rollout of each run is left out: it pays
for what is done once.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch

from runtime.flags import UserError, flag, parse
from runtime.launch import launch

PHASES = ("rollout", "reward", "reference", "update", "communication")


@dataclass(frozen=True)
class Config:
    model: str = flag("runs/zero/base", "the base that is trained")
    processes: int = flag(2, "that are compared with one")
    steps: int = flag(12, "updates of each run")
    pairs: int = flag(3, "runs of each kind, in turn")
    ep: int = flag(0, "spread the weights over the processes, the experts over so many; 0: don't")
    results: str = flag("bench/results/scaling.json", "where the figures go")


def timed(processes: int, config: Config, out: str) -> tuple[Counter, int]:
    """Seconds by phase on rank 0, and tokens written, of one run without its first rollout."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher * (processes > 1), "train_zero.py", "--model",
               config.model, "--threads", "1", "--steps", str(config.steps), "--out", out,
               "--eval-problems", "9", "--eval-samples", "1", "--seed", "0", "--save-every", "1000",
               *["--ep", str(config.ep)] * (processes > 1)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed: {done.stderr[-2000:]}")
    rows = [json.loads(row) for row in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["phase"] == "rl"]
    first = next(i for i, row in enumerate(rows) if i and "tokens" in row)
    seconds: Counter[str] = Counter()
    for row in rows[first:]:
        for phase in PHASES:
            seconds[phase] += row.get(f"seconds_{phase}", 0.0)
    return seconds, sum(row["tokens_trained"] for row in rows[first:])


def main(config: Config) -> None:
    found: dict[int, list[tuple[Counter, int]]] = {1: [], config.processes: []}
    for pair in range(config.pairs):
        for processes, runs in found.items():
            with tempfile.TemporaryDirectory() as place:
                runs.append(timed(processes, config, f"{place}/run"))
    tokens = {count for runs in found.values() for _, count in runs}
    if len(tokens) > 1:
        raise UserError(f"the runs did not train the same tokens: {tokens}")
    speed = {n: median(count / s.total() for s, count in runs) for n, runs in found.items()}
    split = {
        n: {phase: median(s[phase] for s, _ in runs) for phase in PHASES}
        for n, runs in found.items()
    }
    print("| processes | tokens/s | " + " | ".join(f"{phase}, s" for phase in PHASES) + " |")
    print("|---" * (2 + len(PHASES)) + "|")
    for n in found:
        cells = [f"{split[n][phase]:.2f}" for phase in PHASES]
        print(f"| {n} | {speed[n]:,.0f} | " + " | ".join(cells) + " |")
    ratio = speed[config.processes] / speed[1]
    print(f"{config.processes} processes train {ratio:.2f} x as many tokens a second as one")
    results = dict(
        date=str(date.today()), machine=f"{os.cpu_count()} cores, {platform.machine()}",
        torch=torch.__version__, command=f"python -m bench.scaling --processes {config.processes}"
        f" --steps {config.steps} --pairs {config.pairs} --ep {config.ep}", ratio=ratio,
        tokens_per_second=speed, seconds=split, pairs=config.pairs,
    )  # fmt: skip
    Path(config.results).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    launch(main, parse(Config, {}))
