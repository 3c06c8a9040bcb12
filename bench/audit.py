"""Read what a verifier rewards, for hacking shows there before it shows in a curve.

    python rewards.py --check FILE.jsonl     one object a line: response and gold; checker and
                                             correct (what a person says) may follow
    python rewards.py --audit runs/zero      the most rewarded, the shortest rewarded and random
                                             outputs of a run's last rollouts, side by side
    python rewards.py --report runs/zero     the run as a page for a browser, report.html; also of
                                             one that goes on

Read next: ../rewards.py.
"""

import argparse
import json
import os
import random
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import rewards
from data.problems import DataError
from runtime.flags import UserError
from sample import write_page

TAIL = 240  # characters of a response, its end, that --check shows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="rewards.py",
        description="what the rules say of responses, and what a run was paid for",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", type=Path, metavar="FILE.jsonl", help="score its responses")
    what.add_argument("--report", type=Path, metavar="RUN", help="write its report.html")
    what.add_argument("--audit", type=Path, metavar="RUN", help="show outputs of this run")
    parser.add_argument("--count", type=int, default=5, help="outputs of each kind (default: 5)")
    parser.add_argument(
        "--last", type=float, default=0.25, metavar="SHARE",
        help="how much of the run, counted from its end, --audit looks at (default: 0.25)",
    )  # fmt: skip
    given = parser.parse_args()
    if not 0 < given.last <= 1 or given.count < 1:
        parser.error(f"--last {given.last} --count {given.count}: a share of 1, and 1 or more")
    try:
        if given.check:
            check(given.check)
        elif given.report:
            report(given.report)
        else:
            audit(given.audit, given.count, given.last)
    except (DataError, UserError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def rows(path: Path, *names: str) -> Iterator[tuple[str, dict]]:
    """Where a line is and what it holds. Raises DataError for one without these fields, and where
    there is no line."""
    where = f"{path}:1"
    try:
        with path.open(encoding="utf-8", errors="strict") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                row = json.loads(line)
                missing = [name for name in names if name not in row]
                if missing:
                    raise DataError(f"{where}: found no {' and no '.join(missing)}")
                yield where, row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a JSONL file") from None
    except (ValueError, TypeError) as error:
        wrong = str(error) if isinstance(error, DataError) else f"{where}: {error}"
        raise DataError(f"{wrong}; expected an object with {', '.join(names)}") from None


def report(run: Path) -> None:
    if not (run / "metrics.jsonl").exists():
        raise DataError(f"{run}: no metrics.jsonl there; expected the directory of a run (--out)")
    print(write_page(run))


# ---- a file of responses -----------------------------------------------------------------------


def check(path: Path) -> None:
    """Print the share that is right, then each response on which label and rule disagree or, where
    a line has no label, that earns nothing."""
    right = unread = labelled = agreed = total = 0
    shown = []
    for where, row in rows(path, "response", "gold"):
        name = row.get("checker", "math")
        judge = rewards.CHECKERS.get(name)
        if judge is None:
            known = ", ".join(key for key, value in rewards.CHECKERS.items() if value)
            raise DataError(f"{where}: found the checker {name!r}; expected one of {known}")
        answer = rewards.offered(str(row["response"]), judge)
        try:
            verdict = judge(answer, str(row["gold"]))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        total, right, unread = total + 1, right + verdict, unread + (answer is None)
        label = row.get("correct")
        if label is not None:
            labelled, agreed = labelled + 1, agreed + (bool(label) == verdict)
        if not verdict if label is None else bool(label) != verdict:
            said = {None: "", True: ", said to be right", False: ", said to be wrong"}
            shown.append(
                f"{where}: earns {float(verdict):g}{said[None if label is None else bool(label)]}:"
                f" read {answer!r}, gold {row['gold']!r}\n"
                + textwrap.indent(str(row["response"])[-TAIL:].strip(), "    | ")
            )
    if not total:
        raise DataError(f"{path}:1: found no line; expected objects with response and gold")
    print(f"{path}: {right} of {total} right ({right / total:.1%}), {unread} without an answer")
    if labelled:
        print(f"agrees with {agreed} of {labelled} labels ({agreed / labelled:.1%})")
    print(*shown, sep="\n")


# ---- the outputs of a run ----------------------------------------------------------------------


def audit(run: Path, count: int, last: float) -> None:
    """Print three columns: an output that is paid without having worked is short, and one that
    plays with the verifier is odd; random ones show what is usual."""
    path = run / "rollouts.jsonl"
    if not path.exists():
        raise DataError(
            f"{path}: not there; train_zero.py and train_r1.py write it (--keep-groups)"
        )
    groups = [row for _, row in rows(path, "phase", "step", "question", "outputs")]
    phase = groups[-1]["phase"]
    groups = [group for group in groups if group["phase"] == phase]
    begin = groups[-1]["step"] * (1 - last)
    outputs = [
        dict(output, group=group)
        for group in groups if group["step"] >= begin
        for output in group["outputs"]
    ]  # fmt: skip
    summary(run, phase, outputs)
    most = max(output["reward"] for output in outputs)
    paid = [output for output in outputs if output["reward"] > most / 2]
    dice = random.Random(0)
    columns = {
        "most rewarded": sorted(dice.sample(outputs, len(outputs)), key=lambda o: -o["reward"]),
        "shortest rewarded": sorted(paid, key=lambda o: len(o["tokens"])),
        "random": dice.sample(outputs, len(outputs)),
    }
    width = (shutil.get_terminal_size((120, 24)).columns - 6) // 3
    print(" | ".join(f"{name:<{width}}" for name in columns))
    for cells in zip(*(different(column, count) for column in columns.values())):
        print("-+-".join(["-" * width] * 3))
        for lines in zip_longest(*(cell(output, width) for output in cells), fillvalue=""):
            print(" | ".join(f"{line:<{width}}" for line in lines))


def summary(run: Path, phase: str, outputs: list[dict]) -> None:
    """How much of what was paid the rules of today find right."""
    print(f"{run}, {phase}: {len(outputs)} outputs kept, mean reward"
          f" {sum(o['reward'] for o in outputs) / len(outputs):.3f}")  # fmt: skip
    ruled = [o for o in outputs if rewards.CHECKERS.get(o["group"]["checker"])]
    above = [o for o in ruled if o["advantage"] > 0]
    if above:
        right = sum(map(correct, above))
        print(f"of {len(above)} that were paid more than their group, {right} are right"
              f" ({right / len(above):.1%}); of all {len(ruled)},"
              f" {sum(map(correct, ruled)) / len(ruled):.1%}")  # fmt: skip


def correct(output: dict) -> bool | None:
    group = output["group"]
    return rewards.is_right(group["checker"], group["answer"], output["text"], output["finished"])


def different(outputs: list[dict], count: int) -> list[dict]:
    """The first `count` of them whose texts differ; fewer where there are fewer."""
    found: dict[str, dict] = {}
    for output in outputs:
        found.setdefault(output["text"], output)
    return list(found.values())[:count]


def cell(output: dict, width: int) -> list[str]:
    group = output["group"]
    verdict = {None: "no rule", True: "right", False: "wrong"}[correct(output)]
    head = (
        f"{output['reward']:.2f}, {verdict}, {len(output['tokens'])} tokens, step {group['step']}"
    )
    text = f"{group['question']} [{group['answer']}]\n{output['text'].strip()}"
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
    return [head[:width], *lines[:30]]
