"""A calculator tool: expressions are parsed and evaluated in bounded time, never run as code.

Exact arithmetic on integers and fractions by sympy. Only the functions in FUNCTIONS can be called,
names have no values, and every intermediate result has at most DIGITS digits.
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


class ExpressionError(ValueError):
    """The calculator cannot evaluate an expression; the message says why."""


def calculate(expression: str) -> str:
    """The exact value of `expression`, as "42", "3/4" or "sqrt(2)"; ExpressionError without one.

    Python notation; also `^` for powers, `×`, `÷`, and a trailing `=`.
    """
    text = expression.strip().rstrip("= ?.").replace("^", "**").replace("×", "*").replace("÷", "/")
    if not 0 < len(text) <= LONGEST:
        raise ExpressionError(f"an expression has 1 to {LONGEST} signs, this one {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"{text!r} is no expression") from error
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
            return _operate(type(kind), _value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if (
            name in FUNCTIONS
        ):
            return _call(name, [_value(arg) for arg in args])
    raise ExpressionError(f"{ast.unparse(node)!r} is no number and no known operation")


def _operate(kind, left, right):
    if right == 0 and kind in (ast.Div, ast.FloorDiv, ast.Mod):
        raise ExpressionError("division by zero")
    if kind is ast.Pow:
        small = right.is_Integer and abs(right) <= DIGITS
        if not small or abs(int(right)) * _digits(left) > DIGITS or (left == 0 and right < 0):
            raise ExpressionError(f"the power {left}**{right} is too large or undefined")
    return _bounded(_BINARY[kind](left, right))


def _call(name: str, args: list):
    if name in ("gcd", "lcm") and not (len(args) >= 2 and all(x.is_Integer for x in args)):
        raise ExpressionError(f"{name} takes two whole numbers or more")
    if name in ("abs", "sqrt") and (len(args) != 1 or not args[0].is_Rational):
        raise ExpressionError(f"{name} takes one rational number")
    if name == "sqrt" and not (args[0] >= 0 and _digits(args[0]) <= 20):
        raise ExpressionError("sqrt takes a number from 0 on, of at most 20 digits")
    if name in ("gcd", "lcm"):
        value = args[0]
        for other in args[1:]:
            value = FUNCTIONS[name](value, other)
        return _bounded(value)
    return _bounded(FUNCTIONS[name](*args))


def _digits(number) -> int:
    if not number.is_Rational:
        return DIGITS
    return max(len(str(abs(number.p))), len(str(number.q)))


def _bounded(number):
    if number.is_Rational and _digits(number) > DIGITS:
        raise ExpressionError(f"a result has more than {DIGITS} digits")
    return number
