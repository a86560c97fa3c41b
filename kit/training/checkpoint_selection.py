"""Which checkpoint is meant: chosen on the validation split, never on the test it is reported on.

`stats.best_of_optimism` says what choosing the best of several on the test set flatters by; here
the published checkpoints of Open-RS are read with that in mind.
"""

from collections.abc import Mapping

import pandas

from kit import paths
from kit.analysis import stats

LOGS = paths.DATA / "openrs_checkpoints.csv"
BENCHMARKS = ("aime24", "amc23", "math500", "minerva", "olympiad")  # as Open-RS was evaluated
TOKENS = 32768  # and how many an answer may have


def samples(items: int) -> int:
    """Samples per problem that a benchmark of so many items takes: one item of AIME is 3.3 points,
    and ten seeds of it spread by 5 to 15 (arXiv 2504.07086)."""
    return 10 if items <= 100 else 3


def chosen(validation: Mapping[int, float]) -> int:
    """The step of the best validation accuracy, the earliest of equals."""
    if not validation:
        raise ValueError("No checkpoint has a validation accuracy; save and score at least one.")
    return min(validation, key=lambda step: (-validation[step], step))


def published() -> pandas.DataFrame:
    """Logged checkpoints of the three Open-RS experiments: `accuracy` in percent with interval."""
    logs = pandas.read_csv(LOGS, comment="#")
    found = [stats.wilson(row.correct, row.items) for row in logs.itertuples()]
    return logs.assign(accuracy=[interval.percent for interval in found])


def against_first(logs: pandas.DataFrame) -> pandas.DataFrame:
    """Each later checkpoint minus the first of its experiment and benchmark, in points.

    Unpaired, since no answer per item is published; `holm` adjusts `p` over all of `logs`.
    """
    rows = []
    for (experiment, benchmark), group in logs.groupby(["experiment", "benchmark"]):
        first, *later = group.sort_values("step").itertuples()
        for row in later:
            found = stats.unpaired((row.correct, row.items), (first.correct, first.items))
            points = found.difference.percent
            rows.append((experiment, benchmark, row.step, first.step, points, found.p))
    table = pandas.DataFrame(
        rows, columns=["experiment", "benchmark", "step", "first", "difference", "p"]
    )
    return table.assign(holm=stats.holm(table["p"]) if len(table) else [])


def flattery(logs: pandas.DataFrame) -> pandas.DataFrame:
    """Per experiment and benchmark: the best checkpoint, the mean of all, and by how many points
    the best of as many equal checkpoints would exceed their mean by luck alone."""
    rows = []
    for (experiment, benchmark), group in logs.groupby(["experiment", "benchmark"]):
        items, count = int(group["items"].iloc[0]), len(group)
        mean = group["correct"].sum() / group["items"].sum()
        best = group["correct"].max() / items
        luck = stats.best_of_optimism(mean, items, count)
        rows.append((experiment, benchmark, items, count, *(100 * x for x in (mean, best, luck))))
    names = ["experiment", "benchmark", "items", "checkpoints", "mean", "best", "luck"]
    return pandas.DataFrame(rows, columns=names).assign(gain=lambda t: t["best"] - t["mean"])
