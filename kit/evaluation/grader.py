r"""The one grader: where a text says its answer, and whether that answer equals the gold.

`kit.evaluation.extract` reads the text (the later of box and answer line, else last number).
Equality is settled in this process for identical, numeric, listed and worded answers, and by
math-verify in worker processes for the rest. Model text is hostile: a worker has bounded CPU time
and memory, is killed when it passes them, and is replaced; nothing is evaluated as code.
Compliance with the requested form is reported apart from correctness. The rules of equality
are the table in tests/evaluation/test_grader.py.
"""

import math
import re
from collections.abc import Sequence

from kit.data import boxed
from kit.evaluation import extract, latex, sandbox
from kit.evaluation.equivalence import equal
from kit.evaluation.latex import LONGEST
from kit.schema import ASKS, Grade

# Part of every record's key. Raise it by one when a verdict may differ from that of before on the
# same text: records stored under another one are graded anew, not decoded.
GRADE_VERSION = 1
FORMS = ("boxed", "answer line", "any")

_COMPLIANT_LINE = re.compile(r"^[ \t]*+answer:[ \t]*+\S", re.IGNORECASE | re.MULTILINE)
_OPTION = re.compile(r"\(?([A-J])\)?")
_WORDS = re.compile(r"[^\W\d_][\w .'’-]*")
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*(?!percent|points)[A-Za-z]")


def _complies(text: str, form: str) -> bool:
    text = extract.said(text)
    boxes = boxed.boxes(text) if form != "answer line" else []
    complies = bool(boxes) and boxes[-1].command == r"\boxed{"
    return complies or (form != "boxed" and bool(_COMPLIANT_LINE.search(text)))


def gold_of_solution(solution: str) -> str | None:
    r"""The gold answer of a MATH solution: its last box. None where there is none, or a blank."""
    return boxed.last_boxed(solution)


def grade(text: str, gold: str, form: str = "boxed", asks: str = "any") -> Grade:
    """Grade one text against its gold answer; never raises on what the text says.

    `asks` is the form that the answer must have, one of schema.ASKS: where the task is the form,
    an equal value in another one (the question said again) is wrong, with the reason "form".

    `form` is the form that was asked for: "boxed" (complies with a balanced, braced \\boxed),
    "answer line" (a line that begins with "Answer:"), or "any" of them. Reasons: "equal",
    "different", "form", "no answer", "no gold", "too long", and those of `workers.compare`.
    """
    return grade_many([text], [gold], form, [asks])[0]


def grade_many(
    texts: list[str],
    golds: list[str],
    form: str = "boxed",
    asks: Sequence[str] | None = None,
) -> list[Grade]:
    """Grade texts against golds, in order; equal pairs are worked out once; see `grade`."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(map(repr, FORMS))}")
    if len(texts) != len(golds):
        raise ValueError(f"{len(texts)} texts but {len(golds)} golds; give one gold for each text")
    found = [extract.extract(text, option(gold)) for text, gold in zip(texts, golds, strict=True)]
    quick = [settle(gold, each) for gold, each in zip(golds, found)]
    reasons = sandbox.compare([pair for pair in quick if len(pair) == 2])
    grades, any_form = [], ["any"] * len(texts)
    for text, gold, wanted, each, verdict in zip(texts, golds, asks or any_form, found, quick):
        reason, answer = reasons.get(verdict) or verdict[0], each.answer[:LONGEST]
        if reason == "equal" and not in_form(answer, wanted, gold):
            reason = "form"
        grades.append(Grade(reason == "equal", answer, reason, each.method, _complies(text, form)))
    return grades


def in_form(answer: str, asks: str, gold: str) -> bool:
    """Whether an answer that equals `gold` has the form that was asked for, see schema.ASKS.

    evaluated: a number, as written as the gold; simplified: lowest terms; factored: a product.
    """
    if asks not in ASKS:
        raise ValueError(f"asks is {asks!r}; choose one of {', '.join(map(repr, ASKS))}")
    value, gold = latex.tidy(answer).rpartition("=")[2].strip(), latex.tidy(gold)
    number, wanted = latex.number(value), latex.number(gold)
    if asks == "evaluated":
        return number is not None and (number.places >= 0 or not wanted or wanted.places < 0)
    if asks == "simplified":
        terms = [int(term) for term in re.findall(r"[0-9]+", value)[-2:]]
        whole = number is not None and number.places == 0
        return whole or (number is not None and number.places < 0 and math.gcd(*terms) == 1)
    return asks == "any" or len(latex.terms(value)) == 1


def option(gold: str) -> bool:
    """Whether the gold answer is the letter of an option."""
    return bool(_OPTION.fullmatch(latex.tidy(gold[:LONGEST])))


def settle(gold: str, found: extract.Found) -> tuple[str, ...]:
    """(reason,) when this process can tell, else the tidied (gold, answer) for a worker."""
    answer = found.answer
    if not gold.strip():
        return ("no gold",)
    if not answer:
        return ("no answer",)
    if gold.strip() in (answer, found.sentence):
        return ("equal",)
    if max(len(answer), len(gold)) > LONGEST:
        return ("too long",)
    percents = ["%" in text or "percent" in text for text in (gold, answer)]
    if percents == [True, False] and _UNIT.search(answer):
        return ("different",)  # 25 ft is not 25%
    gold, answer = latex.tidy(gold), latex.tidy(answer)
    if _WORDS.fullmatch(gold) and extract.names(gold, found.sentence or answer):
        return ("equal",)
    verdict = equal(gold, answer, lambda *_: None)
    return (gold, answer) if verdict is None else ("equal" if verdict else "different",)
