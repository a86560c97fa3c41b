"""The leakage guard: an answer is found in every notation and sentence, and little else is."""

import json
import random
import re

import pytest

from kit import paths
from kit.data.sources import local_files, read_rows
from kit.reasoning_bank.strategy import leaks_answer

FORMS = [
    "The answer is {}.",
    "We get {} in the end.",
    "{} is the answer.",
    "so the total = {}",
    "which equals {}, as required",
    "The result: {}",
    "This gives {} for the sum.",
    "Hence $x = {}$.",
    r"After simplifying we find \boxed{{{}}}.",
    "Remember {} as the final value.",
]
GOLDS = {  # gold, and other ways of writing it
    "7": ["7.0", "$7$"],
    "1234": ["1,234", r"1{,}234", r"1\,234", "1234.0"],
    r"\frac{1}{2}": ["1/2", "1 / 2", "0.5", r"\dfrac12", r"\tfrac{1}{2}"],
    r"-\frac{10}{11}": ["-10/11", r"-\dfrac{10}{11}"],
    r"2\sqrt{22}": ["2√22", r"2 \sqrt{ 22 }"],
    r"25\pi": ["25π", r"25 \pi"],
    r"72^\circ": ["72", "72°"],
    r"\text{Evelyn}": ["Evelyn"],
    "(3, 4)": ["(3,4)"],
    "x^2+1": ["x^2 + 1"],
    "1:2": ["1 : 2"],
    "1.5": ["3/2", "1 1/2", "1½", "3:2", "150%"],
    "1500": ["1.5e3", r"1.5 \times 10^3", "1.5 × 10³"],
    r"50\%": ["50%", "0.5", "1/2"],
    r"\frac{1} {2}": [r"\frac{1}{2}", r"\frac{1}  {2}", r"\frac {1} {2}"],
    "blue car": ["bluecar", "blue  car"],
}
HARMLESS = [
    "Name the size of one group and the number of groups, then multiply the two.",
    "Step 1: read the question. Step 2: write what is given. Step 3: compute.",
    "A list of 2, 3 or 4 numbers needs 1, 2 or 3 additions.",
    "When there are 2 equations, eliminate one unknown first.",
    "Work modulo 10 for the last digit: powers of 3 go 3, 9, 7, 1.",
    "Probability is the number of good outcomes over all outcomes, for example 1 of 6.",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gold", GOLDS)
def test_an_answer_is_found_in_every_sentence_and_notation(form, gold):
    missed = [way for way in [gold, *GOLDS[gold]] if not leaks_answer(form.format(way), gold)]
    assert missed == []


def test_latex_is_found_anywhere_however_answer_and_text_are_spaced():
    for answer in (r"\frac{1}{2}", r"\frac{1} {2}", r"\frac{ 1 }{ 2 }"):
        for text in (r"so \frac{1}{2} it is", r"so \frac{1}  {2} it is"):
            assert leaks_answer(text, answer), (text, answer)


def test_numbers_that_are_no_results_are_left_alone():
    alarms = [(text, gold) for text in HARMLESS for gold in map(str, range(100))
              if leaks_answer(text, gold, "Find the sum of 58 and 67.")]  # fmt: skip
    assert alarms == []


def test_the_result_of_another_problem_is_no_leak():
    worked = "42 and 30: 42 - 30 = 12, 30 - 12 - 12 = 6, so it is 6."
    ask = "Find the Greatest Common Divisor (GCD) of these numbers: {}."
    assert not leaks_answer(worked, "6", ask.format("18, 24"))
    assert leaks_answer(worked, "12", ask.format("42, 30"))
    assert leaks_answer("The answer is 6.", "6", ask.format("18, 24"))


@pytest.mark.skipif(not local_files("math", "test"), reason="no copy of MATH in KIT_DATA")
def test_rates_on_math():
    """At most 1% of golds missed, and at most 1% of pairs with harmless lessons flagged."""
    (file,) = local_files("math", "test")
    some = random.Random(0).sample(read_rows(file, "math")[0], 1500)
    missed = [(p.answer, form) for p in some for form in FORMS
              if not leaks_answer(form.format(p.answer), p.answer)]  # fmt: skip
    assert len(missed) <= 0.01 * len(some) * len(FORMS), missed[:10]
    rows = (paths.DATA / "strategies" / "laptop.jsonl").read_text(encoding="utf-8")
    written = [json.loads(row)["content"] for row in rows.splitlines()]
    texts = [*written, *HARMLESS]
    alarms = sum(leaks_answer(text, p.answer, p.question) for text in texts for p in some)
    assert alarms <= 0.01 * len(texts) * len(some)
    fractions = [p.answer for p in some if re.fullmatch(r"\\frac\{\d+\}\{\d+\}", p.answer)]
    slashed = [re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", gold) for gold in fractions]
    assert fractions and all(map(leaks_answer, map(FORMS[1].format, slashed), fractions))
