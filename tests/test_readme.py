"""What README points at is there."""

import re
from pathlib import Path

import pytest

from bench import readme
from runtime.memory import Config, overview

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_each_equation_has_its_code_and_its_test():
    rows = readme.ROW.findall(README)
    assert len(rows) >= 20
    for _, _, _, test_file, test in rows:
        assert f"\ndef {test}(" in (ROOT / "tests" / test_file).read_text(), test


def test_line_numbers_are_those_of_the_code():
    assert len(readme.COUNT.findall(README)) >= 6
    assert readme.refreshed(README) == README, "python -m bench.readme brings it up to date"


def test_an_equation_whose_code_is_gone_is_named():
    row = "| R1 Eq. 9 | [grpo.py:1](grpo.py#L1) `no_such` | `test_grpo.py` `test_x` |"
    with pytest.raises(ValueError, match="no_such in grpo.py"):
        readme.refreshed(row)
    assert "grpo.py:1]" not in readme.refreshed(row.replace("no_such", "grpo_loss"))


FOLDERS = ("bench", "data", "kernels", "runtime", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))])


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for target, heading in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text()):
        there = (page.parent / target) if target else page
        assert there.exists(), target
        if heading and there.suffix == ".md":
            assert heading in anchors(there), f"{target}#{heading}"


def test_no_place_is_left_to_be_filled():
    assert not re.findall(r"^[A-Z]{4,}$", README, re.M)


def test_the_first_code_block_has_two_commands():
    block = README.split("```bash\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) == 2
    assert "python train_zero.py" in block and "python -m pytest" in block


def test_the_table_of_hardware_is_what_the_planner_prints():
    table = overview(Config(recompute=True)).split("\n\n")[0]
    assert table in (ROOT / "runtime/README.md").read_text()
