"""What a stage of a run left, made again from its records and results, and held against its files.

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
class Remade:
    """What came of making the things of a stage again."""

    wrong: list[str] = field(default_factory=list)  # what differs, a sentence each
    left: list[str] = field(default_factory=list)  # what does not follow from records
    files: set[str] = field(default_factory=set)  # names of the files that were held against it
    count: int = 0  # tables, figures and measurements made


def stage(run: Run, name: str) -> Remade:
    """Make all again that the stage `name` of a run left. ValueError, KeyError, TypeError,
    IndexError or AttributeError where its files are damaged."""
    made = Remade()
    listed = f"exhibits/{name}/{LIST}"
    rows = run.json(listed) or []
    shown = _tables(run, name, [row for row in rows if "file" not in row], made)
    _figures(run, name, [row for row in rows if "file" in row], shown, made)
    made.files |= {listed} if listed in run.files and not made.left else set()
    _entries(run, name, shown, made)
    _measured(run, name, made)
    return made


def _tables(run: Run, stage: str, rows: list[dict], made: Remade) -> dict[str, pd.DataFrame]:
    """The tables of a stage that follow from its records, by caption."""
    shown = {}
    for row in rows:
        caption = row["caption"]
        frame = recompute.table(stage, caption, run.results[stage], run.records[stage])
        if frame is None:
            made.left.append(f"{stage}, table {caption!r}: does not follow from records")
        else:
            shown[caption] = frame
            made.count += 1
            if exhibits.as_table(caption, frame).rows != row["rows"]:
                made.wrong.append(f"{stage}, table {caption!r} is not what the records say")
        tex, csv = (f"exhibits/{stage}/{exhibits.slug(caption)}.{kind}" for kind in ("tex", "csv"))
        made.files |= {tex, csv}
        for name in (tex, csv):
            if name not in run.files:
                raise ValueError(f"{name} is missing")
        if run.files[tex] != exhibits.latex(exhibits.listed(row)).encode():
            made.wrong.append(f"{tex} is not what its table says")
        if not _same_csv(run.files[csv], row, frame):
            made.wrong.append(f"{csv} is not what its table says")
    return shown


def _same_csv(data: bytes, row: dict, frame: pd.DataFrame | None) -> bool:
    """Whether a CSV has the numbers of `frame`, or, without one, shows what the table shows."""
    try:
        read = pd.read_csv(io.BytesIO(data), **AS_WRITTEN)
        if frame is None:
            table = exhibits.gathered(read)
            texts = _texts(data) if len(table.columns) == len(read.columns) else table
            shown = exhibits.as_table(row["caption"], table).rows
            cells = zip(texts.to_numpy().ravel(), sum(shown, []), sum(row["rows"], []), strict=True)
            return all(said in both for *both, said in cells)
        text = exhibits.spread(frame).to_csv(index=False)
        again = pd.read_csv(io.StringIO(text), **AS_WRITTEN)
        pd.testing.assert_frame_equal(read, again, check_dtype=False, rtol=CLOSE, atol=1e-9)
    except (AssertionError, ValueError, TypeError):  # also of pandas, that it is no CSV
        return False
    return True


def _texts(data: bytes) -> pd.DataFrame:
    """A CSV with every cell as it is written: a number that was a text, such as 0.50, stays one."""
    return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)


def _figures(run: Run, stage: str, rows: list[dict], shown: dict, made: Remade) -> None:
    given = run.stamps.get(stage, {}).get("parameters", {})
    for row in rows:
        caption, place = row["caption"], f"exhibits/{stage}/{row['file'].rpartition('.')[0]}"
        names = [f"{place}.{kind}" for kind in exhibits.FORMATS]
        if lost := [name for name in names if name not in run.files]:
            raise ValueError(f"{lost[0]} is missing")
        picture = redraw.figure(caption, run.results[stage], shown, run.records[stage], given)
        if picture is None:
            made.left.append(f"{stage}, figure {caption!r}: does not follow from records")
            continue
        made.count += 1
        if picture.alt != row["alt"]:
            made.wrong.append(
                f"{stage}, figure {caption!r}: its words are not what the records say"
            )
        other, unknown = redraw.compare(picture, {name: run.files[name] for name in names})
        made.wrong += [f"{name} is not what the records say" for name in other]
        made.left += [f"{name}: another version of Matplotlib drew it" for name in unknown]
        made.files |= {*names} - {*unknown}


def _entries(run: Run, stage: str, shown: dict, made: Remade) -> None:
    found = run.results[stage]
    again = recompute.entries(stage, found, shown, run.records[stage])
    for name, value in again.items():
        if not _alike(exhibits.plain(value, name), found[name]):
            made.wrong.append(f"results/{stage}.json: {name!r} is not what the records say")
    if others := [name for name in found if name not in (*again, *CHECKED)]:
        made.left.append(f"results/{stage}.json, what no record holds: {', '.join(others)}")


def _alike(one, other) -> bool:
    """Whether two values of JSON are the same but for the low bits of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-9)
    return one == other


def _measured(run: Run, stage: str, made: Remade) -> None:
    """Measurements that come out otherwise, and those that no record holds, such as arithmetic."""
    found = run.results[stage]
    again = recompute.measured(stage, found, run.records[stage], run.claims)
    for claim, value in again.items():
        said = Measurement(**found["measurements"][claim]).texts()
        if value.texts() != said:
            made.wrong.append(f"{claim} measured {' ['.join(said)}] in the results, "
                              f"{' ['.join(value.texts())}] from the records")  # fmt: skip
    made.count += len(again)
    if others := sorted({*found.get("measurements", {})} - {*again}):
        made.left.append(f"{stage}, measurements that no record holds: {', '.join(others)}")
