"""Figures of a run drawn again from its results and records, and compared with their files."""

import io
import re
import zlib
from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.image import imread

from kit.analysis import effects, plots, tables
from kit.analysis.plots import Picture
from kit.budget.plots import places_frontier, sweep_frontier
from kit.dms import plots as dms_plots
from kit.parametric import plots as parametric_plots
from kit.report import exhibits, recompute
from kit.training import plots as training_plots

POINTS = 0.02  # 1/72 inch: the low bits of a machine move a line by less
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?|-?\.\d+")
STREAM = re.compile(rb"stream\r?\n(.*?)\r?\nendstream", re.DOTALL)
SPACE = re.compile(rb"\s+")  # lines of a PDF are as long as their numbers let them
# Digests of paths in SVG, and what counts bytes in a PDF: they move with the low bits.
MOVES = re.compile(
    rb'(?:id="|href="#|url\(#)\w+|\d{10} \d{5} [nf]|startxref\s+\d+|obj\n\d+\nendobj'
)


def figure(
    caption: str, results: Mapping, frames: Mapping[str, pd.DataFrame], records: pd.DataFrame,
    parameters: Mapping,
) -> Picture | None:  # fmt: skip
    """The figure of a stage by its caption, as its notebook draws it: from results, tables by
    caption, records and parameters. None where it does not follow from these."""
    if caption == "Accuracy without memory, by family and level":
        first = records[records["model"] == parameters["MODELS"][0]]
        by_arm = {arm: tables.by_family(first, arm) for arm in ("plain", "format")}
        return plots.accuracy_by_family(by_arm)
    if caption == "Retrieved strategies minus each control":
        return plots.forest(pd.DataFrame(results["contrasts"]))
    if caption == "KL to full attention against what is kept":
        rows = frames[recompute.QUALITY]
        return dms_plots.quality(rows[rows["policy"] != "full"])
    if caption == "Compounding, with and without the bank":
        return training_plots.rounds(frames[recompute.COMPOUNDING])
    frequency_tables = {"By how often a fact was told": recompute.KNOWN,
                        "Recall by how often a fact was told": recompute.RECALL}  # fmt: skip
    if caption in frequency_tables:
        arms = frames[frequency_tables[caption]]
        best = arms["arm"].isin(["plain", "larger anchor", "fetched", *parameters["ARMS"], "rag"])
        return parametric_plots.accuracy_by_frequency(arms[best], results["buckets"])
    if caption == "Accuracy against bytes read":
        return parametric_plots.accuracy_by_bytes(frames[recompute.BYTES])
    rows_of = {"Accuracy against bytes, weights shared": "scenarios",
               "Five memories on one axis of bytes": "places"}  # fmt: skip
    if caption in rows_of:
        return _frontier(rows_of[caption], results, records, parameters["BATCH"])
    return None


def _frontier(name: str, results: Mapping, records: pd.DataFrame, batch: int) -> Picture:
    """The `scenarios` or `places` of a sweep against bytes where `batch` questions share the
    weights."""
    rows, correct = pd.DataFrame(results[name]), recompute.outcomes(results, name, records)
    if name == "places":
        front, _ = effects.places(rows, correct, np.random.default_rng(0))
        return places_frontier(front, batch)
    rows = rows.rename(columns={"accuracy": "interval"})
    return sweep_frontier(rows, correct, "shared_bytes", batch)


def compare(picture: Picture, files: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """Names of those `files` of a figure that show something else than `picture`, and of those that
    cannot be compared, since another version of Matplotlib wrote them."""
    versions = {m[1] for data in files.values() if (m := re.search(rb"Matplotlib v([\d.]+)", data))}
    if versions - {matplotlib.__version__.encode()}:
        return [], [*files]
    kinds = {name: name.rpartition(".")[2] for name in files}
    return [name for name, kind in kinds.items()
            if not _same(exhibits.render(picture, kind), files[name], kind)], []  # fmt: skip


def _same(first: bytes, second: bytes, kind: str) -> bool:
    """Whether two files of a figure show the same but for the low bits of numbers."""
    if first == second:
        return True
    try:
        if kind == "png":
            pixels = [imread(io.BytesIO(data)) for data in (first, second)]
            return pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).max() < 0.1
        if kind == "pdf":
            first, second = (
                STREAM.sub(lambda m: zlib.decompress(m[1]), data) for data in (first, second)
            )
    except (ValueError, OSError, SyntaxError, zlib.error):  # of PIL: no picture
        return False
    first, second = (SPACE.sub(b" ", MOVES.sub(b"", data)) for data in (first, second))
    numbers = [np.array([*map(float, NUMBER.findall(data))]) for data in (first, second)]
    return NUMBER.split(first) == NUMBER.split(second) and np.allclose(
        *numbers, rtol=0, atol=POINTS
    )
