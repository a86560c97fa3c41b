"""One function per published figure: tables in, a Picture out. No numbers are computed here."""

import matplotlib
import numpy as np
import pandas as pd

from kit.analysis.plot_style import SERIES, STYLE, WIDTH, Picture, finish, intervals, rows_of


def accuracy_by_family(tables: dict[str, pd.DataFrame]) -> Picture:
    """Accuracy with 95% intervals per family and level of one model.

    `tables` holds per arm what `kit.analysis.tables.by_family` gives for it.
    """
    with matplotlib.rc_context(STYLE):
        rows = sorted({key for table in tables.values() for key in _rows(table)}, key=_all_last)
        picture, axes = rows_of(len(rows), 0.08 + 0.07 * len(tables))
        at = {row: len(rows) - 1 - number for number, row in enumerate(rows)}
        step = 0.55 / max(len(tables), 1)
        for number, (arm, table) in enumerate(tables.items()):
            offset = step * (number - (len(tables) - 1) / 2)
            heights = np.array([at[row] for row in _rows(table)]) - offset
            intervals(axes, heights, np.array([*table["accuracy"]]), number, arm)
        axes.axhline(0.5, color="black", linewidth=0.6)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("accuracy, percent, 95% interval")
        names = [f"{family.replace('_', ' ')} {level}".strip() for family, level in rows]
        finish(picture, axes, np.array([*at.values()]), names, "prompt")
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

    `audits` is `kit.analysis.tables.audits`; claims that are no difference or have no counts are
    left out.
    """
    points = audits["published"].str.endswith((" percent", " points"))
    effects = audits[audits["p"].notna() & points]
    zero = ((effects["low"] <= 0) & (effects["high"] >= 0)).to_numpy(dtype=bool)
    with matplotlib.rc_context(STYLE):
        picture, axes = rows_of(len(effects), 0.17)
        at = np.arange(len(effects))[::-1]
        numbers = effects[["estimate", "low", "high"]].to_numpy()
        for series, (keep, label) in enumerate(((~zero, "excludes zero"), (zero, "includes zero"))):
            intervals(axes, at[keep], numbers[keep], series, f"{label} ({keep.sum()})")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("published difference, points")
        finish(picture, axes, at, [*effects["claim"]], "95% interval")
    picture.alt = (
        f"Of {len(effects)} published differences with known counts, the 95% interval of "
        f"{(~zero).sum()} excludes zero and that of {zero.sum()} includes it."
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
