"""Rows of a file of problems: JSON lines, a JSON array, CSV, TSV or Parquet, each also in gzip.

`read` yields (line, row), or (line, error) for a malformed row, which never loses the others.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

JSON, TABLES, PARQUET = (".jsonl", ".json", ".ndjson"), (".csv", ".tsv"), (".parquet",)
KINDS = (*JSON, *TABLES, *PARQUET)  # suffixes, in any case; each may be followed by .gz

Row = dict


class BadRow(ValueError):
    """A malformed row; the message says what is wrong."""


@dataclass(frozen=True)
class Reject:
    """A malformed row and why it was rejected."""

    file: str
    line: int  # counted from 1; the row number in JSON arrays and parquet files
    reason: str


def kind(path: Path) -> str:
    """The suffix that says how a file is read, in lower case and without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def text(row: Row, field: str) -> str:
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


def reason(error: Exception) -> str:
    """Why a row was rejected, in one sentence."""
    if isinstance(error, UnicodeError):
        return f"not UTF-8: {error.reason}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def read(path: Path) -> Iterator[tuple[int, Row | Exception]]:
    """(line, row) of a file, or (line, error) for a malformed row.

    ValueError, which names the file, where it is of no kind that is read, or damaged as a whole.
    """
    if kind(path) not in KINDS:
        raise ValueError(
            f"{path} is none of {', '.join(KINDS)}, with or without .gz: save it as one"
        )
    raw = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no readable gzip file: {error}") from None
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the data: run `git lfs pull` in its repository"
        )
    how = {PARQUET: _parquet, TABLES: _table, JSON: _json}
    yield from next(reader for kinds, reader in how.items() if kind(path) in kinds)(raw, path)


def _parquet(raw: bytes, path: Path) -> Iterator[tuple[int, Row]]:
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no readable parquet file: {error}") from None
    yield from enumerate(table.to_pylist(), start=1)


def _table(raw: bytes, path: Path) -> Iterator[tuple[int, Row | Exception]]:
    """Commas, semicolons or tabs, whichever the header has most of."""
    # A byte that is not UTF-8 becomes a lone surrogate, which `text` refuses in its own row.
    lines = io.StringIO(raw.decode("utf-8-sig", errors="surrogateescape"), newline="")
    header = lines.readline()
    lines.seek(0)
    mark = max("\t,;" if kind(path) == ".tsv" else ",;\t", key=header.count)
    reader = csv.DictReader(lines, delimiter=mark)
    try:
        for row in reader:
            whole = None not in row and None not in row.values()
            shifted = BadRow("not as many fields as the header; quote texts with commas")
            yield reader.line_num, row if whole else shifted
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _json(raw: bytes, path: Path) -> Iterator[tuple[int, Row | Exception]]:
    """The rows of an array, of the only list of objects in an object, or one row a line."""
    if kind(path) == ".json":
        try:
            whole = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if raw.lstrip()[:1] == b"[":
                at = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise ValueError(f"{path}{at}: {reason(error)}") from None
        else:
            if isinstance(whole, dict):
                lists = [v for v in whole.values() if isinstance(v, list) and v]
                lists = [v for v in lists if isinstance(v[0], dict)]
                whole = lists[0] if len(lists) == 1 else [whole]
            yield from enumerate(whole if isinstance(whole, list) else [whole], start=1)
            return
    for line, one in enumerate(raw.split(b"\n"), start=1):
        if one.strip():
            try:
                yield line, json.loads(one.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield line, error
