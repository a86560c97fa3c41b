"""What a strategy is, and to whom it may be shown: the guard against giving answers away.

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
from kit.schema import Problem, digest

KINDS = ("success", "failure")
RETIRED = ("uses", "wins")  # columns of banks built before December 2026, never read
PARAPHRASE = 0.9  # cosine from which two questions with the same numbers count as one
# Where a result stands: what comes before a short answer that is given away.
RESULT = r"(?i:answer|result|total|sum|product|value|equals?|is|boxed|[=≈→:])[\s\W]{0,6}"


@dataclass(frozen=True)
class Strategy:
    """One lesson, and where it comes from."""

    title: str
    description: str  # one sentence: when to use it
    content: str  # what to do
    kind: str  # "success" or "failure": how the attempt it was distilled from ended
    problem_id: str
    family: str
    level: int
    question: str  # of the problem it was distilled from
    model: str  # name and weights hash of the extractor
    extractor: str  # fingerprint of the extracting program
    step: int = 0  # of the loop that made it

    @property
    def id(self) -> str:
        """Hash of what it says and of the problem it is from: 16 hex digits."""
        return digest([self.title, self.description, self.content, self.problem_id], 16)

    @property
    def text(self) -> str:
        """What is embedded and searched."""
        return f"{self.title}. {self.description} {self.content}".strip()


@dataclass(frozen=True)
class RetrievalResult:
    """What a search gave, best first, and what the guard kept back, with the reason."""

    strategies: tuple[Strategy, ...]
    scores: tuple[float, ...]  # cosine, BM25, or fused reciprocal ranks
    filtered: dict[str, str]  # id -> "same problem", "near-duplicate" or "gives the answer away"


def read(file: Path) -> list[Strategy]:
    """Strategies from a file of JSON lines, fields as in Strategy; ValueError names the row."""
    strategies = []
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
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
    """The schema of a bank for vectors of `dimension`."""

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
    """The same for Arrow. Lance is told that ids are keys, else two writers at once would both
    insert what neither has seen."""
    schema = row_model(dimension).to_arrow_schema()
    key = schema.field("id").with_metadata({"lance-schema:unenforced-primary-key": "true"})
    return schema.set(schema.get_field_index("id"), key)


def leak_reason(item: Strategy, problem: Problem, cosine: float = 0.0) -> str:
    """Why `item` must not be shown to who solves `problem`, "" where it may.

    `cosine` is that of their questions. Other numbers make another problem; equal numbers with
    nearly the same words, or with the same meaning, do not.
    """
    if item.problem_id == problem.id:
        return "same problem"
    mine, theirs = signature(item.question), signature(problem.question)
    if mine.numbers == theirs.numbers and similarity(mine, theirs) >= NEAR:
        return "near-duplicate"
    if mine.numbers and sorted(mine.numbers) == sorted(theirs.numbers) and cosine >= PARAPHRASE:
        return "near-duplicate"
    return "gives the answer away" if leaks_answer(item.text, problem.answer) else ""


def leaks_answer(text: str, answer: str) -> bool:
    """Whether `text` says `answer`: anywhere, or, if of one or two signs, where a result stands."""
    signs = "".join(answer.split())
    if not signs:
        return False
    spaced = r"\s*".join(map(re.escape, signs))  # LaTeX may be spaced otherwise
    lead = RESULT if len(signs) < 3 else ""
    flags = re.IGNORECASE if len(signs) > 1 else 0  # "A" is an answer, "a" a word
    return re.search(rf"{lead}(?<![\w.]){spaced}(?!\w|\.\d)", text, flags) is not None
