"""Figures of parametric memory: the cluster tree, accuracy by training frequency and by bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from kit.analysis.plots import SERIES, STYLE, WIDTH, Picture, line, places


def cluster_map(paths: Mapping[str, Sequence[int]], branching: int) -> Picture:
    """The clusters of each level as boxes, as wide as they have members, each leaf labelled by its
    first member; `paths` maps the name of a member to its path."""
    levels, total = len(next(iter(paths.values()))), len(paths)
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 0.9 + 0.5 * levels), layout="constrained")
        axes = picture.subplots()
        for level in range(levels):
            sizes, left = Counter(path[level] for path in paths.values()), 0
            for node in range(branching ** (level + 1)):
                colour = SERIES[node // branching**level % len(SERIES)][0]
                box = (left / total, levels - level - 1), sizes[node] / total, 0.9
                axes.add_patch(Rectangle(*box, facecolor=colour, alpha=0.35, edgecolor="white"))
                middle = (left + sizes[node] / 2) / total
                if sizes[node] / total > 0.03:
                    axes.text(middle, levels - level - 0.55, f"{sizes[node]}", ha="center",
                              va="center", fontsize=7)  # fmt: skip
                left += sizes[node]
        names, middle = {}, {}
        order = sorted(paths, key=lambda name: paths[name][-1])
        for place, name in enumerate(order):
            names.setdefault(paths[name][-1], name)
            middle.setdefault(paths[name][-1], place / total)
        for leaf, name in names.items():
            axes.text(middle[leaf], -0.1, name, rotation=90, va="top", ha="left", fontsize=6)
        axes.set_xlim(0, 1)
        axes.set_ylim(-1.1, levels)
        axes.axis("off")
    sizes = Counter(path[0] for path in paths.values())
    picture.alt = (
        f"{total} subjects in {len(sizes)} clusters of {min(sizes.values())} to "
        f"{max(sizes.values())}, {len(names)} leaves; a leaf each begins with "
        f"{', '.join([*names.values()][:8])}."
    )
    return picture


def fetched_path(sizes: Sequence[int], branching: int, path: Sequence[int]) -> Picture:
    """A bank as a tree of blocks, those on `path` filled: what one question fetches. `sizes` are
    the units of a block by level, `path` its node at each level."""
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 0.5 + 0.55 * len(sizes)), layout="constrained")
        axes = picture.subplots()
        for level in range(len(sizes)):
            nodes = branching ** (level + 1)
            for node in range(nodes):
                on = node == path[level]
                box = ((node + 0.05) / nodes, len(sizes) - 1 - level), 0.9 / nodes, 0.8
                colour = SERIES[0][0] if on else "#D5D8DD"
                axes.add_patch(Rectangle(*box, facecolor=colour, edgecolor="white"))
        axes.set(xlim=(0, 1), ylim=(-0.1, len(sizes)))
        names = [f"level {level}: {units} units" for level, units in enumerate(sizes, 1)]
        axes.set_yticks(np.arange(len(sizes))[::-1] + 0.4, names)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    blocks = sum(branching ** (level + 1) for level in range(len(sizes)))
    picture.alt = (
        f"Of {blocks} blocks one on each of {len(sizes)} levels is fetched: nodes "
        f"{', '.join(map(str, path))}, with {', '.join(map(str, sizes))} units a layer."
    )
    return picture


def accuracy_by_frequency(table: pd.DataFrame, buckets: Sequence[str]) -> Picture:
    """Accuracy by training frequency, one line per arm; `table` has `arm` and (estimate, low, high)
    for each of the `buckets` in which anything was asked."""
    parts = [name for name in buckets if table[name].notna().all()]
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.2), layout="constrained")
        axes, count = picture.subplots(), len(table)
        for number, (series, row) in enumerate(zip(places(table["arm"]), table.to_dict("records"))):
            at = np.arange(len(parts)) + 0.06 * (number - (count - 1) / 2)
            line(axes, at, [row[part] for part in parts], series, row["arm"])
        axes.set_xticks(range(len(parts)), parts)
        axes.set_xlabel("how often a fact was told in training")
        axes.set_ylabel("accuracy, percent, 95% interval")
        picture.legend(loc="outside upper center", ncols=3, frameon=False)
    phrases = [
        f"{row['arm']} {', '.join(f'{row[part][0]:.0f}%' for part in parts)}"
        for row in table.to_dict("records")
    ]
    picture.alt = f"Accuracy in {', '.join(parts)}: {'; '.join(phrases)}."
    return picture


def accuracy_by_bytes(table: pd.DataFrame) -> Picture:
    """Accuracy against the bytes that a query reads beside the model; `table` has `arm`,
    `accuracy` as (estimate, low, high) and `read_bytes`."""
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.0), layout="constrained")
        axes = picture.subplots()
        for series, row in zip(places(table["arm"]), table.to_dict("records")):
            line(axes, [row["read_bytes"] / 2**20], [row["accuracy"]], series, row["arm"])
        axes.set_xscale("symlog", linthresh=0.1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
        axes.set_xlabel("MiB read per query beside the model")
        axes.set_ylabel("accuracy, percent, 95% interval")
        picture.legend(loc="outside upper center", ncols=3, frameon=False)
    phrases = [
        f"{row['arm']} {row['accuracy'][0]:.0f}% for {row['read_bytes'] / 2**20:.2f} MiB"
        for row in table.to_dict("records")
    ]
    picture.alt = f"Accuracy against bytes read: {'; '.join(phrases)}."
    return picture
