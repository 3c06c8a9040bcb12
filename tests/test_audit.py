"""rewards.py --check and --audit: what they show is what is in the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import audit

RIGHT = "<think> 1 + 2 </think> <answer> 3 </answer>"
WRONG = "<think> 1 + 2 = 3 </think> <answer> 4 </answer>"


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs the command in this process; what it printed."""

    def ask(*arguments, code=None) -> str:
        monkeypatch.setenv("COLUMNS", "150")
        monkeypatch.setattr(sys, "argv", ["rewards.py", *map(str, arguments)])
        if code is None:
            audit.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            audit.main()
        assert (ended.value.code == 2) == (code == 2)
        return capsys.readouterr().err + str(ended.value)

    return ask


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_scored_and_what_earns_nothing_is_shown(ask, tmp_path):
    rows = [{"response": RIGHT, "gold": "3"}, {"response": WRONG, "gold": "3"},
            {"response": "<think> 3", "gold": "3"},
            {"response": "\\boxed{8*3}", "gold": "24 from 3 8",
             "checker": "countdown"}]  # fmt: skip
    said = ask("--check", write(tmp_path / "r.jsonl", rows))
    assert "2 of 4 right (50.0%), 1 without an answer" in said
    assert (
        "r.jsonl:2: earns 0: read '4', gold '3'" in said and "r.jsonl:3: earns 0: read None" in said
    )
    assert "r.jsonl:1" not in said and "r.jsonl:4" not in said and "labels" not in said


def test_labels_and_rules_that_disagree_are_shown_both_ways(ask, tmp_path):
    rows = [{"response": RIGHT, "gold": "3", "correct": True},
            {"response": RIGHT, "gold": "3", "correct": False},
            {"response": WRONG, "gold": "3", "correct": False},
            {"response": WRONG, "gold": "3", "correct": True}]  # fmt: skip
    said = ask("--check", write(tmp_path / "r.jsonl", rows))
    assert "agrees with 2 of 4 labels (50.0%)" in said
    assert "r.jsonl:2: earns 1, said to be wrong" in said
    assert "r.jsonl:4: earns 0, said to be right" in said
    assert "r.jsonl:1" not in said and "r.jsonl:3" not in said


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"response": "a", "gold": "3"}\nwhat\n', r"r.jsonl:2: Expecting value"),
        ('{"response": "a"}\n', "r.jsonl:1: found no gold"),
        ('{"response": "a", "gold": " "}\n', "r.jsonl:1: gold is ' '"),
        ('{"response": "a", "gold": "3", "checker": "mth"}\n', "found the checker 'mth'"),
        ("[]\n", "r.jsonl:1: found no response"),
        ("\n", "r.jsonl:1: found no line"),
        ("7\n", "r.jsonl:1:"),
    ],
)
def test_a_broken_line_is_named(ask, tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    assert message in ask("--check", tmp_path / "r.jsonl", code=1)


def test_files_that_are_not_there_are_named(ask, tmp_path):
    assert "No such file" in ask("--check", tmp_path / "none.jsonl", code=1)
    assert "--keep-groups" in ask("--audit", tmp_path, code=1)
    assert "--last 0.0" in ask("--audit", tmp_path, "--last", 0, code=2)
    assert "one of the arguments" in ask(code=2)


def test_an_audit_shows_what_was_paid_and_what_of_it_is_right(ask, tmp_path):
    def output(text, reward, advantage, finished=True):
        return dict(text=text, reward=reward, advantage=advantage, finished=finished,
                    tokens=text.split())  # fmt: skip

    def group(step, *outputs, phase="rl"):
        return dict(phase=phase, step=step, question="1 + 2 ?", answer="3", checker="math", level=1,
                    outputs=outputs)  # fmt: skip

    hacked = WRONG.replace("1 + 2 = 3", "1 + 2 = 3 or 4 or 5")
    rows = [
        group(1, output("OTHER", 1.0, 1.0), phase="before"),
        group(10, output("EARLY", 1.0, 1.0)),
        group(100, output(hacked, 1.0, 1.0), output("no", 0.0, -1.0)),
        group(99, output(RIGHT, 0.9, 0.5), output(RIGHT, 0.9, 0.5), output("3", 0.8, 0.0, False)),
    ]
    write(tmp_path / "rollouts.jsonl", rows)
    said = ask("--audit", tmp_path)
    assert f"{tmp_path}, rl: 5 outputs kept" in said
    assert "of 3 that were paid more than their group, 2 are right (66.7%); of all 5, 40.0%" in said
    assert "OTHER" not in said and "EARLY" not in said
    first = said.split("-+-")[2].splitlines()[1].split(" | ")
    assert first[0].startswith("1.00, wrong, 14 tokens, step 100")  # the most rewarded
    assert first[1].startswith("0.80, wrong, 1 tokens, step 99")  # the shortest paid
    assert "EARLY" in ask("--audit", tmp_path, "--last", 1)


def test_rewards_py_is_the_command(tmp_path):
    file = write(tmp_path / "r.jsonl", [{"response": RIGHT, "gold": "3"}])
    command = [sys.executable, "rewards.py", "--check", str(file)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert "1 of 1 right (100.0%)" in done.stdout and not done.stderr
