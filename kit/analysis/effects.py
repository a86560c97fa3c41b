"""Where to spend the next byte: effects of each place of memory over a grid of scenarios.

A grid crosses the places, so each effect is a mean over pairs of scenarios that differ in one place
only, and pairs by problem: `table` and `outcomes` are those of `kit.budget.sweep`, rows [C] and
[C, P]. Runs without room leave holes in a grid; an effect of which no pair is left is None: not
measured. Intervals are cluster bootstraps over problems.

Source of the questions: arXiv 2510.10964, findings 1 to 5.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

import numpy as np
import pandas as pd

from kit.analysis import pareto, stats

PLACES = ("model", "bits", "policy", "kv_bits", "memory", "tokens", "width")
PLAIN = {"model": "", "bits": 16, "policy": "full", "kv_bits": 16, "memory": False, "width": 1}
MIB = 2**20


def pairs(
    table: pd.DataFrame, place: str, low, high, where: Mapping | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with `low` at `place`, and those with `high` there and all else equal, maybe none;
    `where` restricts other places to values."""
    keys = [name for name in PLACES if name != place and name in table]
    rows = table.assign(row=np.arange(len(table)))
    for name, value in (where or {}).items():
        rows = rows[rows[name] == value]
    return _joined(*(rows[rows[place] == value] for value in (low, high)), keys)


def accuracies(outcomes: np.ndarray, rng: np.random.Generator) -> list[tuple]:
    """Percent solved, and its 95% interval, of every row of outcomes [C, P]."""
    intervals = [stats.mean_interval(row, rng, draws=2_000) for row in outcomes]
    return [each.percent for each in intervals]


def difference(
    table: pd.DataFrame,
    outcomes: np.ndarray,
    rng: np.random.Generator,
    scenario: Mapping,
    control: Mapping,
) -> stats.Interval | None:
    """By how much one scenario solves more than another one, in shares; None where the table has
    not both. Each names the values that differ from PLAIN, and `model` a part of its name."""
    sides = []
    for settings in (PLAIN | dict(scenario), PLAIN | dict(control)):
        rows = table["model"].str.contains(settings.pop("model"), regex=False)
        for place, value in settings.items():
            rows &= table[place] == value
        if not rows.any():
            return None
        sides.append(outcomes[rows.to_numpy().argmax()])
    return stats.cluster_bootstrap(sides[0] - sides[1], rng)


def gap(
    table: pd.DataFrame,
    outcomes: np.ndarray,
    rng: np.random.Generator,
    cache: tuple[str, int],
    control: tuple[str, int],
    budget: str = "shared_bytes",
) -> stats.Interval | None:
    """By how much the frontier of all scenarios with one (policy, kv_bits) lies above that of
    another, at equal `budget`, in shares: see `kit.analysis.pareto.mean_gap`. None where there are
    none of either, or the two share no range of budgets."""
    sides = []
    for policy, bits in (cache, control):
        selection = ((table["policy"] == policy) & (table["kv_bits"] == bits)).to_numpy()
        sides.append((table.loc[selection, budget].to_numpy(), outcomes[selection]))
    if not all(len(budgets) for budgets, _ in sides):
        return None
    low, high = max(x.min() for x, _ in sides), min(x.max() for x, _ in sides)
    return pareto.mean_gap(*sides, rng) if low < high else None


def gaps(
    table: pd.DataFrame, outcomes: np.ndarray, rng: np.random.Generator
) -> dict[tuple[tuple[str, int], tuple[str, int]], stats.Interval | None]:
    """`gap` of each cache setting over the first of the grid, by (policy, kv_bits) of both; and of
    eviction over quantisation, each alone: the last policy and the last precision."""
    first, *ways = product(*_values(table))
    pairs, each_alone = [(way, first) for way in ways], evicted_or_quantized(table)
    if first not in each_alone:
        pairs.append(each_alone)
    return {pair: gap(table, outcomes, rng, *pair) for pair in pairs}


def evicted_or_quantized(table: pd.DataFrame) -> tuple[tuple[str, int], tuple[str, int]]:
    """The last policy of the grid at the highest precision, and the whole cache at the lowest."""
    policies, bits = _values(table)
    return (policies[-1], bits[0]), (PLAIN["policy"], bits[-1])


def _values(table: pd.DataFrame) -> tuple[list[str], list[int]]:
    """Policies of the cache in the order of the grid, the whole cache first, and its precisions,
    the highest first: in a grid with holes the first row says neither."""
    policies = sorted(dict.fromkeys(table["policy"]), key=lambda name: name != PLAIN["policy"])
    return policies, sorted(set(table["kv_bits"].tolist()), reverse=True)


def gap_rows(
    intervals: Mapping[tuple[tuple[str, int], tuple[str, int]], stats.Interval | None],
) -> pd.DataFrame:
    """`gaps` as a table, in points."""
    return pd.DataFrame(
        [{"cache": "{}, {} bit".format(*one), "against": "{}, {} bit".format(*other),
          "difference": gap and gap.percent}
         for (one, other), gap in intervals.items()],
        columns=["cache", "against", "difference"],
    )  # fmt: skip


def single_factor(row: Mapping) -> str:
    """The single factor in which a scenario differs from PLAIN, tokens and votes aside; "as it is"
    where there is none, "" where there are several."""
    names = {"bits": "weights", "policy": "cache", "kv_bits": "cache", "memory": "strategies"}
    factors = {name for place, name in names.items() if row[place] != PLAIN[place]}
    return "" if len(factors) > 1 else factors.pop() if factors else "as it is"


def places(
    table: pd.DataFrame, outcomes: np.ndarray, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scenarios with a `place` each, with intervals and on the frontier of bytes with the weights
    shared, see `kit.analysis.pareto.table`; and of each place the most accurate one."""
    table = table.assign(interval=accuracies(outcomes, rng))
    front = pareto.table(table, "shared_bytes", outcomes, rng)
    best = front.sort_values("accuracy", kind="stable").groupby("place", sort=False).tail(1)
    columns = ["place", "interval", "tokens", "width", "bytes", "shared_bytes", "membership"]
    return front, best[columns]


def marginal_effects(
    table: pd.DataFrame, outcomes: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Marginal effect of a step in each place: points, MiB, points per MiB; cheaper values first.

    A step that saves bytes and gains points has no price; `points per MiB` is then missing. All is
    where no pair is left.
    """
    rows = []
    for place in PLACES:
        if place not in table or table[place].nunique() < 2:
            continue
        order = table.groupby(place)["bytes"].mean().sort_values().index
        for low, high in zip(order, order[1:]):
            before, after = pairs(table, place, low, high)
            row = {"place": place, "from": str(low), "to": str(high), "pairs": len(before)}
            if not len(before):
                rows.append(row | dict.fromkeys(["points", "MiB", "points per MiB"]))
                continue
            interval = stats.cluster_bootstrap((outcomes[after] - outcomes[before]).mean(0), rng)
            more = (table["bytes"].to_numpy()[after] - table["bytes"].to_numpy()[before]).mean()
            points = interval.percent
            row |= {"points": points, "MiB": more / MIB}
            each = tuple(x * MIB / more for x in points) if more > 0 else None
            rows.append(row | {"points per MiB": each})
    return pd.DataFrame(rows)


def interaction(
    table: pd.DataFrame,
    outcomes: np.ndarray,
    rng: np.random.Generator,
    effect: tuple[str, object, object],
    of: tuple[str, object, object],
) -> stats.Interval | None:
    """By how much an effect (place, from, to) differs between two values of another place (place,
    from, to): does eviction cost more at 4 bit? A difference of differences, in shares; None where
    the effect is not measured at both."""
    place, low, high = of
    sides = []
    for value in (high, low):
        before, after = pairs(table, *effect, where={place: value})
        if not len(before):
            return None
        sides.append((outcomes[after] - outcomes[before]).mean(0))
    return stats.cluster_bootstrap(sides[0] - sides[1], rng)


def interactions(
    table: pd.DataFrame, outcomes: np.ndarray, ends: Sequence[tuple[str, object, object]]
) -> pd.DataFrame:
    """`interaction` of each pair of `ends` (place, from, to), in points, as a table."""
    rows = []
    for effect, of in combinations(ends, 2):
        between = interaction(table, outcomes, np.random.default_rng(0), effect, of)
        names = ["{}, {} to {}".format(*each) for each in (effect, of)]
        rows.append([*names, between and between.percent])
    return pd.DataFrame(rows, columns=["effect", "changes_with", "difference"])


def threshold(
    table: pd.DataFrame, outcomes: np.ndarray, rng: np.random.Generator, draws: int = 2_000
) -> pd.DataFrame:
    """At which size of weights a byte begins to buy more as tokens than as weights.

    For each size but the largest: points per MiB of going to the next size, and of going to the
    next budget of tokens at this size; `first` is the share of bootstrap draws in which it is the
    smallest size whose tokens buy more. Rows are one per size of which both are measured, and a
    last one, of no size, for the draws in which weights always buy more; none where no size is.
    `table` has `weight_bytes` beside the places.
    """
    sizes = np.sort(table["weight_bytes"].unique())
    budgets = np.sort(table["tokens"].unique())
    table = table.assign(row=np.arange(len(table)))
    total = table["bytes"].to_numpy()
    keys = [name for name in ("policy", "kv_bits", "memory", "width") if name in table]
    steps = {}  # size: (problem vector per MiB) of weights and of tokens
    for small, large in zip(sizes, sizes[1:]):
        smaller = table[table["weight_bytes"] == small]
        above = table[table["weight_bytes"] == large]
        up = _joined(smaller, above, [*keys, "tokens"])
        longer = [
            _joined(smaller[smaller["tokens"] == a], smaller[smaller["tokens"] == b], keys)
            for a, b in zip(budgets, budgets[1:])
        ]
        if not len(up[0]) or not sum(len(a) for a, _ in longer):
            continue
        both = up, tuple(np.concatenate(side) for side in zip(*longer))
        steps[small] = [(outcomes[b] - outcomes[a]).mean(0) * MIB / (total[b] - total[a]).mean()
                        for a, b in both]  # fmt: skip
    if not steps:
        return pd.DataFrame(columns=["weight_bytes", "as weights", "as tokens", "first"])
    counts = np.zeros(len(steps) + 1)
    n = outcomes.shape[1]
    for _ in range(draws):
        weights = rng.multinomial(n, np.full(n, 1 / n)) / n
        pairs_of = enumerate(steps.values())
        first = [i for i, (up, longer) in pairs_of if longer @ weights > up @ weights]
        counts[first[0] if first else -1] += 1
    rows = [
        {"weight_bytes": size, "as weights": 100 * up.mean(), "as tokens": 100 * longer.mean()}
        for size, (up, longer) in steps.items()
    ]
    rows.append({"weight_bytes": np.nan, "as weights": np.nan, "as tokens": np.nan})
    return pd.DataFrame(rows).assign(first=counts / draws)


def switch(steps: pd.DataFrame) -> tuple[float, float, float]:
    """Bytes of weights from which tokens buy more, by `threshold`: median over the draws, and the
    middle 95% of them. "Never" counts as twice the largest size."""
    sizes = steps["weight_bytes"].fillna(2 * steps["weight_bytes"].max()).to_numpy()
    below = np.cumsum(steps["first"].to_numpy()) - 1e-9
    return tuple(float(sizes[np.argmax(below >= share)]) for share in (0.5, 0.025, 0.975))


def _joined(low: pd.DataFrame, high: pd.DataFrame, keys: list[str]):
    """Numbers in the column `row` of scenarios in `low` and `high` that agree in `keys`."""
    sides = [frame.set_index(keys)["row"] for frame in (low, high)]
    both = sides[0].to_frame("low").join(sides[1].rename("high"), how="inner")
    return both["low"].to_numpy(), both["high"].to_numpy()
