"""The school suite: every answer found again from the text alone, by search or simulation."""

import itertools
import json
import math
import os
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from sympy import interpolate, symbols
from sympy.parsing.sympy_parser import (
    implicit_multiplication,
    parse_expr,
    standard_transformations,
)
from sympy.solvers import solve

from kit import paths
from kit.data import generated, school
from kit.data.dedup import check_disjoint, signature
from kit.data.problems import SPLITS, load
from kit.evaluation import grader

DATA = Path(os.environ.get("KIT_DATA", paths.ROOT.parent / "shared" / "data"))
CELLS = list(itertools.product(school.FAMILIES, (1, 2, 3)))
BESIDE_THE_POINT = re.compile(
    r"[A-Z]\w+ turned \d+ last week\. ?|It is \d+ degrees outside\. ?"
    r"|\w+ and \w+ have been neighbours for \d+ years\. ?"
    r"|All of this happens in a town of \d+ streets\. ?"
    r"|The day before, \w+ had slept for \d+ hours\. ?|\w+ heard of it \d+ minutes later\. ?"
)
MANY = range(1, 20_000)


# ---- what the numbers of a text say, in the order of the text --------------------------------


def reduced(a, p, off, fee):
    return sum(p - Fraction(p * off, 100) for _ in range(a)) + fee


def reduced_both(a, p, b, q, off, fee):
    return sum((1 - Fraction(off, 100)) * price for price in [p] * a + [q] * b) + fee


def some_free(each, p, n, b, q):
    paid = next(paid for paid in MANY if paid + paid // each >= n)
    return sum([p] * paid + [q] * b)


def full_bags(a, n, gone, k):
    return sum(1 for _ in range(k, a * n - gone + 1, k))


def empty_seats(a, n, t, s):
    people, seats = a * n + t, s
    while seats < people:
        seats += s
    return seats - people


def three_shares(k, d, total):
    second = next(x for x in MANY if x + k * x + k * x - d == total)
    return total - second - k * second


def equation(text):
    x = symbols("x")
    written = re.search(r"[-+x\d/() ]+ = [-+x\d/() ]*[x\d)]", text)[0].strip()
    rules = (*standard_transformations, implicit_multiplication)
    left, right = (parse_expr(side, transformations=rules) for side in written.split("="))
    (found,) = solve(left - right, x)
    return found


def tickets(n, p, q, total):
    return next(a for a in range(n + 1) if a * p + (n - a) * q == total)


def one_price(text):
    first, second = map(int, re.findall(r"\$(\d+)", text))
    a, b, c, d = map(int, re.findall(r"(?<![$\d])\d+", text))
    prices = itertools.product(range(1, 60), repeat=2)
    (found,) = {p for p, q in prices if a * p + b * q == first and c * p + d * q == second}
    return found


def ages(d, n, later):
    return next(old for old in range(d, 200) if old + n + old - d + n == later)


def parts(text):
    return [Fraction(part) for part in re.findall(r"\d+/\d+", text)]


def sum_of_parts(text):
    one, _, two, _, three = text.removeprefix("Calculate ").split()[:5]
    return Fraction(one) + Fraction(two) - Fraction(three)


def remains(text):
    whole = left = math.prod(part.denominator for part in parts(text))
    for part in parts(text):
        left -= left * part
    return Fraction(left, whole)


def whole(text):
    (one, two), last = parts(text), int(re.search(r" (\d+) (?:pages|litres)", text)[1])
    return next(w for w in MANY if w - one * w - two * w == last)


def before(p, q, now):
    def twice(n):
        return (once := n - Fraction(n * p, 100)) - once * q / 100

    return next(n for n in MANY if twice(n) == now)


def without(n, a, b, c):
    girls = range(int(Fraction(n * a, 100)))
    others = range(len(girls), n)
    with_one = {*girls[: len(girls) * b // 100], *others[: len(others) * c // 100]}
    return n - len(with_one)


def thinner(a, p, b, q, c):
    sugar = [Fraction(p, 100)] * a + [Fraction(q, 100)] * b + [Fraction(0)] * c
    return 100 * sum(sugar) / len(sugar)


def area(perimeter, d):
    return next(w * (w + d) for w in MANY if w + w + d + w + w + d == perimeter)


def path(a, b, t):
    squares = itertools.product(range(-t, a + t), range(-t, b + t))
    return sum(not (0 <= x < a and 0 <= y < b) for x, y in squares)


def rise(a, b, h, n, s):
    water = a * b * h
    return next(Fraction(i, 2) for i in MANY if a * b * (h + Fraction(i, 2)) - water == n * s**3)


def hands(n, k):
    return sum(1 for _ in itertools.combinations(range(n), k))


def juries(a, b, k, m):
    one, other = (itertools.combinations(range(size), of) for size, of in ((a, k), (b, m)))
    return sum(1 for _ in itertools.product(one, other))


def with_a_woman(a, b, m, least):
    drawn = itertools.combinations([1] * a + [0] * b, m)
    return sum(sum(jury) >= least for jury in drawn)


def way_back(a, u, b, v, w):
    return Fraction(sum([u] * a + [v] * b if u > 7 else [a] * u + [b] * v), w)


def caught(u, t, v):
    return next(x for x in MANY if v * x == u * (x + t))


def met(apart, u, v):
    return next(u * Fraction(t, 2) for t in MANY if Fraction(t, 2) * (u + v) == apart)


def rows(a, last, n):
    return sum(range(a, last + 1, (last - a) // (n - 1)))


def term(i, x, j, y, k):
    return interpolate([(i, x), (j, y)], k)


def up_to(a, i, x, n):
    return sum(interpolate([(1, a), (i, x)], at) for at in range(1, n + 1))


ORACLES = {  # of a level each: by all numbers of the text, or by the text
    "shopping": (reduced, reduced_both, some_free),
    "sharing": (full_bags, empty_seats, three_shares),
    "equations": (equation,) * 3,
    "systems": (tickets, one_price, ages),
    "fractions": (sum_of_parts, remains, whole),
    "percentages": (before, without, thinner),
    "geometry": (area, path, rise),
    "counting": (hands, juries, with_a_woman),
    "rates": (way_back, caught, met),
    "sequences": (rows, term, up_to),
}
BY_TEXT = (equation, one_price, sum_of_parts, remains, whole)


def found(p) -> Fraction:
    """The answer of a problem, from its text."""
    text, dropped = BESIDE_THE_POINT.subn("", p.question)
    assert dropped == (p.level == 3 and p.family != "equations"), p.question
    oracle = ORACLES[p.family][p.level - 1]
    read = [text] if oracle in BY_TEXT else map(int, re.findall(r"-?\d+", text))
    return Fraction(str(oracle(*read)))


# ---- tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_answers_are_right_and_problems_differ(family, level):
    made = generated.generate(family, level, 24, seed=5)
    for p in made:
        assert found(p) == Fraction(p.answer), (p.question, p.answer)
        assert (p.family, p.level, p.source) == (family, level, "school")
        assert p.question == " ".join(p.question.split()) and len(p.answer) <= 8
    cores = {signature(BESIDE_THE_POINT.sub("", p.question)).numbers for p in made}
    assert len(cores) == len(made), "the same numbers in other words are the same problem"
    assert generated.guess_share(made) <= 0.25
    for p in made:
        assert p.answer.lstrip("-") not in ["0", *re.findall(r"[\d/]+", p.question)], p.question
    worded = {re.sub(r"\d+", "", p.question).strip(" +-") for p in made}
    assert len(worded) > 1 or (family, level) == ("fractions", 1)


def test_the_frozen_suite_is_right_disjoint_and_even():
    sets = {split: load("school", split) for split in SPLITS}
    assert {split: len(one) for split, one in sets.items()} == generated.SIZES["school"]
    for one, other in itertools.combinations(sets.values(), 2):
        check_disjoint(one, other)
    everything = [p for one in sets.values() for p in one.problems]
    assert len({p.id for p in everything}) == len(everything)
    for p in everything:
        assert found(p) == Fraction(p.answer), p
    cores = Counter(
        (p.family, p.level, *signature(BESIDE_THE_POINT.sub("", p.question)).numbers)
        for p in everything
    )
    assert max(cores.values()) == 1
    for one in sets.values():
        counts = Counter((p.family, p.level) for p in one.problems)
        assert {*counts} == {*CELLS} and max(counts.values()) - min(counts.values()) <= 1


def test_the_frozen_suite_shares_nothing_with_other_sets():
    others = [load("laptop", split) for split in SPLITS]
    if DATA.is_dir():
        others += [load(name, path=DATA / f"{name}_test.jsonl") for name in ("gsm8k", "math")]
    for split, other in itertools.product(SPLITS, others):
        check_disjoint(load("school", split), other)


def test_the_frozen_suite_can_be_made_again_from_its_manifest():
    manifest = json.loads((paths.DATA / "problems" / "school.manifest.json").read_text())
    made = generated.make(
        "school", list(manifest["families"]), manifest["counts"], manifest["seed"]
    )
    for one in made:
        assert one.fingerprint == load("school", one.split).fingerprint


def test_a_required_form_is_that_of_the_answer():
    suite = load("school").problems
    golds, asks = [p.answer for p in suite], [p.asks for p in suite]
    assert {p.family: p.asks for p in suite if p.asks != "any"} == {
        "equations": "evaluated",
        "fractions": "simplified",
    }
    boxed = [f"\\boxed{{{gold}}}" for gold in golds]
    assert all(grade.correct for grade in grader.grade_many(boxed, golds, asks=asks))
    echo = next(p for p in suite if (p.family, p.level) == ("fractions", 1))
    said = echo.question.removeprefix("Calculate ").split(" as ")[0]
    assert not grader.grade(f"\\boxed{{{said}}}", echo.answer, asks=echo.asks).correct


def test_an_unknown_suite_or_family_is_named():
    with pytest.raises(ValueError, match="no suite 'college'; there are laptop, school"):
        generated.families_of("college")
    with pytest.raises(ValueError, match="no family 'knots'; there are chain_sum, .*sequences"):
        generated.levels("knots")
