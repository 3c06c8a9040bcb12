r"""Questions with a gold answer: what RL trains on and what evaluation asks.

R1-Zero learns from questions whose answer a rule can check (R1 2.2.2). A source has two methods,
both pure functions of their arguments, so that a run can resume without a position in the data:

    batch(count, *, seed, step)     questions of the training split, for one step
    held_out(count, *, seed=0)      questions that no batch ever contains (a hash decides which)

and there are two kinds of source: Generated, without end (`calc_chain`, the toy's task, `countdown`
and those of puzzles.py), and Listed, a file that is walked in epochs (`read_jsonl`: GSM8K, MATH,
your own).

Read next: ../rewards.py (what compares an output with the gold answer).
Check it: python -m pytest tests/test_problems.py
"""

import difflib
import hashlib
import json
import math
import os
import random
import re
import reprlib
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from data.answers import MAX_ANSWER, closing_brace, read
from data.chat import DIGITS
from data.corpus import BILINGUAL, LABELS, Chain
from data.puzzles import PUZZLES

HELD_OUT = 0.05  # share of the problems kept from training; the toy's corpus has its own


class DataError(ValueError):
    """A data file that cannot be used; the message opens with file:line."""


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # gold, as text; what the checker compares with; for code: the tests, as JSON
    checker: str = "math"  # a key of rewards.CHECKERS, which refuses an unknown one
    level: int = 0  # difficulty; 0 where the source does not say
    language: str = "en"


class Draw(NamedTuple):
    problem: Problem
    identity: Hashable  # equal for the same problem in another language or order
    held_out: bool


class Generated:
    """Endless problems from `make(level, rng) -> Draw`, which draws from both splits. Raises
    ValueError where the levels are none, or not all from `easiest` to `hardest`."""

    def __init__(self, make: Callable, levels: Iterable[int], *, easiest: int, hardest: int):
        self.make, self.levels = make, tuple(levels)
        if not self.levels or min(self.levels) < easiest or max(self.levels) > hardest:
            raise ValueError(f"levels={self.levels}; expected some from {easiest} to {hardest}")

    def batch(self, count: int, *, seed: int, step: int) -> list[Problem]:
        """`count` training problems, their levels drawn uniformly; a problem may come twice."""
        rng = random.Random(f"batch {seed} {step}")
        problems = []
        for level in rng.choices(self.levels, k=count):
            draw = self.make(level, rng)
            while draw.held_out:  # the level stays, so that the split does not shift the levels
                draw = self.make(level, rng)
            problems.append(draw.problem)
        return problems

    def held_out(self, count: int, *, seed: int = 0) -> list[Problem]:
        """`count` different held-out problems, the levels in turn; fewer are a prefix of more.
        Raises ValueError where a level has not enough of them."""
        rngs = {level: random.Random(f"held-out {seed} {level}") for level in self.levels}
        found: dict[Hashable, Problem] = {}
        for i in range(count):
            level = self.levels[i % len(self.levels)]
            draws = (self.make(level, rngs[level]) for _ in range(10_000))  # then it is exhausted
            new = next((d for d in draws if d.held_out and d.identity not in found), None)
            if new is None:
                has = f"level {level} has only {i // len(self.levels)} held-out problems"
                raise ValueError(f"{has}, too few for {count} over all levels; ask for fewer")
            found[new.identity] = new.problem
        return list(found.values())


class Listed:
    """A finite list, as read from a file. `all_held_out` says that it is a test file."""

    def __init__(self, problems: Iterable[Problem], *, all_held_out: bool = False):
        self.train, self.test = [], []
        for problem in problems:
            words = " ".join(problem.question.split())  # spaces do not make another question
            test = all_held_out or _share(words) < HELD_OUT
            (self.test if test else self.train).append(problem)

    def batch(self, count: int, *, seed: int, step: int) -> list[Problem]:
        """Step number `step` through the epochs, each a permutation, if every step takes `count`.
        Nothing repeats within an epoch. Raises ValueError where there is nothing to train on."""
        if not self.train:
            raise ValueError(f"all {len(self.test)} problems are held out; train on other ones")
        problems = []
        for i in range(step * count, (step + 1) * count):
            epoch, place = divmod(i, len(self.train))
            if place == 0 or not problems:
                order = random.Random(f"epoch {seed} {epoch}").sample(self.train, len(self.train))
            problems.append(order[place])
        return problems

    def held_out(self, count: int, *, seed: int = 0) -> list[Problem]:
        """At most `count` held-out problems, for a file has only so many, in an order by hash,
        since the first lines of a file are rarely typical. ValueError where there is none."""
        if not self.test:
            found = f"none of the {len(self.train)} problems is held out (1 in 20 is expected)"
            raise ValueError(f"{found}; evaluate on a test file: --test-data")
        return sorted(self.test, key=lambda p: _share(f"{seed} {p.question}"))[:count]


def _share(text: str) -> float:
    """A hash in [0, 1). Python's own hash() differs from one process to the next."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def calc_chain(levels: Iterable[int] = range(2, 11), chinese: float = 0.0) -> Generated:
    """The toy's task; a level is how many operations, `chinese` the share asked in Chinese."""
    if not 0 <= chinese <= 1:
        raise ValueError(f"calc-chain {chinese=}; expected a share from 0 to 1")

    def make(level: int, rng: random.Random) -> Draw:
        chain = Chain.random(level, rng)
        # Drawn even when chinese is 0, so that the chains are the same whatever the share.
        language = "zh" if rng.random() < chinese else "en"
        problem = Problem(chain.question(language), str(chain.answer), "math", level, language)
        return Draw(problem, chain, chain.held_out())

    return Generated(make, levels, easiest=1, hardest=len(LABELS))  # each operation has a label


def bilingual_chain(levels: Iterable[int] = range(2, BILINGUAL.longest + 1)) -> Generated:
    """The same, half of it in Chinese: what the toy of R1's four stages is about."""
    return calc_chain(levels, chinese=BILINGUAL.chinese)


def spelled_chain(levels: Iterable[int] = range(2, BILINGUAL.longest + 1)) -> Generated:
    """The same with the gold answer as a word: no rule can check it, a judge has to (R1 2.3.3)."""
    digits = bilingual_chain(levels)

    def make(level: int, rng: random.Random) -> Draw:
        draw = digits.make(level, rng)
        words = DIGITS[draw.problem.language == "zh"]
        spelled = words[int(draw.problem.answer)]
        return draw._replace(problem=replace(draw.problem, answer=spelled, checker="judge"))

    return Generated(make, levels, easiest=1, hardest=len(LABELS))


def countdown(levels: Iterable[int] = (3, 4)) -> Generated:
    """Reach a two-digit target from numbers between 1 and 99; a level is how many numbers."""

    def make(level: int, rng: random.Random) -> Draw:
        target = 0
        while not 10 <= target <= 99:
            # Joined two by two, over positive integers, until only the target is left: it is so
            # always within reach. An answer need not keep to positive integers.
            numbers = [rng.randint(1, 99) for _ in range(level)]
            values = list(numbers)
            while len(values) > 1:
                low, high = sorted(values.pop(rng.randrange(len(values))) for _ in range(2))
                results = [low + high, high - low, low * high, 0 if high % low else high // low]
                values.append(rng.choice([value for value in results if value > 0]))
            target = values[0]
        question = (
            f"Using the numbers {numbers}, write an expression that equals {target}. You may use "
            "+, -, *, / and brackets, and every number has to be used exactly once."
        )
        gold = f"{target} from {' '.join(map(str, numbers))}"
        identity = (target, *sorted(numbers))
        held_out = _share(f"countdown {identity}") < HELD_OUT
        return Draw(Problem(question, gold, "countdown", level), identity, held_out)

    return Generated(make, levels, easiest=2, hardest=6)


def puzzle(name: str, levels: Iterable[int] | None = None) -> Generated:
    """One of puzzles.py, which says what its levels are."""
    maker, usual, easiest, hardest = PUZZLES[name]

    def make(level: int, rng: random.Random) -> Draw:
        question, answer, checker, identity = maker(level, rng)
        held_out = _share(f"{name} {identity}") < HELD_OUT
        return Draw(Problem(question, answer, checker, level), identity, held_out)

    levels = usual if levels is None else levels
    return Generated(make, levels, easiest=easiest, hardest=hardest)


def load(source: str, *, all_held_out: bool = False, **settings) -> Generated | Listed:
    """`calc-chain`, `bilingual-chain`, `spelled-chain`, `countdown`, one of puzzles.py or the path
    of a JSONL file, with the settings of that source.
    all_held_out: a file is a test file; generated problems have a held-out part of their own.
    Raises ValueError for another name, DataError for a file that cannot be used."""
    generated = {"calc-chain": calc_chain, "bilingual-chain": bilingual_chain,
                 "spelled-chain": spelled_chain, "countdown": countdown,
                 **{name: partial(puzzle, name) for name in PUZZLES}}  # fmt: skip
    if source in generated:
        return generated[source](**settings)
    if "." in source or os.path.exists(source):
        return Listed(read_jsonl(source), all_held_out=all_held_out, **settings)
    near = difflib.get_close_matches(source, generated, n=1, cutoff=0)[0]
    found = f"unknown problems {source!r} (nearest: {near!r})"
    raise ValueError(f"{found}; expected {', '.join(generated)} or the path of a .jsonl file")


def read_jsonl(path: str | os.PathLike) -> list[Problem]:
    """One problem per line: `question` or `problem`, and `answer` or (MATH) `solution`; `level`,
    `language` and `checker` may follow. A program is asked for with `tests` in place of an answer
    (see code_tests). Raises DataError, which names the file and the line."""
    problems = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig").strip()  # -sig drops a byte-order mark
                    problems += [_problem(text)] if text else []
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a JSONL file") from None
    if not problems:
        raise DataError(f"{path}:1: found no problem; expected one JSON object per line")
    return problems


def _problem(line: str) -> Problem:
    try:
        row = json.loads(line, parse_int=str, parse_float=str)  # as written: 0.10 is not 0.1
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise ValueError(f"found {reprlib.repr(line)} ({where}); expected a JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {reprlib.repr(row)}; expected a JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    question, checker = _field(row, "question", "problem"), _field(row, "checker", or_else="math")
    if "tests" in row:
        # As they were meant: 1 is a number here.
        checker, row["answer"] = "code", json.dumps(json.loads(line)["tests"])
    answer = _field(row, "answer", "solution")
    if checker == "code":
        if sys.platform != "linux":
            raise ValueError(f"found tests; programs run on Linux only, and this is {sys.platform}")
        code_tests(answer)
    if checker == "math":
        # A worked solution that marks no answer would score 0 for ever. A matrix may stand on
        # several lines too; its backslashes tell them apart.
        worked = "answer" not in row or ("\n" in answer and "\\" not in answer)
        answer = _math_gold(answer, worked)
        if read(answer) is None:  # nothing could ever equal it
            raise ValueError(
                f"found the gold answer {reprlib.repr(answer)}; expected one to compare: not blank,"
                f" at most {MAX_ANSWER} characters, its brackets closed, nothing empty such as"
                " \\frac{}{}, and no division by zero"
            )
    # MATH writes "Level 3", and "Level ?" a few times.
    level = _field(row, "level", or_else="0").removeprefix("Level ").replace("?", "0")
    if not level.isdecimal():
        raise ValueError(f"found level {level!r}; expected a number, or such as 'Level 3'")
    return Problem(question, answer, checker, int(level), _field(row, "language", or_else="en"))


def code_tests(text: str) -> list[dict]:
    """The tests of a program, read from JSON: {"input": ..., "output": ...}, two texts, or
    {"call": name, "args": [...], "expected": ...}. Raises ValueError where one is something else,
    and where a program that does nothing would pass."""
    tests = strict_json(text)
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"found the tests {reprlib.repr(tests)}; expected a list of some")
    for test in tests:
        kinds = {key: type(test[key]) for key in test} if isinstance(test, dict) else {}
        if kinds == {"input": str, "output": str}:
            (test["input"] + test["output"]).encode()  # a lone surrogate is a ValueError
        elif not (
            kinds.keys() == {"call", "args", "expected"}
            and kinds["args"] is list
            and kinds["call"] is str
            and test["call"].isidentifier()
        ):
            raise ValueError(
                f'found the test {reprlib.repr(test)}; expected "input" and "output", two texts,'
                ' or "call" (a name), "args" (a list) and "expected"'
            )
    if not any(
        test.get("output", "").strip() or test.get("expected") is not None for test in tests
    ):
        raise ValueError("found tests that expect nothing; a program that does nothing would pass")
    return tests


def strict_json(text: str) -> object:
    """json.loads without what JSON does not know: NaN and infinity, in letters or by overflow."""

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"found the number {text[:20]}; expected a finite one")
        return float(text)

    return json.loads(text, parse_constant=number, parse_float=number)


def _field(row: dict, *names: str, or_else: str | None = None) -> str:
    """The first of these fields that the row has, without the white space around it."""
    name = next((name for name in names if name in row), None)
    if name is None and or_else is None:
        raise ValueError(f"found the fields {sorted(row)}; expected {' or '.join(names)}")
    value = row.get(name, or_else)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"found {name} {reprlib.repr(value)}; expected a text or a number")
    value.encode()  # half a surrogate pair, which JSON can spell, is a ValueError here
    return value.strip()


def _math_gold(answer: str, worked: bool) -> str:
    """The number after GSM8K's ####, else what the last box holds, else the text itself unless it
    is a worked solution. Raises ValueError where that cannot be read."""
    if "####" in answer:
        number = answer.rpartition("####")[2].strip()
        if not re.fullmatch(r"-?[0-9][0-9,]*(\.[0-9]+)?", number):
            raise ValueError(f"found {reprlib.repr(number)} after ####; expected a number")
        return number.replace(",", "")
    boxed = last_box(answer)
    if boxed == "" or (worked and boxed is None):
        raise ValueError(f"found {reprlib.repr(answer)}; expected #### or a whole \\boxed{{...}}")
    return answer if boxed is None else boxed


def last_box(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces nested: "" if it is never closed (an earlier box
    does not stand in for it), None without any. \fbox{5} and \boxed 5$ count too: MATH has them."""
    *before, rest = re.split(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text)
    if not before:
        return None
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()
    return rest[1 : max(closing_brace(rest, 0), 1)].strip()
