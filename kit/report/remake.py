"""Makes the outputs of a stage again from its records and results, and compares them with its
files.

Tables with their CSV and LaTeX, figures in every format, entries of the results and measurements.
What does not follow from records is named; a CSV or LaTeX file of such a table must still show what
the table shows.
"""

import io
import math
from dataclasses import dataclass, field

import pandas as pd

from kit.analysis.contrasts import Measurement
from kit.report import exhibits, recompute, redraw
from kit.report.bundle import Run
from kit.report.exhibits import LIST

CLOSE = 1e-6  # of a number beside that of the same computation on another machine
AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts
CHECKED = ("keys", "verdicts", "headline", "by_chance", "measurements", "declared", "renewed")


@dataclass
class Remake:
    """The result of making the outputs of a stage again."""

    differences: list[str] = field(default_factory=list)  # a sentence each
    unchecked: list[str] = field(default_factory=list)  # what does not follow from records
    files: set[str] = field(default_factory=set)  # names of the files that were held against it
    count: int = 0  # tables, figures and measurements made


def stage(run: Run, name: str) -> Remake:
    """Make all again that the stage `name` of a run left. ValueError, KeyError, TypeError,
    IndexError or AttributeError where its files are damaged."""
    remade = Remake()
    list_file = f"exhibits/{name}/{LIST}"
    rows = run.json(list_file) or []
    frames = _tables(run, name, [row for row in rows if "file" not in row], remade)
    _figures(run, name, [row for row in rows if "file" in row], frames, remade)
    remade.files |= {list_file} if list_file in run.files and not remade.unchecked else set()
    _entries(run, name, frames, remade)
    _measured(run, name, remade)
    return remade


def _tables(run: Run, stage: str, rows: list[dict], remade: Remake) -> dict[str, pd.DataFrame]:
    """The tables of a stage that follow from its records, by caption."""
    frames = {}
    for row in rows:
        caption = row["caption"]
        frame = recompute.table(stage, caption, run.results[stage], run.records[stage])
        if frame is None:
            remade.unchecked.append(f"{stage}, table {caption!r}: does not follow from records")
        else:
            frames[caption] = frame
            remade.count += 1
            if exhibits.as_table(caption, frame).rows != row["rows"]:
                remade.differences.append(f"{stage}, table {caption!r} is not what the records say")
        tex, csv = (f"exhibits/{stage}/{exhibits.slug(caption)}.{kind}" for kind in ("tex", "csv"))
        remade.files |= {tex, csv}
        for name in (tex, csv):
            if name not in run.files:
                raise ValueError(f"{name} is missing")
        if run.files[tex] != exhibits.latex(exhibits.listed(row)).encode():
            remade.differences.append(f"{tex} is not what its table says")
        if not _same_csv(run.files[csv], row, frame):
            remade.differences.append(f"{csv} is not what its table says")
    return frames


def _same_csv(data: bytes, row: dict, frame: pd.DataFrame | None) -> bool:
    """Whether a CSV has the numbers of `frame`, or, without one, shows what the table shows."""
    try:
        stored = pd.read_csv(io.BytesIO(data), **AS_WRITTEN)
        if frame is None:
            table = exhibits.gathered(stored)
            texts = _texts(data) if len(table.columns) == len(stored.columns) else table
            rows = exhibits.as_table(row["caption"], table).rows
            cells = zip(texts.to_numpy().ravel(), sum(rows, []), sum(row["rows"], []), strict=True)
            return all(text in both for *both, text in cells)
        text = exhibits.spread(frame).to_csv(index=False)
        again = pd.read_csv(io.StringIO(text), **AS_WRITTEN)
        pd.testing.assert_frame_equal(stored, again, check_dtype=False, rtol=CLOSE, atol=1e-9)
    except (AssertionError, ValueError, TypeError):  # also of pandas, that it is no CSV
        return False
    return True


def _texts(data: bytes) -> pd.DataFrame:
    """A CSV with every cell as it is written: a number that was a text, such as 0.50, stays one."""
    return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)


def _figures(run: Run, stage: str, rows: list[dict], frames: dict, remade: Remake) -> None:
    parameters = run.stamps.get(stage, {}).get("parameters", {})
    for row in rows:
        caption, place = row["caption"], f"exhibits/{stage}/{row['file'].rpartition('.')[0]}"
        names = [f"{place}.{kind}" for kind in exhibits.FORMATS]
        if missing := [name for name in names if name not in run.files]:
            raise ValueError(f"{missing[0]} is missing")
        picture = redraw.figure(caption, run.results[stage], frames, run.records[stage], parameters)
        if picture is None:
            remade.unchecked.append(f"{stage}, figure {caption!r}: does not follow from records")
            continue
        remade.count += 1
        if picture.alt != row["alt"]:
            remade.differences.append(
                f"{stage}, figure {caption!r}: its words are not what the records say"
            )
        different, unknown = redraw.compare(picture, {name: run.files[name] for name in names})
        remade.differences += [f"{name} is not what the records say" for name in different]
        remade.unchecked += [f"{name}: another version of Matplotlib drew it" for name in unknown]
        remade.files |= {*names} - {*unknown}


def _entries(run: Run, stage: str, frames: dict, remade: Remake) -> None:
    results = run.results[stage]
    again = recompute.entries(stage, results, frames, run.records[stage])
    for name, value in again.items():
        if not _alike(exhibits.plain(value, name), results[name]):
            remade.differences.append(f"results/{stage}.json: {name!r} is not what the records say")
    if names := [name for name in results if name not in (*again, *CHECKED)]:
        remade.unchecked.append(f"results/{stage}.json, what no record holds: {', '.join(names)}")


def _alike(first, second) -> bool:
    """Whether two values of JSON are the same but for the low bits of numbers."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _alike(first[key], second[key]) for key in first
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_alike, first, second))
    if isinstance(first, float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=CLOSE, abs_tol=1e-9)
    return first == second


def _measured(run: Run, stage: str, remade: Remake) -> None:
    """Measurements that come out otherwise, and those that no record holds, such as arithmetic."""
    results = run.results[stage]
    again = recompute.measured(stage, results, run.records[stage], run.claims)
    for claim, value in again.items():
        texts = Measurement(**results["measurements"][claim]).texts()
        if value.texts() != texts:
            remade.differences.append(f"{claim} measured {' ['.join(texts)}] in the results, "
                                f"{' ['.join(value.texts())}] from the records")  # fmt: skip
    remade.count += len(again)
    if names := sorted({*results.get("measurements", {})} - {*again}):
        remade.unchecked.append(f"{stage}, measurements that no record holds: {', '.join(names)}")
