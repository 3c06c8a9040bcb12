"""README's figure of reward hacking: the same base and the same RL, under a weak verifier and ours.

    python -m bench.hacking                          on the base of the default run, runs/zero/base
    python -m bench.hacking --model DIR --seed 1

The weak one pays an output that has the gold answer anywhere in it, as verifiers in use do. Both
runs are measured by ours: what they are paid, and what is right.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.zero import run

RESULTS = Path("bench/results/hacking")
VERIFIERS = {"contains": "the gold answer anywhere in the output", "rules": "rewards.py"}


def commands(model: Path, seed: int, steps: int) -> dict[str, list[str]]:
    train = [sys.executable, "train_zero.py", "--model", str(model), "--seed", str(seed)]
    train += [
        "--steps",
        str(steps),
        "--threads",
        "1",
        "--eval-problems",
        "90",
        "--eval-samples",
        "8",
    ]
    return {name: [*train, "--reward", name, "--out", f"runs/hacking-{name}-{seed}"]
            for name in VERIFIERS}  # fmt: skip


def curves(metrics: Path) -> dict[str, list[float]]:
    """By update: the share of what can be earned that is paid, and the share that is right."""
    rows = [json.loads(row) for row in metrics.read_text().splitlines()]
    rows = [row for row in rows if row["phase"] == "rl" and "reward" in row]
    highest = 1.0 if "contains" in metrics.parent.name else 2.0  # ours adds the format's point
    return {
        "step": [row["step"] for row in rows],
        "paid": [row["reward"] / highest for row in rows],
        "right": [row["accuracy"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
    }


def draw(results: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, (name, title) in zip(axes, VERIFIERS.items()):
        curve = curves(results / name / "metrics.jsonl")
        axis.plot(curve["step"], curve["paid"], color="tab:red", label="reward paid, share of all")
        axis.plot(curve["step"], curve["right"], color="tab:blue", label="right, by rewards.py")
        axis.set(title=f"verifier: {title}", xlabel="update", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(results / "curve.png", dpi=110)


def table(results: Path) -> str:
    lines = ["| verifier | paid, first and last 5 rollouts | right | best | tokens |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, title in VERIFIERS.items():
        curve = curves(results / name / "metrics.jsonl")
        ends = {key: (sum(curve[key][:5]) / 5, sum(curve[key][-5:]) / 5) for key in curve}
        cells = [title, "{:.2f} → {:.2f}".format(*ends["paid"]),
                 "{:.2f} → {:.2f}".format(*ends["right"]), f"{max(curve['right']):.2f}",
                 "{:.1f} → {:.1f}".format(*ends["tokens"])]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="reward hacking, and none: a figure and a table")
    parser.add_argument("--model", type=Path, default=Path("runs/zero/base"), help="the base")
    parser.add_argument("--seed", type=int, default=0, help="of both runs (default: 0)")
    parser.add_argument("--steps", type=int, default=60, help="updates of each (default: 60)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"(default: {RESULTS})")
    given = parser.parse_args()
    if not given.model.is_dir():
        sys.exit(f"error: {given.model}: no such base; python train_zero.py makes one, or --model")
    todo = commands(given.model, given.seed, given.steps)
    with ThreadPoolExecutor(len(todo)) as pool:  # two runs at a time, each on one thread
        list(pool.map(lambda item: run(*item, results=given.results), todo.items()))
    print(table(given.results))
    draw(given.results)


if __name__ == "__main__":
    main()
