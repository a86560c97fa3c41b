r"""The value of plain algebra, to tell two expressions apart without the slow LaTeX parser.

Only what no parser reads otherwise: sums, products, powers, `\frac`, `\sqrt` and `\pi` of numbers
and of letters but e and i. Anything else has no value here: three letters side by side (a word?),
one before a parenthesis (a function?), a number before a fraction (mixed?), a slash, two numbers in
a row.
"""

import math
import re

_TOKEN = re.compile(
    r" *(?:(?P<number>[0-9]{1,15}(?:\.[0-9]{1,15})?(?![0-9.,]))"
    r"|(?P<command>\\(?:frac|sqrt|pi|cdot|times)(?![a-zA-Z]))"
    r"|(?P<letter>(?<![a-zA-Z]{2})[a-df-hj-z](?![A-Za-z]{2}|_| ?[('!]))|(?P<sign>[-+^(){}\[\]]))"
)
_STARTS = {"number", "letter", r"\pi", "(", r"\sqrt", r"\frac"}
TOLERANCE = 1e-6  # relative: that of floats in math-verify; rounding here is far below
DEEPEST = 50  # nested groups


def apart(one: str, other: str) -> bool:
    """Whether two tidied expressions have values, and these differ where letters have values."""
    values = evaluate(one), evaluate(other)
    if None in values:
        return False
    first, second = values
    return abs(first - second) > TOLERANCE * max(abs(first), abs(second))


def evaluate(text: str) -> float | None:
    """The real value of an expression with letters between 1 and 2; None where it has none here."""
    try:
        reader = _Reader(text)
        value = reader.sum()
        return value if reader.kind == "end" and math.isfinite(value) else None
    except (ValueError, ArithmeticError):
        return None


class _Reader:
    """Recursive descent; ValueError for anything that is not plain algebra."""

    def __init__(self, text: str):
        self.text, self.place, self.depth = text.rstrip(), 0, 0
        self.next()

    def next(self) -> str:
        """The current token; the reader moves to the one behind it."""
        before = getattr(self, "token", "")
        if self.place == len(self.text):
            self.kind = self.token = "end"
            return before
        match = _TOKEN.match(self.text, self.place)
        if not match:
            raise ValueError(self.text)
        self.place, self.token = match.end(), match[0].strip()
        self.kind = match.lastgroup if match.lastgroup in ("number", "letter") else self.token
        return before

    def take(self, token: str) -> None:
        if self.next() != token:
            raise ValueError(token)

    def sum(self) -> float:
        sign = -1 if self.token == "-" else 1
        if self.token in ("-", "+"):
            self.next()
        value = sign * self.product()
        while self.token in ("-", "+"):
            value += (-1 if self.next() == "-" else 1) * self.product()
        return value

    def product(self) -> float:
        before, value = self.kind, self.power()
        while self.kind in _STARTS or self.token in (r"\cdot", r"\times"):
            if self.token in (r"\cdot", r"\times"):
                self.next()
            elif self.kind == "number" or (before == "number" and self.kind == r"\frac"):
                raise ValueError("two numbers side by side")
            before = self.kind
            value *= self.power()
        return value

    def power(self) -> float:
        value = self.base()
        if self.token != "^":
            return value
        self.next()
        if self.kind == "number" and len(self.token) > 1:
            raise ValueError("an exponent of two digits without braces")
        value = math.pow(value, self.base())
        if self.token == "^":
            raise ValueError("a tower of powers")
        return value

    def base(self) -> float:
        kind, token = self.kind, self.next()
        if kind == "number":
            return float(token)
        if kind == "letter":
            return 1 + (7 * ord(token) % 26 + 1) / 27.5
        if token == r"\pi":
            return math.pi
        if token in ("(", "{"):
            return self.group(token)
        if token == r"\frac":
            return self.braced() / self.braced()
        if token != r"\sqrt":
            raise ValueError(token)
        degree = 2.0
        if self.token == "[":
            self.next()
            degree = float(self.next())
            self.take("]")
        bare = self.kind == "letter" or (self.kind == "number" and len(self.token) == 1)
        inside = self.base() if bare else self.braced()
        return math.pow(inside, 1 / degree)  # ValueError where it is negative

    def braced(self) -> float:
        self.take("{")
        return self.group("{")

    def group(self, bracket: str) -> float:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("too deep")
        value = self.sum()
        self.take({"(": ")", "{": "}"}[bracket])
        self.depth -= 1
        return value
