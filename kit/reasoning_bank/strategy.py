"""A strategy, and the leakage guard: which strategies must not be shown for a problem.

Strategies can also be read from a file of JSON lines, so that what a larger model or a person wrote
can be evaluated here; `model` and `extractor` of each row say who.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from lancedb.pydantic import LanceModel, Vector

from kit.data.dedup import NEAR, signature, similarity
from kit.evaluation import latex
from kit.schema import Problem, digest

KINDS = ("success", "failure")
RETIRED = ("uses", "wins")  # columns of banks built before December 2026, never read
PARAPHRASE = 0.9  # cosine similarity from which two questions with the same numbers count as one
# What precedes a result in a text; a short answer counts as leaked only after one of these.
RESULT = r"(?i:answer|result|total|sum|product|value|equals?|is|boxed|[=≈→:])[\s\W]{0,6}"
FRACTION = r"\\[dt]?frac *\{-?\d+\} *\{\d+\}"
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"


@dataclass(frozen=True)
class Strategy:
    """One lesson and its provenance, see Section 3.2 of https://arxiv.org/abs/2509.25140."""

    title: str
    description: str  # one sentence: when to use it
    content: str  # what to do
    kind: str  # "success" or "failure": outcome of the attempt it was extracted from
    problem_id: str
    family: str
    level: int
    question: str  # of the problem it was extracted from
    model: str  # name and weights hash of the extractor
    extractor: str  # fingerprint of the extracting program
    step: int = 0  # of `build.fill_bank`

    @property
    def id(self) -> str:
        """Hash of its text and of its problem: 16 hex digits."""
        return digest([self.title, self.description, self.content, self.problem_id], 16)

    @property
    def text(self) -> str:
        """The text that is embedded and searched."""
        return f"{self.title}. {self.description} {self.content}".strip()


@dataclass(frozen=True)
class RetrievalResult:
    """Retrieved strategies, best first, and what the leakage guard filtered, with the reason."""

    strategies: tuple[Strategy, ...]
    scores: tuple[float, ...]  # cosine, BM25, or fused reciprocal ranks
    filtered: dict[str, str]  # id -> "same problem", "near-duplicate" or "gives the answer away"


def read(file: Path) -> list[Strategy]:
    """Strategies from a file of JSON lines, fields as in Strategy; ValueError names the row."""
    strategies = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            strategies.append(Strategy(**{k: v for k, v in row.items() if k not in RETIRED}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, row {number}: no strategy ({error}); correct it.") from error
        if strategies[-1].kind not in KINDS or not strategies[-1].content:
            raise ValueError(
                f"{file}, row {number}: kind is {strategies[-1].kind!r}, content "
                f"{strategies[-1].content[:20]!r}; kinds are {KINDS}, content must not be empty."
            )
    return strategies


def row_model(dimension: int) -> type[LanceModel]:
    """The row schema of a bank with vectors of `dimension`."""

    class Row(LanceModel):
        id: str
        title: str
        description: str
        content: str
        kind: str
        problem_id: str
        family: str
        level: int
        question: str
        model: str
        extractor: str
        step: int
        text: str
        vector: Vector(dimension)  # of the text
        question_vector: Vector(dimension)

    return Row


def row_schema(dimension: int) -> pyarrow.Schema:
    """The same for Arrow, with `id` as primary key; without it, two concurrent writers could insert
    the same row."""
    schema = row_model(dimension).to_arrow_schema()
    key = schema.field("id").with_metadata({"lance-schema:unenforced-primary-key": "true"})
    return schema.set(schema.get_field_index("id"), key)


def leak_reason(item: Strategy, problem: Problem, cosine: float = 0.0) -> str:
    """Why `item` must not be shown for `problem`, "" if it may be.

    `cosine` is the similarity of their questions. Questions with other numbers are other problems;
    questions with equal numbers and nearly the same words, or the same meaning, are the same.
    """
    if item.problem_id == problem.id:
        return "same problem"
    source, target = signature(item.question), signature(problem.question)
    if source.numbers == target.numbers and similarity(source, target) >= NEAR:
        return "near-duplicate"
    same_numbers = source.numbers and sorted(source.numbers) == sorted(target.numbers)
    if same_numbers and cosine >= PARAPHRASE:
        return "near-duplicate"
    return "gives the answer away" if leaks_answer(item.text, problem.answer) else ""


def leaks_answer(text: str, answer: str) -> bool:
    """Whether `text` contains `answer`, or the same number or formula written otherwise: anywhere,
    or, for an answer of one or two characters, only where a result is stated."""
    answer = latex.tidy(answer) if r"\text" in answer else answer
    characters = "".join(answer.split())
    if not characters:
        return False
    spaced = r"\s*".join(map(re.escape, characters))  # LaTeX may be spaced otherwise
    lead = RESULT if len(characters) < 3 else ""
    flags = re.IGNORECASE if len(characters) > 1 else 0  # "A" is an answer, "a" a word
    if re.search(rf"{lead}(?<![\w.]){spaced}(?!\w|\.\d)", text, flags):
        return True
    written = _notation(answer)
    formula = rf"(?<![0-9.]){re.escape(written)}(?![0-9])"
    if "\\" in written and len(written) > 3 and re.search(formula, _notation(text)):
        return True
    gold = latex.number(latex.tidy(answer))
    return gold is not None and any(
        (other := latex.number(latex.tidy(found[1]))) and other.value == gold.value
        for found in re.finditer(rf"{lead}(?<![\w.])({FRACTION}|{NUMBER})(?!\w|\.\d)", text)
    )


def _notation(text: str) -> str:
    r"""The text without spaces, formulas in one notation: \dfrac, √ and π as \frac, \sqrt, \pi."""
    return latex.squeeze(re.sub(r"\\sqrt ?([0-9a-z])", r"\\sqrt{\1}", latex.tidy(text)))
