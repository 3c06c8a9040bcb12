"""Asynchronous rollouts against synchronous ones: what staleness costs in what is learned, and what
becomes of a run whose workers die and join.

    python -m bench.zero             first: the bases
    python -m bench.asynchronous     three seeds, each both ways from the same base

Each asynchronous run starts three rollout workers. After a third of its updates one is killed
(SIGKILL), after half of them another joins from outside.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from runtime.flags import UserError, flag, parse
from runtime.launch import launch

RESULTS = Path("bench/results/asynchronous")
KEPT = ("result.json", "metrics.jsonl", "config.json")


STEPS = 160  # updates of the default run
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # t of 95 % for so many runs


@dataclass(frozen=True)
class Config:
    bases: str = flag("runs/zero-{seed}/base", "where the base of each seed is")
    out: str = flag("runs/{kind}-{seed}", "directory of each run; kind: sync or async")
    seeds: tuple[int, ...] = flag((0, 1, 2), "of the runs, two to five")
    workers: int = flag(3, "rollout workers that each run starts")
    ahead: int = flag(1, "rollouts that may be drawn ahead")
    threads: int = flag(1, "of each process")
    table: bool = flag(False, "only print what is there")


def updates(out: Path) -> list[dict]:
    """The lines of RL in a run's metrics."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(row) for row in text.split("\n")[:-1]]
    return [row for row in rows if row["phase"] == "rl"]


def command(kind: str, seed: int, config: Config) -> list[str]:
    base, out = (text.format(kind=kind, seed=seed) for text in (config.bases, config.out))
    if not Path(base).is_dir():
        raise UserError(f"no base in {base}: first run python -m bench.zero, or give --bases")
    return [sys.executable, "train_zero.py", "--threads", str(config.threads), "--model", base,
            "--seed", str(seed), "--out", out]  # fmt: skip


def keep(kind: str, seed: int, config: Config) -> Path:
    """Put what the table is made of where it is kept."""
    out, place = Path(config.out.format(kind=kind, seed=seed)), RESULTS / f"{kind}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(out / file, place / file)
    return place


def run_synchronous(seed: int, config: Config) -> None:
    started = command("sync", seed, config)
    print("+", " ".join(started[1:]), flush=True)
    subprocess.run(started, stdout=subprocess.DEVNULL, check=True)
    keep("sync", seed, config)


def run_asynchronous(seed: int, config: Config) -> None:
    """Start a run, kill a worker, let another join."""
    started = command("async", seed, config)
    started += ["--async-rollouts", str(config.workers), "--ahead", str(config.ahead)]
    out = Path(started[started.index("--out") + 1])
    print("+", " ".join(started[1:]), flush=True)
    start, faults, joined = time.monotonic(), {}, None
    job = subprocess.Popen(started, stdout=subprocess.DEVNULL)
    while job.poll() is None:
        time.sleep(0.2)
        done = len(updates(out))
        if "killed" not in faults and done >= STEPS // 3:
            victim = min((out / "spool").glob("*/workers/[!.]*"))
            os.kill(int(victim.name.rsplit("-", 1)[1]), signal.SIGKILL)
            faults["killed"] = dict(worker=victim.name, update=done)
        if "joined" not in faults and done >= STEPS // 2:
            joined = subprocess.Popen([*started[:4], "--join", str(out)])
            faults["joined"] = dict(pid=joined.pid, update=done)
    if job.returncode or joined is None:
        if joined is not None:
            joined.kill()
        raise UserError(f"the run in {out} ended with exit code {job.returncode}: too early")
    faults |= dict(joined_ended_with=joined.wait(), seconds=round(time.monotonic() - start, 1))
    place = keep("async", seed, config)
    (place / "faults.json").write_text(json.dumps(faults, indent=2) + "\n")


def passed(kind: str, seed: int) -> tuple[float, list[float]]:
    """pass@1 of a run at its end, and its 95 % interval over problems."""
    result = json.loads((RESULTS / f"{kind}-{seed}" / "result.json").read_text())["zero"]
    return result["pass@1"], result["interval"]


def staleness(seed: int) -> tuple[float, int, int]:
    """In updates: the mean, the most, and the most that was allowed."""
    place = RESULTS / f"async-{seed}"
    config = json.loads((place / "config.json").read_text())
    rollouts = [line for line in updates(place) if "staleness" in line]
    values = [line["staleness"] for line in rollouts]
    most = max(line["staleness_max"] for line in rollouts)
    return sum(values) / len(values), most, config["ahead"] * config["minibatches"]


def table(seeds: tuple[int, ...]) -> bool:
    """Print it; whether the mean of the asynchronous runs is in the 95 % interval of that of the
    synchronous ones (Student's, over runs) and no output was staler than allowed."""
    print("| seed | synchronous pass@1 | asynchronous | updates behind |")
    print("|---|---|---|---|")
    found: dict[str, list[float]] = {"sync": [], "async": []}
    bounded = True
    for seed in seeds:
        cells = [f"{seed}"]
        for kind, values in found.items():
            value, (low, high) = passed(kind, seed)
            values.append(value)
            cells.append(f"{value:.3f} ± {(high - low) / 2:.3f}")
        mean, most, allowed = staleness(seed)
        bounded &= most <= allowed
        print("| " + " | ".join([*cells, f"{mean:.2f}, at most {most} of {allowed}"]) + " |")
    middle, ours = (sum(values) / len(values) for values in found.values())
    half = STUDENT[len(seeds)] * stdev(found["sync"]) / len(seeds) ** 0.5
    inside = abs(ours - middle) <= half
    print(f"mean: synchronous {middle:.3f} ± {half:.3f}, asynchronous {ours:.3f}:"
          f" {'inside' if inside else 'OUTSIDE'}")  # fmt: skip
    return inside and bounded


def main(config: Config) -> None:
    for kind, run in (("sync", run_synchronous), ("async", run_asynchronous)):
        for seed in config.seeds if not config.table else ():
            if not (Path(config.out.format(kind=kind, seed=seed)) / "result.json").exists():
                run(seed, config)
    if not table(config.seeds):
        raise UserError("the runs differ, or one was staler than allowed")


if __name__ == "__main__":
    launch(main, parse(Config, {}))
