"""Figures: the one style that all share, and those of records and published claims.

A Picture is a matplotlib Figure that carries its alternative text and shows itself in notebooks.
Colours are the Okabe-Ito set, told apart by marker too. Drawn narrow, so that a phone still shows
readable letters.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kit.analysis import stats

WIDTH = 4.6  # inches
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"))
SERIES += (("#E69F00", "v"), ("#56B4E9", "P"), ("#999999", "X"))
# Names that figures share, as places in SERIES: one colour and marker a name in every figure.
SHARED = {
    name: place
    for group in (
        ("plain", "format"),
        ("plain", "fetched", "rag", "shared", "lora-ffn", "wrong", "generic", "continued",
         "fetched-oracle", "rag + fetched", "shared-bank", "shared-lora-ffn", "fetched-early",
         "larger anchor", "rag 5", "rag 5 + fetched"),
        ("full", "dms", "window", "h2o", "tova", "random", "rkv", "knorm", "snapkv"),
        ("as it is", "blocks", "strategies", "trained", "cache", "weights"),
        ("without the bank", "with the bank"),
        ("linear weights", "keys and values", "strategies", "embeddings", "bank",
         "scales and zeros", "norms", "evictor"),
        ("16 bit", "8 bit", "4 bit", "16 bit, memory", "8 bit, memory", "4 bit, memory"),
    )
    for place, name in enumerate(group)
}  # fmt: skip
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


def three_digits(value: float) -> str:
    """Three digits for an alternative text: 0.012, 3.4, 1,204; never 1.2e+03."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


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


def places(names: Iterable[str]) -> list[int]:
    """The place in SERIES of each of the `names` in a figure: that of SHARED, or else the first one
    that no other has."""
    listed = [SHARED.get(name) for name in names]
    free = (place for place in count() if place not in listed)
    return [next(free) if place is None else place for place in listed]


def groups(table: pd.DataFrame, by: str) -> list[tuple[int, str, pd.DataFrame]]:
    """The place in SERIES, the name and the rows of each value of a column, in their order."""
    frames = dict([*table.groupby(by, sort=False)])
    return [*zip(places(frames), frames, frames.values(), strict=True)]


def look(place: int) -> dict:
    """Colour, marker and line of a place in SERIES: behind the last of them come the same colours
    again, hollow and dashed, then half filled and dotted."""
    colour, marker = SERIES[place % len(SERIES)]
    again = min(place // len(SERIES), 2)
    return {"color": colour, "marker": marker, "linestyle": ("-", "--", ":")[again],
            "markerfacecolor": "white" if again == 1 else colour,
            "fillstyle": "left" if again == 2 else "full"}  # fmt: skip


def intervals(axes: Axes, at: np.ndarray, numbers: np.ndarray, series: int, label: str) -> None:
    """Points with horizontal error bars; `numbers` is rows of (estimate, low, high)."""
    value, low, high = numbers.reshape(-1, 3).T
    error = np.clip([value - low, high - value], 0, None)  # 0% may have its low end at 1e-15
    points = look(series) | {"linestyle": ""}
    axes.errorbar(value, at, xerr=error, elinewidth=1.2, label=label, **points)


def line(axes: Axes, at, numbers: list[tuple], series: int, label: str) -> None:
    """A line through points with vertical error bars; `numbers` is (estimate, low, high) each."""
    value, low, high = np.array(numbers, dtype=float).reshape(-1, 3).T
    error = np.clip([value - low, high - value], 0, None)
    axes.errorbar(at, value, yerr=error, linewidth=1.2, elinewidth=1, label=label, **look(series))


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


def flow(steps: Sequence[str], back: str = "") -> Picture:
    """The steps of a method as boxes from left to right, joined by arrows; `back` names what an
    arrow from the last box carries to the first."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        picture = Picture(figsize=(WIDTH * 1.3, 1.1 + 0.3 * bool(back)), layout="constrained")
        axes = picture.subplots()
        axes.set(xlim=(-0.5, len(steps) - 0.5), ylim=(-1.1 if back else -0.5, 0.5))
        axes.axis("off")
        frame = {"boxstyle": "round,pad=0.4", "facecolor": "#DCEEFB", "edgecolor": SERIES[0][0]}
        for at, step in enumerate(steps):
            axes.text(at, 0, step, ha="center", va="center", fontsize=7.5, bbox=frame)
        arrow = {"arrowstyle": "->", "color": "black", "linewidth": 1}
        for at in range(len(steps) - 1):
            axes.annotate("", (at + 0.62, 0), (at + 0.38, 0), arrowprops=arrow)
        if back:
            bent = arrow | {"connectionstyle": "arc3,rad=-0.12"}
            axes.annotate("", (0, -0.4), (len(steps) - 1, -0.4), arrowprops=bent)
            axes.text((len(steps) - 1) / 2, -1.05, back, ha="center", va="bottom", fontsize=7.5)
    words = ", then ".join(step.replace("\n", " ") for step in steps)
    picture.alt = f"{words}{f'; back to the first: {back}' if back else ''}."
    return picture


def cache_growth(prompt: int, new: int) -> Picture:
    """How the cache of one answer grows: the entries that each of its `new` tokens attends to.

    The first comes from the `prompt` alone. The last step is the peak; the area is all reads.
    """
    steps = np.arange(1, new + 1)
    live = prompt + steps - 1
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 2.2), layout="constrained")
        axes = picture.subplots()
        axes.fill_between(steps, live, step="mid", color=SERIES[0][0], alpha=0.25, linewidth=0)
        axes.step(steps, live, where="mid", color=SERIES[0][0], linewidth=1.2)
        axes.axhline(prompt, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("tokens of the answer")
        axes.set_ylabel("entries in the cache")
        axes.set_ylim(0, None)
    picture.alt = (
        f"A prompt of {prompt} tokens and an answer of {new}: the cache grows to {live[-1]} "
        f"entries, and {live.sum():,} are read in all."
    )
    return picture


def accuracy_by_family(tables: dict[str, pd.DataFrame]) -> Picture:
    """Accuracy with 95% intervals per family and level of one model.

    `tables` holds per arm what `kit.analysis.tables.by_family` gives for it.
    """
    with matplotlib.rc_context(STYLE):
        rows = sorted({key for table in tables.values() for key in _rows(table)}, key=_all_last)
        picture, axes = rows_of(len(rows), 0.08 + 0.07 * len(tables))
        at = {row: len(rows) - 1 - number for number, row in enumerate(rows)}
        step = 0.55 / max(len(tables), 1)
        for number, (series, arm) in enumerate(zip(places(tables), tables)):
            table = tables[arm]
            offset = step * (number - (len(tables) - 1) / 2)
            heights = np.array([at[row] for row in _rows(table)]) - offset
            intervals(axes, heights, np.array([*table["accuracy"]]), series, arm)
        axes.axhline(0.5, color="black", linewidth=0.6)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("accuracy, percent, 95% interval")
        names = [f"{family.replace('_', ' ')} {level}".strip() for family, level in rows]
        finish(picture, axes, np.array([*at.values()]), names, "prompt")
    sentences = []
    for arm, table in tables.items():
        value, low, high = table["accuracy"].iloc[-1]
        sentences.append(f"{arm} {value:.0f}% ({low:.0f}% to {high:.0f}%)")
    picture.alt = (
        f"Accuracy by problem family and level. Over all problems: {'; '.join(sentences)}."
    )
    return picture


def _rows(table: pd.DataFrame) -> list[tuple]:
    return [*zip(table["family"], table["level"], strict=True)]


def _all_last(row: tuple) -> tuple:
    family, level = row
    return level == "", family, level


def published_effects(audits: pd.DataFrame) -> Picture:
    """Published differences, in points, with the 95% interval that their own counts allow.

    `audits` is `kit.analysis.tables.audits`; claims that are no difference or have no counts are
    left out.
    """
    points = audits["published"].str.endswith((" percent", " points"))
    effects = audits[audits["p"].notna() & points]
    unsure = (effects["p"] >= stats.ALPHA).to_numpy(dtype=bool)
    with matplotlib.rc_context(STYLE):
        picture, axes = rows_of(len(effects), 0.17)
        at = np.arange(len(effects))[::-1]
        numbers = effects[["estimate", "low", "high"]].to_numpy()
        kinds = (~unsure, "told from zero"), (unsure, "not told from zero")
        for series, (keep, label) in enumerate(kinds):
            intervals(axes, at[keep], numbers[keep], series, f"{label} ({keep.sum()})")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("published difference, points")
        finish(picture, axes, at, [*effects["claim"]], "95% interval")
    picture.alt = (
        f"Of {len(effects)} published differences in points with known counts, {(~unsure).sum()} "
        f"can be told from zero by their own numbers and {unsure.sum()} cannot."
    )
    return picture


def forest(table: pd.DataFrame) -> Picture:
    """Paired differences of one arm against each control; `table` is
    `kit.analysis.tables.against`."""
    with matplotlib.rc_context(STYLE):
        picture, axes = rows_of(len(table), 0.25)
        at = np.arange(len(table))[::-1]
        numbers = np.array([*table["difference"]], dtype=float).reshape(-1, 3)
        declared = table["primary"].to_numpy(dtype=bool)
        for series, (keep, label) in enumerate(((declared, "declared"), (~declared, "further"))):
            if keep.any():
                intervals(axes, at[keep], numbers[keep], series, label)
        axes.axvline(0, color="black", linewidth=0.8)
        first = table.iloc[0]
        axes.set_xlabel(f"{first['arm']} minus this arm, points")
        finish(picture, axes, at, [*table["control"]], "accuracy, 95% interval")
    value, low, high = first["difference"]
    picture.alt = (
        f"Accuracy of {first['arm']} minus that of {len(table)} controls; the declared contrast, "
        f"{first['control']}, is {value:.1f} points [{low:.1f}, {high:.1f}]."
    )
    return picture


def bank_map(vectors: np.ndarray, families: list[str], kinds: list[str]) -> Picture:
    """Strategies on the first two principal axes of their text vectors [N, D], by family."""
    centred = vectors - vectors.mean(0)
    _, sizes, axes_ = np.linalg.svd(centred, full_matrices=False)
    at = centred @ axes_[:2].T
    shares = 100 * sizes[:2] ** 2 / max(float((sizes**2).sum()), 1e-12)
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 0.7 * WIDTH), layout="constrained")
        axes = picture.subplots()
        for number, family in enumerate(sorted(set(families))):
            colour, _ = SERIES[number % len(SERIES)]
            for kind, marker in (("success", "o"), ("failure", "x")):
                keep = [f == family and k == kind for f, k in zip(families, kinds)]
                if any(keep):
                    label = f"{family.replace('_', ' ')}, {kind} ({sum(keep)})"
                    axes.scatter(*at[keep].T, s=14, color=colour, marker=marker, label=label)
        axes.set_xlabel(f"first principal axis ({shares[0]:.0f}% of the variance)")
        axes.set_ylabel(f"second ({shares[1]:.0f}%)")
        picture.legend(loc="outside right upper", frameon=False, fontsize=7)
    picture.alt = (
        f"{len(families)} strategies of {len(set(families))} families on two principal axes of "
        f"their vectors, which hold {shares.sum():.0f}% of the variance."
    )
    return picture
