"""Figures of learned eviction: training, what is kept, KL and bytes against it, the frontier.

Tables in, a Picture out. No numbers are computed here.
"""

import html

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from kit.analysis.plots import SERIES, STYLE, WIDTH, Picture, groups, line, look


def _plain_numbers(axis) -> None:
    """1, 2, 5, 10 on a logarithmic axis; powers of ten need fonts that may be missing."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def training(history: list[dict], title: str = "") -> Picture:
    """An evictor's training: gates closed against the schedule, and the KL it costs."""
    frame = pd.DataFrame(history)
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.2), layout="constrained")
        upper, lower = picture.subplots(2, 1, sharex=True)
        upper.plot(frame["step"], frame["target"], color="black", linewidth=1, label="schedule")
        upper.plot(frame["step"], frame["closed"], color=SERIES[0][0], label="closed gates")
        upper.set_ylabel("share of tokens")
        upper.legend(frameon=False)
        lower.plot(frame["step"], frame["kl"], color=SERIES[1][0])
        lower.set_ylabel("KL, nats")
        lower.set_xlabel("step")
        picture.suptitle(title, fontsize=9)
    last = frame.iloc[-1]
    picture.alt = (
        f"Training over {len(frame)} steps: closed gates end at a share of {last['closed']:.2f}, "
        f"the schedule at {last['target']:.2f}, the KL at {last['kl']:.3f} nats."
    )
    return picture


def gate_mechanism(weights: dict[str, np.ndarray]) -> Picture:
    """The keys that each token attends to, one panel per kind of eviction; `weights` are [T, T], of
    `kit.dms.gates.attention_weights`."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        picture = Picture(figsize=(WIDTH, 2.5), layout="constrained")
        panels = picture.subplots(1, len(weights), sharey=True, squeeze=False)[0]
        for axes, (name, matrix) in zip(panels, weights.items()):
            axes.imshow(np.asarray(matrix) > 0, cmap="Blues", vmin=0, vmax=1.4)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("key of token")
            axes.set_xticks(range(0, len(matrix), 2))
            axes.set_yticks(range(0, len(matrix), 2))
            axes.tick_params(labelsize=7)
        panels[0].set_ylabel("query of token")
    counts = [f"{name} {int((np.asarray(matrix) > 0).sum())}" for name, matrix in weights.items()]
    picture.alt = f"Which keys each query reads; entries read in all: {', '.join(counts)}."
    return picture


def kept_heatmap(positions: list[list], length: int) -> Picture:
    """Share of the tokens kept, per layer and KV head, by `positions` as of `live_positions`."""
    share = np.array([[len(head) / length for head in layer] for layer in positions])
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        picture = Picture(figsize=(WIDTH, 1.2 + 0.18 * share.shape[1]), layout="constrained")
        axes = picture.subplots()
        image = axes.imshow(share.T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xlabel("layer")
        axes.set_ylabel("KV head")
        axes.set_yticks(range(share.shape[1]))
        picture.colorbar(image, label="kept", shrink=0.9)
    low, high = share.min(), share.max()
    picture.alt = (
        f"Share of {length} tokens kept per layer and head: {share.mean():.2f} on average, "
        f"from {low:.2f} to {high:.2f}."
    )
    return picture


def kept_text(tokens: list[str], positions: list[list]) -> str:
    """HTML of a text whose tokens are shaded by the share of layers and heads that keep them."""
    heads = [head for layer in positions for head in layer]
    counts = np.bincount(np.concatenate(heads).astype(int), minlength=len(tokens))
    spans = [
        f'<span style="background:rgba(0,114,178,{0.75 * count / len(heads):.2f})" '
        f'title="kept by {count} of {len(heads)}">{html.escape(token)}</span>'
        for token, count in zip(tokens, counts)
    ]
    return f'<div style="white-space:pre-wrap;line-height:1.7">{"".join(spans)}</div>'


def quality(table: pd.DataFrame) -> Picture:
    """KL against the kept fraction, one line per policy; `table` is
    `kit.analysis.tables.quality`."""
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.2), layout="constrained")
        axes = picture.subplots()
        for series, name, rows in groups(table, "policy"):
            rows = rows.sort_values("kept_fraction")
            line(axes, rows["kept_fraction"], [*rows["kl"]], series, name)
        if np.isfinite(axes.dataLim.minposy):  # what is not positive has no logarithm
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("kept fraction of the tokens, window counted")
        axes.set_ylabel("KL to full attention, nats")
        picture.legend(loc="outside upper center", ncols=3, frameon=False)
    best = table.loc[table.groupby("compression_x")["kl"].idxmin()] if len(table) else table
    phrases = [f"{row.policy} at {row.compression_x:g}x" for row in best.itertuples()]
    picture.alt = f"KL against kept fraction by policy. Lowest KL: {', '.join(phrases)}."
    return picture


def allocated(table: pd.DataFrame) -> Picture:
    """Allocated bytes of the cache against the kept fraction; `table` is
    `kit.analysis.tables.quality`."""
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 2.6), layout="constrained")
        axes = picture.subplots()
        for series, name, rows in groups(table, "policy"):
            points = look(series) | {"linestyle": ""}
            axes.plot(rows["kept_fraction"], rows["kv_bytes"] / 2**20, label=name, **points)
        axes.set_xlim(0, 1.05)
        axes.set_ylim(0, None)
        axes.set_xlabel("kept fraction of the tokens")
        axes.set_ylabel("MiB per sequence")
        picture.legend(loc="outside upper center", ncols=3, frameon=False)
    low, high = table["kv_bytes"].min() / 2**20, table["kv_bytes"].max() / 2**20
    picture.alt = f"KV bytes allocated per sequence: {low:.2f} to {high:.2f} MiB with what is kept."
    return picture


def scaling_frontier(table: pd.DataFrame, budget: str, label: str) -> Picture:
    """Accuracy against a budget, one marker per compression, the frontier drawn as steps.

    `table` is `kit.analysis.pareto.table` with columns `compression`, `length` and `width`.
    """
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(WIDTH, 3.2), layout="constrained")
        axes = picture.subplots()
        for number, (name, rows) in enumerate(table.groupby("compression", sort=False)):
            colour, marker = SERIES[number % len(SERIES)]
            axes.plot(rows[budget], rows["accuracy"], marker, color=colour, label=name)
        best = table[table["on_frontier"]].sort_values(budget)
        axes.step(best[budget], best["accuracy"], where="post", color="black", linewidth=0.8)
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.set_xlabel(label)
        axes.set_ylim(0, max(5.0, 1.1 * table["accuracy"].max()))
        axes.set_ylabel("accuracy, percent")
        picture.legend(loc="outside upper center", ncols=4, frameon=False)
    names = [f"{r.length}-{r.width}-{r.compression}" for r in best.itertuples()]
    picture.alt = f"Accuracy against {label}. On the frontier (L-W-CR): {', '.join(names)}."
    return picture
