r"""The one grader: where a text says its answer, and whether that answer equals the gold.

`extract` reads the text (last balanced box, else answer line, else last number). Equality is
settled in this process for identical, numeric, listed and worded answers, and by math-verify
in worker processes for the rest. Model text is hostile: a worker has bounded CPU time and
memory, is killed when it passes them, and is replaced; nothing is evaluated as code.
Compliance with the requested form is reported apart from correctness. The rules of equality
are the table in tests/test_grade.py.
"""

import functools
import re

from kit import latex, workers
from kit.equality import equal
from kit.schema import Grade

FORMS = ("boxed", "answer line", "any")
LONGEST = 2000  # characters of an answer that are looked at

_ANSWER_IS = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_ANSWER_COLON = re.compile(
    r"[\s>#*_\-]*+(?:(?:the|my|so,?|final|correct)\s++){0,3}+answer\s*+[*_]*+\s*+[:=]",
    re.IGNORECASE,
)
_HASHES = re.compile(r"\s*+####\s*+(\S*[0-9]\S*)\s*$")
_LAST_NUMBER = re.compile(
    r"(?<![\w.)])-?+\\[dt]?frac\{-?[0-9]{1,99}\}\{[0-9]{1,99}\}"
    r"|(?:(?<![\w)])-)?+\$?+(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?:/[0-9]++)?+(?:\s?\\?%)?+"
)
_COMPLIANT_LINE = re.compile(r"^[ \t]*+answer:[ \t]*+\S", re.IGNORECASE | re.MULTILINE)


def extract(text: str) -> tuple[str, str]:
    """(answer, method): the last box, else the last answer line, else the last number.

    After a closed `<think>` block only what follows it counts, unless that is blank. Methods:
    "boxed", "answer line", "last number", "none" (answer ""). Linear in the length of the text.
    """
    text = _said(text)
    if (boxed := latex.last_boxed(text)) is not None:
        return boxed, "boxed"
    if line := _answer_line(text):
        return line, "answer line"
    numbers = _LAST_NUMBER.finditer(latex.ascii_digits(text).replace("\u2212", "-"))
    last = functools.reduce(lambda _, match: match, numbers, None)
    return (last[0], "last number") if last else ("", "none")


def _said(text: str) -> str:
    _, closed, rest = text.rpartition("</think>")
    return rest if closed and rest.strip() else text


def _answer_line(text: str) -> str:
    """What the last answer line says, "" without one; a line left open goes on below."""
    lines = text.splitlines()
    for at in range(len(lines) - 1, -1, -1):
        line = lines[at]
        if hashes := _HASHES.match(line):
            return hashes[1]
        if "answer" not in line.lower():
            continue
        heads = [head] if (head := _ANSWER_COLON.match(line)) else list(_ANSWER_IS.finditer(line))
        if not heads:
            continue
        said, below = line[heads[-1].end() :], at + 1
        while below < min(len(lines), at + 20) and (not _strip(said) or _open(said)):
            said, below = said + "\n" + lines[below], below + 1
        if said := _strip(re.split(r"[.!]\s+(?=[A-Z])", said, maxsplit=1)[0]):
            return said
    return ""


def _open(said: str) -> bool:
    return said.count("{") > said.count("}") or said.count(r"\begin") > said.count(r"\end")


def _strip(said: str) -> str:
    """Without markdown emphasis, one pair of math delimiters, and the full stop."""
    said = said.strip(" \t\n*_`").removesuffix(".").strip(" \t\n*_`")
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = said[len(left) : -len(right)]
        if said.startswith(left) and said.endswith(right) and inner and left not in inner:
            return inner.strip()
    return said


def _complies(text: str, form: str) -> bool:
    text = _said(text)
    box = latex.last_box(text) if form != "answer line" else None
    boxed = box is not None and box[1] == r"\boxed{"
    return boxed or (form != "boxed" and bool(_COMPLIANT_LINE.search(text)))


def gold_of_solution(solution: str) -> str | None:
    r"""The gold answer of a MATH solution: its last box. None where there is none, or a blank."""
    return latex.last_boxed(solution)


def grade(text: str, gold: str, form: str = "boxed") -> Grade:
    """Grade one text against its gold answer; never raises on what the text says.

    `form` is the form that was asked for: "boxed" (complies with a balanced, braced \\boxed),
    "answer line" (a line that begins with "Answer:"), or "any" of them. Reasons: "equal",
    "different", "no answer", "no gold", "too long", and those of `workers.compare`.
    """
    return grade_many([text], [gold], form)[0]


def grade_many(texts: list[str], golds: list[str], form: str = "boxed") -> list[Grade]:
    """Grade texts against golds, in order; equal pairs are worked out once."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(map(repr, FORMS))}")
    if len(texts) != len(golds):
        raise ValueError(f"{len(texts)} texts but {len(golds)} golds; give one gold for each text")
    found = [extract(text) for text in texts]
    quick = [settle(gold, answer) for gold, (answer, _) in zip(golds, found, strict=True)]
    reasons = workers.compare([pair for pair in quick if len(pair) == 2])
    grades = []
    for text, (answer, method), verdict in zip(texts, found, quick, strict=True):
        reason = reasons.get(verdict) or verdict[0]
        correct = reason == "equal"
        grades.append(Grade(correct, answer[:LONGEST], reason, method, _complies(text, form)))
    return grades


def settle(gold: str, answer: str) -> tuple[str, ...]:
    """(reason,) when this process can tell, else the tidied (gold, answer) for a worker."""
    if not gold.strip():
        return ("no gold",)
    if not answer:
        return ("no answer",)
    if gold.strip() == answer:
        return ("equal",)
    if max(len(answer), len(gold)) > LONGEST:
        return ("too long",)
    gold, answer = latex.tidy(gold), latex.tidy(answer)
    verdict = equal(gold, answer, lambda *_: None)
    return (gold, answer) if verdict is None else ("equal" if verdict else "different",)
