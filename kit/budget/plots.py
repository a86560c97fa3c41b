"""Figures of memory budgets: the ledger as stacked bars, and accuracy against a budget."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from kit.analysis.plots import SERIES, STYLE, WIDTH, Picture

MIB = 2**20
FAINT = 0.12  # opacity of a point that is on the frontier in no bootstrap draw


def ledger_bars(bars: Mapping[str, Mapping[str, float]]) -> Picture:
    """Bytes by part as one stacked bar each; `bars` is name to part to bytes, for example of
    `kit.budget.ledger.Configuration.parts` and of what was allocated."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    parts = [part for part in parts if any(bar.get(part, 0) for bar in bars.values())]
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 0.9 + 0.45 * len(bars)), layout="constrained")
        axes = picture.subplots()
        at, left = np.arange(len(bars))[::-1], np.zeros(len(bars))
        for number, part in enumerate(parts):
            size = np.array([bar.get(part, 0) / MIB for bar in bars.values()])
            hatch = "///" if number >= len(SERIES) else None
            colour = SERIES[number % len(SERIES)][0]
            axes.barh(at, size, 0.6, left, color=colour, hatch=hatch, edgecolor="white", label=part)
            left += size
        axes.set_yticks(at, [*bars])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("MiB")
        picture.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    phrases = [
        f"{name} {sum(bar.values()) / MIB:.1f} MiB ("
        + ", ".join(f"{part} {bar[part] / MIB:.2f}" for part in parts if bar.get(part))
        + ")"
        for name, bar in bars.items()
    ]
    picture.alt = f"Bytes by part: {'; '.join(phrases)}."
    return picture


def budget_frontier(
    table: pd.DataFrame, budget: str, label: str, by: str, scale: float = 1.0
) -> Picture:
    """Accuracy against `budget` / `scale`, a colour per value of `by`, the frontier as steps.

    `table` is that of `kit.analysis.pareto.table`; opacity is the share of bootstrap draws in which
    a point is on the frontier. Frontier points have error bars from the column `interval`.
    """
    best = table[table["on_frontier"]].sort_values(budget)
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.4), layout="constrained")
        axes, handles = picture.subplots(), []
        for number, (name, rows) in enumerate(table.groupby(by, sort=False)):
            colour, marker = SERIES[number % len(SERIES)]
            face = "none" if number >= len(SERIES) else colour
            seen = FAINT + (1 - FAINT) * rows["membership"].to_numpy()
            look = dict(marker=marker, edgecolors=colour, facecolors=face, s=16)
            axes.scatter(rows[budget] / scale, rows["accuracy"], alpha=seen, **look)
            handles.append(Line2D([], [], linestyle="", marker=marker, color=colour,
                                  markerfacecolor=face, label=name))  # fmt: skip
        value, low, high = np.array([*best["interval"]], dtype=float).reshape(-1, 3).T
        error = np.clip([value - low, high - value], 0, None)
        axes.errorbar(best[budget] / scale, value, yerr=error, linestyle="", color="black",
                      elinewidth=0.7)  # fmt: skip
        axes.step(best[budget] / scale, best["accuracy"], where="post", color="black", linewidth=1)
        axes.set_xscale("log")
        narrow = table[budget].max() < 10 * table[budget].min()
        subs = (1, 1.5, 2, 3, 4, 6, 8) if narrow else (1, 2, 5)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylim(0, None)
        axes.set_ylabel("accuracy, percent, 95% interval")
        picture.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False,
                       fontsize=8)  # fmt: skip
    phrases = [
        f"{row['accuracy']:.0f}% at {row[budget] / scale:.3g} ({row[by]}, on it in "
        f"{100 * row['membership']:.0f}% of the draws)"
        for row in best.drop_duplicates([budget, "accuracy"]).to_dict("records")
    ]
    picture.alt = f"Accuracy against {label}. On the frontier: {'; '.join(phrases)}."
    return picture
