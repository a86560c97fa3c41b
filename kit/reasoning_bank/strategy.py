"""A strategy, and the leakage guard: which strategies must not be shown for a problem.

Strategies can also be read from a file of JSON lines, so that what a larger model or a person wrote
can be evaluated here; `model` and `extractor` of each row say who.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pandas
import pyarrow
from lancedb.pydantic import LanceModel, Vector

from kit.data.dedup import NEAR, signature, similarity
from kit.evaluation import latex
from kit.schema import Problem, digest

KINDS = ("success", "failure")
RETIRED = ("uses", "wins")  # columns of banks built before December 2026, never read
PARAPHRASE = 0.9  # cosine similarity from which two questions with the same numbers count as one
# Numbers of one or two digits stand in many texts: they are given away where a result is stated.
NUMBER = (
    r"(?<![\w.])-?(?:\\[dtc]?frac *(?:\{ *-?\d+ *\}|\d) *(?:\{ *\d+ *\}|\d)"
    r"|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?: */ *\d+(?!\.?\d))?)(?!\w|\.\d)"
)
RESULT = r"\b(?:answers?|results?|solutions?|totals?|sum|product|value|equals?)\b|\\boxed"
GETS = (
    r"\b(?:is|gets?|got|gives?|giving|obtain|finds?|found|have|yields?|makes?|leaves?|to|remember)\b"
    r"|[=≈→⇒:]"
)
FILLER = r"(?:[\s\W]|\b(?:is|are|be|as|of|to|equal|exactly|just|only|simply|then|the|number)\b)"
ENDS = r"is|as|in|at|for|by|from|with|because|since|so|when|after|which|where|and|or|then"
CLOSED = r"(?:[\s$*})\]%°]|\^ *\{? *\\circ\b *\}?|\\%|\\text *\{[^{}]*\})*"
AFTER = rf"{CLOSED}(?:$|[.,;:!?\n](?!\d)|(?:{ENDS})\b)"  # of a result that only GETS introduced
NAMED = (
    rf"{CLOSED}(?:(?:is|was|as)\s+(?:\w+\s+){{0,2}}(?:answer|result|solution|value|total|sum)"
    r"|(?:in|at) the end\b|altogether\b|in (?:all|total)\b)"
)
OPERAND = r"[\s$})\]]*(?:[+*×·^/]\s*[\w(\\]|\\(?:cdot|times|div)|-\s*\w)"


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

    @classmethod
    def of(cls, problem: Problem, **fields) -> "Strategy":
        """A strategy that comes from `problem`, with all other `fields` given."""
        return cls(
            problem_id=problem.id,
            family=problem.family,
            level=problem.level,
            question=problem.question,
            **fields,
        )

    @property
    def id(self) -> str:
        """Hash of its text and of its problem: 16 hex digits."""
        return digest([self.title, self.description, self.content, self.problem_id], 16)

    @property
    def text(self) -> str:
        """The text that is embedded and searched."""
        return f"{self.title}. {self.description} {self.content}".strip()

    @property
    def summary(self) -> str:
        """Title and description, which reasoning-bank-slm embeds."""
        return f"{self.title}. {self.description}".strip()


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


def examples(records: pandas.DataFrame, longest: int = 256) -> list[Strategy]:
    """Worked examples instead of lessons: correct attempts of at most `longest` tokens, verbatim,
    one per problem."""
    rows = records[records["correct"] & (records["new_tokens"] <= longest)]
    rows = rows.drop_duplicates("problem_id")
    columns = ["problem_id", "question", "answer", "family", "level", "source"]
    models = rows["model"] + "@" + rows["weights_hash"]
    solved = map(Problem, *(rows[name] for name in columns))
    return [example(*each) for each in zip(solved, rows["text"], models, strict=True)]


def example(problem: Problem, text: str, model: str) -> Strategy:
    """A correct attempt of `model` at a problem, verbatim."""
    return Strategy.of(
        problem,
        title="Worked example",
        description="",
        content=f"{problem.question}\n{text.strip()}",
        kind="success",
        model=model,
        extractor="trajectory",
    )


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
    leak = leaks_answer(item.text, problem.answer, problem.question)
    return "gives the answer away" if leak else ""


def leaks_answer(text: str, answer: str, question: str = "") -> bool:
    """Whether `text` contains `answer`, or the same number or formula written otherwise: anywhere,
    or, for an answer of one or two signs, only where a result is stated.

    A sentence most of whose numbers are not in the `question` states the result of another one.
    """
    raw, text = "".join(answer.split()), re.sub(r"(?<=\d)(?:,?\\[!,]|\{,\})(?=\d{3})", "", text)
    answer = latex.tidy(answer)
    characters, gold = "".join(answer.split()), latex.number(answer)
    if not characters:
        return False
    if ("\\" in raw or ":" in raw) and raw in "".join(text.split()):
        return True
    if gold:
        short = len(re.sub(r"\\frac|\D", "", answer)) < 3
        places = [sides for values, *sides in _numbers(text) if values & _values(gold)]
        return any(not short or _stated(*sides, question) for sides in places)
    spaced = r"\s*".join(map(re.escape, characters))  # LaTeX may be spaced otherwise
    flags = re.IGNORECASE if len(characters) > 1 else 0  # "A" is an answer, "a" a word
    places = [match.span() for match in re.finditer(rf"(?<![\w.]){spaced}(?!\w|\.\d)", text, flags)]
    if any(len(characters) > 2 or _stated(text[:a], text[b:], question) for a, b in places):
        return True
    written = _notation(answer)
    formula = rf"(?<![0-9.]){re.escape(written)}(?![0-9])"
    plain = len(written) < 3 or written.isalpha()  # words run together in a text without spaces
    return not plain and bool(re.search(formula, _notation(text), flags))


@functools.lru_cache(maxsize=1024)  # a text is held against the answers of many problems
def _numbers(text: str) -> list[tuple[set, str, str]]:
    """The numbers of a text, as `NUMBER` or the grader finds them: values, text before, after."""
    matches = [(m[0], text[max(m.start() - 500, 0) : m.start()], text[m.end() :][:100])
             for m in re.finditer(NUMBER, text)]  # fmt: skip
    each = ((latex.number(latex.tidy(part)), *sides) for part, *sides in
            (*matches, *latex.numbers(text)))  # fmt: skip
    return [(_values(number), before, after) for number, before, after in each if number]


def _values(number: latex.Number) -> set:
    """The values that a number may mean: 50% is 50, and 0.5."""
    return {number.value, number.value / (100 if number.percent else 1)}


def _stated(before: str, after: str, question: str) -> bool:
    """Whether what stands between two parts of a text is said to be a result."""
    before = re.split(r"[.!?;\n](?!\d)", before)[-1]
    others, own = ({*re.findall(r"\d+", part)} for part in (before, question))
    if re.match(OPERAND, after) or (own and 2 * len(own & others) < len(others)):
        return False
    if re.search(rf"(?:{RESULT}){FILLER}{{0,6}}$", before, re.IGNORECASE):
        return True
    if re.match(NAMED, after, re.IGNORECASE):
        return True
    prefix = re.search(rf"(?:{GETS}){FILLER}{{0,6}}$", before, re.IGNORECASE)
    return bool(prefix and re.match(AFTER, after))


def _notation(text: str) -> str:
    r"""The text without spaces, formulas in one notation: \dfrac, √ and π as \frac, \sqrt, \pi."""
    text = latex.tidy(re.sub(r"√ ?(\d+)", r"\\sqrt{\1}", text))
    return latex.squeeze(re.sub(r"\\sqrt ?([0-9a-z])", r"\\sqrt{\1}", text))
