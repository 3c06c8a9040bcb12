r"""What an answer is, and when two of them are one: 1/2 and \frac12, x = 3 and 3, {1,2} and {2,1}.

`read` turns a text into one of the forms below, `same` compares two. What is ambiguous is not
equal, for the policy searches for what passes. The rules, where one could decide otherwise:

  - A number is written in one of the ways of NUMBER, FRACTION and SCIENTIFIC. One that has yet to
    be computed, 6*7 or 10^2, equals no number: the question may be just that.
  - A decimal of ROUNDED places or more also stands for what rounds to it, 0.3333 for 1/3, unless
    that is a decimal too; a shorter one is exact, and so is 0.0012, whose digits are too few. A
    decimal comma is read where no list is wanted.
  - Units are not converted. One that the gold answer names has to be there: 5 for 5 cm is wrong.
    One that it doesn't name may be: 5 cm for 5, but not 5 thousand; 50% is neither 50 nor 0.5.
    Degrees and currencies are left out: the question has fixed them.
  - A list without brackets may come in any order, as a set, but never stands for one of its items.
    Against a tuple, or with different names (a = 1, b = 2), the order counts.
  - x = 3 equals 3, but only for a name on one side, and never y = 3. A chain, x = 1 + 2 = 3, ends
    in its answer, for how it was found is not judged; what follows ≈ only restates what is before.
    Other equations are equal if one is a multiple of the other. 1 < x < 2 is the interval (1,2).
  - Expressions are equal if their values are, whatever their form: (x+1)^2 and x^2+2x+1.
  - What is none of these is a text, equal to itself in upper or lower case.

Read next: ../rewards.py, which takes the answer from an output. Before: expressions.py.
Run: python -m pytest tests/test_answers.py
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial

from data.expressions import MAX_DEPTH, WORDS as KNOWN, Expression

MAX_ANSWER = 1000  # characters; bounds the time and the size of every number below
MAX_ITEMS = 100  # each is compared with each
ROUNDED = 4


# An answer is one of these, or a str: a text in lower case.


@dataclass(frozen=True)
class Number:
    value: Fraction
    unit: str
    places: int  # after the decimal point; 0 for a whole number and for a fraction


@dataclass(frozen=True)
class Measure:
    expression: Expression
    unit: str  # "" for none


@dataclass(frozen=True)
class Items:
    kind: str  # the two brackets, or "list" without any, "union", "ratio", "matrix", "row"
    items: tuple
    decimal: "Number | None" = None  # what it is if its comma is a decimal one, as in 1,25


@dataclass(frozen=True)
class Relation:
    sign: str  # = < ≤ ≠
    difference: Expression | None  # of the two sides, if both are expressions
    name: str | None  # where it stands alone on one side,
    value: object | None  # and what this says of it: what it is, or the interval that it is in


# ---- from a text to its bare form ------------------------------------------------------

# What LaTeX adds to an answer. Most of it becomes a space, not nothing, lest two digits join. From
# here on ⦃ and ⦄ are the braces of a set, \\{ and \\}, and ⏎ ends a row.
END = "(?![A-Za-z])"  # of a command's name
LATEX = [
    (r"\\\\(?:\[[^\]]*\])?", " ⏎ "),  # the end of a matrix's row
    (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname)"
     r"\s*\{([^{}]*)\}", r" \1 "),
    (rf"\\[dtc]frac{END}", r"\\frac"),
    (r"\\frac\s*([0-9A-Za-z])", r"\\frac{\1}"), (r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),
    (r",\\!\s*", ","), (r"\\!", ""), (rf"\\\$|\\(?:euro|pounds|yen){END}", " "),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree", " "),
    (rf"\\q?quad|\\(?:left|right|displaystyle|[bB]ig[lr]?){END}|\\[,;: ()\[\]]", " "),
    (rf"\\(?:\{{|lbrace{END})", "⦃"), (rf"\\(?:\}}|rbrace{END})", "⦄"), (r"\\%", " %"),
    (rf"\\leq?(?:slant)?{END}", "≤"), (rf"\\geq?(?:slant)?{END}", "≥"), (rf"\\neq?{END}", "≠"),
    (rf"\\lt{END}", "<"), (rf"\\gt{END}", ">"), (rf"\\approx{END}", "≈"), (r"\\bigcup", r"\\cup "),
    (r"\\varnothing|⦃\s*⦄", r"\\emptyset "),
]  # fmt: skip
PLAIN = [
    (r"[$€£¥°~]", " "),  # mathematics' or money's; and degrees
    (r"\s*\{\s*,\s*\}\s*", ","), (r"_\{([A-Za-z0-9])\}(?![0-9])", r"_\1"),
    (r"\{\s+", "{"), (r"\s+\}", "}"), (r"\}\s+\{", "}{"),
    (rf"\s(?:per ?cent(?:age)?s?|pct){END}", " %"), (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"),
    (r"\s*([-+*/=^()\[\]⦃⦄<>≤≥≠≈])\s*", r"\1"),  # not the comma: "1, 234" are two numbers
]  # fmt: skip
LATEX, PLAIN = [[(re.compile(a), b) for a, b in rules] for rules in (LATEX, PLAIN)]
UNICODE = str.maketrans({
    "\N{MINUS SIGN}": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "√": "\\sqrt ", "²": "^2",
    "³": "^3", "π": "\\pi ", "∞": "\\infty ", "±": "\\pm ", "∈": "\\in ", "∪": "\\cup ",
    "∅": "\\emptyset ",
})  # fmt: skip
EMPTY = re.compile(r"\\(?:frac|sqrt)\s*(?:\{[^{}]*\})?\s*\{\s*\}")
OPENING, CLOSING = "([{⦃", ")]}⦄"
KINDS = dict(zip(OPENING + CLOSING, "(({⦃(({⦃"))  # an interval, [0,1), mixes two of them


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, or -1; escaped braces do not count."""
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return -1


def undress(text: str) -> str:
    """The answer without LaTeX's wrappers and spacing."""
    text = text.strip()
    if text.startswith("\\boxed{") and closing_brace(text, 6) == len(text) - 1:
        text = text[7:-1]
    text = text.translate(UNICODE)
    for pattern, replacement in LATEX * ("\\" in text) + PLAIN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).removesuffix(".").rstrip()


def balanced(text: str) -> bool:
    """Whether each bracket is closed by one of its kind."""
    opened = []
    for sign in re.findall(r"[()\[\]{}⦃⦄]", text):
        if sign in OPENING:
            opened.append(sign)
        elif not opened or KINDS[opened.pop()] != KINDS[sign]:
            return False
    return not opened


def cut(text: str, pattern: str) -> tuple[list[str], list[str]]:
    """The pieces of the text, cut where `pattern` stands outside of all brackets, and the cuts.
    A pattern that also finds numbers keeps them whole."""
    pieces, cuts, start, depth = [], [], 0, 0
    for match in re.finditer(rf"[(\[{{⦃]|[)\]}}⦄]|{pattern}", text):
        if match[0] in OPENING:
            depth += 1
        elif match[0] in CLOSING:
            depth -= 1
        elif depth == 0 and not match[0][-1].isdigit():
            pieces.append(text[start : match.start()].strip())
            cuts.append(match[0].strip())
            start = match.end()
    return [*pieces, text[start:].strip()], cuts


# ---- from the bare form to an answer ---------------------------------------------------

THOUSANDS = r"[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)"
NUMBER = rf"(?:(?:{THOUSANDS}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
FRACTION = rf"(?:\\frac\{{(-?{NUMBER})\}}\{{(-?{NUMBER})\}}|({NUMBER})/({NUMBER}))"
MIXED = r"([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+) ([0-9]+)/([0-9]+)"
EXPONENT = r"10\^(?:\{(-?[0-9]{1,3})\}|(-?[0-9]{1,3}))"
SCIENTIFIC = rf"({NUMBER})(?:\*| ?x ?| ?\\times ?| ?\\cdot ?){EXPONENT}"
UNIT = re.compile(
    r"(?P<value>.*(?:[^A-Za-z\\ ]|\\pi(?= (?:[ckm]m|ft|[A-Za-z]{4}))))"  # \pi abc is a product
    r"(?P<unit> ?%|(?<=[0-9])m\^[23]| ?[A-Za-z]{2,}(?:[ /*-][A-Za-z]+|\^[23]|\^\{[23]\})*)"
)
SHORT = set("cm mm km kg mg ml ft in lb oz hr min mph st nd rd th".split())  # else 2ab is a product
CURRENCY = {"dollar", "dollars", "degree", "degrees", "euro", "euros"}
# Words after a number that are no unit: they make another number of it, or a sentence.
NO_UNITS = set("% hundred hundreds thousand thousands million millions billion billions trillion"
               " trillions k bn lakh crore dozen score half halves third thirds quarter quarters"
               " fifths sixths eighths tenth tenths hundredths thousandths squared cubed factorial"
               " plus minus over choose mod and or nor not no but is are to than vs versus maybe"
               " perhaps otherwise".split())  # fmt: skip

NAME = (
    r"(?:(?!\\pi)\\?[A-Za-z]+'?(?:_(?:[A-Za-z0-9]|\{[^{}]*\}))?"
    r"(?:\((?:-[0-9]+|[A-Za-z0-9, ]+)\))?)"
)
SIDE = re.compile(  # of an equation, if it names the other: x, f(x), |AB|, A:B, (p, q)
    rf"{NAME}|\|{NAME}\||{NAME} ?[:/] ?{NAME}|\\frac\{{{NAME}\}}\{{{NAME}\}}"
    rf"|\({NAME}(?:, ?{NAME})*\)"
)
RELATIONS = r"[=<>≤≥≠≈]|\\in(?![A-Za-z])"
MATRIX = re.compile(
    r"[(\[]?\\begin\{(?P<kind>[pb]?matrix|array)\}(?:\{[lcr|]*\})?(?P<rows>.*)"
    r"\\end\{(?P=kind)\}[)\]]?"
)
WORDS = re.compile(r"(?:[A-Za-z]+(?:[ '’.-]+|$))+")
BOTH = re.compile(r"\s*\\([pm])[pm](?![A-Za-z])\s*")
FLIP = {">": "<", "≥": "≤"}
WORD = r"(?<![A-Za-z\\])(?:and|or)(?![a-z])"  # "1orW(x)" has one
AND = rf"(?<![0-9.,]){THOUSANDS}(?![0-9])|\s*(?:,\s*(?:and|or)(?![a-z])|,|{WORD})\s*"


def fraction(digits: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", digits))


def split_unit(text: str) -> tuple[str, str]:
    """The value and its unit: "", "%", or words such as "cm^2", in lower case."""
    match = UNIT.fullmatch(text)
    if match is None:
        return text, ""
    unit = match["unit"]
    first = re.match("[A-Za-z]*", unit.strip())[0].casefold()
    if first in KNOWN or not (unit[0] in " %m" or first in SHORT):
        return text, ""
    unit = re.sub(r"[{}]", "", unit).strip().casefold()
    return match["value"].strip(), "" if unit in CURRENCY else unit


def read_number(text: str, depth: int) -> Number | None:
    """A number in one of a closed list of spellings, and its unit."""
    text, unit = split_unit(text)
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("+", "-") else text
    if re.fullmatch(NUMBER, text):
        return Number(sign * fraction(text), unit, len(text.partition(".")[2]))
    if match := re.fullmatch(FRACTION, text):
        above, below = [fraction(part) for part in match.groups() if part]
        return Number(sign * above / below, unit, 0)
    if match := re.fullmatch(MIXED, text):
        whole, above, below = [int(part) for part in match.groups() if part]
        return Number(sign * (whole + Fraction(above, below)), unit, 0) if above < below else None
    if match := re.fullmatch(SCIENTIFIC, text):
        exponent = int(match[2] or match[3])
        return Number(sign * fraction(match[1]) * Fraction(10) ** exponent, unit, 0)
    return None


def read_word(text: str, depth: int) -> str | None:
    """A choice, as in (A), or words: "ab" is no product, lest "on" equal "no"."""
    letter = re.fullmatch(r"\(?([A-Za-z])\)?", text)
    if letter:
        return letter[1].casefold()
    words = re.findall("[A-Za-z]{2,}", text)
    if WORDS.fullmatch(text) and not set(words) <= set(KNOWN):
        return text.casefold()
    return None


def read_matrix(text: str, depth: int) -> Items | None:
    match = MATRIX.fullmatch(text)
    if match is None or "\\begin" in match["rows"]:
        return None
    rows = match["rows"].strip().removesuffix("⏎").split("⏎")
    rows = [collect("row", row.split("&"), depth) for row in rows]
    return Items("matrix", tuple(rows)) if all(rows) else None


def read_parts(kind: str, separator: str, text: str, depth: int) -> Items | None:
    pieces, cuts = cut(text, separator)
    items = collect(kind, pieces, depth) if cuts else None
    if items and re.fullmatch("[+-]?[0-9]+,[0-9]+", text):
        return replace(items, decimal=read_number(text.replace(",", "."), depth))
    return items


def collect(kind: str, pieces: list[str], depth: int) -> Items | None:
    """The items of these texts, if none is blank and they are not too many."""
    if len(pieces) > MAX_ITEMS or not all(piece.strip() for piece in pieces):
        return None
    items = []
    for piece in pieces:
        item = read_piece(piece.strip(), depth + 1)
        both = kind in ("list", "{}") and "\\pm" in piece and isinstance(item, Items)
        items += item.items if both and item.kind == "list" else [item]
    return Items(kind, tuple(items))


def read_brackets(text: str, depth: int) -> Items | Number | None:
    """A tuple, an interval or a set. One item in parentheses is no tuple, and no choice such as (2)
    if it is a fraction. Braces without a backslash are LaTeX's own: what they hold is a list."""
    kind = (text[0] + text[-1]).replace("⦃", "{").replace("⦄", "}")
    if kind not in ("()", "[]", "(]", "[)", "{}") or not balanced(text[1:-1]):
        return None
    pieces, cuts = cut(text[1:-1], "[,;]")
    if kind == "()" and not cuts:
        number = read_number(pieces[0], depth)
        return number if number and number.value.denominator != 1 else None
    return collect("list" if text[0] == "{" and cuts else kind, pieces, depth)


def read_both(text: str, depth: int) -> Items | None:
    """a \\pm b, which are two."""
    if not re.search(r"\\pm(?![A-Za-z])", text):
        return None
    signs = [{"p": "+", "m": "-"}, {"p": "-", "m": "+"}]
    texts = [BOTH.sub(lambda match: sign[match[1]], text) for sign in signs]
    return Items("list", tuple(read_piece(text, depth + 1) for text in texts))


def read_relation(text: str, depth: int) -> Relation | Items | None:
    sides, signs = cut(text, RELATIONS)
    if not signs or not all(sides):
        return None
    named = [SIDE.fullmatch(side) is not None for side in sides]
    if signs[0] == "≈" and named[0]:
        return read_relation(f"{sides[0]}={sides[1]}", depth)
    if "≈" in signs:
        before = zip(sides, [*signs[: signs.index("≈")], ""])
        return read_piece("".join(side + sign for side, sign in before), depth + 1)
    if len(signs) > 1 and set(signs) == {"="} and any(named[:-1]):
        name = sides[named.index(True)]
        return Relation("=", None, spelled(name), read_piece(sides[-1], depth + 1))
    if set(signs) <= {">", "≥"}:
        sides, signs = sides[::-1], [FLIP[sign] for sign in signs[::-1]]
    ordered = set(signs) <= {"<", "≤"}
    if len(signs) == 2 and ordered and SIDE.fullmatch(sides[1]):  # 1 < x < 2
        return interval(sides[0], signs, sides[2], depth)
    if len(signs) != 1:
        return None
    (left, right), [sign] = sides, signs
    measure = read_measure(f"({left})-({right})", depth)
    difference, name, value = measure and measure.expression, None, None
    named = [SIDE.fullmatch(side) is not None for side in sides]
    if sign in ("=", "\\in") and any(named):
        name, said = (left, right) if named[0] else (right, left)
        sign, value = "=", read_piece(said, depth + 1)
    elif difference is None or not difference.names or not any(difference.values):
        return None  # nothing to compare, or such as 42 = 43 and x = x
    elif ordered and any(named):
        name = left if named[0] else right
        ends = ("-\\infty", ["<", sign], right) if named[0] else (left, [sign, "<"], "\\infty")
        value = interval(*ends, depth)
    return Relation(sign, difference, name and spelled(name), value)


def spelled(name: str) -> str:
    """The name in one spelling: x_{1} is x_1, and f(t) is f(x)."""
    return re.sub(r"[{} ]|\([A-Za-z]\)$", "", name)


def interval(low: str, signs: list[str], high: str, depth: int) -> Items:
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Items(kind, (read_piece(low, depth + 1), read_piece(high, depth + 1)))


def read_measure(text: str, depth: int) -> Measure | None:
    value, unit = split_unit(text)
    try:
        return Measure(Expression(value), unit)
    except ValueError:
        return None


READERS = (
    read_number, read_word, read_matrix, partial(read_parts, "list", ";"),
    partial(read_parts, "list", AND), read_brackets, read_both, read_relation,
    partial(read_parts, "union", rf"\\cup{END}"), partial(read_parts, "ratio", ":"), read_measure,
)  # fmt: skip


def read_piece(text: str, depth: int = 0) -> object:
    """The answer in a bare text. ZeroDivisionError where a number in it has no value."""
    if text and depth <= MAX_DEPTH:
        for reader in READERS:
            answer = reader(text, depth)
            if answer is not None:
                return answer
    return text.casefold()


@lru_cache(maxsize=4096)  # a gold meets its whole group of outputs, an answer the whole vote
def read(text: str) -> object | None:
    """The answer that the text is; None where it is not readable: blank, too long, with brackets
    that are not closed, \\frac{}{}, or a division by zero."""
    if len(text) > MAX_ANSWER:
        return None
    bare = undress(text)
    if not bare or not balanced(re.sub("[⦃⦄]", "", bare)) or EMPTY.search(bare):
        return None
    try:
        return read_piece(bare)
    except ZeroDivisionError:
        return None


# ---- whether two answers are one -------------------------------------------------------


def same(a: object, b: object) -> bool:
    """Whether an answer, as read, is the gold answer b. It is symmetric but for units."""
    if isinstance(a, Relation) and isinstance(b, Relation):
        if a.name == b.name is not None and same(a.value, b.value):
            return True
        ordered, both = a.sign in ("<", "≤"), a.difference and b.difference
        return bool(both) and a.sign == b.sign and a.difference.multiple(b.difference, ordered)
    if isinstance(a, Relation) or isinstance(b, Relation):
        a, b = (x.value if isinstance(x, Relation) else x for x in (a, b))
        return a is not None and b is not None and same(a, b)
    if isinstance(a, Items) and isinstance(b, Items):
        return same_items(a, b)
    if isinstance(a, Items) or isinstance(b, Items):
        a, b = (x.decimal if isinstance(x, Items) else x for x in (a, b))
    if isinstance(a, (Number, Measure)) and isinstance(b, (Number, Measure)):
        extra = not b.unit and not NO_UNITS & set(a.unit.split())
        return (a.unit == b.unit or extra) and same_value(a, b)
    return isinstance(a, str) and a == b


def same_value(a: Number | Measure, b: Number | Measure) -> bool:
    """Exact; but a long decimal is also what rounds to it and is not a decimal itself."""
    if isinstance(a, Measure) and isinstance(b, Measure):
        return a.expression.same(b.expression)
    long, other = (a, b) if isinstance(a, Number) and a.places >= ROUNDED else (b, a)
    places = long.places if isinstance(long, Number) else 0
    # 0.0000 and 0.0001 stand for themselves only: too many small numbers round to them.
    if places >= ROUNDED and abs(long.value) * 10**places >= 100:
        half = Fraction(1, 2 * 10**places)
        if isinstance(other, Measure):
            return other.expression.near(long.value, half)
        if other.places == 0:
            return abs(long.value - other.value) <= half
    return isinstance(a, Number) and isinstance(b, Number) and a.value == b.value


def same_items(a: Items, b: Items) -> bool:
    """In any order: sets, unions, and lists without brackets."""
    if {a.kind, b.kind} <= {"list", "{}"} or a.kind == b.kind == "union":
        names = [{x.name for x in group.items if isinstance(x, Relation)} for group in (a, b)]
        # a = 1, b = 2 says what the order of a list without names has to be.
        if all(names) or not any(names) or max(map(len, names)) == 1:
            return all(any(same(x, y) for y in b.items) for x in a.items) and all(
                any(same(x, y) for x in a.items) for y in b.items
            )
    elif a.kind != b.kind and {a.kind, b.kind} != {"list", "()"}:
        return False
    return len(a.items) == len(b.items) and all(map(same, a.items, b.items))


def math_equal(prediction: str | None, gold: str) -> bool:
    """Whether the two are one answer, by the rules above.

    Raises ValueError on a blank gold, which would otherwise reward a blank prediction.
    """
    wanted = read(gold)
    if wanted is None and len(gold) <= MAX_ANSWER and not undress(gold):
        raise ValueError(f"gold is {gold!r}; it must hold an answer: drop this question")
    if wanted is None or prediction is None:
        return False
    answer = read(prediction)
    return answer is not None and same(answer, wanted)
