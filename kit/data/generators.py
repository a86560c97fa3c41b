"""Task families of the laptop suite: reasoning-gym settings by level, asked plainly.

One entry per reasoning-gym dataset: generator settings from easy to hard, how an entry becomes
one self-contained question without format instructions, and which entries are kept. `suite`
generates and freezes them. Levels are easy on purpose: the bundled 135M model must solve between
15% and 50% of the suite, or nothing could be compared on it (LOG.md has the table of what was
tried). Families whose golds an independent oracle does not confirm are not here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

Entry = dict  # what reasoning-gym makes: question, answer, metadata


@dataclass(frozen=True)
class Family:
    """Settings of one reasoning-gym dataset by level, and how its entries become questions."""

    levels: tuple[dict, ...]  # generator settings, easiest first
    ask: Callable[[Entry], str]
    keep: Callable[[Entry, int], bool] = lambda entry, level: True
    asks: str = "any"  # form of the answer, one of schema.ASKS


def _range(name: str, low: int, high: int) -> dict:
    return {f"min_{name}": low, f"max_{name}": high}


def _calculate(entry: Entry) -> str:
    return f"Calculate {entry['metadata']['expression']}."


def _of_numbers(what: str) -> Callable[[Entry], str]:
    def ask(entry: Entry) -> str:
        numbers = ", ".join(map(str, entry["metadata"]["numbers"]))
        return f"Find the {what} of these numbers: {numbers}."

    return ask


def _factors(entry: Entry, level: int) -> bool:
    """No trivial factor; level 2 has two factors from 10 to 29."""
    factors = list(map(int, entry["metadata"]["expression"].split(" * ")))
    return min(factors) >= 2 if level == 1 else max(factors) < 30


def _equation(entry: Entry) -> str:
    """The unknown is always x: a renamed equation would be the same problem."""
    variable, equation = entry["metadata"]["variable"], entry["metadata"]["equation"]
    return f"Solve for x: {equation.replace('*', '').replace(variable, 'x')}"


def _small(entry: Entry, level: int) -> bool:
    """A coefficient times the unknown; level 1: from 2 to 9, level 2: larger."""
    found = re.match(r"(\d+)\*[a-z] = ", entry["metadata"]["equation"])
    return bool(found) and (2 <= int(found[1]) <= 9) == (level == 1) and int(found[1]) > 1


_TWO_TERMS = _range("terms", 2, 2)
_EQUATIONS = _TWO_TERMS | {
    **_range("value", 1, 9),
    "operators": ("*",),
    "operators_weights": [1.0],
}

FAMILIES = {
    "chain_sum": Family(
        tuple(_TWO_TERMS | _range("digits", k, k) for k in (1, 2)), _calculate, asks="evaluated"
    ),
    "products": Family(
        (_range("terms", 2, 3) | _range("digits", 1, 1), _TWO_TERMS | _range("digits", 2, 2)),
        _calculate,
        _factors,
        asks="evaluated",
    ),
    "gcd": Family(
        tuple({"max_value": top} for top in (15, 50)),
        _of_numbers("Greatest Common Divisor (GCD)"),
    ),
    "lcm": Family(
        tuple({"max_value": top} for top in (15, 30)),
        _of_numbers("Least Common Multiple (LCM)"),
    ),
    "simple_equations": Family((_EQUATIONS, _EQUATIONS), _equation, _small),
    "fraction_simplification": Family(
        tuple(
            {"max_value": top, "styles": ("plain",)} | _range("factor", 2, factor)
            for top, factor in ((10, 5), (30, 10))
        ),
        lambda entry: entry["question"].split(" Give only")[0],
        keep=lambda entry, level: entry["metadata"]["simplified_denominator"] > 1,
        asks="simplified",
    ),
    "letter_counting": Family(
        (_range("words", 5, 6), _range("words", 10, 12)), lambda entry: entry["question"]
    ),
}
