"""The tables of bench/results/r1/README.md: stages, language reward, distillation; three seeds.

    python -m bench.r1             run what is not there yet, and print
    python -m bench.r1 --jobs 2    two runs at a time, each on one thread
    python -m bench.r1 --table     only print what is there

A seed is an R1-Zero and four stages (train_r1.py), the first two again without the language reward,
and a student that is distilled from the result and, on its own, trained by RL (distill.py).
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.zero import run

RESULTS = Path("bench/results/r1")
SEEDS = range(3)
STAGES = {"zero": "Zero", "dev1": "Dev1", "dev2": "Dev2", "dev3": "Dev3", "r1": "R1"}
MEASURES = ("pass@1", "cons@16", "format", "language", "instruction", "helpful", "safe", "tokens")


def commands(seed: int, threads: int) -> dict[str, list[str]]:
    """Run name -> command, in the order they need each other."""

    def command(program: str, out: str, *flags: str) -> list[str]:
        common = ["--threads", str(threads), "--seed", str(seed), "--out", f"runs/{out}-{seed}"]
        return [sys.executable, program, *common, *flags]

    zero = ["--zero", f"runs/zero-bilingual-{seed}"]
    return {
        f"r1-{seed}": command("train_r1.py", "r1", *zero),
        f"r1-mixed-{seed}": command(
            "train_r1.py", "r1-mixed", *zero, "--until", "dev2", "--language-weight", "0"
        ),
        f"distill-{seed}": command(
            "distill.py", "distill", "--teacher", f"runs/r1-{seed}/r1", "--compare-rl"
        ),
    }


def result(name: str) -> dict | None:
    file = RESULTS / name / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def stages_table() -> str:
    """Each measure by stage: the mean over the seeds, and below it each seed's."""
    found = {seed: result(f"r1-{seed}") for seed in SEEDS}
    found = {seed: each for seed, each in found.items() if each}
    lines = [row("", *STAGES.values()), row(*["---"] * (len(STAGES) + 1))]
    for key in MEASURES:
        digits = 1 if key == "tokens" else 3
        cells = []
        for stage in STAGES:
            values = [each[stage][key] for each in found.values()]
            mean = sum(values) / max(1, len(values))
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            cells.append(f"**{mean:.{digits}f}** ({each})")
        lines.append(row(key, *cells))
    lines += ["", row("tendency", *(f"seed {seed}" for seed in found))]
    lines.append(row(*["---"] * (len(found) + 1)))
    for claim in next(iter(found.values()), {"claims": {}})["claims"]:
        held = ["yes" if each["claims"][claim] else "**no**" for each in found.values()]
        lines.append(row(claim, *held))
    return "\n".join(lines)


def language_table() -> str:
    lines = [row("seed", "Zero", "Dev2 with the reward", "Dev2 without", "pass@1 with", "without")]
    lines.append(row(*["---"] * 6))
    for seed in SEEDS:
        with_it, without = result(f"r1-{seed}"), result(f"r1-mixed-{seed}")
        if with_it and without:
            both = [each["dev2"] for each in (with_it, without)]
            cells = [with_it["zero"]["language"], *(each["language"] for each in both)]
            cells += [each["pass@1"] for each in both]
            lines.append(row(seed, *(f"{cell:.3f}" for cell in cells)))
    return "\n".join(lines)


def distill_table() -> str:
    lines = [row("seed", "teacher", "student's base", "distilled", "RL"), row(*["---"] * 5)]
    for seed in SEEDS:
        if found := result(f"distill-{seed}"):
            cells = [found[arm] for arm in ("teacher", "base", "distilled", "rl")]
            shown = (f"{each['pass@1']:.3f} (greedy {each['greedy']:.3f})" for each in cells)
            lines.append(row(seed, *shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="tables of R1's stages")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: 1)")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of each run; 0: torch's choice"
    )
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    if not given.table:
        threads = given.threads or (1 if given.jobs > 1 else 0)

        def run_seed(seed: int) -> None:
            for name, command in commands(seed, threads).items():
                run(name, command, RESULTS, resume="")

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(run_seed, SEEDS))
    print(stages_table(), language_table(), distill_table(), sep="\n\n")


if __name__ == "__main__":
    main()
