"""A calculator that a model may use: expressions are read, never run as code, in bounded time.

Exact arithmetic on integers and fractions by sympy. Only what stands in FUNCTIONS can be called,
only numbers can be named, and every intermediate result has at most DIGITS digits, so that nothing
takes longer than a blink.
"""

import ast
import math
import operator

import sympy

DIGITS = 200  # of a numerator or denominator
LONGEST = 200  # characters of an expression
FUNCTIONS = {
    "gcd": sympy.gcd,
    "lcm": sympy.lcm,
    "abs": abs,
    "min": min,
    "max": max,
    "sqrt": sympy.sqrt,
}
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class Unreadable(ValueError):
    """An expression that the calculator does not take; the message says why."""


def calculate(expression: str) -> str:
    """The exact value of `expression`, as "42", "3/4" or "sqrt(2)"; Unreadable says what is wrong.

    Python notation; `^` is a power, `×`, `÷` and `=` with nothing behind it are understood.
    """
    text = expression.strip().rstrip("= ?.").replace("^", "**").replace("×", "*").replace("÷", "/")
    if not 0 < len(text) <= LONGEST:
        raise Unreadable(f"an expression has 1 to {LONGEST} signs, this one {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Unreadable(f"{text!r} is no expression") from error
    return str(_value(tree))


def _value(node: ast.AST):
    """The sympy number of one node."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(
            number, bool
        ) and math.isfinite(number):
            return _bounded(sympy.Rational(str(number)))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            return -_value(inner) if isinstance(sign, ast.USub) else _value(inner)
        case ast.BinOp(op=kind, left=left, right=right) if type(kind) in _BINARY:
            return _combined(type(kind), _value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as given, keywords=[]) if (
            name in FUNCTIONS
        ):
            return _called(name, [_value(each) for each in given])
    raise Unreadable(f"{ast.unparse(node)!r} is no number and no known operation")


def _combined(kind, left, right):
    if right == 0 and kind in (ast.Div, ast.FloorDiv, ast.Mod):
        raise Unreadable("division by zero")
    if kind is ast.Pow:
        small = right.is_Integer and abs(right) <= DIGITS
        if not small or abs(int(right)) * _digits(left) > DIGITS or (left == 0 and right < 0):
            raise Unreadable(f"the power {left}**{right} is too large or undefined")
    return _bounded(_BINARY[kind](left, right))


def _called(name: str, given: list):
    if name in ("gcd", "lcm") and not (len(given) >= 2 and all(x.is_Integer for x in given)):
        raise Unreadable(f"{name} takes two whole numbers or more")
    if name in ("abs", "sqrt") and (len(given) != 1 or not given[0].is_Rational):
        raise Unreadable(f"{name} takes one rational number")
    if name == "sqrt" and not (given[0] >= 0 and _digits(given[0]) <= 20):
        raise Unreadable("sqrt takes a number from 0 on, of at most 20 digits")
    if name in ("gcd", "lcm"):
        value = given[0]
        for other in given[1:]:
            value = FUNCTIONS[name](value, other)
        return _bounded(value)
    return _bounded(FUNCTIONS[name](*given))


def _digits(number) -> int:
    if not number.is_Rational:
        return DIGITS
    return max(len(str(abs(number.p))), len(str(number.q)))


def _bounded(number):
    if number.is_Rational and _digits(number) > DIGITS:
        raise Unreadable(f"a result has more than {DIGITS} digits")
    return number
