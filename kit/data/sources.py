"""Published benchmarks: their files on the hub, and how a row of each becomes a problem.

`SOURCES` is the table; `read_rows` turns a file in the published layout into problems and rejects
(file, line, reason): a malformed row never loses the others. Splits and samples are made in
`problems`.

File names were checked against stored pages of the hub, not the live hub; those of gpqa and of
the training halves of math and gsm8k, and the columns of open-rs, were taken from public code that
reads them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from kit import paths
from kit.data import rows
from kit.data.boxed import last_boxed
from kit.data.rows import BadRow, Reject, Row
from kit.data.rows import text as _text
from kit.schema import Problem, digest


def slug(text: str) -> str:
    return "_".join(text.casefold().replace("&", "and").split())


def _level(row: Row) -> int:
    """`Level 3` or 3; two rows of MATH train say `Level ?` and are rejected."""
    level = str(row.get("level", "")).removeprefix("Level ")
    if level not in {"1", "2", "3", "4", "5"}:
        raise BadRow(f"level unknown: {row.get('level')!r}")
    return int(level)


def _boxed_gold(row: Row) -> str:
    gold = last_boxed(_text(row, "solution"))
    if not gold:
        raise BadRow("no boxed answer in field 'solution'")
    return gold


def _math(row: Row) -> tuple:
    return _text(row, "problem"), _boxed_gold(row), slug(_text(row, "type")), _level(row)


def _math500(row: Row) -> tuple:
    gold, family = _text(row, "answer"), slug(_text(row, "subject"))
    return _text(row, "problem"), gold, family, _level(row)


def _gsm8k(row: Row) -> tuple:
    _, mark, gold = _text(row, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise BadRow("no '#### answer' in field 'answer'")
    return _text(row, "question"), gold.strip().replace(",", ""), "gsm8k", 0


def _integer(value) -> str:
    """ "073", 73 and 73.0 are all 73."""
    try:
        number = Decimal(str(value))  # a float would lose digits of large integers
        if isinstance(value, bool) or number != number.to_integral_value():
            raise ValueError
    except (ValueError, ArithmeticError):
        raise BadRow(f"field 'answer' is {value!r}, not an integer") from None
    return f"{number:.0f}"


def _aime(row: Row, family: str) -> tuple:
    return _text(row, "problem"), _integer(row.get("answer")), family, 0


def _amc(row: Row) -> tuple:
    return _text(row, "question"), _integer(row.get("answer")), "amc23", 0


def _minerva(row: Row) -> tuple:
    """`question` and `answer`, or `problem` and the box of its `solution`."""
    if "question" in row:
        return _text(row, "question"), _text(row, "answer"), "minerva", 0
    return _text(row, "problem"), _boxed_gold(row), "minerva", 0


def _olympiad(row: Row) -> tuple:
    """`final_answer` is a list of LaTeX answers; several belong to one problem."""
    golds = row.get("final_answer")
    golds = [golds] if isinstance(golds, str) else golds
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) for g in golds):
        raise BadRow("field 'final_answer' is not a text or a list of texts")
    gold = ", ".join(g.strip().strip("$") for g in golds)
    return _text(row, "question"), _text({"final_answer": gold}, "final_answer"), "olympiad", 0


def _gpqa(row: Row) -> tuple:
    """Four options in an order fixed by the hash of the question; the gold answer is a letter."""
    question, correct = _text(row, "Question"), _text(row, "Correct Answer")
    options = [correct, *(_text(row, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = sorted(range(4), key=lambda i: digest([question, i]))
    lines = [f"{letter}) {options[i]}" for letter, i in zip("ABCD", order, strict=True)]
    gold = "ABCD"[order.index(0)]
    return "\n".join([question, "", *lines]), gold, slug(_text(row, "High-level domain")), 0


def _open_rs(row: Row, family: str) -> tuple:
    """The field `answer`, else the box of the solution; level 1 is `Easy`, 2 any other."""
    gold = _text(row, "answer").strip("$") if row.get("answer") else _boxed_gold(row)
    return _text(row, "problem"), gold, family, 1 if row.get("level") == "Easy" else 2


@dataclass(frozen=True)
class Source:
    """Repository, files and row format of a published set."""

    repo: str
    files: dict[str, tuple[str, ...]]  # published split -> files; validation is split off train
    read: Callable[[Row], tuple]  # row -> question, gold, family, level
    licence: str
    id_field: str | None = None  # None: the id is a hash of the question
    gated: bool = False  # the hub asks to accept its terms
    redistributable: bool = True  # else a bundle leaves its texts out, see kit.report.withheld


_SUBJECTS = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]
_SHARD = "00000-of-00001.parquet"


def _math_files(split: str) -> tuple[str, ...]:
    return tuple(f"{subject}/{split}-{_SHARD}" for subject in _SUBJECTS)


def _test(*files: str) -> dict[str, tuple[str, ...]]:
    return {"test": files}


def _train() -> dict[str, tuple[str, ...]]:
    return {"train": (f"data/train-{_SHARD}",)}


SOURCES = {
    "math": Source(
        "EleutherAI/hendrycks_math",
        {split: _math_files(split) for split in ("train", "test")},
        _math,
        "MIT",
    ),
    "math500": Source(
        "HuggingFaceH4/MATH-500", _test("test.jsonl"), _math500, "MIT", id_field="unique_id"
    ),
    "gsm8k": Source(
        "openai/gsm8k",
        {split: (f"main/{split}-{_SHARD}",) for split in ("train", "test")},
        _gsm8k,
        "MIT",
    ),
    "aime24": Source(
        "HuggingFaceH4/aime_2024",
        _test(f"data/train-{_SHARD}"),
        lambda row: _aime(row, "aime24"),
        "problems (c) MAA",
        redistributable=False,
    ),
    "aime25": Source(
        "math-ai/aime25",
        _test("test.jsonl"),
        lambda row: _aime(row, "aime25"),
        "Apache-2.0, problems (c) MAA",
        redistributable=False,
    ),
    "amc23": Source(
        "math-ai/amc23", _test(f"test-{_SHARD}"), _amc, "problems (c) MAA", redistributable=False
    ),
    "minerva": Source("math-ai/minervamath", _test("test.jsonl"), _minerva, "as published"),
    "olympiad": Source("math-ai/olympiadbench", _test("test.jsonl"), _olympiad, "as published"),
    "open-rs": Source("knoveleng/open-rs", _train(), lambda row: _open_rs(row, "open-rs"), "MIT"),
    "open-s1": Source("knoveleng/open-s1", _train(), lambda row: _open_rs(row, "open-s1"), "MIT"),
    "gpqa": Source(  # its authors ask that examples stay off the web
        "Idavidrein/gpqa",
        _test("gpqa_diamond.csv"),
        _gpqa,
        "CC-BY-4.0",
        gated=True,
        redistributable=False,
    ),
}

ALIASES = {  # how others name these sets
    "math500": ("math_500",),
    "aime24": ("aime_24",),
    "aime25": ("aime_2025", "aime_25"),
    "minerva": ("minerva_math",),
    "olympiad": ("olympiadbench", "OlympiadBench"),
}


def read_rows(path: Path, name: str) -> tuple[list[Problem], list[Reject]]:
    """Problems and rejects of one file in the published layout of the set `name`."""
    source = SOURCES[name]
    problems, rejects = collect(path.name, rows.read(path), lambda row: _problem(row, name, source))
    return [*problems.values()], rejects


def collect(
    file: str, numbered_rows: Iterable[tuple[int, Row | Exception]], make: Callable[[Row], Problem]
) -> tuple[dict[int, Problem], list[Reject]]:
    """The problems that `make` makes of rows, by line, and the rows for which it raises ValueError.

    Of rows with the same id the first is taken, and none where their golds differ.
    """
    problems, first, rejects = {}, {}, []
    for line, row in numbered_rows:
        try:
            if isinstance(row, Exception):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"the row is {type(row).__name__}, not an object")
            problem = make(row)
            at, gold = first.setdefault(problem.id, (line, problem.answer))
            if at == line:
                problems[line] = problem
            elif same_gold(gold, problem.answer):
                raise BadRow(f"repeats line {at} (id {problem.id})")
            else:
                if problems.pop(at, None):
                    reason = f"another gold than line {line}: {gold!r}, not {problem.answer!r}"
                    rejects.append(Reject(file, at, reason))
                raise BadRow(f"another gold than line {at}: {problem.answer!r}, not {gold!r}")
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(file, line, rows.reason(error)))
    return problems, sorted(rejects, key=lambda reject: reject.line)


def same_gold(a: str, b: str) -> bool:
    """Whether two golds are the same text but for spaces, dollars and case, or one number."""
    a, b = ("".join(gold.replace("$", "").split()).casefold() for gold in (a, b))
    try:
        return a == b or Fraction(a) == Fraction(b)
    except (ValueError, ZeroDivisionError):
        return False


def _problem(row: Row, name: str, source: Source) -> Problem:
    question, gold, family, level = source.read(row)
    if source.id_field is None:
        own = digest(question, 12)
    elif isinstance(own := row.get(source.id_field), bool) or not isinstance(own, (str, int)):
        raise BadRow(f"field {source.id_field!r} is missing or no text")
    return Problem(f"{name}-{own}", question, gold, family, level, name)


def local_files(name: str, half: str) -> list[Path]:
    """The files of a published split in the folder KIT_DATA; [] if it is unset or has none.

    Taken are math_test.jsonl, math/test.jsonl, or the files of the repository in a folder of its
    name; of sets for testing only also aime24.jsonl. The names of `ALIASES` do as well, and every
    suffix of `rows.KINDS`.
    """
    if paths.READER is None:
        return []
    source = SOURCES[name]
    names = [name, source.repo.split("/")[1], *ALIASES.get(name, ())]
    for place in names:
        files = [paths.READER / place / file for file in source.files[half]]
        if all(file.is_file() for file in files):
            return files
    stems = [f"{place}{mark}{half}" for place in names for mark in "_-/"]
    stems += [place for place in names if len(source.files) == 1]
    suffixes = [suffix + end for suffix in rows.KINDS for end in ("", ".gz")]
    every = [paths.READER / f"{stem}{suffix}" for stem in stems for suffix in suffixes]
    return [file for file in every if file.is_file()][:1]
