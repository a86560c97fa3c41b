"""Checkpoint selection: on the validation split, never on the test set that is reported.

Selecting the best of several checkpoints on the test set overstates its accuracy, by
`stats.best_of_optimism`; `selection_bias` puts this bias beside the logged checkpoints of Open-RS
(https://arxiv.org/abs/2503.16219).
"""

from collections.abc import Mapping

import pandas

from kit import paths
from kit.analysis import stats

LOGS = paths.DATA / "openrs_checkpoints.csv"
BENCHMARKS = ("aime24", "amc23", "math500", "minerva", "olympiad")  # on which Open-RS reports
TOKENS = 32768  # most of an answer, as in Open-RS


def samples_per_problem(items: int) -> int:
    """Samples per problem for a benchmark of `items` problems: 10 up to 100 problems, else 3.

    One problem of AIME is 3.3 points, and ten seeds spread over 5 to 15 points
    (https://arxiv.org/abs/2504.07086).
    """
    return 10 if items <= 100 else 3


def select(validation: Mapping[int, float]) -> int:
    """The step with the best validation accuracy, the earliest of ties; ValueError without any."""
    if not validation:
        raise ValueError("No checkpoint has a validation accuracy; save and score at least one.")
    return min(validation, key=lambda step: (-validation[step], step))


def open_rs_logs() -> pandas.DataFrame:
    """Logged checkpoints of the three Open-RS experiments.

    `accuracy` is (estimate, low, high) in percent, a 95% Wilson interval.
    """
    logs = pandas.read_csv(LOGS, comment="#")
    intervals = [stats.wilson(row.correct, row.items) for row in logs.itertuples()]
    return logs.assign(accuracy=[interval.percent for interval in intervals])


def against_first(logs: pandas.DataFrame) -> pandas.DataFrame:
    """Each later checkpoint minus the first of its experiment and benchmark, in points.

    The test is unpaired, since answers per item are not published; `holm` is `p` adjusted over all
    rows.
    """
    rows = []
    for (experiment, benchmark), group in logs.groupby(["experiment", "benchmark"]):
        first, *later = group.sort_values("step").itertuples()
        for row in later:
            test = stats.unpaired((row.correct, row.items), (first.correct, first.items))
            points = test.difference.percent
            rows.append((experiment, benchmark, row.step, first.step, points, test.p))
    table = pandas.DataFrame(
        rows, columns=["experiment", "benchmark", "step", "first", "difference", "p"]
    )
    return table.assign(holm=stats.holm(table["p"]) if len(table) else [])


def selection_bias(logs: pandas.DataFrame) -> pandas.DataFrame:
    """Per experiment and benchmark: accuracy of the best checkpoint, mean of all, `gain` of best
    over mean, and `expected optimism`, the gain that as many checkpoints of equal true accuracy
    would have; in percent and points."""
    rows = []
    for (experiment, benchmark), group in logs.groupby(["experiment", "benchmark"]):
        items, count = int(group["items"].iloc[0]), len(group)
        mean = group["correct"].sum() / group["items"].sum()
        best = group["correct"].max() / items
        optimism = stats.best_of_optimism(mean, items, count)
        percent = (100 * share for share in (mean, best, optimism))
        rows.append((experiment, benchmark, items, count, *percent))
    names = ["experiment", "benchmark", "items", "checkpoints", "mean", "best"]
    return pandas.DataFrame(rows, columns=[*names, "expected optimism"]).assign(
        gain=lambda t: t["best"] - t["mean"]
    )
