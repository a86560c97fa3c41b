"""One function per published table: records in, a DataFrame of numbers with intervals out.

Shares are percent; intervals are 95%, over problems. `style` turns a table into HTML for
notebooks and the report; nothing is rounded before that.
"""

import pandas as pd

from kit import contrasts

MEASURES = ("accuracy", "majority", "finished", "compliance", "accuracy_given_finished")


def _interval(records: pd.DataFrame, contrast: dict) -> tuple[float, float, float] | None:
    found = contrasts.compute(contrast, records)
    return found and (found.estimate, found.low, found.high)


def arms(records: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: shares with intervals, and what an answer costs in tokens and bytes."""
    rows = []
    for (model, arm), of_arm in records.groupby(["model", "arm"], sort=True):
        row = {"model": model, "arm": arm, **_counts(of_arm)}
        for measure in MEASURES:
            row[measure] = _interval(of_arm, {"measure": measure, "arm": arm})
        row["new_tokens"] = of_arm["new_tokens"].mean()
        row["kv_reads_tokens"] = of_arm["kv_reads_tokens"].mean()
        row["kv_peak_bytes"] = of_arm["kv_peak_bytes"].mean()
        row["seconds"] = of_arm["seconds"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def by_family(records: pd.DataFrame, arm: str = "plain") -> pd.DataFrame:
    """One row per family and level of one arm, and one for all of them."""
    of_arm = records[records["arm"] == arm]
    groups = [*of_arm.groupby(["family", "level"], sort=True), (("all", ""), of_arm)]
    rows = []
    for (family, level), group in groups:
        row = {"family": family, "level": level, **_counts(group)}
        for measure in ("accuracy", "finished", "compliance", "accuracy_given_finished"):
            row[measure] = _interval(group, {"measure": measure, "arm": arm})
        row["new_tokens"] = group["new_tokens"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def _counts(records: pd.DataFrame) -> dict:
    """How many problems and samples stand behind a row."""
    return {"problems": records["problem_id"].nunique(), "samples": len(records)}


def difference(records: pd.DataFrame, arm: str, control: str, measures=MEASURES) -> pd.DataFrame:
    """Arm minus control in points, paired by problem, one row per measure."""
    rows = []
    for measure in measures:
        found = contrasts.compute({"measure": measure, "arm": arm, "control": control}, records)
        if found is not None:
            interval = (found.estimate, found.low, found.high)
            rows.append({"measure": measure, "difference": interval, "problems": found.n})
    return pd.DataFrame(rows)


def answers(records: pd.DataFrame) -> pd.DataFrame:
    """Where the grader found the answers: share of samples per arm, percent."""
    counts = records.groupby(["arm", "method"]).size().unstack(fill_value=0)
    return 100 * counts.div(counts.sum(axis=1), axis=0)


def text(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with every cell as the text that a reader sees."""
    return table.apply(lambda column: column.map(lambda cell: _cell(column.name, cell)))


def _cell(name: str, cell) -> str:
    if isinstance(cell, tuple):
        return f"{cell[0]:.1f} [{cell[1]:.1f}, {cell[2]:.1f}]"
    if cell is None or cell is pd.NA or cell != cell:
        return "–"
    if name.endswith("bytes"):
        return f"{cell / 2**20:.2f} MiB"
    if isinstance(cell, float):
        return f"{cell:.1f}"
    return str(cell)


def style(table: pd.DataFrame):
    """`text(table)` as a Styler: numbers right, words left, no index."""
    shown = text(table)
    words = [name for name in shown if table[name].map(lambda cell: isinstance(cell, str)).all()]
    return (
        shown.style.hide(axis="index")
        .set_properties(**{"text-align": "right"})
        .set_properties(subset=words, **{"text-align": "left"})
    )
