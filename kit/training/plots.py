"""Figures of training: rewards by length, checkpoints, rounds, metrics by step."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from kit.analysis.plots import SERIES, STYLE, WIDTH, Picture, groups, line, three_digits


def cosine(lengths: Mapping[str, np.ndarray], table: pd.DataFrame) -> Picture:
    """The cosine reward over length, as published and as described, above a histogram of outputs.

    `table` has columns `ratio` (length over the limit) and one per curve; `lengths` holds ratios
    of real outputs, counted as the curve of that name counts them.
    """
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.6), layout="constrained")
        upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for number, name in enumerate(column for column in table if column != "ratio"):
            colour, dash = SERIES[number // 2][0], ("-", "--")[number % 2]
            upper.plot(table["ratio"], table[name], dash, color=colour, label=name)
        upper.set_ylabel("reward")
        picture.legend(loc="outside upper center", ncols=2, frameon=False)
        edges = np.linspace(0, table["ratio"].max(), 61)
        for number, (name, ratios) in enumerate(lengths.items()):
            share = 100 * np.histogram(np.clip(ratios, 0, edges[-1]), edges)[0] / len(ratios)
            lower.stairs(share, edges, color=SERIES[number][0], label=name)
        lower.legend(frameon=False)
        lower.set_ylabel("outputs, %")
        lower.set_xlabel("length over the limit")
    beyond = [f"{name} {100 * np.mean(ratios > 1):.0f}%" for name, ratios in lengths.items()]
    picture.alt = (
        "The published cosine reward repeats every two limits, the described one stays at its "
        f"end. Real outputs longer than the limit: {', '.join(beyond)}."
    )
    return picture


def group(rewards: Sequence[float], advantages: Sequence[float]) -> Picture:
    """Rewards of the answers of one group, with their mean, and the advantages that come of it."""
    at = np.arange(1, len(rewards) + 1)
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 2.2), layout="constrained")
        left, right = picture.subplots(1, 2)
        left.bar(at, rewards, color=SERIES[0][0])
        left.axhline(np.mean(rewards), color="black", linewidth=0.8, linestyle=":")
        left.set_ylabel("reward")
        right.bar(at, advantages, color=[SERIES[2 if a > 0 else 1][0] for a in advantages])
        right.axhline(0, color="black", linewidth=0.8)
        right.set_ylabel("advantage")
        for axes in (left, right):
            axes.set_xlabel("answer")
            axes.set_xticks(at)
    more, less = sum(a > 0 for a in advantages), sum(a < 0 for a in advantages)
    picture.alt = (
        f"{len(rewards)} answers of mean reward {np.mean(rewards):.2f}: {more} are made more "
        f"likely, {less} less."
    )
    return picture


def checkpoints(logs: pd.DataFrame) -> Picture:
    """Accuracy of published checkpoints with 95% intervals; `logs` is
    `kit.training.checkpoint_selection.open_rs_logs`."""
    names = list(dict.fromkeys(logs["benchmark"]))
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 1.5 * len(names) + 0.6), layout="constrained")
        panels = np.atleast_1d(picture.subplots(len(names), 1, sharex=True))
        for axes, name in zip(panels, names, strict=True):
            for number, (experiment, rows) in enumerate(logs.groupby("experiment")):
                subset = rows[rows["benchmark"] == name]
                steps = subset["step"] + 8 * (number - 1)  # side by side
                line(axes, steps, [*subset["accuracy"]], number, f"experiment {experiment}")
            axes.set_ylabel(f"{name}, %")
        panels[-1].set_xlabel("step")
        lines = panels[0].get_legend_handles_labels()
        picture.legend(*lines, loc="outside upper center", ncols=3, frameon=False)
    picture.alt = (
        f"Accuracy of {len(logs)} checkpoints of {logs['experiment'].nunique()} experiments with "
        f"95% intervals on {', '.join(names)}."
    )
    return picture


def rounds(table: pd.DataFrame) -> Picture:
    """Accuracy by round, one line per value of `way`; `accuracy` is (estimate, low, high)."""
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.0), layout="constrained")
        axes = picture.subplots()
        for number, (series, way, rows) in enumerate(groups(table, "way")):
            offset = 0.06 * (number - (table["way"].nunique() - 1) / 2)
            line(axes, rows["round"] + offset, [*rows["accuracy"]], series, way)
        axes.set_xticks(sorted(table["round"].unique()))
        axes.set_xlabel("rounds of training")
        axes.set_ylabel("accuracy, percent, 95% interval")
        picture.legend(loc="outside upper center", ncols=2, frameon=False)
    series = []
    for way, rows in table.groupby("way", sort=False):
        values = [f"{accuracy[0]:.0f}%" for accuracy in rows["accuracy"]]
        series.append(f"{way} {', '.join(values)}")
    picture.alt = f"Accuracy by round of training: {'; '.join(series)}."
    return picture


def training(runs: Sequence[Sequence[Mapping]], shown: Mapping[str, str]) -> Picture:
    """Logged metrics by step: mean over `runs` (training seeds) and band from min to max.

    `shown` maps a key of the log to the label of its panel; keys that no step has are left out.
    """
    frames = [pd.DataFrame(list(run)).set_index("step") for run in runs]
    columns = {key: label for key, label in shown.items() if any(key in frame for frame in frames)}
    with matplotlib.rc_context(STYLE):
        rows = -(-len(columns) // 2)
        picture = Picture(figsize=(WIDTH, 1.35 * rows + 0.5), layout="constrained")
        panels = picture.subplots(rows, 2, sharex=True, squeeze=False)
        for axes, (key, label) in zip(panels.flat, columns.items()):
            values = pd.concat([frame[key] for frame in frames if key in frame], axis=1)
            form = "o-" if len(values) < 3 else "-"
            axes.plot(values.index, values.mean(axis=1), form, color=SERIES[0][0])
            if values.shape[1] > 1:
                low, high = values.min(axis=1), values.max(axis=1)
                axes.fill_between(values.index, low, high, color=SERIES[0][0], alpha=0.25)
            axes.set_title(label, fontsize=8)
        for axes in panels.flat[len(columns) :]:
            axes.set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = [f"{label} {three_digits(frames[0][key].iloc[-1])}" for key, label in columns.items()]
    picture.alt = (
        f"Training over {len(frames[0])} steps and {len(runs)} seeds; at the end of the first: "
        f"{', '.join(last)}."
    )
    return picture
