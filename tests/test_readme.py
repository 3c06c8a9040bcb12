"""What README points at is there."""

import re
from pathlib import Path

from runtime.memory import Config, overview

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_each_equation_has_its_code_and_its_test():
    row = r"^\| .+ \| `([\w/]+\.py)` `(\w+)` \| `([\w/]+\.py)` `(\w+)` \|$"
    rows = re.findall(row, README, re.M)
    assert len(rows) >= 12
    for file, name, test_file, test in rows:
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(), re.M), name
        assert f"\ndef {test}(" in (ROOT / "tests" / test_file).read_text(), test


def test_the_line_counts_are_about_right():
    counts = re.findall(r"`(\w+\.py)` \((\d+)(?: lines)?\)", README)
    assert len(counts) >= 6
    for file, count in counts:
        lines = len((ROOT / file).read_text().splitlines())
        assert abs(lines - int(count)) <= 25, f"{file} has {lines} lines, README says {count}"


def test_every_file_that_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_place_is_left_to_be_filled():
    assert not re.findall(r"^[A-Z]{4,}$", README, re.M)


def test_the_first_code_block_has_two_commands():
    block = README.split("```bash\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) == 2
    assert "python train_zero.py" in block and "python -m pytest" in block


def test_the_table_of_hardware_is_what_the_planner_prints():
    table = overview(Config(recompute=True)).split("\n\n")[0]
    assert table in README
