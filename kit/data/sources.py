"""Published benchmarks: their files on the hub, and how a row of each becomes a problem.

`SOURCES` is the table, `OWN` the layout of any other file: columns by their usual names.
`read_rows` turns a file (JSONL, a JSON array, parquet, CSV or TSV, also packed as .gz) into
problems and rejects (file, line, reason): a malformed row never loses the others. Splits and
samples are made in `problems`.

File names were checked against stored pages of the hub, not the live hub; those of gpqa and of
the training halves of math and gsm8k, and the columns of open-rs, were taken from public code that
reads them.
"""

import csv
import gzip
import io
import json
import re
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


# Columns of a file of one's own, the first that a row has; upper case is as good.
QUESTION = ("question", "problem", "prompt", "query", "content", "input")
ANSWER = ("answer", "final_answer", "gold", "target", "label", "correct", "output", "solution")
OPTIONS = ("options", "choices")
FAMILY = ("family", "subject", "type", "category", "topic")


def _own(row: Row) -> tuple:
    """Question, gold, family and level of a row whose columns have usual names. With options the
    gold is a letter: given as such, as a number counted from 0, or as the text of an option."""
    row = {name.casefold(): value for name, value in row.items()}
    question, answer, options, family = (
        next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
        for names in (QUESTION, ANSWER, OPTIONS, FAMILY)
    )
    if question is None or answer is None:
        what, names = ("question", QUESTION) if question is None else ("answer", ANSWER)
        raise BadRow(f"no {what}; the columns are {', '.join(row)}: name one {' or '.join(names)}")
    if isinstance(row.get("body"), str):  # ASDiv, SVAMP: the story apart from the question
        question = f"{row['body'].strip()} {question}"
    question = _text({"question": question}, "question")
    family = _slug(family) if isinstance(family, str) and family.strip() else "own"
    level = str(row.get("level", "")).removeprefix("Level ")
    level = int(level) if level in {"1", "2", "3", "4", "5"} else 0
    if options is not None:
        lines, gold = _choices(options, answer)
        return "\n".join([question, "", *lines]), gold, family, level
    return question, _own_gold(answer), family, level


def _choices(options, answer) -> tuple[list[str], str]:
    """The options as lines "A) ...", and the letter of the right one."""
    if isinstance(options, str):
        lines = options.splitlines()
    else:
        texts = options.values() if isinstance(options, dict) else options
        plain = [re.sub(r"^\(?[A-J][).:]\s*", "", str(text).strip()) for text in texts]
        lines = [f"{letter}) {text}" for letter, text in zip("ABCDEFGHIJ", plain)]
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(lines):
            return lines, "ABCDEFGHIJ"[answer]
        if str(answer).strip() in plain:
            return lines, "ABCDEFGHIJ"[plain.index(str(answer).strip())]
    if not re.fullmatch("[A-J]", letter := str(answer).strip("() .").upper()):
        raise BadRow(f"field 'answer' is {answer!r}, none of the options")
    return lines, letter


def _own_gold(answer) -> str:
    """The gold answer: what stands after #### or in the last box of a solution, several joined, a
    number without the unit in parentheses that ASDiv adds."""
    if isinstance(answer, list):
        return ", ".join(map(_own_gold, answer))
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal):
        raise BadRow(f"field 'answer' is {type(answer).__name__}, not a text or a number")
    text = str(answer).rpartition("####")[2]
    gold = last_boxed(text) or text.strip().strip("$")
    return _text({"answer": re.sub(r"^([-\d.,/%]+) \([^()\d]+\)$", r"\1", gold)}, "answer")


OWN = Source("", {}, _own, "")


def read_rows(path: Path, name: str) -> tuple[list[Problem], list[Reject]]:
    """Problems and rejects of one file in the published layout of the set `name`, or in `OWN`."""
    source, problems, rejects, lines = SOURCES.get(name, OWN), [], [], {}
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
    """(line, row) of a file, or (line, error) for a malformed line; in an array, the number of the
    row."""
    raw, kinds = path.read_bytes(), [suffix.lower() for suffix in path.suffixes]
    if raw.startswith(b"version https://git-lfs."):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the file; fetch it by `git lfs pull`"
        )
    if kinds[-1:] == [".gz"]:
        raw, kinds = gzip.decompress(raw), kinds[:-1]
    if kinds[-1:] == [".parquet"]:
        try:
            yield from enumerate(pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist(), start=1)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from None
    elif kinds[-1:] in ([".csv"], [".tsv"]):
        # A byte that is not UTF-8 becomes a lone surrogate, which _text refuses in its own row.
        text = raw.decode("utf-8-sig", errors="surrogateescape")
        header = text.partition("\n")[0]
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count)
        )
        try:
            for row in reader:
                whole = None not in row and None not in row.values()
                shifted = BadRow("not as many fields as the header; quote texts with commas")
                yield reader.line_num, row if whole else shifted
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    elif kinds[-1:] == [".json"] and raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        whole = _json(raw)
        if isinstance(whole, Exception):
            raise ValueError(f"{path} is no JSON array: {_reason(whole)}")
        yield from enumerate(whole, start=1)
    else:
        for line, text in enumerate(raw.split(b"\n"), start=1):
            if text.strip():
                yield line, _json(text)


def _json(raw: bytes) -> Row | Exception:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error
