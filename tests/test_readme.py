"""What README says about the code is so, and bench/readme.py refuses what is not."""

import json
import re
from pathlib import Path

import pytest

from bench import readme
from runtime.memory import Config, overview

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE, TESTS = readme.read(readme.CODE), readme.read(readme.TESTS)


def section(title: str) -> str:
    return README.split(f"## {title}")[1].split("\n## ")[0]


def changed(texts: dict[str, str], file: str, old: str, new: str) -> dict[str, str]:
    assert texts[file].count(old) == 1
    return {**texts, file: texts[file].replace(old, new)}


def test_readme_is_up_to_date_with_the_code():
    assert readme.refreshed(README) == README, "python -m bench.readme brings it up to date"
    for folder in ("kernels", "runtime"):
        page = (ROOT / folder / "README.md").read_text()
        assert readme.with_lengths(page) == page, "python -m bench.readme brings it up to date"


@pytest.mark.parametrize(
    "old, new",
    [
        ("tests/test_grpo.py#L", "tests/test_model.py#L"),  # another file's line
        ("`test_eq_1_clip", "`test_eq_3_clip"),  # another equation's test
        ("`grpo_loss`", "`step`"),  # another function
        ("`A_i = (r_i - mean(r)) / std(r)`", "`A_i = r_i`"),  # another formula
        ("| R1 Eq. 2 |", "| R1 Eq. 4 |"),  # another equation
        ("| R1 Eq. 2 |", None),  # no row
        ("[train_r1.py:", "[train_zero.py:"),  # another place of a departure
        ("`kernels/` (", "`kernels/` (1"),
        ("`data/puzzles.py` (", "`data/puzzles.py` (1"),
    ],
)
def test_what_is_wrong_in_readme_is_seen_and_mended(old, new):
    assert old in README
    rows = README.splitlines(keepends=True)
    first = next(i for i, row in enumerate(rows) if old in row)
    rows[first] = "" if new is None else rows[first].replace(old, new, 1)
    assert "".join(rows) != README and readme.refreshed("".join(rows)) == README


# ---- from equation to code to test -------------------------------------------------------


def test_the_map_has_formula_line_function_and_tests():
    formula = "A_i = (r_i - mean(r)) / std(r)"
    code = {"a.py": f"class G:\n    def f(x):\n        # R1 Eq. 3: {formula}\n        return x\n"}
    tests = {"tests/test_a.py": "\n\ndef test_eq_3_by_hand():\n    pass\n"}
    printed, words = readme.equations(code, tests)
    assert printed == (
        f"| R1 Eq. 3 | `{formula}` | [a.py:3](a.py#L3) `G.f` |"
        " [`test_eq_3_by_hand`](tests/test_a.py#L3) |"
    )
    assert not words


def test_ranges_lists_other_papers_and_sections():
    code = {"a.py": "# V3 Eq. 2, 4-5: k\nx = 1\n# Dr. GRPO 3.2, constant: |o|\ny = 2\n"}
    tests = {"tests/test_a.py": "def test_v3_eq_2_to_2_and_v3_eq_4_to_5_dr_grpo_3_2_constant_x():"}
    printed, words = readme.equations(code, tests)
    assert printed.startswith("| V3 Eq. 2, 4-5 | `k` | [a.py:1](a.py#L1) `x` |")
    assert words.startswith(r"| Dr. GRPO 3.2, constant | \|o\| | [a.py:3](a.py#L3) `y` |")
    assert printed.count("#L1)") == 2 and words.count("tests/test_a.py#L1") == 1


@pytest.mark.parametrize(
    "which, file, old, new, told",
    [
        (TESTS, "tests/test_grpo.py", "_eq_1_", "_eq_3_", "r1_eq_1 has no test"),
        (TESTS, "tests/test_grpo.py", "_dapo_eq_8_", "_dapo_eq_9_", "dapo_eq_8 has no test"),
        (TESTS, "tests/test_grpo.py", "_eq_1_", "_eq_7_", "named after r1_eq_7, which no comment"),
        (TESTS, "tests/test_model.py", "_eq_1_to_11_", "_eq_1_to_9_", "v3_eq_10 has no test"),
        (TESTS, "tests/test_sample.py", "test_r1_3_mean", "test_r1_3_means", "r1_3_mean has no"),
        (CODE, "grpo.py", "# R1 Eq. 2: ", "# R1 Eq. 1: ", "r1_eq_1 stands twice"),
        (CODE, "grpo.py", "# R1 Eq. 2: ", "# ", "named after r1_eq_2, which no comment has"),
        (CODE, "grpo.py", "# R1 Eq. 2: ", "# R1 Eq 2: ", "has none of the forms"),
        (CODE, "grpo.py", "# R1 Eq. 2: ", "# R1 Eq. 2 ", "has none of the forms"),
        (CODE, "rewards.py", "# R1 2.2.2, accuracy: ", "# R1 2.2.2: ", "needs a word"),
    ],
)
def test_an_equation_without_its_test_or_a_test_without_its_equation_is_refused(
    which, file, old, new, told
):
    code, tests = (changed(t, file, old, new) if t is which else t for t in (CODE, TESTS))
    with pytest.raises(ValueError, match=told):
        readme.equations(code, tests)


def test_the_map_is_of_the_whole_repository():
    printed, words = readme.equations(CODE, TESTS)
    keys = {key for place in readme.comments(CODE, readme.EQUATION) for key in place.keys}
    assert keys >= {f"v3_eq_{n}" for n in range(1, 26)} | {f"r1_eq_{n}" for n in (1, 2, 3)}
    assert printed in README and words in README


# ---- what differs --------------------------------------------------------------------------


def test_every_departure_in_the_code_has_its_row_and_every_row_its_place():
    title = "What differs from the paper"
    for comment in readme.comments(CODE, readme.DEPARTURE):
        assert f"| {comment.match['place']}: " in section(title)
    more = changed(
        CODE, "grpo.py", "import torch\n", "# Departs from R1 2.2.1, x: y\nimport torch\n"
    )
    fewer = changed(CODE, "model.py", "# Departs from V3 Eq. 21: ", "# ")
    for code, odd in ((more, "R1 2.2.1, x"), (fewer, "V3 Eq. 21")):
        with pytest.raises(ValueError, match=f"not the same: {odd}"):
            readme.with_departures(README, code)


def test_every_docstring_that_lists_departures_can_be_reached():
    found = section("What differs from the paper")
    files = [file for file, text in CODE.items() if "\nDepartures from the " in text]
    assert len(files) >= 5 and all(f"]({file})" in found for file in files)
    assert not [file for file, text in CODE.items()
                if "# Departs from" in text and f"[{file}:" not in found]  # fmt: skip


# ---- the reading order ---------------------------------------------------------------------


def test_each_file_and_folder_to_read_has_its_length():
    pages = [section("Reading order")]
    pages += [(ROOT / folder / "README.md").read_text() for folder in ("kernels", "runtime")]
    counted = {match[0]: int(match[1]) for page in pages for match in readme.COUNT.findall(page)}
    files = {file for file, text in CODE.items() if text and not file.startswith("bench/")}
    assert set(counted) == files | {"data/", "kernels/", "runtime/"}
    for folder in ("data/", "kernels/", "runtime/"):
        inside = [n for file, n in counted.items() if file.startswith(folder) and file != folder]
        assert counted[folder] == sum(inside), folder


# ---- the metrics ---------------------------------------------------------------------------

COMMITTED = sorted((ROOT / "bench/results").rglob("metrics.jsonl"))
# No committed run has logged these: of several processes, of flags and claims that were not run,
# and why no output of these runs was dropped.
NOT_COMMITTED = {
    "seconds_communication", "repetition", "overlong", "charged", "value_loss", "seconds_critic",
    "critic_grad_norm", "repeated", "too long", "code", "no room",
}  # fmt: skip


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: "-".join(file.parts[-3:-1]))
def test_readme_explains_every_metric_of_the_committed_runs(file):
    assert not readme.unexplained(file)


def test_every_metric_of_readme_is_logged_somewhere():
    glossary = readme.Glossary(README)
    lines = [json.loads(line) for file in COMMITTED for line in file.read_text().splitlines()]
    logged = {(glossary.kind_of(line["phase"]), glossary.metric_of(key))
              for line in lines for key in line}  # fmt: skip
    logged.add(("evaluation", "seconds_pretrain"))  # of updates that 20 does not divide: none here
    assert {metric for _, metric in glossary.pairs - logged} == NOT_COMMITTED
    assert {kind for kind, _ in glossary.pairs} == set(glossary.kinds)


def test_every_metric_of_readme_is_in_todays_code():
    code = "\n".join(CODE.values())
    for _, metric in readme.Glossary(README).pairs:
        timed = metric.removeprefix("seconds_")
        name = metric.removesuffix("@k").removesuffix("@1")
        written = f'run.phase("{timed}")' if timed not in (metric, "communication") else name
        assert re.search(rf"(?<!\w){re.escape(written)}(?!\w)", code), metric


@pytest.mark.parametrize(
    "line, unexplained",
    [
        (dict(phase="rl", loss=0, reward=1, seconds_rollout=1, peak_mb_update=2), set()),
        (dict(phase="evaluate dev1", **{"cons@64": 1, "pass@1": 1, "pass@8": 1}), set()),
        (dict(phase="rl", seconds_sleep=1), {("rl", "seconds_sleep")}),
        (dict(phase="rl", tokens_per_second_sample=1), {("rl", "tokens_per_second_sample")}),
        (dict(phase="pretrain", reward=1, loss=1), {("pretrain", "reward")}),
        (dict(phase="evaluate dev1 general", loss=1), {("evaluate dev1 general", "loss")}),
        (dict(phase="filter x", kept=1, lost=1), {("filter x", "lost")}),
        (dict(phase="lunch", loss=1), {("lunch", "loss")}),
    ],
)
def test_a_name_is_explained_for_its_kind_of_line_only(line, unexplained, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(dict(step=1, **line)) + "\n")
    assert readme.unexplained(file) == unexplained
    without = "\n".join(row for row in README.splitlines() if not row.startswith("| loss | rl |"))
    wanted = unexplained | ({("rl", "loss")} if line["phase"] == "rl" and "loss" in line else set())
    assert readme.unexplained(file, without) == wanted


# ---- the rest ------------------------------------------------------------------------------


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
