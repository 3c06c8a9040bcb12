"""Keep README up to date: what it says about the code is made from the code.

    python -m bench.readme             rewrite README.md where it is behind the code
    python -m bench.readme --check     only say whether it is

1. How long files and folders are, and so on the pages of kernels/ and runtime/.
2. From equation to code to test. A comment above the code has a place of a paper and its formula,
   and a test is named after the place; where no equation is printed, a word tells what it is about:

       # V3 Eq. 6-9: c_Q = W_DQ h; ...                test_v3_eq_6_to_9_...    (R1: test_eq_1_...)
       # R1 2.3.2, language: Reward = ...             test_r1_2_3_2_language_...

   A place without a test, a test without a place, and a place that stands twice are errors.
3. What differs from the paper. The row that begins with R1 2.2.2, format: links to the comment
   `# Departs from R1 2.2.2, format: why`. One without the other is an error.
4. The table of claims.

`unexplained` compares what a run has logged with README's table of metrics. Tests ask for all of it
(tests/test_readme.py).
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bench.claims.__main__ import CLAIMS
from bench.claims.claim import table

ROOT = Path(__file__).parent.parent
CODE = ("*.py", "data/*.py", "kernels/*.py", "runtime/*.py", "bench/claims/*.py")
TESTS = ("tests/test_*.py", "tests/kernels/test_*.py")
COUNT = re.compile(r"`((?:\w+/)*(?:\w+\.py|\w+/))` \((\d+)( lines)?\)")

# What a paper is called in comments, and in the names of tests.
PAPERS = {"R1": "r1", "DeepSeekMath": "deepseekmath", "DAPO": "dapo", "Dr. GRPO": "dr_grpo",
          "V3": "v3", "YaRN": "yarn", "InstructGPT": "instructgpt", "GAE": "gae"}  # fmt: skip
COMMENTED, NAMED = "|".join(map(re.escape, PAPERS)), "|".join(PAPERS.values())
PLACE = (
    rf"(?P<paper>{COMMENTED})(?: \(\d+\.\d+\))? "
    r"(?:Eq\. (?P<equations>\d[\d, -]*)|(?P<section>\d[\d.]*))(?:, (?P<topic>\w+))?"
)
EQUATION = re.compile(rf"# (?P<place>{PLACE}): (?P<formula>.+)")
DEPARTURE = re.compile(rf"# Departs from (?P<place>{PLACE}): ")
ALMOST = re.compile(rf"# (?:Departs from )?(?:{COMMENTED})(?: \(\d+\.\d+\))?,? (?:Eq|\d)")
TEST_OF_EQUATIONS = re.compile(rf"_(?:({NAMED})_)?eq_(\d+)(?:_to_(\d+))?(?=_)")
TEST_OF_SECTION = re.compile(rf"_({NAMED})_((?:\d+_)+)([a-z]+)")


# ---- comments in the code, names of tests ------------------------------------------------


class Comment(NamedTuple):
    match: re.Match
    file: str
    line: int
    inside: str  # the function

    @property
    def keys(self) -> list[str]:
        """r1_eq_1, or r1_2_2_2_format; of a range, each."""
        paper, topic = PAPERS[self.match["paper"]], self.match["topic"]
        if self.match["section"]:
            return [f"{paper}_{self.match['section'].replace('.', '_')}_{topic}"]
        spans = [part.split("-") for part in self.match["equations"].split(",")]
        return [f"{paper}_eq_{n}" for span in spans for n in range(int(span[0]), int(span[-1]) + 1)]

    @property
    def link(self) -> str:
        return f"[{self.file}:{self.line}]({self.file}#L{self.line}) `{self.inside}`"


def read(patterns: tuple[str, ...]) -> dict[str, str]:
    """The texts of files, by their paths."""
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def comments(code: dict[str, str], kind: re.Pattern) -> Iterator[Comment]:
    """Raises ValueError for a comment that begins like one of these and is none."""
    for file, text in code.items():
        for line, written in enumerate(text.splitlines(), 1):
            if match := kind.search(written):
                yield Comment(match, file, line, name_at(text, line))
            elif ALMOST.search(written) and not any(
                each.search(written) for each in (EQUATION, DEPARTURE)
            ):
                raise ValueError(f"{file}:{line}: {written.strip()!r} has none of the forms above")


def name_at(text: str, line: int) -> str:
    """Class.function around a line or, outside of any, what the next statement gives a name."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(parsed(text)) if isinstance(node, definitions)]
    around = [node.name for node in nodes if node.lineno <= line <= node.end_lineno]
    following = next((node for node in parsed(text).body if node.end_lineno >= line), None)
    if not around and isinstance(following, ast.Assign):
        around = [ast.unparse(following.targets[0])]
    return ".".join(around) or getattr(following, "name", "")


parsed = lru_cache(64)(ast.parse)


def tests_of(tests: dict[str, str]) -> dict[str, list[str]]:
    """Links to the tests that are named after a place, by its key."""
    found: dict[str, list[str]] = {}
    for file, text in tests.items():
        for line, written in enumerate(text.splitlines(), 1):
            if test := re.match(r"def (test_\w+)\(", written):
                for key in keys_in(test[1]):
                    found.setdefault(key, []).append(f"[`{test[1]}`]({file}#L{line})")
    return found


def keys_in(name: str) -> Iterator[str]:
    for paper, first, last in TEST_OF_EQUATIONS.findall(name):
        yield from (f"{paper or 'r1'}_eq_{n}" for n in range(int(first), int(last or first) + 1))
    for paper, numbers, topic in TEST_OF_SECTION.findall(name):
        yield f"{paper}_{numbers}{topic}"


# ---- what README has of them ---------------------------------------------------------------


def equations(code: dict[str, str], tests: dict[str, str]) -> tuple[str, str]:
    """The map of equations, and that of what is not printed as one. Raises ValueError where they
    are not whole."""
    places, named = list(comments(code, EQUATION)), tests_of(tests)
    keys = [key for place in places for key in place.keys]
    wrong = [f"{key} needs a word, as in R1 2.2.2, format" for key in keys if key.endswith("None")]
    wrong += [f"{key} stands twice" for key in sorted({key for key in keys if keys.count(key) > 1})]
    wrong += [f"{key} has no test" for key in keys if key not in named]
    wrong += [f"{named[key][0]} is named after {key}, which no comment has"
              for key in named if key not in keys]  # fmt: skip
    if wrong:
        raise ValueError("; ".join(wrong))
    rows: tuple[list, list] = ([], [])
    for place in sorted(places, key=in_order):
        formula = place.match["formula"].replace("|", r"\|")
        known = ", ".join(dict.fromkeys(test for key in place.keys for test in named[key]))
        formula = formula if place.match["section"] else f"`{formula}`"
        rows[bool(place.match["section"])].append(
            f"| {place.match['place']} | {formula} | {place.link} | {known} |"
        )
    return "\n".join(rows[0]), "\n".join(rows[1])


def in_order(place: Comment) -> tuple:
    numbers = re.findall(r"\d+", place.match["section"] or place.match["equations"])
    return [*PAPERS].index(place.match["paper"]), list(map(int, numbers))


def with_departures(readme: str, code: dict[str, str]) -> str:
    """Each row that begins with a place gets a link to the comment. Raises ValueError for a row or
    a comment without the other."""
    marked = {each.match["place"]: each for each in comments(code, DEPARTURE)}
    begins = re.compile(rf"^(?P<cells>\| (?P<place>{PLACE}): .*\|) *(?:\[[^|\n]*)?\|$", re.M)
    rows = [match["place"] for match in begins.finditer(readme)]
    if set(rows) != set(marked) or len(rows) != len(set(rows)):
        odd = sorted({*rows} ^ {*marked}) or rows
        raise ValueError(f"rows and comments of what differs are not the same: {', '.join(odd)}")

    def linked(match: re.Match) -> str:
        return f"{match['cells']} {marked[match['place']].link} |"

    return begins.sub(linked, readme)


def lines_of(path: str) -> int:
    files = (ROOT / path).glob("*.py") if path.endswith("/") else [ROOT / path]
    return sum(len(file.read_text().splitlines()) for file in files)


def with_lengths(page: str) -> str:
    return COUNT.sub(lambda m: f"`{m[1]}` ({lines_of(m[1])}{m[3] or ''})", page)


def refreshed(readme: str) -> str:
    """The text with today's numbers and rows."""
    code = read(CODE)
    printed, words = equations(code, read(TESTS))
    rows = table(CLAIMS, ROOT / "bench/results/claims")
    claims = f"\n{rows}\n" if rows.count("\n") > 1 else ""
    head = "| {} | here | code | test |\n|---|---|---|---|\n"
    parts = {"claims": claims, "equations": f"\n{head.format('equation')}{printed}\n\n",
             "words": f"\n{head.format('place')}{words}\n\n"}  # fmt: skip
    for name, text in parts.items():
        mark = f"<!-- {name} -->\n"
        readme = re.sub(f"{mark}.*{mark}", lambda _: mark + text + mark, readme, flags=re.DOTALL)
    return with_lengths(with_departures(readme, code))


# ---- the table of metrics ------------------------------------------------------------------


STAMP = ("phase", "step")  # of every line


class Glossary:
    """README's two tables: which lines there are, and what is in them."""

    def __init__(self, readme: str):
        section = readme.split("## The metrics")[1].split("\n## ")[0]
        lines, metrics = section.split("| metric |")
        rows = re.findall(r"^\| ([a-z][^|]*) \| (`[^|]+`) \|", lines, re.M)
        self.kinds = {kind: re.findall(r"`([^`]+)`", phases) for kind, phases in rows}
        rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", metrics, re.M)
        self.pairs = {(kind, metric) for names, kinds in rows
                      for metric in names.split(", ") for kind in kinds.split(", ")}  # fmt: skip

    def kind_of(self, phase: str) -> str | None:
        for kind, phases in self.kinds.items():
            if any(re.fullmatch(name.replace("NAME", r"\w+"), phase) for name in phases):
                return kind
        return None

    @staticmethod
    def metric_of(key: str) -> str:
        """cons@16 is cons@k; beside seconds_X stand its tokens_per_second_X and peak_mb_X."""
        if key == "pass@1":
            return key
        return re.sub(r"^(tokens_per_second|peak_mb)_", "seconds_", re.sub(r"@\d+$", "@k", key))


def unexplained(metrics: Path, readme: str | None = None) -> set[tuple[str, str]]:
    """What stands in the lines of a metrics.jsonl that README does not explain for lines of that
    kind: phase and name."""
    known = Glossary(readme or (ROOT / "README.md").read_text())
    lines = map(json.loads, metrics.read_text().splitlines())
    logged = {(line["phase"], key) for line in lines for key in line if key not in STAMP}
    return {(phase, key) for phase, key in logged
            if (known.kind_of(phase), known.metric_of(key)) not in known.pairs}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="what README says about the code")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where behind")
    given = parser.parse_args()
    pages = {"README.md": refreshed, "kernels/README.md": with_lengths,
             "runtime/README.md": with_lengths}  # fmt: skip
    behind = []
    for name, renewed in pages.items():
        old = (ROOT / name).read_text()
        new = renewed(old)
        behind += [name] * (new != old)
        if not given.check:
            (ROOT / name).write_text(new)
    print(f"behind the code: {', '.join(behind)}" if behind else "up to date")
    sys.exit(given.check and bool(behind))


if __name__ == "__main__":
    main()
