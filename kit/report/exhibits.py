"""Exhibits of a stage for the report and for papers: its key tables and figures, and its numbers.

Under outputs/<profile>/exhibits/<stage>/ a table is CSV (numbers as they are, a column each for the
ends of an interval) and booktabs LaTeX (as a reader sees them), a figure is PDF, SVG and PNG;
exhibits.json says what there is, in order.
"""

import io
import json
import math
import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from kit.analysis.plots import STYLE, Picture
from kit.paths import run_dir
from kit.pipeline.errors import read_json
from kit.pipeline.provenance import write_json, write_text
from kit.schema import DIGITS

LIST = "exhibits.json"
BASELINE = "Baseline: accuracy and costs of each prompt"  # a caption that others look for
FEW, MANY = 4, 8  # rows at most, columns more, of a LaTeX table that is turned
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX = str.maketrans({sign: f"\\{sign}" for sign in "&%$#_{}"} | LATEX)
LINE, BETWEEN, NARROW = 100, 3, 9  # characters of a line, between columns, of a heading at least
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
ENDS = ("_low", "_high")  # of an interval, behind the name of its column
FORMATS = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}


@dataclass(frozen=True)
class Table:
    """A table as a reader sees it; the first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    words: tuple[int, ...] = (0,)  # columns set left, the others hold numbers


@dataclass(frozen=True)
class Figure:
    """A figure as an SVG file, and what it says in words."""

    caption: str
    file: Path
    alt: str


def save(
    folder: Path, frames: Mapping[str, pd.DataFrame], pictures: Mapping[str, Picture]
) -> list[Path]:
    """Write tables and figures, by caption, into `folder`, which they replace: the files."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    rows, names = [], [slug(caption) for caption in (*pictures, *frames)]
    if len(set(names)) < len(names):
        raise ValueError(f"captions make equal file names: {sorted(names)}; tell them apart")
    rows += [_draw(folder, caption, picture) for caption, picture in pictures.items()]
    rows += [_write(folder, caption, frame) for caption, frame in frames.items()]
    write_json(folder / LIST, rows)
    return sorted(folder.iterdir())


def renew(
    folder: Path, frames: Mapping[str, pd.DataFrame], pictures: Mapping[str, Picture]
) -> list[str]:
    """Write those tables and figures of `folder` again, in their places, that are given here by
    caption: the captions of the others."""
    rows, others = read_json(folder / LIST), []
    for number, row in enumerate(rows):
        caption = row["caption"]
        if caption in pictures:
            rows[number] = _draw(folder, caption, pictures[caption])
        elif caption in frames:
            rows[number] = _write(folder, caption, frames[caption])
        else:
            others.append(caption)
    write_json(folder / LIST, rows)
    return others


def _draw(folder: Path, caption: str, picture: Picture) -> dict:
    """Write a figure in every format: what the list says of it."""
    for kind in FORMATS:
        (folder / f"{slug(caption)}.{kind}").write_bytes(render(picture, kind))
    return {"caption": caption, "file": f"{slug(caption)}.svg", "alt": picture.alt}


def render(picture: Picture, kind: str) -> bytes:
    """The file of a figure in one of FORMATS, whether or not it has been drawn before: a layout
    settles in the second drawing."""
    buffer, clear = io.BytesIO(), kind == "svg"
    with matplotlib.rc_context(STYLE):
        picture.draw_without_rendering()
        picture.savefig(buffer, format=kind, metadata=FORMATS[kind], dpi=300, transparent=clear)
    return buffer.getvalue()


def _write(folder: Path, caption: str, frame: pd.DataFrame) -> dict:
    """Write a table as CSV and LaTeX: what the list says of it."""
    table = as_table(caption, frame)
    write_text(folder / f"{slug(caption)}.csv", spread(frame).to_csv(index=False))
    write_text(folder / f"{slug(caption)}.tex", latex(table))
    return vars(table)


def spread(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with three columns for one of (estimate, low, high): NAME, NAME_low, NAME_high."""
    columns = {}
    for name in frame:
        cells = [*frame[name]]
        if any(isinstance(cell, tuple) for cell in cells):
            rows = [cell if isinstance(cell, tuple) else (None,) * 3 for cell in cells]
            ends = [f"{name}{end}" for end in ("", *ENDS)]
            columns |= {end: pd.Series(of, dtype=float) for end, of in zip(ends, zip(*rows))}
        else:
            columns[name] = pd.Series(cells, dtype=frame[name].dtype)
    return pd.DataFrame(columns)


def gathered(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame`, as it is read from a CSV, with the three columns of an interval in one again."""
    columns = {}
    for name in frame:
        ends = [f"{name}{end}" for end in ("", *ENDS)]
        if {*ends} <= {*frame}:
            rows = frame[ends].itertuples(index=False, name=None)
            columns[name] = [None if pd.isna(row[0]) else row for row in rows]
        elif not any(str(name) == f"{base}{end}" for base in frame for end in ENDS):
            columns[name] = frame[name]
    return pd.DataFrame(columns)


def plain(value, place: str):
    """`value` as JSON types: tables as rows, dataclasses as their fields, floats to 12 significant
    digits, a NaN or an infinity as null; TypeError names the `place` where something else is."""
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {str(key): plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"save_results: {place} is a {type(value).__name__}; convert it to numbers, "
                    "texts, lists or dicts first")  # fmt: skip


def load(folder: Path) -> list[Table | Figure]:
    """The exhibits that `save` wrote to `folder`, in its order; [] where there is nothing."""
    if not (folder / LIST).is_file():
        return []
    rows = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return [listed(row, folder) for row in rows]


def listed(row: Mapping, folder: Path = Path()) -> Table | Figure:
    """The table or figure that a row of the list in `folder` describes."""
    if "file" in row:
        return Figure(row["caption"], folder / row["file"], row["alt"])
    return Table(row["caption"], row["columns"], row["rows"], tuple(row["words"]))


def load_results(profile: str) -> dict[str, dict]:
    """The saved numbers of every notebook run so far, by stage, in running order."""
    files = sorted((run_dir(profile) / "results").glob("*.json"))
    return {file.stem: read_json(file) for file in files}


def as_table(caption: str, frame: pd.DataFrame) -> Table:
    """`frame` as `kit.analysis.tables.text` shows it."""
    from kit.analysis import tables  # and scipy: a second that who only loads results saves

    texts = tables.text(frame)
    words = tuple(number for number, name in enumerate(frame) if tables.is_words(frame[name]))
    return Table(caption, [*texts.columns], texts.to_numpy().tolist(), words)


def latex(table: Table) -> str:
    """booktabs tabulars, one below the other, each no wider than a page with its headings in lines;
    numbers are for siunitx. Few rows of many columns stand upright."""
    rows, columns, words = table.rows, table.columns, table.words
    if len(rows) <= FEW and len(columns) > MANY:
        numbers = [i for i in range(len(columns)) if i not in words]
        columns = ["", *(" ".join(row[i] for i in words) for row in rows)]
        rows = [[table.columns[i], *(row[i] for row in rows)] for i in numbers]
        words = (0,)
    heads, widths = {}, {}
    for i, name in enumerate(columns):
        longest = max((len(row[i]) for row in rows), default=0)
        lines = textwrap.wrap(name, max(longest, NARROW), break_long_words=False)
        heads[i] = escaped(name) if len(lines) < 2 else _stacked(lines, i in words)
        widths[i] = max([longest, *map(len, lines)]) + BETWEEN
    tabulars = []
    for part in _parts(widths, words):
        cells = [[escaped(row[i]) if i in words else numeric(row[i]) for i in part] for row in rows]
        frame = pd.DataFrame(cells, columns=range(len(part)))
        styler = frame.style.hide(axis="index")
        styler = styler.format_index(lambda at, part=part: heads[part[at]], axis="columns")
        form = "".join("l" if number in words else "r" for number in part)
        tabulars.append(styler.to_latex(hrules=True, column_format=form))
    return f"% {table.caption}\n" + "\\par\\medskip\n".join(tabulars)


def _stacked(lines: list[str], left: bool) -> str:
    inside = r" \\ ".join(map(escaped, lines))
    return f"\\shortstack[{'l' if left else 'r'}]{{{inside}}}"


def _parts(widths: Mapping[int, int], words: tuple[int, ...]) -> list[list[int]]:
    """Columns by tabular: those of words in each, the others as many as fit beside them."""
    first = [i for i in widths if i in words]
    parts, free = [[*first]], LINE - sum(widths[i] for i in first)
    remaining = free
    for i in (i for i in widths if i not in words):
        if widths[i] > remaining and len(parts[-1]) > len(first):
            parts, remaining = [*parts, [*first]], free
        parts[-1].append(i)
        remaining -= widths[i]
    return [sorted(part) for part in parts]


def numeric(text: str) -> str:
    """`text` for LaTeX with each number of it for siunitx, which gives it a true minus sign."""
    parts = NUMBER.split(text)
    numbers = [f"\\num{{{number.replace(',', '')}}}" for number in NUMBER.findall(text)]
    signs = {"<": "$<$", ">": "$>$"}
    texts = ["".join(signs.get(sign, sign) for sign in escaped(part)) for part in parts]
    return "".join(text + number for text, number in zip(texts, [*numbers, ""], strict=True))


def escaped(text: str) -> str:
    """`text` for LaTeX."""
    return text.translate(LATEX)


def slug(caption: str) -> str:
    """The file name of what has this caption, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")
