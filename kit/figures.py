"""One function per published figure: tables in, a Picture out.

A Picture is a matplotlib Figure that carries its alternative text and shows itself in notebooks.
One style block; colours are the Okabe-Ito set, told apart by marker too. Drawn narrow, so that
a phone still shows readable letters. No numbers are computed here.
"""

import base64
import html
import io

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.6  # inches
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"))
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.markersize": 4,
    "svg.fonttype": "path",  # the same letters where the font is missing
    "svg.hashsalt": "kit",  # the same ids, so the same bytes, each time
}


class Picture(Figure):
    """A Figure with its alternative text; notebooks show it without pyplot."""

    alt: str = ""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        picture = base64.b64encode(buffer.getvalue()).decode()
        return {"image/png": picture, "text/plain": self.alt}


def _picture(rows: int, row_inches: float) -> tuple[Picture, Axes]:
    """A Picture of `rows` horizontal lines with room for an axis and a legend."""
    picture = Picture(figsize=(WIDTH, 1.0 + row_inches * rows), layout="constrained")
    axes = picture.subplots()
    axes.margins(y=0.6 / max(rows, 1))
    return picture, axes


def _intervals(axes: Axes, at: np.ndarray, numbers: np.ndarray, series: int, label: str) -> None:
    """Points with horizontal error bars; `numbers` is rows of (estimate, low, high)."""
    value, low, high = numbers.reshape(-1, 3).T
    colour, marker = SERIES[series % len(SERIES)]
    error = np.clip([value - low, high - value], 0, None)  # 0% may have its low end at 1e-15
    axes.errorbar(
        value, at, xerr=error, linestyle="", color=colour, marker=marker, elinewidth=1.2,
        label=label,
    )  # fmt: skip


def _finish(picture: Picture, axes: Axes, at: np.ndarray, names: list[str], title: str) -> None:
    """Names down the left side, the legend above the data, where it hides nothing."""
    axes.set_yticks(at, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    picture.legend(title=title, loc="outside upper center", ncols=4, frameon=False)


def accuracy_by_family(tables: dict[str, pd.DataFrame]) -> Picture:
    """Accuracy with 95% intervals per family and level of one model.

    `tables` holds per arm what `kit.tables.by_family` gives for it.
    """
    with matplotlib.rc_context(STYLE):
        rows = sorted({key for table in tables.values() for key in _rows(table)}, key=_all_last)
        picture, axes = _picture(len(rows), 0.08 + 0.07 * len(tables))
        at = {row: len(rows) - 1 - number for number, row in enumerate(rows)}
        step = 0.55 / max(len(tables), 1)
        for number, (arm, table) in enumerate(tables.items()):
            offset = step * (number - (len(tables) - 1) / 2)
            heights = np.array([at[row] for row in _rows(table)]) - offset
            _intervals(axes, heights, np.array([*table["accuracy"]]), number, arm)
        axes.axhline(0.5, color="black", linewidth=0.6)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("accuracy, percent, 95% interval")
        names = [f"{family.replace('_', ' ')} {level}".strip() for family, level in rows]
        _finish(picture, axes, np.array([*at.values()]), names, "prompt")
    said = []
    for arm, table in tables.items():
        value, low, high = table["accuracy"].iloc[-1]
        said.append(f"{arm} {value:.0f}% ({low:.0f}% to {high:.0f}%)")
    picture.alt = f"Accuracy by problem family and level. Over all problems: {'; '.join(said)}."
    return picture


def _rows(table: pd.DataFrame) -> list[tuple]:
    return [*zip(table["family"], table["level"], strict=True)]


def _all_last(row: tuple) -> tuple:
    family, level = row
    return level == "", family, level


def published_effects(audits: pd.DataFrame) -> Picture:
    """Published differences, in points, with the 95% interval that their own counts allow.

    `audits` is `kit.tables.audits`; claims that are no difference or have no counts are left out.
    """
    points = audits["published"].str.endswith((" percent", " points"))
    effects = audits[audits["p"].notna() & points]
    zero = ((effects["low"] <= 0) & (effects["high"] >= 0)).to_numpy(dtype=bool)
    with matplotlib.rc_context(STYLE):
        picture, axes = _picture(len(effects), 0.17)
        at = np.arange(len(effects))[::-1]
        numbers = effects[["estimate", "low", "high"]].to_numpy()
        for series, (keep, label) in enumerate(((~zero, "excludes zero"), (zero, "includes zero"))):
            _intervals(axes, at[keep], numbers[keep], series, f"{label} ({keep.sum()})")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("published difference, points")
        _finish(picture, axes, at, [*effects["claim"]], "95% interval")
    picture.alt = (
        f"Of {len(effects)} published differences with known counts, the 95% interval of "
        f"{(~zero).sum()} excludes zero and that of {zero.sum()} includes it."
    )
    return picture


def svg(picture: Picture) -> str:
    """The picture as one <img> with inline SVG data and its alternative text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        picture.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(picture.alt)}" src="data:image/svg+xml;base64,{data}">'
