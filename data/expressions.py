r"""Expressions as people write them, in LaTeX or plain: \frac{x+2}{7}, 3\sqrt{13}, 2 sin b cos a.

Nothing here executes a text: a recursive-descent parser of our own reads it into nested tuples such
as ("+", ("name", "x"), ("number", Fraction(1))). Two expressions are equal where their values are,
at PLACES fixed pseudo-random places: exact fractions as long as there are no roots and functions,
160 bits beyond. All is bounded (length, depth, exponents, size), for a policy writes these texts.

    sum      := ["+" | "-"] product (("+" | "-") product)*
    product  := power (["*" | "/"] power)*        without a sign it multiplies, as in 2x
    power    := atom ["!"] ["^" argument]
    argument := ["-"] atom
    atom     := number | name | "(" sum ")" | "{" sum "}" | "|" sum "|"
              | \frac argument argument | \sqrt ["[" sum "]"] argument | \sin ["^" argument] power+

Read next: answers.py, which reads what is more than an expression: lists, equations, units.
Run: python -m pytest tests/test_answers.py
"""

import functools
import math
import operator
import random
import re
from fractions import Fraction

import mpmath

MAX_DEPTH = 20  # nested parentheses; Python's own stack is the limit this stays away from
MAX_BITS = 4000  # of a value; beyond, no value
PLACES = 4

mp = mpmath.mp.clone()  # a context of our own: its precision is nobody else's
mp.prec = 160
CLOSE = mp.mpf(2) ** -110  # relative; what is left to rounding and to cancellation is 50 bits

# \sin^{-1} is the inverse; \log has the base 10.
FUNCTIONS = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc,
    "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh,
    "tanh": mp.tanh, "exp": mp.exp, "ln": mp.ln, "log": mp.log10,
}  # fmt: skip
CONSTANTS = {"pi": mp.pi(), "e": mp.e(), "i": mp.j}
NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi"
    " rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi"
    " Omega infty ell hbar pi e i".split()
)
SIGNS = {"times": "*", "cdot": "*", "div": "/", "ast": "*", "lvert": "|", "rvert": "|", "vert": "|"}
COMMANDS = {  # the token that a command is
    **{name: ("name", name) for name in NAMES},
    **{name: ("function", name) for name in FUNCTIONS},
    **{name: ("sign", sign) for name, sign in SIGNS.items()},
    **{name: ("command", name) for name in ("frac", "sqrt")},
}
WORDS = {*FUNCTIONS, "sqrt", "pi"}  # what a plain text may write without a backslash
BRACKETS = {"(": ")", "{": "}", "|": "|"}

TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
    r"|(?P<indexed>(?:[A-Za-z]|\\[A-Za-z]+)(?<!\\log)_(?:[A-Za-z0-9]|\{[A-Za-z0-9+\-, ]*\}))"
    r"|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+(?![A-Za-z_])|[A-Za-z])"
    r"|(?P<sign>[-+*/^!()\[\]{}|_])|(?P<unknown>\S)"
)


def tokenize(text: str) -> list[tuple[str, str]]:
    """Pairs of kind and text: number, name, function, command (frac, sqrt) or sign. ValueError."""
    tokens = []
    for match in TOKEN.finditer(text):
        kind, found = match.lastgroup, match[match.lastgroup]
        if kind == "word" and found not in WORDS and len(found) <= 3:
            tokens += [("name", letter) for letter in found]
        elif kind == "indexed":
            tokens.append(("name", re.sub(r"[{} ]", "", found)))
        elif kind in ("number", "sign"):
            tokens.append((kind, found))
        elif found in COMMANDS and (kind == "command" or found in WORDS):
            tokens.append(COMMANDS[found])
        else:
            raise ValueError(f"found {found!r}, which is neither a name nor a function")
    return [*tokens, ("end", "")]


class Parser:
    """Reads the tokens from the left; each method takes what it has read."""

    def __init__(self, text: str):
        self.tokens, self.position, self.depth, self.bars = tokenize(text), 0, 0, False

    def parse(self) -> tuple:
        """The whole text as a tree; ValueError where it is none."""
        tree = self.sum()
        self.expect("end", "")
        return tree

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position]

    def take(self, *signs: str) -> str | None:
        """The next token's text, if it is one of these signs."""
        kind, text = self.peek()
        if kind != "sign" or text not in signs:
            return None
        self.position += 1
        return text

    def expect(self, kind: str, text: str) -> None:
        if self.peek() != (kind, text):
            raise ValueError(f"found {self.peek()[1]!r} where {text or 'the end'!r} belongs")
        self.position += 1

    def sum(self) -> tuple:
        """All terms in one node, however many, so that only brackets make a tree deep."""
        sign, terms = self.take("+", "-"), []
        while sign or not terms:
            term = self.product()
            terms.append(("-", term) if sign == "-" else term)
            sign = self.take("+", "-")
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def product(self) -> tuple:
        factors = [self.power()]
        while (sign := self.take("*", "/")) or self.starts_factor():
            factor = self.power()
            parts = [factors[-1], *factor[1:]] if factor[0] == "frac" and not sign else [()]
            if all(part[:1] == ("number",) and part[1].denominator == 1 for part in parts):
                factors[-1] = ("+", factors[-1], factor)  # a mixed number: two and a third
            else:
                factors.append(("/", factor) if sign == "/" else factor)
        return ("*", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign. It is never a number: "4 2" is not 8."""
        kind, text = self.peek()
        if kind == "sign":
            return text == "(" or (text == "|" and not self.bars)
        return kind in ("name", "function", "command")

    def power(self) -> tuple:
        tree = self.atom()
        if self.take("!"):
            tree = ("!", tree)
        return ("^", tree, self.argument()) if self.take("^") else tree

    def argument(self) -> tuple:
        """What ^, \\frac and \\sqrt take: {sum}, or one atom with its sign."""
        if self.take("-"):
            return ("-", self.atom())
        return self.atom()

    def atom(self) -> tuple:
        (kind, text), self.position = self.peek(), self.position + 1
        if kind in ("number", "name"):
            return (kind, Fraction(text) if kind == "number" else text)
        bars, self.bars, self.depth = self.bars, text == "|", self.depth + 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if kind == "function":
            tree = self.function(text)
        elif text == "frac":
            tree = ("frac", self.argument(), self.argument())
        elif text == "sqrt":
            degree = ("number", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.expect("sign", "]")
            tree = ("root", self.argument(), degree)
        elif text in BRACKETS:
            tree = self.sum()
            self.expect("sign", BRACKETS[text])
            tree = ("abs", tree) if text == "|" else tree
        else:
            raise ValueError(f"found {text or 'the end'!r} where a number or a name belongs")
        self.depth, self.bars = self.depth - 1, bars
        return tree

    def function(self, name: str) -> tuple:
        """\\sin^2 x, \\log_2 8, \\sin 2x: without parentheses, up to a sign or a function."""
        base = self.argument() if name == "log" and self.take("_") else None
        exponent = self.argument() if self.take("^") else None
        if exponent == ("-", ("number", Fraction(1))):
            if f"arc{name}" not in FUNCTIONS:
                raise ValueError(f"the inverse of {name} is not known")
            name, exponent = f"arc{name}", None
        factors = [self.atom() if self.peek() == ("sign", "(") else self.power()]
        if factors[0][0] in ("number", "name"):  # \\sin 2x y, but \\sin(2)x ends at ")"
            while self.peek()[0] in ("name", "command"):
                factors.append(self.power())
        value = ("*", *factors)
        tree = (name, value) if base is None else ("*", ("ln", value), ("/", ("ln", base)))
        return tree if exponent is None else ("^", tree, exponent)


# ---- values ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def place(name: str, number: int) -> Fraction:
    """The value of a name at a place: positive at the first two, negative at the third."""
    rng = random.Random(f"{name} {number}")
    sign = (1, 1, -1, rng.choice((1, -1)))[number]
    return sign * Fraction(rng.randrange(500, 3000), 1009)


def evaluate(tree: tuple, number: int = 0):
    """The value at a place: a Fraction as long as that is exact, else of mpmath's.
    ValueError where it is too large, ZeroDivisionError where there is none."""
    operation, *parts = tree
    if operation == "number":
        return parts[0]
    if operation == "name":
        return CONSTANTS[parts[0]] if parts[0] in CONSTANTS else place(parts[0], number)
    values = [evaluate(part, number) for part in parts]
    if operation in ("+", "*"):  # of any number of values, one by one, lest it grow too far
        return functools.reduce(lambda a, b: apply(operation, a, b), values)
    return apply(operation, *values)


def apply(operation: str, *values):
    """The result, if it is of a size that can be worked with; a long fraction is rounded."""
    if operation in FUNCTIONS or not exact(*values):
        values = [mp.convert(value) for value in values]
    result = OPERATIONS[operation](*values)
    if isinstance(result, Fraction):
        if bits(result) <= MAX_BITS:
            return result
        result = mp.convert(result)
    if not mp.isfinite(result) or (result != 0 and abs(mp.mag(result)) > MAX_BITS):
        raise ValueError("too large, or not a number")
    return result


def bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length() - 2


def function(name: str, value):
    if name in ("ln", "log"):
        if value == 0:
            raise ZeroDivisionError
    elif value != 0 and mp.mag(value) > 200:
        raise ValueError(f"{name} of too large a number")  # a sine of 2^4000 takes 4000 bits of pi
    return FUNCTIONS[name](value)


def power(base, exponent):
    if base == 0:
        if mp.re(exponent) <= 0:
            raise ZeroDivisionError
        return base
    if isinstance(base, Fraction) and exponent.denominator == 1:
        if abs(exponent) * bits(base) <= MAX_BITS:
            return base ** int(exponent)
    base, exponent = mp.convert(base), mp.convert(exponent)
    if mp.mag(exponent) > 64:
        raise ValueError("too large an exponent")  # e^{2^4000} takes a second to be found too large
    return mp.power(base, exponent)


def root(value, degree):
    """Of a negative number the real root, if the degree is odd, else the principal one."""
    if degree not in range(2, 101):
        raise ValueError("the degree of a root is other than 2 to 100")
    value, degree = mp.convert(value), int(mp.re(degree))
    if degree % 2 and is_real(value) and mp.re(value) < 0:
        return -mp.root(-mp.re(value), degree)
    return mp.sqrt(value) if degree == 2 else mp.root(value, degree)


def factorial(value):
    if value not in range(301):
        raise ValueError("the factorial of other than 0 to 300")
    return Fraction(math.factorial(int(mp.re(value))))


OPERATIONS = {
    "+": operator.add, "*": operator.mul, "/": lambda a: 1 / a, "frac": operator.truediv,
    "-": operator.neg, "abs": abs, "!": factorial, "^": power, "root": root,
    **{name: functools.partial(function, name) for name in FUNCTIONS},
}  # fmt: skip


def is_real(value) -> bool:
    return isinstance(value, Fraction) or abs(mp.im(value)) <= CLOSE * abs(value)


def exact(*values) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def close(a, b) -> bool:
    """Equal: exactly if both are exact, else but for the rounding."""
    if exact(a, b):
        return a == b
    a, b = mp.convert(a), mp.convert(b)
    return abs(a - b) <= CLOSE * max(abs(a), abs(b))


# ---- expressions -----------------------------------------------------------------------


class Expression:
    """An expression that has values; compared with `same`. ValueError where the text is none,
    ZeroDivisionError where it has no value anywhere, such as 1/0."""

    def __init__(self, text: str):
        parser = Parser(text)
        self.tree = parser.parse()
        self.names = {name for kind, name in parser.tokens if kind == "name"} - CONSTANTS.keys()
        # At all places at once: where one is too large it has to show here, not in a comparison.
        self.first = self.value(0)
        others = [self.value(n) if self.names else self.first for n in range(1, PLACES)]
        self.values = [self.first, *others]  # those of a constant are the same
        if self.first is None and self.values.count(None) > PLACES - 2:
            raise ZeroDivisionError("no value")

    def value(self, number: int):
        """The value at a place, None where there is none."""
        try:
            return evaluate(self.tree, number)
        except ZeroDivisionError:
            return None

    def same(self, other: "Expression") -> bool:
        """Whether the values agree wherever both have one. Where only one of the two is real,
        as are ln x^2 and 2 ln x at negative x, nothing is said; at two places something has to."""
        if not all(close(a, b) for a, b in comparable([self.first], [other.first])):
            return False  # as most pairs do
        pairs = comparable(self.values, other.values)
        return len(pairs) >= 2 and all(close(a, b) for a, b in pairs)

    def near(self, value: Fraction, distance: Fraction) -> bool:
        """Whether it is a constant at most that far away from the value."""
        return not self.names and abs(mp.convert(self.first) - value) <= mp.convert(distance)

    def multiple(self, other: "Expression", positive: bool) -> bool:
        """Whether it is the other times a constant that is not 0, and positive if so asked."""
        pairs = comparable(self.values, other.values)
        pairs = [(a, b) if exact(a, b) else (mp.convert(a), mp.convert(b)) for a, b in pairs]
        ratios = [a / b if b else 0 for a, b in pairs if a or b]
        if len(pairs) < 2 or not all(ratios):
            return False
        if positive and not all(is_real(ratio) and mp.re(ratio) > 0 for ratio in ratios):
            return False
        return all(close(ratio, ratios[0]) for ratio in ratios)


def comparable(first: list, second: list) -> list[tuple]:
    pairs = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    return [(a, b) for a, b in pairs if is_real(a) == is_real(b)]


def arithmetic(text: str) -> Fraction:
    """The value of numbers, + - * / and parentheses: no signs before a number, and nothing left
    out, as in 2(3). ValueError for all else, ZeroDivisionError by zero."""
    compact = re.sub(r"\s*([-+*/()])\s*", r"\1", text.strip())
    if re.search(r"[^-+*/()0-9]|(^|[-+*/(])[-+*/]|[0-9)]\(", compact):
        raise ValueError(f"found {text!r}; expected numbers, + - * / and parentheses")
    return evaluate(Parser(compact).parse())
