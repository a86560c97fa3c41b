"""Figures of memory budgets: the ledger as stacked bars, and accuracy against a budget."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from kit.analysis import pareto
from kit.analysis.plots import SERIES, STYLE, WIDTH, Picture, groups, look, places, three_digits

MIB = 2**20
# Column of a sweep: label of its axis, what the colours tell apart, and its unit.
BUDGETS = {
    "bytes": ("MiB, one question alone", "weights", MIB),
    "shared_bytes": ("MiB, weights shared by {}", "cache", MIB),
    "reads": ("tokens read of the cache, mean over layers", "cache", 1),
    "seconds": ("seconds, batch as run here", "weights", 1),
    "joules": ("joules, batch as run here", "weights", 1),
}
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
        for series, part in zip(places(parts), parts):
            size = np.array([bar.get(part, 0) / MIB for bar in bars.values()])
            hatch = "///" if series >= len(SERIES) else None
            axes.barh(at, size, 0.6, left, color=look(series)["color"], hatch=hatch,
                      edgecolor="white", label=part)  # fmt: skip
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


def sweep_frontier(table: pd.DataFrame, outcomes: np.ndarray, budget: str, batch: int) -> Picture:
    """Accuracy of the scenarios of a sweep against a budget of BUDGETS, where `batch` questions
    are answered at once; `table` has their intervals, `outcomes` is [C, P]."""
    label, by, scale = BUDGETS[budget]
    weights = [f"{b} bit{', memory' * m}" for b, m in zip(table["bits"], table["memory"])]
    caches = [f"{p}, {b} bit" for p, b in zip(table["policy"], table["kv_bits"])]
    table = table.assign(weights=weights, cache=caches)
    front = pareto.table(table, budget, outcomes, np.random.default_rng(0))
    return budget_frontier(front, budget, label.format(batch), by, scale)


def places_frontier(front: pd.DataFrame, batch: int) -> Picture:
    """Accuracy against bytes, the weights shared by `batch` questions, a colour per place of
    memory; `front` is by `kit.analysis.effects.places`."""
    label, _, scale = BUDGETS["shared_bytes"]
    return budget_frontier(front, "shared_bytes", label.format(batch), "place", scale)


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
        for series, name, rows in groups(table, by):
            points = look(series) | {"linestyle": ""}
            opacity = FAINT + (1 - FAINT) * rows["membership"].to_numpy()
            axes.scatter(rows[budget] / scale, rows["accuracy"], s=16, alpha=opacity,
                         marker=points["marker"], edgecolors=points["color"],
                         facecolors=points["markerfacecolor"])  # fmt: skip
            handles.append(Line2D([], [], label=name, **points))
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
        f"{row['accuracy']:.0f}% at {three_digits(row[budget] / scale)} ({row[by]}, on it in "
        f"{100 * row['membership']:.0f}% of the draws)"
        for row in best.drop_duplicates([budget, "accuracy"]).to_dict("records")
    ]
    picture.alt = f"Accuracy against {label}. On the frontier: {'; '.join(phrases)}."
    return picture
