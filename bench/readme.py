"""Keep README up to date: how long the files are, where an equation's code begins, the table of
claims.

    python -m bench.readme             rewrite README.md where it is behind the code
    python -m bench.readme --check     only say whether it is

A test asks for the same (tests/test_readme.py).
"""

import argparse
import json
import re
import sys
from pathlib import Path

from bench.claims.__main__ import CLAIMS
from bench.claims.claim import table

ROOT = Path(__file__).parent.parent
COUNT = re.compile(r"`(\w+\.py)` \((\d+)( lines)?\)")
ROW = re.compile(
    r"^\| (.+) \| \[([\w/]+\.py):\d+\]\([^)]*\) `(\w+)` \| `([\w/]+\.py)` `(\w+)` \|$", re.M
)


def line_of(file: str, name: str) -> int:
    """Where the function or class begins. Raises ValueError where the file has none of the name."""
    for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
        if re.match(rf"\s*(def|class) {name}\b", line):
            return number
    raise ValueError(f"README's map names {name} in {file}, which has none: correct the row")


def refreshed(readme: str) -> str:
    """The text with today's numbers and rows."""

    def count(match: re.Match) -> str:
        lines = len((ROOT / match[1]).read_text().splitlines())
        return f"`{match[1]}` ({lines}{match[3] or ''})"

    def row(match: re.Match) -> str:
        equation, file, name, test_file, test = match.groups()
        line = line_of(file, name)
        code = f"[{file}:{line}]({file}#L{line}) `{name}`"
        return f"| {equation} | {code} | `{test_file}` `{test}` |"

    rows = table(CLAIMS, ROOT / "bench/results/claims")
    rows = f"\n{rows}\n" if rows.count("\n") > 1 else ""
    mark = "<!-- claims -->\n"
    readme = re.sub(f"{mark}.*{mark}", lambda match: mark + rows + mark, readme, flags=re.DOTALL)
    return ROW.sub(row, COUNT.sub(count, readme))


def unexplained(metrics: Path) -> set[str]:
    """The names in a metrics.jsonl that README's glossary does not have."""
    glossary = (ROOT / "README.md").read_text().split("## The metrics")[1].split("\n## ")[0]
    names = [name.strip() for row in re.findall(r"^\| ([^|]+) \|", glossary, re.M)
             for name in row.split(",")]  # fmt: skip
    explained = "|".join(re.escape(n).replace(r"\*", r"\w+").replace("@k", r"@\d+") for n in names)
    lines = map(json.loads, metrics.read_text().splitlines())
    keys = {key for line in lines for key in line} - {"phase", "step"}
    return {key for key in keys if not re.fullmatch(explained, key)}


def main() -> None:
    parser = argparse.ArgumentParser(description="README's line numbers and claims")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where behind")
    given = parser.parse_args()
    file = ROOT / "README.md"
    old, new = file.read_text(), refreshed(file.read_text())
    if not given.check:
        file.write_text(new)
    print("README.md was behind the code" if new != old else "README.md is up to date")
    sys.exit(given.check and new != old)


if __name__ == "__main__":
    main()
