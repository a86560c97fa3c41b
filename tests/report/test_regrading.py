"""Grades made again from texts: what was altered is wrong, what an earlier grader gave is told."""

from dataclasses import asdict

import pandas as pd
import pytest

from kit.data import problems
from kit.data.prompts import FORM
from kit.evaluation import grader, sandbox
from kit.report import regrading
from tests.runs import record

SUITE = problems.load("laptop", "test").problems
FRACTION = next(each for each in SUITE if each.family == "fraction_simplification")


def answered(text: str, **changes) -> pd.DataFrame:
    """One record of a fraction of the suite, as the grader of this kit leaves it."""
    row = asdict(record("plain", 0, True)) | {"problem_id": FRACTION.id}
    row |= {"question": FRACTION.question, "answer": FRACTION.answer, "asks": FRACTION.asks}
    row |= asdict(grader.grade(text, FRACTION.answer, FORM, FRACTION.asks))
    return pd.DataFrame([row | {"text": text} | changes])


def test_what_the_grader_left_is_what_it_says_again():
    records = pd.concat([answered(f"Answer: {FRACTION.answer}"), answered("no idea")])
    assert regrading.graded(records)[records.columns].equals(records)
    assert regrading.check(records) == ([], [])


@pytest.mark.parametrize("change", [{"correct": True, "reason": "equal"}, {"compliant": False},
                                    {"extracted": "7"}, {"method": "boxed"}])  # fmt: skip
def test_an_altered_grade_is_wrong(change):
    (wrong,), left = regrading.check(answered("Answer: 99", **change))
    assert "1 of 1 answers are graded otherwise" in wrong and FRACTION.id in wrong and not left


def test_an_altered_text_gold_or_form_is_wrong():
    right = answered(f"Answer: {FRACTION.answer}")
    assert "graded otherwise" in regrading.check(right.assign(text="Answer: 99"))[0][0]
    (wrong,), _ = regrading.check(answered("Answer: 99", answer="99", correct=True,
                                           reason="equal"))  # fmt: skip
    assert "the gold answer of 1 records is not that of data/, such as '99'" in wrong
    echo = FRACTION.question.split()[3]
    credited = answered(f"Answer: {echo}", asks="any", correct=True, reason="equal")
    assert "equal in the records, form from its text" in regrading.check(credited)[0][0]


def test_the_grade_of_an_earlier_grader_is_told_and_is_not_wrong():
    echo = FRACTION.question.split()[3]
    old = answered(f"Answer: {echo}", correct=True, reason="equal")
    for records, by in [
        (old.drop(columns=["grade_version", "asks"]), "the grader of an earlier kit"),
        (
            old.assign(grade_version=grader.GRADE_VERSION + 7),
            f"version {grader.GRADE_VERSION + 7} of the grader",
        ),
    ]:
        wrong, (line,) = regrading.check(records)
        assert not wrong and f"grades of 1 answers by {by}" in line
        assert "grades 1 otherwise (0 right, 1 wrong instead)" in line and "--again" in line


def test_what_hangs_on_the_machine_and_what_data_does_not_have_is_counted(monkeypatch):
    slow = answered(r"Answer: \sqrt{2}")
    monkeypatch.setattr(sandbox, "compare", lambda pairs: dict.fromkeys(pairs, "timeout"))
    wrong, (line,) = regrading.check(slow)
    assert not wrong and line.startswith("1 answers could not be graded again")
    wrong, (line,) = regrading.check(answered("Answer: 99", source="math500", problem_id="x"))
    assert not wrong and line.startswith("gold answers of 1 records") and "(math500)" in line
