"""Plain algebra has a value, what may be read otherwise has none, and only values tell apart."""

import math

import pytest

from kit.evaluation.equivalence import symbolic
from kit.evaluation.numeric import apart, evaluate

EQUAL = [  # of each row no two are apart
    ("8+4\\sqrt{3}", "4\\sqrt 3 + 8", "4(2+\\sqrt{3})", "8 + \\sqrt{48}"),
    ("(x-1)(x+1)", "x^2-1", "-(1 - x^{2})", "x^2 - x + x - 1"),
    ("\\frac{3\\pi}{4}", "\\frac{3}{4}\\pi", "\\pi \\cdot \\frac{3}{4}"),
    ("2^{-3}", "\\frac{1}{8}", "0.125", "\\sqrt{\\frac{1}{64}}"),
    ("ab - c", "-c + b a"),
    ("2\\sqrt[3]{4}", "\\sqrt[3]{32}"),
]
NO_VALUE = [
    *(
        "x(x+1)",
        "f(2)",
        "2\\frac{1}{3}",
        "1/2x",
        "2 3",
        "1,000",
        "x^10",
        "\\sqrt 12",
        "2^3^2",
        "n!",
    ),
    *("cos x", "max", "e^x", "3i", "x_1", "A", "5%", "x = 2", "x < 2", "\\sin x", "(1,2)", "[1]"),
    *(
        "\\sqrt{-1}",
        "\\frac{x}{0}",
        "(-8)^{\\frac{1}{3}}",
        "2^{2^{100}}",
        "",
        "3x-",
        "(x",
        "\\{x\\}",
    ),
    *("(" * 900 + "1" + ")" * 900, "9" * 400, "{" * 1000, "-" * 1000),
]


@pytest.mark.parametrize("forms", EQUAL, ids=lambda forms: forms[0])
def test_equal_expressions_have_one_value(forms):
    values = [evaluate(form) for form in forms]
    assert values == pytest.approx([values[0]] * len(forms), rel=1e-12)
    assert not any(apart(one, other) for one in forms for other in forms)


@pytest.mark.parametrize("text", NO_VALUE, ids=lambda text: text[:20])
def test_what_may_be_read_otherwise_has_no_value_and_is_never_apart(text):
    assert evaluate(text) is None and not apart(text, "7") and not apart("7", text)


def test_values_of_different_expressions_tell_them_apart_and_math_verify_agrees():
    firsts = [forms[0] for forms in EQUAL]
    pairs = [(one, other) for one in firsts for other in firsts if one != other]
    assert all(apart(*pair) for pair in pairs)
    assert not any(symbolic(*pair) for pair in pairs)


def test_rounding_is_no_difference():
    assert evaluate("\\pi") == math.pi
    assert not apart("0.3333333x", "\\frac{x}{3}") and apart("0.333x", "\\frac{x}{3}")
