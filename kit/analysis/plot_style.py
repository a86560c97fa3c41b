"""A Picture, and the one style that all figures share.

A Picture is a matplotlib Figure that carries its alternative text and shows itself in notebooks.
Colours are the Okabe-Ito set, told apart by marker too. Drawn narrow, so that a phone still shows
readable letters.
"""

import base64
import html
import io
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.6  # inches
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"))
SERIES += (("#E69F00", "v"), ("#56B4E9", "P"), ("#999999", "X"))
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # letters embedded, as journals ask for
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


def rows_of(rows: int, row_inches: float) -> tuple[Picture, Axes]:
    """A Picture of `rows` horizontal lines with room for an axis and a legend."""
    picture = Picture(figsize=(WIDTH, 1.0 + row_inches * rows), layout="constrained")
    axes = picture.subplots()
    axes.margins(y=0.6 / max(rows, 1))
    return picture, axes


def intervals(axes: Axes, at: np.ndarray, numbers: np.ndarray, series: int, label: str) -> None:
    """Points with horizontal error bars; `numbers` is rows of (estimate, low, high)."""
    value, low, high = numbers.reshape(-1, 3).T
    colour, marker = SERIES[series % len(SERIES)]
    error = np.clip([value - low, high - value], 0, None)  # 0% may have its low end at 1e-15
    axes.errorbar(
        value, at, xerr=error, linestyle="", color=colour, marker=marker, elinewidth=1.2,
        label=label,
    )  # fmt: skip


def line(axes: Axes, at, numbers: list[tuple], series: int, label: str) -> None:
    """A line through points with vertical error bars; `numbers` is (estimate, low, high) each.
    Colours begin again after seven series, then hollow and dashed."""
    value, low, high = np.array(numbers, dtype=float).reshape(-1, 3).T
    colour, marker = SERIES[series % len(SERIES)]
    again = dict(linestyle="--", markerfacecolor="white") if series >= len(SERIES) else {}
    axes.errorbar(
        at, value, yerr=np.clip([value - low, high - value], 0, None), color=colour, marker=marker,
        linewidth=1.2, elinewidth=1, label=label, **again,
    )  # fmt: skip


def finish(picture: Picture, axes: Axes, at: np.ndarray, names: list[str], title: str) -> None:
    """Names down the left side, the legend above the data, where it hides nothing."""
    axes.set_yticks(at, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    picture.legend(title=title, loc="outside upper center", ncols=4, frameon=False)


def svg(picture: Picture) -> str:
    """The picture as one <img> with inline SVG data and its alternative text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        picture.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _image(buffer.getvalue(), picture.alt)


def image(file: Path, alt: str) -> Markup:
    """An SVG file as one <img>."""
    return Markup(_image(file.read_bytes(), alt))


def _image(data: bytes, alt: str) -> str:
    data = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
