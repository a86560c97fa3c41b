"""Candidate task families of the laptop suite: reasoning-gym settings by level, asked plainly.

One entry per reasoning-gym dataset: generator settings from easy to hard, how an entry becomes
one self-contained question without format instructions, and which entries are sound. Which of
them make up the suite stands in data/problems/MANIFEST.json; `suite` generates and freezes.

Generators of reasoning-gym 0.1.25 give wrong golds unless told otherwise (measured on 1,000 items
each): basic_arithmetic without parentheses works from left to right, 2 + 3 * 4 = 20 (66% wrong),
and with them floors its divisions (1%); family_relationships names in-laws, nieces and nephews
from the wrong side (14%); simple_geometry has "convex" polygons with an angle over 180 degrees.
Hence the operators and the `keep` below.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

Entry = dict  # what reasoning-gym makes: question, answer, metadata


@dataclass(frozen=True)
class Family:
    """Settings of one reasoning-gym dataset by level, and how its entries become questions."""

    levels: tuple[dict, ...]  # generator settings, easiest first
    ask: Callable[[Entry], str]
    keep: Callable[[Entry, int], bool] = lambda entry, level: True  # is the entry sound
    answer: Callable[[Entry], str] = lambda entry: entry["answer"]


def _range(name: str, low: int, high: int) -> dict:
    return {f"min_{name}": low, f"max_{name}": high}


def _terms(terms: int, digits: int, **more) -> dict:
    return _range("terms", terms, terms) | _range("digits", digits, digits) | more


def _what_is(entry: Entry) -> str:
    expression = entry["metadata"]["expression"].replace("( ", "(").replace(" )", ")")
    return f"What is {expression}?"


def _of_numbers(what: str) -> Callable[[Entry], str]:
    def ask(entry: Entry) -> str:
        return f"What is the {what} of {' and '.join(map(str, entry['metadata']['numbers']))}?"

    return ask


def _equation(entry: Entry) -> str:
    """The unknown is always x: a renamed equation would be the same problem."""
    variable, equation = entry["metadata"]["variable"], entry["metadata"]["equation"]
    return f"Solve for x: {equation.replace(variable, 'x')}"


def _next_number(entry: Entry) -> str:
    shown = ", ".join(map(str, entry["metadata"]["sequence"][:-1]))
    return f"What is the next number in this sequence? {shown}"


def _moves(entry: Entry, _level: int) -> bool:
    """The sequence has not run into a constant, whose next number is a copy."""
    return len(set(entry["metadata"]["sequence"][-3:])) > 1


def _legs(entry: Entry) -> str:
    counts = entry["metadata"]["animals"].items()
    animals = [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts]
    return f"How many legs do {' and '.join(animals)} have?"


def _gsm(entry: Entry) -> str:
    return entry["question"].split(" Give the result as your final answer.")[0]


def _few_numbers(entry: Entry, level: int) -> bool:
    """The generator has one difficulty; level 1 are the questions with up to three numbers."""
    return (len(re.findall(r"\d+", entry["question"])) <= 3) == (level == 1)


def _weekday(entry: Entry) -> str:
    start = date.fromisoformat(entry["metadata"]["start_date"])
    days = entry["metadata"]["offset_days"]
    when = f"will it be in {days} days" if days > 0 else f"was it {-days} days ago"
    return (
        f"Today is {start:%A}, {start:%B} {start.day}, {start.year}. What day of the week {when}?"
    )


def _angle(entry: Entry) -> str:
    known = ", ".join(f"{angle:g}" for angle in entry["metadata"]["known_angles"])
    sides = entry["metadata"]["n_sides"]
    return (
        f"A convex polygon with {sides} sides has interior angles of {known} degrees and one more. "
        "How many degrees is that last angle?"
    )


def _largest(entry: Entry) -> str:
    candidates = ", ".join(f"{number:.2f}" for number in entry["metadata"]["candidates"])
    return f"Which of these numbers is the {entry['metadata']['size']}: {candidates}?"


def _relation(entry: Entry) -> str:
    story, known = entry["question"].split("\n\n")[0], entry["metadata"]
    return f"{story} What relation is {known['person1']} to {known['person2']}?"


def _needle(entry: Entry) -> str:
    return entry["question"].removesuffix(" Reply only with a name.").replace(" \n", " ")


def _one_needle(entry: Entry, _level: int) -> bool:
    """The sentence asked about occurs once, so that only one name is right."""
    story, question = entry["question"].split("\n")
    deed = question.removeprefix("Who ").removesuffix("? Reply only with a name.")
    return story.count(f" {deed}. ") == 1


_BLOOD = {"mother", "father", "son", "daughter", "sister", "brother", "wife", "husband"} | {
    "grandmother",
    "grandfather",
}
_NO_DIVISION = {"operators": ("+", "-", "*")}
_SUMS_ONLY = {"operators": ("+", "-"), "operators_weights": [0.5, 0.5]}

FAMILIES = {
    "chain_sum": Family((_terms(2, 1), _terms(2, 2), _terms(3, 2), _terms(4, 3)), _what_is),
    "basic_arithmetic": Family(
        tuple(_terms(t, d, **_NO_DIVISION) for t, d in ((2, 1), (3, 1), (4, 2))), _what_is
    ),
    "products": Family(
        (_terms(2, 1) | {"max_terms": 3}, _terms(2, 2), _terms(2, 3)),
        _what_is,
        keep=lambda entry, level: entry["answer"] != "0",
    ),
    "decimal_chain_sum": Family(
        tuple(
            _terms(2, digits) | _range("decimal_places", places, places)
            for digits, places in ((1, 1), (2, 1), (2, 2))
        ),
        _what_is,
        answer=lambda entry: f"{Decimal(entry['answer']).normalize() + 0:f}",  # 7.140 as 7.14
    ),
    "gcd": Family(
        tuple({"max_value": top} for top in (20, 100, 1000)), _of_numbers("greatest common divisor")
    ),
    "lcm": Family(
        tuple({"max_value": top} for top in (20, 50, 100)), _of_numbers("least common multiple")
    ),
    "fraction_simplification": Family(
        tuple(
            {"max_value": top, "styles": ("plain",)} | _range("factor", 2, factor)
            for top, factor in ((10, 5), (30, 10), (100, 20))
        ),
        lambda entry: entry["question"].split(" Give only")[0],
        keep=lambda entry, level: entry["metadata"]["simplified_denominator"] > 1,
    ),
    "simple_equations": Family(
        (
            _range("terms", 2, 2) | {"max_value": 20} | _SUMS_ONLY,
            _range("terms", 2, 2) | {"max_value": 12},
            _range("terms", 3, 3) | {"max_value": 20},
        ),
        _equation,
    ),
    "number_sequence": Family(
        tuple(_range("terms", 5, 6) | {"max_complexity": k} for k in (1, 2, 3)),
        _next_number,
        keep=_moves,
    ),
    "letter_counting": Family(
        (_range("words", 5, 6), _range("words", 10, 12)), lambda entry: entry["question"]
    ),
    "spell_backward": Family(
        tuple(_range("word_len", low, high) for low, high in ((3, 3), (4, 4), (5, 6))),
        lambda entry: f'Spell the word "{entry["metadata"]["word"]}" backward.',
    ),
    "leg_counting": Family(
        tuple(
            _range("animals", kinds, kinds) | {"max_instances": most}
            for kinds, most in ((1, 10), (2, 10), (4, 15))
        ),
        _legs,
    ),
    "gsm_symbolic": Family(({}, {}), _gsm, keep=_few_numbers),
    "calendar_arithmetic": Family(
        tuple({"tasks": ["weekday_offset"], "offset_upper_bound": top} for top in (7, 30, 100)),
        _weekday,
    ),
    "simple_geometry": Family(
        tuple(_range("sides", low, high) for low, high in ((3, 3), (4, 4), (5, 6))),
        _angle,
        keep=lambda entry, level: entry["metadata"]["missing_angle_raw"] < 180,
    ),
    "number_format": Family(
        tuple(
            _range("num_candidates", k, k) | {"min_n": 1, "max_n": top, "max_delta": delta}
            for k, top, delta in ((3, 100, 50.0), (4, 1000, 10.0), (6, 1000, 1.0))
        ),
        _largest,
        answer=lambda entry: f"{entry['metadata']['solution']:.2f}",
    ),
    "family_relationships": Family(
        tuple(_range("family_size", low, high) for low, high in ((3, 4), (5, 6), (7, 9))),
        _relation,
        keep=lambda entry, level: entry["answer"] in _BLOOD,
    ),
    "needle_haystack": Family(
        tuple(_range("num_statements", k, k) for k in (3, 10, 30)), _needle, keep=_one_needle
    ),
}
