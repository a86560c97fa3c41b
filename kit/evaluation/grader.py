r"""The grader: extracts the answer of a text and decides whether it equals the gold answer.

`kit.evaluation.extract` finds the answer (the later of box and answer line, else the last number).
Identical, numeric, listed and worded answers are compared in this process, all others by
math-verify in worker processes. Model text is untrusted: a worker that exceeds its CPU time or
memory is killed and replaced, and nothing is evaluated as code. Compliance with the requested
format is reported apart from correctness. The rules of equality are the table in
tests/evaluation/test_grader.py.
"""

import functools
import math
import re
from collections.abc import Sequence

from kit.data import boxed
from kit.evaluation import extract, latex, sandbox
from kit.evaluation.equivalence import equal
from kit.evaluation.latex import LONGEST
from kit.schema import ASKS, Grade

# Part of every record's key. Raise it by one when a verdict on the same text may differ: records
# that were stored under another version are graded again, not decoded.
GRADE_VERSION = 4
FORMS = ("boxed", "answer line", "any")

_COMPLIANT_LINE = re.compile(r"^[ \t]*+answer:[ \t]*+\S", re.IGNORECASE | re.MULTILINE)
_OPTION = re.compile(r"\(?([A-J])\)?")
_WORDS = re.compile(r"[^\W\d_][\w .'’-]*")
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*(?!percent|points)[A-Za-z]")


def _complies(text: str, form: str) -> bool:
    text = extract.after_thinking(text)
    boxes = boxed.boxes(text) if form != "answer line" else []
    complies = bool(boxes) and boxes[-1].command == r"\boxed{"
    return complies or (form != "boxed" and bool(_COMPLIANT_LINE.search(text)))


def grade(text: str, gold: str, form: str = "boxed", asks: str = "any") -> Grade:
    """Grade one text against its gold answer; never raises because of the text.

    `asks` is the required form of the answer, one of schema.ASKS: if the task is to find a form, an
    equal value in another one (such as the question itself) is wrong, with the reason "form".

    `form` is the requested format: "boxed" (a balanced, braced \\boxed complies), "answer line" (a
    line that begins with "Answer:"), or "any" of the two. Reasons: "equal", "different", "form",
    "no answer", "no gold", "too long", and those of `sandbox.compare`.
    """
    return grade_many([text], [gold], form, [asks])[0]


def grade_many(
    texts: list[str],
    golds: list[str],
    form: str = "boxed",
    asks: Sequence[str] | None = None,
) -> list[Grade]:
    """Grade texts against golds, in order; equal pairs are compared once. See `grade`."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(map(repr, FORMS))}")
    if len(texts) != len(golds):
        raise ValueError(f"{len(texts)} texts but {len(golds)} golds; give one gold for each text")
    answers = [extract.extract(text, option(gold)) for text, gold in zip(texts, golds, strict=True)]
    verdicts = [settle(gold, answer) for gold, answer in zip(golds, answers)]
    reasons = sandbox.compare([pair for pair in verdicts if len(pair) == 2])
    grades, any_form = [], ["any"] * len(texts)
    for text, gold, required, each, verdict in zip(
        texts, golds, asks or any_form, answers, verdicts
    ):
        reason, answer = reasons.get(verdict) or verdict[0], each.answer[:LONGEST]
        if reason == "equal" and not in_form(answer, required, gold):
            reason = "form"
        fields = reason == "equal", answer, reason, each.method, _complies(text, form)
        grades.append(Grade(*fields, GRADE_VERSION))
    return grades


def in_form(answer: str, asks: str, gold: str) -> bool:
    """Whether an answer that equals `gold` has the required form, see schema.ASKS.

    evaluated: a number, as written as the gold; simplified: lowest terms; factored: a product.
    """
    if asks not in ASKS:
        raise ValueError(f"asks is {asks!r}; choose one of {', '.join(map(repr, ASKS))}")
    value, gold = latex.tidy(answer).rpartition("=")[2].strip(), latex.tidy(gold)
    if latex.squeeze(value) == latex.squeeze(gold):
        return True
    number, target = latex.number(value), latex.number(gold)
    if asks == "evaluated":
        return number is not None and (number.places >= 0 or not target or target.places < 0)
    if asks == "simplified":
        terms = [int(term) for term in re.findall(r"[0-9]+", value)[-2:]]
        whole = number is not None and number.places == 0
        return whole or (number is not None and number.places < 0 and math.gcd(*terms) == 1)
    return asks == "any" or _factors(value) >= _factors(gold)


def _factors(text: str) -> int:
    """Factors in parentheses of a product, (x-1)^2 counted twice; 0 for a sum and for a number."""
    while (inside := latex.brackets(text)) and inside[0] == "()":
        text = inside[1]
    if len(latex.terms(text)) > 1:
        return 0
    factors = re.findall(r"\([^()]*\)(?: ?\^ ?\{? ?([0-9]{1,2}))?", text)
    return sum(int(power or 1) for power in factors)


def option(gold: str) -> bool:
    """Whether the gold answer is the letter of an option."""
    return bool(_OPTION.fullmatch(latex.tidy(gold[:LONGEST])))


@functools.lru_cache(maxsize=1 << 16)
def same(first: str, second: str) -> bool:
    """Whether two extracted answers are equal by the rules of `grade`, each held against the other:
    3100 and (3,100) are not, which as an answer to 3100 would be a thousands sign."""
    for gold, answer in ((first, second), (second, first)):
        verdict = settle(gold, extract.Extraction(answer, ""))
        if len(verdict) == 2:
            verdict = (sandbox.compare([verdict])[verdict],)
        if verdict != ("equal",):
            return False
    return True


def settle(gold: str, extracted: extract.Extraction) -> tuple[str, ...]:
    """(reason,) if this process can decide, else the tidied (gold, answer) for a worker."""
    answer = extracted.answer
    if not gold.strip():
        return ("no gold",)
    if not answer:
        return ("no answer",)
    if gold.strip() in (answer, extracted.sentence):
        return ("equal",)
    if max(len(answer), len(gold)) > LONGEST:
        return ("too long",)
    percents = ["%" in text or "percent" in text for text in (gold, answer)]
    if percents == [True, False] and _UNIT.search(answer):
        return ("different",)  # 25 ft is not 25%
    gold, answer = latex.tidy(gold), latex.tidy(answer)
    if _WORDS.fullmatch(gold) and extract.names(gold, extracted.sentence or answer):
        return ("equal",)
    verdict = equal(gold, answer, lambda *_: None)
    return (gold, answer) if verdict is None else ("equal" if verdict else "different",)
