"""What a strategy is, and to whom it may be shown: the guard against giving answers away.

A bank can be written to a table of JSON lines and read from one, so that what a larger model or a
person wrote can be evaluated here; `model` and `extractor` of each row say who.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
from lancedb.pydantic import LanceModel, Vector

from kit.data.dedup import NEAR, signature, similarity
from kit.schema import Problem, digest

KINDS = ("success", "failure")
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
    uses: int = 0  # times it stood in a prompt
    wins: int = 0  # times the answer to that prompt was correct

    @property
    def id(self) -> str:
        """Hash of what it says and of the problem it is from: 16 hex digits."""
        return digest([self.title, self.description, self.content, self.problem_id], 16)

    @property
    def text(self) -> str:
        """What is embedded and searched."""
        return f"{self.title}. {self.description} {self.content}".strip()


@dataclass(frozen=True)
class Found:
    """What a search gave, best first, and what the guard kept back, with the reason."""

    strategies: tuple[Strategy, ...]
    scores: tuple[float, ...]  # cosine, BM25, or fused reciprocal ranks
    refused: dict[str, str]  # id -> "same problem", "near-duplicate" or "gives the answer away"


def read(file: Path) -> list[Strategy]:
    """Strategies from a file of JSON lines, fields as in Strategy; ValueError names the row."""
    found = []
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        try:
            found.append(Strategy(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, row {number}: no strategy ({error}); correct it.") from error
        if found[-1].kind not in KINDS or not found[-1].content:
            raise ValueError(
                f"{file}, row {number}: kind is {found[-1].kind!r}, content "
                f"{found[-1].content[:20]!r}; kinds are {KINDS}, content must not be empty."
            )
    return found


def write(strategies: Sequence[Strategy], file: Path) -> None:
    """The same rows to `file`, sorted by id."""
    rows = sorted(strategies, key=lambda item: item.id)
    lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in rows]
    Path(file).write_text("".join(lines))


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
        uses: int
        wins: int
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


def refusal(item: Strategy, problem: Problem, cosine: float = 0.0) -> str:
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
    return "gives the answer away" if gives_away(item.text, problem.answer) else ""


def gives_away(text: str, answer: str) -> bool:
    """Whether `text` says `answer`: anywhere, or, if of one or two signs, where a result stands."""
    signs = "".join(answer.split())
    if not signs:
        return False
    spaced = r"\s*".join(map(re.escape, signs))  # LaTeX may be spaced otherwise
    lead = RESULT if len(signs) < 3 else ""
    flags = re.IGNORECASE if len(signs) > 1 else 0  # "A" is an answer, "a" a word
    return re.search(rf"{lead}(?<![\w.]){spaced}(?!\w|\.\d)", text, flags) is not None
