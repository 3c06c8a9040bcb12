"""Puzzles (data/puzzles.py), each solved again from its question's text, by other means.

python -m pytest tests/test_puzzles.py
"""

import ast
import json
import operator
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from itertools import product

import pytest

from data.problems import load, read_jsonl
from data.puzzles import PUZZLES, knights_equal, sorted_equal
from rewards import CHECKERS, accuracy_reward, need_rules

LEVELS = [(name, level) for name, (_, _, low, high) in PUZZLES.items()
          for level in range(low, high + 1)]  # fmt: skip


def some(name, level, count=200, seed=0):
    return load(name, levels=(level,)).batch(count, seed=seed, step=0)


# ---- solved independently --------------------------------------------------------------------

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
         ast.Div: operator.truediv}  # fmt: skip


def evaluate(node):
    """Value and number of operations; every division has to be exact."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value), 0
    (a, before), (b, after) = evaluate(node.left), evaluate(node.right)
    value = SIGNS[type(node.op)](a, b)
    assert value.denominator == 1
    return value, before + after + 1


def solve_arithmetic(problem):
    text = re.fullmatch(r"Calculate (.+)\. The answer is an integer\.", problem.question)[1]
    value, operations = evaluate(ast.parse(text, mode="eval").body)
    assert operations == problem.level and str(value) == problem.answer


FACT = r"(\w+) (?:is|am) a (knight|knave)"
JOINED = {
    rf"If {FACT}, then {FACT}": lambda a, b: b if a else True,
    rf"{FACT} and {FACT}": lambda a, b: a and b,
    rf"{FACT} or {FACT}": lambda a, b: a or b,
}


def read_claim(speaker, said):
    """The question's sentence as a function of who the knights are."""

    def fact(name, kind):
        name = speaker if name == "I" else name
        return lambda knights: (name in knights) == (kind == "knight")

    if match := re.fullmatch(r"(\w+) and (\w+) are of (the same kind|different kinds)", said):
        first, second = fact(match[1], "knight"), fact(match[2], "knight")
        same = match[3] == "the same kind"
        return lambda knights: (first(knights) == second(knights)) == same
    if match := re.fullmatch(FACT, said):
        return fact(*match.groups())
    for form, join in JOINED.items():
        if match := re.fullmatch(form, said):
            one, two = fact(*match.groups()[:2]), fact(*match.groups()[2:])
            return lambda knights: join(one(knights), two(knights))
    raise AssertionError(said)


def solve_knights(problem):
    claims = re.findall(r'(\w+) says: "([^"]+)\."', problem.question)
    names = [name for name, _ in claims]
    assert len(set(names)) == problem.level
    assert f"You meet {', '.join(names[:-1])} and {names[-1]}." in problem.question
    found, read = [], [(name, read_claim(name, said)) for name, said in claims]
    for kinds in product("01", repeat=len(names)):
        knights = {name for name, kind in zip(names, kinds) if kind == "1"}
        if all(said(knights) == (name in knights) for name, said in read):
            found.append(knights)
    assert len(found) == 1
    told = dict(re.findall(r"(\w+) is a (knight|knave)", problem.answer))
    assert told.keys() == set(names)
    assert {name for name, kind in told.items() if kind == "knight"} == found[0]


def digits_sum(text):
    return sum(int(c) for c in text)


KEYS = [  # over the items as they are written
    ("from the smallest", lambda s: int(s)),
    ("from the largest", lambda s: -int(s)),
    ("by the sum of their digits", lambda s: (digits_sum(s), int(s))),
    ("by their last digit", lambda s: (s[-1], int(s))),
    ("by their distance from 500", lambda s: (abs(500 - int(s)), int(s))),
    ("by their length", lambda s: (len(s), s)),
    ("by their last letter", lambda s: (s[::-1][0], s)),
    ("by their number of vowels", lambda s: (len(re.findall("[aeiou]", s)), s)),
    ("alphabetically", lambda s: s),
]


def solve_sorting(problem):
    match = re.match(r"Sort these (?:numbers|words) (.+?): (.+?)\. Of two", problem.question)
    order, items = match[1], match[2].split(", ")
    assert len(items) == len(set(items)) == problem.level
    if order == "in reverse alphabetical order":
        wanted = sorted(items)[::-1]
    else:
        wanted = sorted(items, key=next(key for start, key in KEYS if order.startswith(start)))
    assert problem.answer == ", ".join(wanted)


def run(step, xs):
    """One step of a program, by its wording."""
    number = re.search(r"-?\d+", step.replace("or 0 if", ""))
    k = int(number[0]) if number else None
    word = step.split()
    if step.startswith("keep only the first"):
        return [x for i, x in enumerate(xs) if i < k]
    if step.startswith("drop the first"):
        return [x for i, x in enumerate(xs) if i >= k]
    if step.startswith("keep only the"):
        tests = dict(even=lambda x: not x & 1, odd=lambda x: x & 1, greater=lambda x: x - k > 0,
                     less=lambda x: k - x > 0, multiples=lambda x: abs(x) % k == 0)  # fmt: skip
        return list(filter(next(test for name, test in tests.items() if name in word), xs))
    if word[0] in ("add", "subtract", "multiply"):
        how = dict(add=operator.add, subtract=operator.sub, multiply=operator.mul)[word[0]]
        return [how(x, k) for x in xs]
    if "square" in word:
        return [x**2 for x in xs]
    if "absolute" in word:
        return [max(x, -x) for x in xs]
    if "up" in word:
        return [sum(xs[: i + 1]) for i in range(len(xs))]
    if word[0] == "sort":
        ordered = []
        for x in xs:
            at = sum(y < x for y in ordered)
            ordered.insert(at, x)
        return ordered if "increasing" in word else list(reversed(ordered))
    if word[0] == "remove":
        return [x for i, x in enumerate(xs) if x not in xs[:i]]
    if step.startswith("keep every second"):
        return [x for i, x in enumerate(xs) if i % 2 == 0]
    if word[0] == "reverse":
        return list(reversed(xs))
    ends = dict(sum=sum, count=len, largest=lambda xs: max(xs) if xs else 0,
                smallest=lambda xs: min(xs) if xs else 0)  # fmt: skip
    return [next(end for name, end in ends.items() if name in word)(xs)]


def solve_programs(problem):
    listing = problem.question.split("in this order: ")[1].split(". Then it prints")[0]
    steps = [part.rstrip("; ") for part in re.split(r"\(\d\) ", listing)[1:]]
    assert len(steps) == problem.level
    tests = json.loads(problem.answer)
    assert len(tests) >= 8 and all(test.keys() == {"input", "output"} for test in tests)
    assert len({test["output"] for test in tests}) >= 4
    assert any(test["input"] == "\n" for test in tests)
    for test in tests:
        xs = [int(x) for x in test["input"].split()]
        for step in steps:
            xs = run(step, xs)
        assert test["output"] == " ".join(str(x) for x in xs) + "\n"


SOLVERS = {"arithmetic": solve_arithmetic, "knights-and-knaves": solve_knights,
           "sorting": solve_sorting, "programs": solve_programs}  # fmt: skip


@pytest.mark.parametrize("name, level", LEVELS)
def test_each_answer_is_found_again_from_the_question(name, level):
    for problem in some(name, level):
        assert problem.level == level
        SOLVERS[name](problem)
        if name != "programs":
            assert accuracy_reward(boxed(problem), problem.answer, CHECKERS[problem.checker]) == 1


def boxed(problem):
    return f"<think> x </think> <answer> {problem.answer} </answer>"


# ---- the sources -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUZZLES)
def test_no_batch_has_a_held_out_puzzle_and_these_differ(name):
    source = load(name)
    held = [problem.question for seed in range(2) for problem in source.held_out(30, seed=seed)]
    assert len(set(held[:30])) == 30
    trained = {p.question for step in range(10) for p in source.batch(50, seed=1, step=step)}
    assert len(trained) > 350 and not trained & set(held)


@pytest.mark.parametrize("name", PUZZLES)
def test_the_split_goes_by_what_the_puzzle_is_and_takes_one_in_twenty(name):
    make, rng = load(name).make, random.Random(0)
    draws = [make(PUZZLES[name][1][-1], rng) for _ in range(1000)]
    sides = {}
    for draw in draws:
        assert sides.setdefault(draw.identity, draw.held_out) == draw.held_out
    assert 0.02 < sum(sides.values()) / len(sides) < 0.08


def test_other_names_or_another_order_of_the_items_do_not_make_another_puzzle():
    make, rng = load("knights-and-knaves").make, random.Random(0)
    texts = {}
    for _ in range(1500):
        draw = make(2, rng)
        texts.setdefault(draw.identity, set()).add(draw.problem.question)
    assert max(map(len, texts.values())) > 5  # under other names
    sort, found = load("sorting", levels=(2,)).make, {}
    for seed in range(6000):
        draw = sort(2, random.Random(seed))
        found.setdefault(draw.identity, set()).add(draw.problem.question)
    assert max(map(len, found.values())) == 2


@pytest.mark.parametrize("name", PUZZLES)
def test_a_batch_is_the_same_in_another_process(name):
    code = f"from data.problems import load; print(load({name!r}).batch(5, seed=7, step=3))"
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": "."}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert told.stdout.strip() == repr(load(name).batch(5, seed=7, step=3))
    assert load(name).batch(5, seed=7, step=4) != load(name).batch(5, seed=7, step=3)


@pytest.mark.parametrize("name", PUZZLES)
def test_levels_outside_of_the_range_are_refused(name):
    _, usual, low, high = PUZZLES[name]
    assert {p.level for p in load(name).batch(200, seed=0, step=0)} == set(usual)
    for level in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"from {low} to {high}"):
            load(name, levels=(level,))


@pytest.mark.parametrize("name", PUZZLES)
def test_a_higher_level_is_a_longer_question(name):
    _, _, low, high = PUZZLES[name]
    high = min(high, 6)
    lengths = [
        sum(len(p.question) for p in some(name, level, 60)) for level in range(low, high + 1)
    ]
    assert lengths == sorted(lengths)


def test_numbers_on_the_way_stay_small_and_every_sign_occurs():
    questions = " ".join(
        p.question for level in range(1, 13) for p in some("arithmetic", level, 50)
    )
    assert all(questions.count(sign) > 50 for sign in "+-*/(")
    answers = [int(p.answer) for p in some("arithmetic", 12)]
    assert max(map(abs, answers)) <= 10_000 and len(set(answers)) > 100


def test_both_kinds_of_people_and_all_kinds_of_claims_occur():
    problems = some("knights-and-knaves", 4)
    knights = sum(p.answer.count("knight") for p in problems) / (4 * len(problems))
    assert 0.35 < knights < 0.65
    text = " ".join(p.question for p in problems)
    for words in (" and I are", "I am a", " or ", '"If ', "the same kind", "different kinds"):
        assert words in text


# ---- the checkers ----------------------------------------------------------------------------

GOLD = "Alice is a knight, Bruno is a knave, Clara is a knight"


@pytest.mark.parametrize(
    "answer",
    [GOLD, GOLD + ".", GOLD.lower(), GOLD.upper(),
     "Bruno is a knave, Clara is a knight and Alice is a knight",
     "Alice is a knight, Bruno is a knave, and Clara is a knight.",
     "Alice: knight; Bruno: knave; Clara: knight", "Alice = knight\nBruno = knave\nClara = knight",
     "Alice is a knight. Bruno is a knave. Clara is a knight.", "alice knight, bruno knave, clara "
     "knight", "Alice -> knight, Bruno -> knave, Clara -> knight", "**Alice** is a **knight**,\n"
     "**Bruno** is a **knave**,\n**Clara** is a **knight**", f"\\text{{{GOLD}}}",
     "  Alice  is  a  knight ,Bruno is the knave,Clara is knight "],
)  # fmt: skip
def test_the_people_may_be_named_in_any_order_and_spelling(answer):
    assert knights_equal(answer, GOLD)


HOSTILE_KNIGHTS = [
    None, "", " ", ",", "knight", "Alice", "Alice is a knight",
    "Alice is a knight, Bruno is a knave", GOLD.replace("knave", "knight"),
    "Alice is a knave, Bruno is a knight, Clara is a knave",
    GOLD + ", Alice is a knight", GOLD + ", Alice is a knave", GOLD + ", Bruno is a knight",
    GOLD + ", David is a knight", GOLD + ". Or not", "not " + GOLD, "It is false that " + GOLD,
    "Alice is a knight or a knave, Bruno is a knave, Clara is a knight", GOLD.replace(",", " or"),
    "Alice is a knight/knave, Bruno is a knave, Clara is a knight", GOLD.replace("is", "is not"),
    "Alice is a knight, Bruno is not a knight, Clara is a knight", "everyone is a knight",
    "Alice and Clara are knights", "Alice is a knightknave, Bruno is a knave, Clara is a knight",
    "Alice is a knight, Bruno is a knave, Clara is a knight?", GOLD * 2, GOLD + "\n" + GOLD,
    "Alice isa knight, Bruno is a knave, Clara is a knight",
    "Alice is a knight, Bruno is a knave, C is a knight",
    "A is a knight, B is a knave, C is a knight", GOLD.replace("knight", "kn\u0456ght"),
    (GOLD + ", ") * 500, "knight " * 100, "Alice is a knight Bruno is a knave Clara is a knight",
    "if Alice is a knight, Bruno is a knave, Clara is a knight", "[" + GOLD,
    "Aliceknight, Brunoknave, Claraknight",
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE_KNIGHTS)
def test_who_names_somebody_twice_or_not_at_all_or_hedges_earns_nothing(answer):
    assert not knights_equal(answer, GOLD)


@pytest.mark.parametrize(
    "gold", ["", "Alice", "Alice is tall", "Alice is a knight, Alice is a knave"]
)
def test_a_gold_that_names_nobody_is_an_error(gold):
    with pytest.raises(ValueError, match="NAME is a knight"):
        knights_equal("Alice is a knight", gold)


@pytest.mark.parametrize(
    "answer",
    ["7, 22, 31", "7,22,31", "7 22 31", "[7, 22, 31]", "(7, 22, 31)", "7\n22\n31", "7; 22; 31.",
     " 7 , 22 , 31 ", "['7', '22', '31']"],
)  # fmt: skip
def test_a_list_may_be_written_in_several_ways(answer):
    assert sorted_equal(answer, "7, 22, 31")


HOSTILE_LISTS = [
    None, "", " ", ",", "7, 22", "22, 7, 31", "31, 22, 7", "7, 22, 31, 31", "7, 7, 22, 31", "72231",
    "7, 22, 31 or 31, 22, 7", "7, 22, 31, 7, 22, 31", "7, 2231", "7.0, 22, 31", "7, 22, 3l",
    "7,,22,31", "7, 22, 31, ",
    "sorted: 7, 22, 31", "7 < 22 < 31 < 40", "[7, 22, 31", "\u0667, 22, 31",
    "7, 22, 31!", "7, 22, [31]", "the numbers 7, 22, 31", "-7, 22, 31", "7 " * 5000,
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE_LISTS)
def test_a_list_with_an_item_missing_added_or_out_of_place_earns_nothing(answer):
    assert not sorted_equal(answer, "7, 22, 31")


def test_words_are_compared_without_case_and_a_blank_gold_is_an_error():
    assert sorted_equal("Ant, BEE", "ant, bee") and not sorted_equal("bee, ant", "ant, bee")
    assert not sorted_equal("antbee", "ant, bee") and not sorted_equal("ant, be e", "ant, bee")
    with pytest.raises(ValueError, match="separated by commas"):
        sorted_equal("", " ")


@pytest.mark.parametrize(
    "piece", ["a ", "alice is a ", "alice: ", ", ", "\n", " ", "- ", "[", "'", "*"]
)
def test_no_answer_takes_long(piece):
    text = piece * (300_000 // len(piece))
    start = time.process_time()
    for end in (None, 1000):
        assert not knights_equal(text[:end], GOLD) and not sorted_equal(text[:end], "7, 22, 31")
    assert time.process_time() - start < 0.5


def test_many_spaces_take_no_time_either():
    start = time.perf_counter()
    for before, after in (("alice", "x"), ("alice is", "x"), ("alice is a", "x"), ("alice", "is")):
        assert not knights_equal(before + " " * 900 + after, GOLD)
    assert knights_equal(GOLD.replace(" is", " " * 100 + "is").replace("a k", "a   k"), GOLD)
    assert time.perf_counter() - start < 0.5


def test_a_file_may_name_the_checkers(tmp_path):
    rows = [dict(question="Who is what?", answer=GOLD, checker="knights-and-knaves"),
            dict(question="Sort", answer="1, 2", checker="sorting")]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = read_jsonl(path)
    need_rules(problems)
    assert [CHECKERS[p.checker](p.answer, p.answer) for p in problems] == [True, True]
