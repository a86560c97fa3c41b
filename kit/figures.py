"""One function per published figure: tables in, a matplotlib Figure out.

Every figure carries its alternative text in `alt`, which the report shows to those who
cannot see it. One style block; colours are the Okabe-Ito set, told apart by marker too.
"""

import base64
import io

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

COLOURS = {"plain": "#0072B2", "format": "#D55E00"}
MARKERS = {"plain": "o", "format": "s"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "kit",
}


def _figure(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def accuracy_by_family(tables: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy with 95% intervals per family and level, one marker per arm."""
    with matplotlib.rc_context(STYLE):
        first = next(iter(tables.values()))
        names = [f"{row.family} {row.level}".strip() for row in first.itertuples()]
        figure, axes = _figure(6.4, 0.8 + 0.24 * len(names))
        at = np.arange(len(names))[::-1]
        for number, (arm, table) in enumerate(tables.items()):
            value, low, high = np.array([*table["accuracy"]]).T
            offset = 0.12 * (number - (len(tables) - 1) / 2)
            axes.errorbar(
                value, at - offset, xerr=[value - low, high - value], label=arm, linestyle="",
                marker=MARKERS[arm], color=COLOURS[arm], markersize=4, elinewidth=1,
            )  # fmt: skip
        axes.axhline(at[-1] + 0.5, color="black", linewidth=0.6)
        axes.set_yticks(at, names)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("accuracy, percent, with 95% interval over problems")
        axes.legend(title="prompt", loc="lower right", frameon=True)
        overall = {arm: table["accuracy"].iloc[-1] for arm, table in tables.items()}
        said = "; ".join(f"{arm} {v[0]:.0f}% ({v[1]:.0f} to {v[2]:.0f})" for arm, v in overall.items())
        figure.alt = f"Accuracy by problem family and level. Over all problems: {said}."
    return figure


def published_effects(audits: pd.DataFrame) -> Figure:
    """Published differences with the 95% interval that their own counts allow, in points."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.4, 0.8 + 0.2 * len(audits))
        at = np.arange(len(audits))[::-1]
        clear = ((audits["low"] > 0) | (audits["high"] < 0)).to_numpy()
        for keep, colour, marker, label in (
            (clear, "#0072B2", "o", "excludes zero"),
            (~clear, "#D55E00", "s", "includes zero"),
        ):
            rows = audits[keep]
            error = [rows["estimate"] - rows["low"], rows["high"] - rows["estimate"]]
            axes.errorbar(
                rows["estimate"], at[keep], xerr=error, linestyle="", marker=marker,
                color=colour, markersize=4, elinewidth=1, label=f"{label} ({len(rows)})",
            )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(at, audits["claim"], fontsize=7)
        axes.set_xlabel("published difference, points, with the interval its counts allow")
        axes.legend(title="95% interval", loc="best", frameon=True)
        figure.alt = (
            f"Of {len(audits)} published differences with known counts, the 95% interval of "
            f"{clear.sum()} excludes zero and that of {(~clear).sum()} includes it."
        )
    return figure


def svg(figure: Figure) -> str:
    """The figure as one <img> with inline SVG data and alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{figure.alt}" src="data:image/svg+xml;base64,{data}">'
