"""Pareto frontiers of accuracy against a memory budget, and votes: the tools of hyper-scaling.

A configuration (length, width, compression) costs a budget, KV reads or peak tokens, and solves
some problems. Which configurations are worth their budget, how sure is that, and by how much does
one family of configurations beat another over the budgets that both cover (arXiv 2506.05345)?
Everything is paired by problem: `outcomes` is a matrix of configurations x problems in [0, 1],
and a bootstrap draws problems for all configurations alike. No decoding and no figures here.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

from kit.analysis import stats
from kit.evaluation.grader import same
from kit.schema import DIGITS

SUBSETS = 2_000  # of a problem's samples: up to so many are enumerated, else so many drawn


def table(
    configurations: pd.DataFrame, budget: str, outcomes: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """`configurations`, cheapest first, with accuracy (percent), on_frontier and membership added.

    Row i of `outcomes` belongs to row i of the frame; `budget` names its column.
    """
    budgets, outcomes = _checked(configurations[budget].to_numpy(), outcomes)
    accuracy = outcomes.mean(axis=1)
    added = configurations.assign(
        **{budget: budgets},
        accuracy=100 * accuracy,
        on_frontier=pareto(budgets, accuracy),
        membership=membership(budgets, outcomes, rng),
    )
    return added.sort_values(budget, kind="stable")


def grid(
    records: dict[tuple[int, float], pd.DataFrame], widths: Sequence[int], rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray]:
    """L-W-CR configurations: one row per length, compression and width, and their outcomes [C, P].

    `records` holds per (length in tokens, compression) the records of the same problems, each
    with as many samples as the largest width. `reads` and `peak` are a problem's mean KV reads
    and peak tokens of one chain, times the width.
    """
    rows, outcomes = [], []
    for (length, compression), frame in records.items():
        cost = frame[["kv_reads_tokens", "kv_peak_tokens"]].mean()
        for width in widths:
            row = {"length": length, "width": width, "compression": f"{compression:g}x"}
            rows.append(row | {"reads": width * cost.iloc[0], "peak": width * cost.iloc[1]})
            outcomes.append(votes(frame, width, rng))
    return pd.DataFrame(rows), np.array(outcomes)


def kept_share(records: pd.DataFrame) -> float:
    """KV reads of `records` over what full attention reads for the same prompts and lengths."""
    first, count = records["prompt_tokens"], records["new_tokens"]
    full = count * first + count * (count - 1) / 2  # the first new token reads the prompt
    return float(records["kv_reads_tokens"].sum() / full.sum())


def gaps(
    configurations: pd.DataFrame,
    outcomes: np.ndarray,
    rng: np.random.Generator,
    control: str = "1x",
) -> pd.DataFrame:
    """Mean gap in points of each compression over `control`, at equal reads and equal peak."""
    rows = []
    is_control = (configurations["compression"] == control).to_numpy()
    for name in configurations.loc[~is_control, "compression"].unique():
        is_compressed = (configurations["compression"] == name).to_numpy()
        row = {"compression": name}
        for budget in ("reads", "peak"):
            cost = configurations[budget].to_numpy()
            sides = ((cost[side], outcomes[side]) for side in (is_compressed, is_control))
            gap = mean_gap(*sides, rng)
            row[f"gap at equal {budget}"] = gap.percent
        rows.append(row)
    return pd.DataFrame(rows)


def pareto(budget: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Whether nothing is at least as cheap and as accurate, and one of them strictly: bool [C].

    Equal configurations do not exclude each other.
    """
    budget, accuracy = np.asarray(budget, dtype=float), _rounded(accuracy)
    cheaper, dearer = budget[None] < budget[:, None], budget[None] > budget[:, None]
    better, worse = accuracy[None] > accuracy[:, None], accuracy[None] < accuracy[:, None]
    dominated = (cheaper & ~worse) | (better & ~dearer)
    return ~dominated.any(axis=1)


def membership(
    budgets: np.ndarray, outcomes: np.ndarray, rng: np.random.Generator, draws: int = 4_000
) -> np.ndarray:
    """Share of bootstrap draws of problems in which each configuration is on the frontier: [C].

    Budgets are fixed [C], or per problem [C, P] and then drawn along with the outcomes. A share
    between 0 and 1 is how far these problems decide; it is no p-value.
    """
    budgets, outcomes = _checked(budgets, outcomes)
    counts = np.zeros(len(outcomes))
    for weights in _resamples(outcomes.shape[1], rng, draws):
        counts += pareto(_mean(budgets, weights), outcomes @ weights)
    return counts / draws


def mean_gap(
    treatment: tuple[np.ndarray, np.ndarray],
    control: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    log: bool = True,
    draws: int = 2_000,
    level: float = 0.95,
) -> stats.Interval:
    """Mean vertical distance of two frontiers, each (budgets, outcomes), over shared budgets.

    A frontier is a step function: the best accuracy measured at this budget or a smaller one,
    because only configurations that were run are available. It is averaged from where both families
    have a configuration to where one has no dearer one; over the logarithm of the budget, since
    budgets are doubled and a linear scale would be dominated by the largest. `log=False` shows how
    much depends on that, since the scale of the paper is not known here.

    The best of many measured accuracies is too high, and more so in the larger family. So the
    whole is repeated on bootstrap draws of problems, and estimate and interval are less the bias
    seen there. That is about half of the true one or more: give both families equally many
    configurations. The interval is the cluster bootstrap of the gap on each problem; in
    simulations it covered 94% to 98%, percentiles of the repeated gap 81% to 98%. ValueError if
    the families share no range.
    """
    sides = _checked(*treatment), _checked(*control)
    n = sides[0][1].shape[1]
    if sides[1][1].shape[1] != n:
        raise ValueError(
            f"treatment has {n} problems, control {sides[1][1].shape[1]}; "
            f"give both the same problems in the same order"
        )
    gaps = _gaps(sides, np.full(n, 1 / n), log)
    draws_of_mean = [_gaps(sides, weights, log) @ weights for weights in _resamples(n, rng, draws)]
    bias = float(np.mean(draws_of_mean) - gaps.mean())
    fixed = stats.cluster_bootstrap(_rounded(gaps), rng, level)
    low, high = max(fixed.low - bias, -1.0), min(fixed.high - bias, 1.0)
    method = "cluster bootstrap, less the bias of choosing"
    return stats.Interval(fixed.estimate - bias, low, high, n, method, level)


def _gaps(sides, weights: np.ndarray, log: bool) -> np.ndarray:
    """Gap on each problem [P] between the frontiers that problems of these weights show."""
    means = [(_mean(budgets, weights), _rounded(outcomes @ weights)) for budgets, outcomes in sides]
    low = max(budget.min() for budget, _ in means)
    high = min(budget.max() for budget, _ in means)
    if low >= high:
        raise ValueError(
            f"the two families share no range of budgets (both run only from {low:g} to {high:g}); "
            f"add configurations until they overlap well"
        )
    shares = [_shares(*mean, low, high, log) for mean in means]
    return shares[0] @ sides[0][1] - shares[1] @ sides[1][1]


def _shares(budget: np.ndarray, accuracy: np.ndarray, low: float, high: float, log: bool):
    """Share of the budgets from `low` to `high` over which each configuration is best: [C]."""
    order = budget.argsort()
    best = np.maximum.accumulate(accuracy[order])
    first = order[np.append(True, best[1:] > best[:-1])]  # the frontier, cheapest first
    edges = np.clip(np.append(budget[first], high), low, high)
    edges = np.log(edges) if log else edges
    shares = np.zeros(len(budget))
    shares[first] = np.diff(edges) / ((np.log(high) - np.log(low)) if log else high - low)
    return shares


def _checked(budgets, outcomes) -> tuple[np.ndarray, np.ndarray]:
    budgets, outcomes = np.asarray(budgets, dtype=float), np.asarray(outcomes, dtype=float)
    if outcomes.ndim != 2 or budgets.shape not in (outcomes.shape, outcomes.shape[:1]):
        raise ValueError(
            f"budgets of shape {budgets.shape} do not fit outcomes of shape {outcomes.shape}; "
            f"give [C] or [C, P] budgets and [C, P] outcomes"
        )
    if not outcomes.size or not ((outcomes >= 0) & (outcomes <= 1)).all():
        where = np.argwhere(~((outcomes >= 0) & (outcomes <= 1)))
        where = "the matrix is empty" if not len(where) else "row {}, problem {}".format(*where[0])
        raise ValueError(f"outcomes must be numbers from 0 to 1 without gaps: {where}")
    if not (np.isfinite(budgets) & (budgets > 0)).all():
        raise ValueError(f"budgets must be positive numbers; one is {budgets.min()}")
    return _digits(budgets), outcomes


def _digits(budgets: np.ndarray) -> np.ndarray:
    """Without the last digits, in which equal costs differ by order of summation, and which results
    do not keep."""
    return np.array([float(f"{x:.{DIGITS}g}") for x in budgets.flat]).reshape(budgets.shape)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return values @ weights if values.ndim == 2 else values


def _rounded(accuracy: np.ndarray) -> np.ndarray:
    """Without the last digits, in which equal accuracies differ by order of summation."""
    return np.round(np.asarray(accuracy, dtype=float), 12)


def _resamples(n: int, rng: np.random.Generator, draws: int):
    """Weights [n] of `draws` bootstrap samples of n problems, one by one."""
    for _ in range(draws):
        yield rng.multinomial(n, np.full(n, 1 / n)) / n


# Votes: what a width of parallel samples would answer


def classes(
    answers: Sequence[str],
    correct: Sequence[bool] | None = None,
    equal: Callable[[str, str], bool] = same,
) -> np.ndarray:
    """For each answer the place of the earliest that equals it, -1 for no answer (""): int [k].

    With `correct`, correct answers equal each other and no wrong one, which may have their value in
    another form than was asked for.
    """
    texts = [answer.strip() for answer in answers]
    right = [False] * len(texts) if correct is None else [bool(hit) for hit in correct]
    labels: list[int] = []
    for place, (text, hit) in enumerate(zip(texts, right, strict=True)):
        alike = (
            other
            for other in dict.fromkeys(labels)
            if other >= 0 and right[other] == hit and (hit or equal(texts[other], text))
        )
        labels.append(next(alike, place) if text else -1)
    return np.array(labels, dtype=int)


def majority(
    answers: Sequence[str],
    correct: Sequence[bool] | None = None,
    equal: Callable[[str, str], bool] = same,
) -> int:
    """Place of the earliest answer of the largest class, ties to the earliest; -1 if all are ""."""
    votes = [place for place in classes(answers, correct, equal).tolist() if place >= 0]
    return max(votes, key=votes.count, default=-1)


def votes(records: pd.DataFrame, width: int, rng: np.random.Generator | None = None) -> list[float]:
    """`vote_accuracy` of each problem in `records`, by its id; without `rng` always the same."""
    rng = np.random.default_rng(0) if rng is None else rng
    ordered = records.sort_values(["problem_id", "sample"])
    starts = np.unique(ordered["problem_id"].to_numpy(str), return_index=True)[1]
    columns = (np.split(ordered[name].to_numpy(), starts[1:]) for name in ("extracted", "correct"))
    return [vote_accuracy([*each], hits, width, rng) for each, hits in zip(*columns, strict=True)]


def vote_accuracy(
    answers: Sequence[str],
    correct: Sequence[bool],
    width: int,
    rng: np.random.Generator,
    equal: Callable[[str, str], bool] = same,
) -> float:
    """Probability that the majority of `width` of one problem's samples is correct.

    Averaged over the subsets of the k >= width samples, so without the bias of voting on the
    first few or of drawing with replacement: all subsets where there are at most SUBSETS, else
    as many drawn by `rng` (standard error at most 0.011). A vote is as correct as the earliest
    sample that gave the winning answer.
    """
    k = len(answers)
    if len(correct) != k or not 1 <= width <= k:
        raise ValueError(
            f"no vote of width {width} among {k} answers, {len(correct)} of them judged"
        )
    labels = classes(answers, correct, equal)
    voting = labels >= 0
    if comb(k, width) <= SUBSETS:
        subsets = np.array(list(combinations(range(k), width)))
    else:
        subsets = np.sort(rng.random((SUBSETS, k)).argpartition(width - 1)[:, :width], axis=1)
    drawn_labels = labels[subsets]  # [subsets, width], earliest sample first
    votes = (drawn_labels[:, :, None] == drawn_labels[:, None, :]).sum(axis=2) * voting[subsets]
    winner = np.take_along_axis(subsets, votes.argmax(axis=1)[:, None], axis=1)
    return float(np.asarray(correct, dtype=float)[winner].mean())
