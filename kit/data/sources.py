"""Published benchmarks: their files on the hub, and how a row of each becomes a problem.

`SOURCES` is the table; `read_rows` turns a JSONL, parquet or CSV file in the published layout
into problems and rejects (file, line, reason): a malformed row never loses the others. Splits and
samples are made in `problems`.

File names were checked against stored pages of the hub, not the live hub; those of gpqa and of
the training halves of math and gsm8k, and the columns of open-rs, were taken from public code that
reads them.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet

from kit.data.boxed import last_boxed
from kit.schema import Problem, digest

Row = dict


class BadRow(ValueError):
    """A malformed row; the message says what is wrong."""


@dataclass(frozen=True)
class Reject:
    """A malformed row and why it was rejected."""

    file: str
    line: int  # counted from 1; the row number in parquet files
    reason: str


def _text(row: Row, field: str) -> str:
    """A non-empty text field; raises BadRow if it is none."""
    if field not in row:
        raise BadRow(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"field {field!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"field {field!r} is empty")
    value.encode()  # UnicodeEncodeError for a lone surrogate
    return value.strip()


def _slug(text: str) -> str:
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
    return _text(row, "problem"), _boxed_gold(row), _slug(_text(row, "type")), _level(row)


def _math500(row: Row) -> tuple:
    gold, family = _text(row, "answer"), _slug(_text(row, "subject"))
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
    return _text(row, "question"), _text(row, "answer"), "minerva", 0


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
    return "\n".join([question, "", *lines]), gold, _slug(_text(row, "High-level domain")), 0


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
    gated: bool = False


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
    ),
    "aime25": Source(
        "math-ai/aime25",
        _test("test.jsonl"),
        lambda row: _aime(row, "aime25"),
        "Apache-2.0, problems (c) MAA",
    ),
    "amc23": Source("math-ai/amc23", _test(f"test-{_SHARD}"), _amc, "problems (c) MAA"),
    "minerva": Source("math-ai/minervamath", _test("test.jsonl"), _minerva, "as published"),
    "olympiad": Source("math-ai/olympiadbench", _test("test.jsonl"), _olympiad, "as published"),
    "open-rs": Source("knoveleng/open-rs", _train(), lambda row: _open_rs(row, "open-rs"), "MIT"),
    "open-s1": Source("knoveleng/open-s1", _train(), lambda row: _open_rs(row, "open-s1"), "MIT"),
    "gpqa": Source("Idavidrein/gpqa", _test("gpqa_diamond.csv"), _gpqa, "CC-BY-4.0", gated=True),
}


def read_rows(path: Path, name: str) -> tuple[list[Problem], list[Reject]]:
    """Problems and rejects of one file in the published layout of the set `name`."""
    source, problems, rejects, lines = SOURCES[name], [], [], {}
    for line, row in _rows(path):
        try:
            if isinstance(row, Exception):
                raise row
            problem = _problem(row, name, source)
            if problem.id in lines:
                raise BadRow(f"same id as line {lines[problem.id]}: {problem.id}")
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(path.name, line, _reason(error)))
        else:
            lines[problem.id] = line
            problems.append(problem)
    return problems, rejects


def _problem(row: Row, name: str, source: Source) -> Problem:
    if not isinstance(row, dict):
        raise BadRow(f"the row is {type(row).__name__}, not an object")
    question, gold, family, level = source.read(row)
    if source.id_field is None:
        own = digest(question, 12)
    elif isinstance(own := row.get(source.id_field), bool) or not isinstance(own, (str, int)):
        raise BadRow(f"field {source.id_field!r} is missing or no text")
    return Problem(f"{name}-{own}", question, gold, family, level, name)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return f"not UTF-8: {error.reason}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _rows(path: Path) -> Iterator[tuple[int, Row | Exception]]:
    """(line, row) of a file, or (line, error) for a malformed line."""
    if path.suffix == ".parquet":
        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from None
    elif path.suffix == ".csv":
        # A byte that is not UTF-8 becomes a lone surrogate, which _text refuses in its own row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    whole = None not in row and None not in row.values()
                    shifted = BadRow("not as many fields as the header; quote texts with commas")
                    yield reader.line_num, row if whole else shifted
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    else:
        for line, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
            if raw.strip():
                yield line, _json(raw)


def _json(raw: bytes) -> Row | Exception:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error
