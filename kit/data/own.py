"""Problems of the reader's own: a file, a folder, or a TOML that names files and columns.

Columns are found by the usual names in `NAMES`, or named by the TOML. Splits come from the names of
files, from a column, or, of one file that a TOML names, from shares drawn by hash: examples are in
docs/problems.md.
"""

import ast
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from kit import paths
from kit.data import rows
from kit.data.boxed import last_boxed
from kit.data.rows import BadRow, Reject, Row
from kit.data.sources import collect, slug
from kit.schema import ASKS, Problem, digest

# Usual names, the first that has something in the row; case, spaces and hyphens do not count.
NAMES = {
    "question": ("question", "problem", "prompt", "input", "query", "content", "instruction"),
    "context": ("context", "body", "passage"),  # precedes the question
    "answer": ("final_answer", "choice_answer", "answer", "answerkey", "correct_answer", "correct",
               "target", "gold", "ground_truth", "expected_answer", "label", "output", "solution"),
    "options": ("options", "choices"),
    "level": ("level", "difficulty", "grade"),
    "family": ("family", "subject", "type", "category", "topic", "subfield", "task"),
    "split": ("split",),
    "asks": ("asks",),
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
SHARES = {
    "train": 0.4,
    "validation": 0.1,
    "test": 0.5,
}  # of the `file` of a TOML without splits, by hash
LETTERS = "ABCDEFGHIJ"
WORKED = "solution"  # a column of worked solutions: its gold is in a box, or after ####

_LEVELS = {"easy": 1, "medium": 2, "hard": 3}
_OPTION = re.compile(r"\s*\(?([A-J])[).:]\s*")
_UNIT = re.compile(r"([-+]?[\d.,/]+)\s*\([^()\d]*\)")  # 9 (apples)


@dataclass(frozen=True)
class Own:
    """The location of the problems of a set: a file by split, or one `file` for all."""

    name: str
    files: dict[str, Path]  # by split, or under "file"
    columns: dict[str, str] = field(default_factory=dict)  # by key of NAMES
    shares: dict[str, float] = field(default_factory=SHARES.copy)
    seed: int = 0  # of the shares
    whole: bool = False  # without a split column, the file is for testing and not shared out


def find(name: str, split: str = "test", path=None, test_path=None) -> Own | None:
    """The set of a path, from here or from the project's folder; None if `name` is no path.

    With `path` the file of one split, and `test_path` that of test, under any name.
    """
    if path is not None:
        split_files = {"test" if split == "test" else "train": Path(path)}
        return Own(name, split_files | ({"test": Path(test_path)} if test_path else {}))
    path = Path(name).expanduser()
    path = path if path.exists() else paths.ROOT / path
    if path.is_dir():
        files = {of: file for file in sorted(path.iterdir())
                 if rows.kind(file) in rows.KINDS and (of := _split_of(file))}  # fmt: skip
        if not files:
            raise ValueError(f"{path} has no file named train, validation or test")
        return Own(path.resolve().name, files)
    if path.suffix == ".toml" and path.is_file():
        return _described(path)
    if path.is_file() or rows.kind(path) in rows.KINDS or path.suffix == ".toml":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}, here or in {paths.ROOT}")
        of = _split_of(path)
        generic = path.name.split(".")[0].lower() in sum(SPLITS.values(), ())
        label = f"{path.resolve().parent.name}/{path.name}" if generic else path.name
        return Own(label, {of or "file": path}, whole=of is None)
    return None


def _split_of(path: Path) -> str | None:
    """The split that the last word of a file's name says, as in gsm8k_test.jsonl."""
    word = re.split(r"[^a-z]+", path.name.lower().split(".")[0])[-1]
    return next((split for split, words in SPLITS.items() if word in words), None)


def _described(path: Path) -> Own:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    keys = ("file", *SPLITS, "columns", "shares", "seed")
    if unknown := sorted({*table} - {*keys}):
        raise ValueError(f"{path} has the key {unknown[0]!r}; there are {', '.join(keys)}")
    files = {of: path.parent / table[of] for of in ("file", *SPLITS) if of in table}
    if not files or ("file" in files and len(files) > 1):
        raise ValueError(f"{path} must name either file, or some of {', '.join(SPLITS)}")
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{path} names {file}, which is not a file")
    columns, shares = table.get("columns", {}), table.get("shares", SHARES)
    if unknown := sorted({*columns} - {*NAMES}):
        raise ValueError(f"{path} has columns.{unknown[0]}; there are {', '.join(NAMES)}")
    if {*shares} != {*SPLITS} or not math.isclose(sum(shares.values()), 1):
        raise ValueError(f"{path}: shares needs {', '.join(SPLITS)}, and they sum to 1")
    return Own(path.name, files, columns, shares, table.get("seed", 0))


def read(own: Own, split: str) -> tuple[dict[int, Problem], list[Reject]]:
    """Problems of one split by line, and rejects of the file they stand in; none without a file."""
    file = own.files.get(split) or own.files.get("file")
    if file is None:
        return {}, []
    lines = [*rows.read(file)]
    good = [row for _, row in lines if isinstance(row, dict)]
    for name in own.columns.values():
        if good and not any(name in row for row in good):
            raise ValueError(f"{file} has no column {name!r}; it has {', '.join(good[0])}")
    gold, column = _choice_reader(own, good), any(_value(own, row, "split") for row in good)
    splits = {}

    def make(row: Row) -> Problem:
        problem = _problem(own, row, gold)
        if "file" not in own.files:
            splits[problem.id] = split
        elif column:
            splits[problem.id] = _named_split(own, row)
        else:
            splits[problem.id] = _drawn_split(own, problem)
        return problem

    problems, rejects = collect(file.name, lines, make)
    return {line: p for line, p in problems.items() if splits[p.id] == split}, rejects


def _named_split(own: Own, row: Row) -> str:
    word = str(_value(own, row, "split")).strip().lower()
    for split, words in SPLITS.items():
        if word in words:
            return split
    raise BadRow(f"split is {word!r}, none of {', '.join(SPLITS)}")


def _drawn_split(own: Own, problem: Problem) -> str:
    """By hash of the question: whatever the order of rows, and when rows are added."""
    if own.whole:
        return "test"
    at, last = int(digest([own.seed, problem.id], 8), 16) / 16**8, "test"
    for last in SPLITS:
        at -= own.shares[last]
        if at < 0:
            break
    return last


# ---- a row ----------------------------------------------------------------------------------


def _column(own: Own, row: Row, key: str) -> str | None:
    """The column of `key` in this row: the named one, else the first usual one that is filled."""
    if key in own.columns:
        return own.columns[key]
    plain = {_plain(name): name for name in reversed(row)}
    filled = (plain[_plain(n)] for n in NAMES[key] if _filled(row.get(plain.get(_plain(n)))))
    return next(filled, None)


def _plain(name) -> str:
    return re.sub(r"[\W_]+", "", str(name)).casefold()


def _filled(value) -> bool:
    return value is not None and value != [] and str(value).strip() not in ("", "nan", "None")


def _value(own: Own, row: Row, key: str):
    value = row.get(_column(own, row, key))
    return value if _filled(value) else None


def _problem(own: Own, row: Row, gold: Callable[[str, list[str]], str]) -> Problem:
    question, context = _required_text(own, row, "question"), _value(own, row, "context")
    if isinstance(context, str) and not question.startswith(context.strip()):
        question = f"{context.strip()} {question}"
    options = _options(own, row)
    if len(options) == 1:  # one text with all of them
        question = f"{question}\n\n{options[0]}"
    elif options:
        lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options)]
        question = "\n".join([question, "", *lines])
    answer = gold(_gold(own, row), options)
    question.encode(), answer.encode()  # UnicodeEncodeError for a lone surrogate
    asks = str(_value(own, row, "asks") or "any")
    if asks not in ASKS:
        raise BadRow(f"asks is {asks!r}, none of {', '.join(ASKS)}")
    family = slug(str(_value(own, row, "family") or "")) or slug(own.name.split(".")[0])
    return Problem(digest(question, 12), question, answer, family, _level(own, row), own.name, asks)


def _required_text(own: Own, row: Row, key: str) -> str:
    """The text of a column that a row must have."""
    value = _value(own, row, key)
    if value is None:
        names = [own.columns[key]] if key in own.columns else NAMES[key]
        present = [name for name in row if _plain(name) in map(_plain, names)]
        if present:
            raise BadRow(f"column {present[0]!r} is empty")
        raise BadRow(
            f"no column for the {key} ({', '.join(names)}); the row has {', '.join(map(str, row))}"
        )
    return _text(value, _column(own, row, key))


def _text(value, column: str) -> str:
    """A text as it is; 51.0 as 51; several answers with commas between them."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(each, column).strip("$") for each in value)
    if isinstance(value, (float, Decimal)) and value == value // 1 and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (bool, int, float, Decimal)):
        return str(value)
    raise BadRow(f"column {column!r} is {type(value).__name__}, not text, number or list")


def _gold(own: Own, row: Row) -> str:
    """The text after ####, in the last box, or in the column; without a unit in brackets."""
    answer, column = _required_text(own, row, "answer"), _column(own, row, "answer")
    _, mark, marked = answer.rpartition("####")
    if mark and marked.strip():
        return marked.strip().replace(",", "")
    if boxed := last_boxed(answer):
        return boxed
    if _plain(column) == WORKED and "answer" not in own.columns:
        raise BadRow(f"no box and no #### in column {column!r}; if it is the bare answer, name it")
    unit = _UNIT.fullmatch(answer)
    bare = answer[1:-1] if answer.count("$") == 2 and answer[0] == answer[-1] == "$" else answer
    return unit[1] if unit else bare


def _level(own: Own, row: Row) -> int:
    """`Level 3`, 3 and 3.0 are 3, easy to hard 1 to 3; anything else 0, as if there were none."""
    level = str(_value(own, row, "level") or "").strip().lower().removesuffix(".0")
    number = re.fullmatch(r"\D*(\d{1,3})\D*", level)
    return int(number[1]) if number else _LEVELS.get(level, 0)


# ---- multiple choice ------------------------------------------------------------------------


def _options(own: Own, row: Row) -> list[str]:
    """The texts of the options; one text if they stand in one; [] if there are none."""
    value = _value(own, row, "options")
    if value is None and "options" not in own.columns:
        plain = {_plain(name): row[name] for name in row}
        for form in ("{}", "option{}", "choice{}"):
            value = [plain.get(form.format(letter.lower())) for letter in LETTERS]
            value = [each for each in value if _filled(each)]
            if len(value) > 1:
                break
            value = None
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _literal(value)
    if isinstance(value, dict):  # {"A": "1", ...}, or texts and labels
        value = value.get("text") or [value[letter] for letter in sorted(value)]
    value = [value] if isinstance(value, str) else value or []
    options = [_text(each, "options") for each in value]
    if len(options) > len(LETTERS):
        raise BadRow(f"{len(options)} options; {len(LETTERS)} letters are graded")
    marks = [_OPTION.match(option) for option in options]
    if len(options) > 1 and all(m and m[1] == c for m, c in zip(marks, LETTERS)):
        options = [option[mark.end() :] for option, mark in zip(options, marks)]
    return options


def _literal(text: str):
    """A list or table written as JSON or Python in a text; the text itself if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _letter(gold: str, options: list[str]) -> str | None:
    match = _OPTION.match(f"{gold})")
    count = len(options) if len(options) > 1 else len(LETTERS)
    return match[1] if match and match[1] in LETTERS[:count] else None


def _by_text(gold: str, options: list[str]) -> str | None:
    return LETTERS[options.index(gold)] if options.count(gold) == 1 else None


def _by_number(first: int) -> Callable[[str, list[str]], str | None]:
    def letter(gold: str, options: list[str]) -> str | None:
        at = int(gold) - first if re.fullmatch(r"\d{1,2}", gold) else -1
        return LETTERS[at] if 0 <= at < len(options) else None

    return letter


def _choice_reader(own: Own, good: list[Row]) -> Callable[[str, list[str]], str]:
    """The reading of golds that suits most rows with options: a letter, the text of an option, its
    number from 0, or from 1. Golds without options are as they are."""
    fits = Counter()
    readings = {"the letter of an option": _letter, "the text of an option": _by_text,
                "the number of an option from 0": _by_number(0),
                "the number of an option from 1": _by_number(1)}  # fmt: skip
    for row in good:
        try:
            options, gold = _options(own, row), _gold(own, row)
        except BadRow:
            continue
        fits.update(name for name, read in readings.items() if options and read(gold, options))
    best = max(readings, key=lambda name: fits[name])  # the first of equals

    def read(gold: str, options: list[str]) -> str:
        letter = readings[best](gold, options) if options else gold
        if letter is None:
            raise BadRow(f"answer {gold!r} is not {best}, of {len(options)}, as in other rows")
        return letter

    return read
