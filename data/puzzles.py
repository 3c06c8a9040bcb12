"""Puzzles without end, each with an answer that a rule can check, from easy to hard.

R1-Zero's questions are of mathematics, code, science and logic (R1 2.2.2). These are small ones of
each kind, made on the spot. A maker is a pure function of its level and of the random stream:

    make(level, rng) -> Puzzle(question, answer, checker, identity)

    arithmetic            level: operations; + - * / and brackets, every division exact
    knights-and-knaves    level: people; what they say leaves exactly one solution
    sorting               level: items; numbers or words, in a stated order
    programs              level: operations of the program to write; the answer is its tests, JSON

Two have a checker of their own here; what is ambiguous or incomplete is wrong.

Read next: problems.py, which keeps some of them from training and hands out the rest.
Check it: python -m pytest tests/test_puzzles.py
"""

import json
import random
import re
from collections.abc import Callable, Hashable
from itertools import accumulate, product
from typing import NamedTuple


class Puzzle(NamedTuple):
    question: str
    answer: str
    checker: str  # a key of rewards.CHECKERS
    identity: Hashable  # equal for the same puzzle with other names or in another wording


# ---- arithmetic ------------------------------------------------------------------------------

BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "": 3}  # how tightly; a number by itself: ""
MOST = 10_000  # of any value on the way


def expression(operations: int, rng: random.Random) -> tuple[str, int, str]:
    """Text, value and outermost operation of a random expression."""
    if operations == 0:
        number = rng.randint(1, 20)
        return str(number), number, ""
    while True:
        sign, before = rng.choice("+-*/"), rng.randrange(operations)
        left, right = (expression(n, rng) for n in (before, operations - 1 - before))
        if sign == "/" and before == 0 and right[1]:  # a number that it divides
            number = abs(right[1]) * rng.randint(2, 12)
            left = str(number), number, ""
        value = apply(sign, left[1], right[1])
        if value is not None and abs(value) <= MOST:
            break
    written = [
        f"({text})" if BINDING[outer] < BINDING[sign] + place else text  # a - (b - c)
        for place, (text, _, outer) in enumerate((left, right))
    ]
    return f"{written[0]} {sign} {written[1]}", value, sign


def apply(sign: str, a: int, b: int) -> int | None:
    """None where a division is not exact."""
    if sign == "/":
        return a // b if b and a % b == 0 else None
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def arithmetic(level: int, rng: random.Random) -> Puzzle:
    text, value, _ = expression(level, rng)
    return Puzzle(f"Calculate {text}. The answer is an integer.", str(value), "math", text)


# ---- knights and knaves ----------------------------------------------------------------------

NAMES = ["Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jonas",
         "Karim", "Laura"]  # fmt: skip
KINDS = "knave", "knight"
# How two facts, such as "Bruno is a knave", are joined.
CLAIMS: dict[str, Callable[[bool, bool], bool]] = {
    "{0} and {1}": lambda first, second: first and second,
    "{0} or {1}": lambda first, second: first or second,
    "if {0}, then {1}": lambda first, second: not first or second,
}
SAME, OTHER = "{0} and {1} are of the same kind", "{0} and {1} are of different kinds"


class Claim(NamedTuple):
    """What somebody says, about people by their numbers."""

    form: str  # a key of CLAIMS; SAME or OTHER; "{0}" for a single fact
    people: tuple[int, ...]
    knights: tuple[bool, ...]  # what each is said to be

    def true(self, kinds: tuple[bool, ...]) -> bool:
        if self.form in (SAME, OTHER):
            return (kinds[self.people[0]] == kinds[self.people[1]]) == (self.form == SAME)
        facts = [kinds[who] == said for who, said in zip(self.people, self.knights)]
        return CLAIMS[self.form](*facts) if len(facts) == 2 else facts[0]

    def spell(self, speaker: int, names: list[str]) -> str:
        who = ["I" if person == speaker else names[person] for person in self.people]
        if self.form not in (SAME, OTHER):
            who = [f"{name} {'am' if name == 'I' else 'is'} a {KINDS[said]}"
                   for name, said in zip(who, self.knights)]  # fmt: skip
        said = self.form.format(*who)
        return said[0].upper() + said[1:]


def claim(speaker: int, people: int, rng: random.Random) -> Claim:
    form = rng.choice(["{0}", SAME, OTHER, *CLAIMS])
    others = [person for person in range(people) if person != speaker]
    if form == "{0}":  # nobody can say "I am a knave", and "I am a knight" tells nothing
        return Claim(form, (rng.choice(others),), (rng.random() < 0.5,))
    pair = tuple(rng.sample(range(people), 2))
    if form in (SAME, OTHER):
        return Claim(form, pair, ())
    return Claim(form, pair, (rng.random() < 0.5, rng.random() < 0.5))


def solutions(claims: list[Claim]) -> list[tuple[bool, ...]]:
    """Who may be a knight: whoever is one says what is true, and nobody else does."""
    everyone = product((False, True), repeat=len(claims))
    return [kinds for kinds in everyone
            if all(said.true(kinds) == kind for said, kind in zip(claims, kinds))]  # fmt: skip


def knights_and_knaves(level: int, rng: random.Random) -> Puzzle:
    found: list = []
    while len(found) != 1:
        kinds, claims = tuple(rng.random() < 0.5 for _ in range(level)), []
        for speaker, kind in enumerate(kinds):
            said = claim(speaker, level, rng)
            while said.true(kinds) != kind:
                said = claim(speaker, level, rng)
            claims.append(said)
        found = solutions(claims)
    names = rng.sample(NAMES, level)
    said = [f'{names[i]} says: "{said.spell(i, names)}."' for i, said in enumerate(claims)]
    answer = ", ".join(f"{name} is a {KINDS[kind]}" for name, kind in zip(names, found[0]))
    question = (
        "On an island, each person is either a knight, who always tells the truth, or a knave, who"
        f" always lies. You meet {', '.join(names[:-1])} and {names[-1]}. {' '.join(said)} Who is"
        f' what? Answer for each of them, as in "{names[0]} is a knight, {names[1]} is a knave".'
    )
    return Puzzle(question, answer, "knights-and-knaves", tuple(claims))


# Each \s* ends at a sign or a letter: two in a row would share many spaces in too many ways.
VERDICT = re.compile(
    r"([a-z]+)(?:\s*(?:is\b|:|=|->|→|-))?(?:\s*\b(?:an?|the)\b)?\s*\b(knight|knave)"
)
MAX_ANSWER = 1000  # characters


def verdicts(text: str) -> dict[str, str] | None:
    """Who is said to be what; None where anything else is said, or somebody is named twice."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.replace("*", "")).lower().strip(" .\n")
    found: dict[str, str] = {}
    for part in re.split(r"\s*(?:[,;.\n]\s*(?:and\s)?|\sand\s)\s*", text):
        verdict = VERDICT.fullmatch(part)
        if verdict is None or verdict[1] in found:
            return None
        found[verdict[1]] = verdict[2]
    return found


def knights_equal(prediction: str | None, gold: str) -> bool:
    """Whether it says of each person, once, what the gold says: "Alice is a knight, Bruno is a
    knave", in any order. Raises ValueError where the gold is not written like that."""
    wanted = verdicts(gold)
    if not wanted:
        raise ValueError(f"gold is {gold!r}; write 'NAME is a knight, NAME is a knave, ...'")
    if prediction is None or len(prediction) > MAX_ANSWER:
        return False
    return verdicts(prediction) == wanted


# ---- sorting ---------------------------------------------------------------------------------

WORDS = """apple anchor amber basket bear bell blanket bridge cabin candle carrot castle cedar chair
    cloud copper coral crow daisy desk dolphin door drum eagle elm engine fern field flute fox frog
    garden gate glove goat grape hammer harbor hat hill honey horse ink iron island ivy jacket jar
    juniper kettle key kite ladder lake lamp lemon lily lion maple map mint mirror moon nail needle
    nest oak oar olive onion otter owl paper pear pencil pine pond quilt quill rabbit river rope
    rose saddle salt shell ship silver stone table thread tiger tower tulip valley violet wagon
    walnut wheel willow window wolf yard zebra""".split()
ORDERS: dict[str, dict[str, Callable]] = {  # the key, after which items may still be equal
    "numbers": {
        "from the smallest to the largest": lambda n: n,
        "from the largest to the smallest": lambda n: -n,
        "by the sum of their digits, the smallest sum first": lambda n: sum(map(int, str(n))),
        "by their last digit, the smallest first": lambda n: n % 10,
        "by their distance from 500, the nearest first": lambda n: abs(n - 500),
    },
    "words": {
        "alphabetically": lambda word: 0,
        "in reverse alphabetical order": lambda word: tuple(-ord(c) for c in word) + (1,),
        "by their length, the shortest first": len,
        "by their last letter, in alphabetical order": lambda word: word[-1],
        "by their number of vowels (a, e, i, o, u), the fewest first": lambda word: sum(
            word.count(vowel) for vowel in "aeiou"
        ),
    },
}
TIES = {"numbers": "the smaller number", "words": "the one that comes first in the alphabet"}


def sorting(level: int, rng: random.Random) -> Puzzle:
    kind = rng.choice(list(ORDERS))
    order, key = rng.choice(list(ORDERS[kind].items()))
    items = rng.sample(range(1, 1000) if kind == "numbers" else WORDS, level)
    answer = ", ".join(map(str, sorted(items, key=lambda item: (key(item), item))))
    question = (
        f"Sort these {kind} {order}: {', '.join(map(str, items))}. Of two that are equal in this,"
        f" {TIES[kind]} goes first. Answer with all of them, separated by commas."
    )
    return Puzzle(question, answer, "sorting", (order, *sorted(items)))


def listed(text: str) -> list[str]:
    """The items: between commas, spaces or line breaks, perhaps in brackets and quotes."""
    text = text.strip().rstrip(".").strip()
    if text[:1] + text[-1:] in ("[]", "()", "{}"):
        text = text[1:-1]
    items = re.split(r"\s*[,;]\s*|\s+", text.strip().lower())
    return [re.sub(r"^(['\"])(.*)\1$", r"\2", item) for item in items]


def sorted_equal(prediction: str | None, gold: str) -> bool:
    """Whether it is the same list: every item once and in the same place. Raises ValueError on a
    gold without items, which nothing, or anything, would equal."""
    wanted = listed(gold)
    if not all(wanted):
        raise ValueError(f"gold is {gold!r}; write the sorted items, separated by commas")
    if prediction is None or len(prediction) > max(MAX_ANSWER, 2 * len(gold)):
        return False
    return listed(prediction) == wanted


# ---- programs to write -----------------------------------------------------------------------

NONE = range(1)
# What a step does with the numbers and k, and which values k may have.
STEPS: dict[str, tuple[Callable[[list[int], int], list[int]], range]] = {
    "keep only the even numbers": (lambda xs, k: [x for x in xs if x % 2 == 0], NONE),
    "keep only the odd numbers": (lambda xs, k: [x for x in xs if x % 2], NONE),
    "keep only the numbers greater than {k}": (
        lambda xs, k: [x for x in xs if x > k],
        range(-15, 16),
    ),
    "keep only the numbers less than {k}": (lambda xs, k: [x for x in xs if x < k], range(-15, 16)),
    "keep only the multiples of {k}": (lambda xs, k: [x for x in xs if x % k == 0], range(3, 8)),
    "add {k} to each number": (lambda xs, k: [x + k for x in xs], range(1, 21)),
    "subtract {k} from each number": (lambda xs, k: [x - k for x in xs], range(1, 21)),
    "multiply each number by {k}": (lambda xs, k: [x * k for x in xs], range(2, 13)),
    "replace each number by its square": (lambda xs, k: [x * x for x in xs], NONE),
    "replace each number by its absolute value": (lambda xs, k: [abs(x) for x in xs], NONE),
    "replace each number by the sum of all numbers up to and including it": (
        lambda xs, k: list(accumulate(xs)),
        NONE,
    ),
    "reverse the order of the numbers": (lambda xs, k: xs[::-1], NONE),
    "sort the numbers in increasing order": (lambda xs, k: sorted(xs), NONE),
    "sort the numbers in decreasing order": (lambda xs, k: sorted(xs, reverse=True), NONE),
    "remove repeated numbers, keeping the first of each": (
        lambda xs, k: list(dict.fromkeys(xs)),
        NONE,
    ),
    "keep only the first {k} numbers, or all if there are fewer": (
        lambda xs, k: xs[:k],
        range(2, 8),
    ),
    "drop the first {k} numbers, or all if there are fewer": (lambda xs, k: xs[k:], range(2, 7)),
    "keep every second number, beginning with the first": (lambda xs, k: xs[::2], NONE),
    # These end in one number, and so can only be the last.
    "take the sum of the numbers": (lambda xs, k: [sum(xs)], NONE),
    "count the numbers": (lambda xs, k: [len(xs)], NONE),
    "take the largest number, or 0 if there is none": (lambda xs, k: [max(xs, default=0)], NONE),
    "take the smallest number, or 0 if there is none": (lambda xs, k: [min(xs, default=0)], NONE),
}
LASTS = list(STEPS)[-4:]
TESTS = 10


def solve(steps: list[tuple[str, int]], numbers: list[int]) -> str:
    """What the program prints: the reference solution."""
    for step, k in steps:
        numbers = STEPS[step][0](numbers, k)
    return " ".join(map(str, numbers)) + "\n"


def programs(level: int, rng: random.Random) -> Puzzle:
    """No step may be without effect on the tests, and these may not all end alike."""
    while True:
        names = rng.sample([step for step in STEPS if step not in LASTS], level)
        if rng.random() < 0.5:
            names[-1] = rng.choice(LASTS)
        steps = [(name, rng.choice(STEPS[name][1])) for name in names]
        told = [name.format(k=k) for name, k in steps]
        draw = random.Random(f"tests of {told}")  # the same program has the same tests
        inputs = [[draw.randint(-20, 20) for _ in range(length)]
                  for length in (0, 1, 2, 3, *draw.choices(range(4, 13), k=TESTS - 4))]  # fmt: skip
        outputs = [solve(steps, numbers) for numbers in inputs]
        fewer = [steps[:i] + steps[i + 1 :] for i in range(level)]
        needed = all([solve(part, numbers) for numbers in inputs] != outputs for part in fewer)
        if needed and len(set(outputs)) >= 4:
            break
    listing = "; ".join(f"({i}) {step}" for i, step in enumerate(told, 1))
    question = (
        "Write a Python program. It reads one line from standard input, which holds integers"
        f" separated by spaces, or nothing. It does the following, in this order: {listing}. Then"
        " it prints what is left on one line, separated by spaces (an empty line for nothing)."
    )
    tests = [dict(input=" ".join(map(str, numbers)) + "\n", output=output)
             for numbers, output in zip(inputs, outputs)]  # fmt: skip
    return Puzzle(question, json.dumps(tests), "code", tuple(told))


# ---- all of them -----------------------------------------------------------------------------

# Name: maker, the levels that are drawn unless others are asked for, the easiest, the hardest.
PUZZLES: dict[str, tuple[Callable[[int, random.Random], Puzzle], range, int, int]] = {
    "arithmetic": (arithmetic, range(3, 7), 1, 12),
    "knights-and-knaves": (knights_and_knaves, range(3, 6), 2, 8),
    "sorting": (sorting, range(4, 9), 2, 20),
    "programs": (programs, range(2, 5), 1, 6),
}
CHECKERS = {"knights-and-knaves": knights_equal, "sorting": sorted_equal}
