"""The last box of a text, against a table and a slow reference."""

import random
import re

import pytest

from kit.data.boxed import last_boxed

BOXES = [
    (r"\boxed{\frac{1}{2}} then", r"\frac{1}{2}"),
    (r"$\boxed 2$.", "2"),
    (r"\boxed -\frac{1}{2}$", r"-\frac{1}{2}"),
    (r"\fbox{7}", "7"),
    (r"\boxed {8}", "8"),
    (r"\boxed{3} and \boxed{4}", "4"),
    (r"\boxed{3} and \boxed{4", "3"),  # never closed: no box
    (r"\boxed{x = \boxed{5}}", "5"),
    (r"\boxed{5} or \boxed{}", "5"),  # blank: no answer in it
    (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
    (r"\boxed{3\}", None),  # \} closes nothing
    (r"\begin{aligned} x &= 2 \\\boxed{9}", "9"),
    (r"\boxed{a \\{b}}", r"a \\{b}"),
    (r"put it in \boxed form", None),
    (r"\boxed{a \\}", r"a \\"),
    (r"\boxedx{3}", None),
    (r"{\boxed} 1", None),
    ("no box", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def slow_last_boxed(text):
    """Every box start, its matching brace by counting: quadratic, written from the definition."""
    found = None
    for start in re.finditer(r"\\boxed\{", text):
        depth, at = 1, start.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 2
                continue
            depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        if depth == 0 and text[start.end() : at - 1].strip():
            found = text[start.end() : at - 1].strip()
    return found


def test_last_boxed_against_slow_reference():
    rng = random.Random(0)
    pieces = [r"\boxed{", "{", "}", "}", r"\{", r"\}", "1", "x ", r"\frac", r"\\"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 25)))
        assert last_boxed(text) == slow_last_boxed(text), text
