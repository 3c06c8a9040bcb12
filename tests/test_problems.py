"""Prompts and problem sources (data/prompts.py, data/problems.py).

python -m pytest tests/test_problems.py
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest

from data.problems import (
    DataError,
    Listed,
    Problem,
    bilingual_chain,
    calc_chain,
    countdown,
    last_box,
    load,
    read_jsonl,
)
from data.prompts import R1_ZERO, TEMPLATES, build_prompt

GENERATED = {
    "calc-chain": calc_chain,
    "bilingual": bilingual_chain,
    "small": lambda: calc_chain(levels=(1, 2)),
    "countdown": countdown,
    "two numbers": lambda: countdown(levels=(2,)),
}


def numbered(count):
    return [Problem(f"What is {i} plus {i}?", str(2 * i)) for i in range(count)]


def identity(problem):
    """The same for one problem in two languages, or with its numbers in another order."""
    if problem.checker == "countdown":
        target, _, *numbers = problem.answer.split()
        return target, tuple(sorted(numbers))
    return problem.question.split(" ", 1)[1]


# ----------------------------------------------------------------------------------- generated


@pytest.mark.parametrize("name", GENERATED)
def test_no_batch_contains_a_held_out_problem(name):
    source = GENERATED[name]()
    batches = [source.batch(32, seed=s, step=t) for s in range(4) for t in range(25)]
    trained = {identity(problem) for batch in batches for problem in batch}
    held = {identity(problem) for s in range(3) for problem in source.held_out(30, seed=s)}
    assert trained and held and not trained & held


def test_the_split_is_the_one_the_corpus_keeps_out_of_pretraining():
    from data.corpus import Chain

    def chain(problem):
        _, start, *rest, _ = problem.question.split()
        return Chain(int(start), tuple((step[0], int(step[1:])) for step in rest[1::2]))

    source = calc_chain(chinese=0.3)
    assert all(chain(problem).held_out() for problem in source.held_out(90))
    assert not any(chain(problem).held_out() for problem in source.batch(300, seed=0, step=0))


def test_a_chain_is_answered_left_to_right_modulo_ten():
    for problem in calc_chain(chinese=0.5).batch(200, seed=1, step=0):
        value, *steps = re.findall(r"[+\-*]?\d", problem.question)
        value = int(value)
        for step in steps:
            value = {"+": value + int(step[1]), "-": value - int(step[1]),
                     "*": value * int(step[1])}[step[0]]  # fmt: skip
        assert problem.answer == str(value % 10)
        assert problem.level == len(steps) and problem.checker == "math"


@pytest.mark.parametrize("source", [calc_chain(), countdown(), Listed(numbered(100))])
def test_a_batch_does_not_depend_on_what_was_asked_before(source):
    first = source.batch(16, seed=3, step=7)
    for step in (0, 1, 2, 7, 8):
        source.batch(16, seed=3, step=step)
    source.held_out(2)
    assert source.batch(16, seed=3, step=7) == first
    assert source.batch(16, seed=3, step=8) != first
    assert source.batch(16, seed=4, step=7) != first


def test_another_process_gets_the_same_problems():
    code = (
        "from data.problems import *\n"
        "listed = Listed(Problem(f'What is {i} plus {i}?', str(2 * i)) for i in range(100))\n"
        "for s in (calc_chain(), countdown(), listed):\n"
        "    print(ascii(s.batch(3, seed=0, step=5) + s.held_out(3)))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def output(hash_seed):  # what Python's own hash() would depend on
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=root, env=environment, check=True, capture_output=True
        ).stdout

    assert output("1") == output("2") != b""


def test_training_levels_are_uniform_also_where_many_problems_are_held_out():
    counts = Counter(p.level for p in calc_chain(range(1, 5)).batch(8000, seed=0, step=0))
    assert sorted(counts) == [1, 2, 3, 4]
    # Standard deviation 39 around 2,000.
    assert all(abs(count - 2000) < 160 for count in counts.values()), counts


def test_held_out_problems_are_balanced_and_differ():
    problems = calc_chain(range(2, 11), chinese=0.5).held_out(450)
    assert set(Counter(p.level for p in problems).values()) == {50}
    assert len({identity(problem) for problem in problems}) == 450
    pairs = countdown(levels=(2,)).held_out(200)
    assert len({identity(problem) for problem in pairs}) == 200
    uneven = Counter(p.level for p in countdown().held_out(101))
    assert uneven == {3: 51, 4: 50}


def test_fewer_held_out_problems_are_a_prefix_of_more():
    for source in (calc_chain(), countdown(), Listed(numbered(400))):
        assert source.held_out(10, seed=2) == source.held_out(15, seed=2)[:10]
        assert source.held_out(10, seed=2) != source.held_out(10, seed=3)


def test_small_levels_give_each_held_out_problem_once_and_then_say_so():
    source = calc_chain(levels=(1,), chinese=0.5)
    message = ""
    try:
        source.held_out(1000)
    except ValueError as error:
        message = str(error)
    found = int(re.search(r"level 1 has only (\d+)", message)[1])
    assert 0 < found < 9 * 9 * 3
    assert len({identity(problem) for problem in source.held_out(found)}) == found


def test_chinese_is_a_share_that_leaves_the_chains_as_they_are():
    english = calc_chain().batch(1000, seed=0, step=0)
    both = calc_chain(chinese=0.25).batch(1000, seed=0, step=0)
    assert {p.language for p in english} == {"en"}
    assert [identity(p) for p in english] == [identity(p) for p in both]
    assert 200 < sum(p.language == "zh" for p in both) < 300
    assert all((p.language == "zh") == ("计算" in p.question) for p in both)
    assert {p.language for p in calc_chain(chinese=1.0).batch(50, seed=0, step=0)} == {"zh"}


def test_bilingual_chains_are_half_in_chinese_and_as_long_as_those_of_the_corpus():
    source = bilingual_chain()
    for problems in (source.batch(2000, seed=0, step=0), source.held_out(700)):
        assert {p.level for p in problems} == set(range(2, 9))
        share = sum(p.language == "zh" for p in problems) / len(problems)
        assert share == pytest.approx(0.5, abs=0.06)
        for p in problems:
            assert p.question.startswith("计算" if p.language == "zh" else "compute")


def reachable(values, target):
    """Brute force in fractions: join any two values by any operation until one is left."""
    if len(values) == 1:
        return values[0] == target
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i == j:
                continue
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            results = {a + b, a - b, a * b} | ({a / b} if b else set())
            if any(reachable([*rest, result], target) for result in results):
                return True
    return False


def test_every_countdown_problem_can_be_solved_with_every_number_once():
    source = countdown(levels=(2, 3, 4))
    for problem in source.batch(60, seed=0, step=0) + source.held_out(30):
        target, word, *numbers = problem.answer.split()
        assert word == "from" and problem.checker == "countdown"
        assert len(numbers) == problem.level and all(1 <= int(n) <= 99 for n in numbers)
        assert 10 <= int(target) <= 99
        assert f"[{', '.join(numbers)}]" in problem.question
        assert f"equals {target}." in problem.question
        assert reachable([Fraction(n) for n in numbers], int(target)), problem


def test_the_brute_force_solver_can_say_no():
    assert not reachable([Fraction(1), Fraction(1), Fraction(1)], 50)
    assert reachable([Fraction(n) for n in (3, 3, 8, 8)], 24)  # only by 8 / (3 - 8 / 3)


def test_countdown_needs_all_four_operations():
    needed = set()
    for problem in countdown(levels=(2,)).batch(400, seed=0, step=0):
        target, _, a, b = problem.answer.split()
        results = {"+": int(a) + int(b), "-": abs(int(a) - int(b)), "*": int(a) * int(b)}
        needed.add(next((op for op, value in results.items() if value == int(target)), "/"))
    assert needed == set("+-*/")


@pytest.mark.parametrize(
    "make, given",
    [
        (lambda: calc_chain(levels=()), "()"),
        (lambda: calc_chain(levels=(0, 2)), "0"),
        (lambda: calc_chain(levels=(21,)), "21"),  # has no label left: its question would be cut
        (lambda: calc_chain(chinese=50), "50"),
        (lambda: countdown(levels=(1,)), "1"),
    ],
)
def test_settings_that_no_problem_can_have_are_refused(make, given):
    with pytest.raises(ValueError, match=f"{re.escape(given)}.*expected"):
        make()


# -------------------------------------------------------------------------------------- listed


def test_an_epoch_is_a_permutation_without_repeats():
    source = Listed(numbered(300))
    size = len(source.train)
    steps = -(-2 * size // 7)
    walked = [p for step in range(steps) for p in source.batch(7, seed=0, step=step)]
    first, second = walked[:size], walked[size : 2 * size]
    assert len(set(first)) == len(set(second)) == size
    assert set(first) == set(second) == set(source.train)
    assert first != second and first != source.train


def test_a_batch_larger_than_the_file_goes_on_with_the_next_epoch():
    source = Listed(numbered(30))
    size = len(source.train)
    counts = Counter(source.batch(3 * size, seed=0, step=1))
    assert set(counts.values()) == {3} and len(counts) == size


def test_a_file_is_split_by_a_hash_of_the_question():
    problems = numbered(4000)
    source = Listed(problems)
    held = source.held_out(4000)
    trained = set(source.batch(len(source.train), seed=0, step=0))
    assert trained | set(held) == set(problems) and not trained & set(held)
    assert 140 < len(held) < 260  # 5 %, standard deviation 14
    # Neither the other lines nor the spacing moves a question to the other side.
    kept = [p for p in problems if p not in trained or p.answer.endswith("4")]
    spaced = [Problem(p.question.replace(" ", "  ") + "\n", p.answer) for p in reversed(kept)]
    assert {p.answer for p in Listed(spaced).held_out(4000)} == {p.answer for p in held}


def test_a_test_file_is_held_out_as_a_whole():
    source = Listed(numbered(50), all_held_out=True)
    assert set(source.held_out(99)) == set(numbered(50))
    assert len(source.held_out(20)) == 20
    with pytest.raises(ValueError, match="50 problems are held out"):
        source.batch(1, seed=0, step=0)


def test_a_file_too_small_to_hold_out_anything_says_so():
    source = Listed([p for p in numbered(100) if p in Listed(numbered(100)).train][:3])
    with pytest.raises(ValueError, match="--test-data"):
        source.held_out(1)


# --------------------------------------------------------------------------------------- files


def write(path, *rows, end="\n"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def test_gsm8k_gold_is_the_number_after_the_hashes(tmp_path):
    path = write(
        tmp_path / "gsm.jsonl",
        {"question": "3 eggs a day, in 400 days?", "answer": "<<3*400=1200>>1200\n#### 1,200"},
        {"question": "It was 4 degrees and fell by 9?", "answer": "4-9=-5\n#### -5"},
        {"question": "Half of 5?", "answer": "#### Halve it\n5/2=2.5\n#### 2.5"},
    )  # fmt: skip
    problems = read_jsonl(path)
    assert [p.answer for p in problems] == ["1200", "-5", "2.5"]
    assert problems[2] == Problem("Half of 5?", "2.5", "math", 0, "en")


def test_math_gold_is_the_last_box_with_its_nested_braces(tmp_path):
    path = write(
        tmp_path / "math.jsonl",
        {"problem": "Halve one.", "level": "Level 3", "type": "Algebra",
         "solution": r"Not $\boxed{2}$ but $\boxed{\frac{1}{2}}$."},
        {"problem": "Roots?", "level": "Level ?", "answer": r"\boxed{\left\{1, 2\right.}"},
        {"problem": "Two plus three?", "solution": r"It is $\boxed 5$, or $6-1$."},
        {"problem": "Given twice", "answer": r"\frac{3}{4}", "solution": r"so \boxed{9}"},
        {"problem": "A column", "answer": "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"},
    )  # fmt: skip
    problems = read_jsonl(path)
    assert [p.answer for p in problems] == [
        r"\frac{1}{2}",
        r"\left\{1, 2\right.",
        "5",
        r"\frac{3}{4}",
        "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}",
    ]
    assert [p.level for p in problems] == [3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "text, box",
    [
        (r"\boxed{1} then \boxed{2", ""),  # the earlier box does not stand in for the last
        (r"\boxed{}", ""),
        (r"\boxed", ""),
        (r"\fbox{7}", "7"),
        (r"\boxed { 7 }", "7"),
        (r"\boxed{a\}b} c", r"a\}b"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxedfigure{1}", None),
        ("7", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


def test_other_answers_and_fields_are_taken_as_they_are(tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        {"question": "  6 * 7?  ", "answer": 42, "level": 2},
        '{"question": "A tenth?", "answer": 0.10}',
        {"question": "计算 1 a +1 ?", "answer": "2", "language": "zh", "level": "4"},
        {"question": "Make 5", "answer": "5 from 2 3", "checker": "countdown", "level": None},
    )
    assert read_jsonl(path) == [
        Problem("6 * 7?", "42", "math", 2, "en"),
        Problem("A tenth?", "0.10", "math", 0, "en"),
        Problem("计算 1 a +1 ?", "2", "math", 4, "zh"),
        Problem("Make 5", "5 from 2 3", "countdown", 0, "en"),
    ]


def test_byte_order_mark_blank_lines_and_crlf_are_tolerated(tmp_path):
    row = '{"question": "1 + 1?", "answer": "2"}'
    path = write(tmp_path / "windows.jsonl", "\ufeff" + row, "", "  ", row, end="\r\n")
    assert read_jsonl(path) == [Problem("1 + 1?", "2")] * 2


BROKEN = {
    "cut off": ('{"question": "1 + 1?", "ans', "column"),
    "not an object": ('["1 + 1?", "2"]', "JSON object"),
    "no answer": ('{"question": "1 + 1?"}', "expected answer or solution"),
    "answer null": ('{"question": "1 + 1?", "answer": null}', "expected answer or solution"),
    "no question": ('{"prompt": "1 + 1?", "answer": "2"}', "'prompt'.*question or problem"),
    "empty question": ('{"question": " ", "answer": "2"}', "question ' '"),
    "empty answer": ('{"question": "1 + 1?", "answer": ""}', "answer ''"),
    "answer is a list": ('{"question": "1 + 1?", "answer": ["2"]}', "expected a text"),
    "answer is true": ('{"question": "1 + 1?", "answer": true}', "answer True"),
    "answer is NaN": ('{"question": "1 + 1?", "answer": NaN}', "answer nan"),
    "no number after ####": ('{"question": "1 + 1?", "answer": "#### two"}', "'two'.*number"),
    "nothing after ####": ('{"question": "1 + 1?", "answer": "1+1=2 ####"}', "''.*number"),
    "open box": (r'{"question": "1 + 1?", "answer": "\\boxed{1} \\boxed{2"}', "whole"),
    "empty box": (r'{"question": "1 + 1?", "answer": "\\boxed{}"}', "whole"),
    "unmarked solution": ('{"problem": "1 + 1?", "solution": "It is 2."}', "expected ####"),
    "unmarked work": (r'{"question": "1 + 1?", "answer": "1+1=2\nIt is 2."}', "expected ####"),
    "level": ('{"question": "1 + 1?", "answer": "2", "level": "hard"}', "'hard'.*Level 3"),
    "half a surrogate pair": (r'{"question": "\ud800", "answer": "2"}', "surrogates"),
    "too deep": ("[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_with_file_and_line(name, tmp_path):
    line, found = BROKEN[name]
    good = '{"question": "1 + 1?", "answer": "2"}'
    path = write(tmp_path / "broken.jsonl", good, "", line, good)  # the blank line counts
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:3: .*{found}"):
        read_jsonl(path)


def test_bytes_that_are_not_utf8_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "a", "answer": "1"}\n{"question": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2: .*utf-8"):
        read_jsonl(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(content, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:1: .*expected"):
        read_jsonl(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*expected a JSONL file"):
            read_jsonl(path)


def test_load_knows_names_and_paths(tmp_path):
    path = write(tmp_path / "own.jsonl", {"question": "1 + 1?", "answer": "2"})
    assert load(str(path), all_held_out=True).held_out(5) == [Problem("1 + 1?", "2")]
    assert load("countdown", levels=(4,)).levels == (4,)
    assert load("calc-chain").held_out(9) == calc_chain().held_out(9)
    assert load("bilingual-chain").held_out(9) == bilingual_chain().held_out(9)
    with pytest.raises(ValueError, match="'calc_chain'.*nearest: 'calc-chain'.*countdown.*jsonl"):
        load("calc_chain")
    with pytest.raises(DataError, match="nowhere.jsonl"):
        load("nowhere.jsonl")


@pytest.mark.skipif("GSM8K" not in os.environ, reason="GSM8K names a folder with the two files")
def test_all_of_gsm8k_can_be_read():
    for name, size in (("train", 7473), ("test", 1319)):
        problems = read_jsonl(os.path.join(os.environ["GSM8K"], f"{name}.jsonl"))
        assert len(problems) == size
        assert all(re.fullmatch(r"-?\d+", problem.answer) for problem in problems)


# ------------------------------------------------------------------------------------- prompts


def test_r1_2_2_3_template_is_the_papers_word_for_word():
    paper = """
        A conversation between User and Assistant. The user asks a question, and the
        Assistant solves it. The assistant first thinks about the reasoning process in the mind and
        then provides the user with the answer. The reasoning process and answer are enclosed within
        <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process
        here </think> <answer> answer here </answer>. User: {question}. Assistant:"""
    assert R1_ZERO == " ".join(paper.split())


def test_the_prompt_ends_where_the_policy_starts_and_does_not_open_its_tags():
    assert build_prompt("1 + 1", "r1-zero").endswith("</answer>. User: 1 + 1. Assistant:")
    assert build_prompt("compute 7 a +5 ?", "toy") == "User: compute 7 a +5 ? Assistant:"


def test_braces_in_a_question_or_a_template_stay_as_they_are(monkeypatch):
    question = r"What is \frac{1}{2} of {question}, {0} or {}?"
    assert build_prompt(question, "toy") == f"User: {question} Assistant:"
    monkeypatch.setitem(TEMPLATES, "boxed", r"{question} Answer in \boxed{}.")
    assert build_prompt("1 + 1?", "boxed") == r"1 + 1? Answer in \boxed{}."


def test_an_unknown_template_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="'r1zero'.*r1-zero, toy.*nearest: 'r1-zero'"):
        build_prompt("1 + 1", "r1zero")
