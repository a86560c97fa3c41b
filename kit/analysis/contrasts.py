"""A contrast: one measure of one arm, or the difference between two arms, with its interval.

Works on a table of records (columns of `schema.Record`) and a small mapping such as
`{"measure": "accuracy", "arm": "format", "control": "plain"}`; the claims declare theirs in that
form, a notebook may write its own. Pairs by problem; samples and their seeds are nested in their
problem, trainings, which the column `training` of `pooled` tells apart, are crossed with problems:
see `kit.analysis.stats`. Knows nothing of published numbers or verdicts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.stats import t

from kit.analysis import pareto, stats
from kit.data import prompts
from kit.evaluation import grader

MEASURES = ("accuracy", "compliance", "finished", "accuracy_given_finished", "boxed", "majority")
FILTERS = {  # key of a contrast to the column of the records that it restricts
    **{column: column for column in ("model", "source", "family", "level", "policy")},
    "prompt": "arm",  # for when `by` makes another column tell the arms apart
}
KEYS = {"measure", "arm", "control", "control_measure", "by", "within", "sampled", *FILTERS}
KEYS |= {"probe"}  # which answers of 05 decide, see kit.report.recompute.on_facts
PROBLEM, TRAINING, SAMPLE = ["source", "problem_id"], "training", ["seed", "sample"]
MIN_VOTES = 3  # one sample, or greedy copies of one, would "prove" that voting changes nothing


@dataclass(frozen=True)
class Measurement:
    """The value of a contrast on this machine, in percent, or in points for a difference."""

    estimate: float
    low: float  # 95% interval
    high: float
    n: int  # independent units: problems, unless `origin` says otherwise
    unit: str
    inner: tuple[float, float] | None = None  # 90% interval, for equivalence
    records: int = 0  # rows of the store behind it
    origin: str = ""  # notebook or method
    model: str = ""  # that was measured
    sides: tuple[float, float] | None = None  # of a difference: arm and control, in percent
    control: str = ""  # of several: the one that is hardest to beat, to which the numbers belong
    beaten: tuple[str, ...] = ()  # of several: those over which the interval excludes zero
    failed: str = ""  # the manipulation check or positive control that did not pass

    def texts(self) -> tuple[str, str]:
        """Estimate with its unit, and interval ("" of what is exact), as a table shows them."""
        digits = ".0f" if abs(self.estimate) >= 10_000 else ".4g"
        digits = "z.1f" if self.unit in ("percent", "points") else digits
        estimate, low, high = (f"{x:{digits}}" for x in (self.estimate, self.low, self.high))
        interval = "" if self.low == self.high else f"{low} to {high}"
        return f"{estimate} {self.unit}", interval


def exact(value: float, unit: str, origin: str = "") -> Measurement:
    """A value computed without sampling, as a number of steps or bytes."""
    return Measurement(value, value, value, 1, unit, (value, value), origin=origin)


def points(interval: stats.Interval, origin: str = "") -> Measurement:
    """A difference of shares, in points."""
    return Measurement(*interval.percent, interval.n, "points", origin=origin)


def share_of(values: Iterable[float], unit: str = "percent", origin: str = "") -> Measurement:
    """Share of independent values that are 1, the others 0: Wilson's interval."""
    values = np.asarray(list(values), dtype=float)
    if not len(values) or not np.isin(values, (0, 1)).all():
        raise ValueError(
            "a share is of values that are 0 or 1, at least one; see mean_of for others"
        )
    outer, inner = (stats.wilson(int(values.sum()), len(values), level) for level in (0.95, 0.90))
    return Measurement(*outer.percent, len(values), unit, inner.percent[1:], origin=origin)


def mean_of(values: Iterable[float], unit: str, origin: str = "") -> Measurement:
    """Mean of independent values that are no shares, as KL per sequence: Student's t with the
    jackknife's error, of its logarithm where all are positive, since such values are skewed."""
    values = np.asarray(list(values), dtype=float)
    if unit in ("percent", "points") or (np.isin(values, (0, 1)).all() and values.any()):
        raise ValueError("a share has no t interval, which may end below 0; use share_of")
    if (values > 0).all():
        (estimate, *ends), (_, *inner) = np.exp(_jackknife(np.log, values)).tolist()
    else:
        (estimate, *ends), (_, *inner) = _jackknife(lambda mean: mean, values).tolist()
    return Measurement(estimate, *ends, len(values), unit, tuple(inner), origin=origin)


def excess_of(
    treatment: Iterable[float], control: Iterable[float], origin: str = ""
) -> Measurement | None:
    """By how many percent the mean of positive values exceeds that of paired ones: an interval of
    the logarithm of the ratio, as in `mean_of`. None where a value is not positive, as a KL that
    rounding alone makes."""
    pairs = np.array([list(treatment), list(control)], dtype=float).T
    if not (pairs > 0).all():
        return None
    ratios = _jackknife(lambda means: np.log(means[..., 0] / means[..., 1]), pairs)
    (estimate, *ends), (_, *inner) = (100 * np.expm1(ratios)).tolist()
    return Measurement(estimate, *ends, len(pairs), "percent more", tuple(inner), origin=origin)


def _jackknife(of: Callable, values: np.ndarray) -> np.ndarray:
    """`of` the mean over n values, with its 95% and 90% intervals, [2, 3]: Student's t with the
    jackknife's standard error; endless for a single value."""
    n, estimate = len(values), of(values.mean(axis=0))
    error = np.inf
    if n > 1:
        without = of((values.sum(axis=0) - values) / (n - 1))
        error = float(np.sqrt((n - 1) * without.var()))
    halves = [error * float(t.ppf((1 + level) / 2, max(1, n - 1))) for level in (0.95, 0.90)]
    return np.array([(estimate, estimate - half, estimate + half) for half in halves])


def check(contrast: Mapping) -> None:
    """ValueError if a contrast is not one that `compute` understands.

    `arm` and `control` are values of the column `by` (default "arm"); without `control` but with
    `control_measure` both sides are the same arm. `within` counts an answer only if prompt and
    new tokens fit into that context. `model` names parts of model names, any of which may match;
    `prompt` names the prompt's arm where `by` is another column; `sampled` keeps only what was
    sampled (true) or greedy (false).
    """
    unknown = set(contrast) - KEYS
    if unknown:
        raise ValueError(f"contrast key {min(unknown)!r} is unknown; use {', '.join(sorted(KEYS))}")
    for key in ("measure", "control_measure"):
        if contrast.get(key, "accuracy") not in MEASURES:
            raise ValueError(f"{key} {contrast[key]!r} is unknown; use {', '.join(MEASURES)}")
    if "measure" not in contrast or "arm" not in contrast:
        raise ValueError("a contrast on records needs `measure` and `arm`")


def compute(contrast: Mapping, records: pd.DataFrame, seed: int = 0) -> Measurement | None:
    """The contrast on these records; None when an arm is absent or no problem is in both."""
    values, rows = _values(contrast, records)
    if not values:
        return None
    interval = stats.paired_interval if len(values) == 2 else stats.mean_interval
    outer, inner = (
        interval(*values, rng=np.random.default_rng(seed), level=level) for level in (0.95, 0.90)
    )
    sides = tuple(100 * float(np.nanmean(stats.problem_means(side))) for side in values)
    return Measurement(
        *outer.percent,
        n=outer.n,
        unit="points" if len(values) == 2 else "percent",
        inner=inner.percent[1:],
        records=rows,
        origin=outer.method,
        model=_select(contrast, contrast["arm"], records)["model"].iloc[0],
        sides=sides if len(sides) == 2 else None,
    )


def p_value(contrast: Mapping, records: pd.DataFrame, seed: int = 0) -> float | None:
    """Two-sided p of a difference, below 0.05 where the interval of `compute` excludes zero; None
    as there."""
    values, _ = _values(contrast, records)
    if len(values) < 2:
        return None
    return stats.paired_p(*values, rng=np.random.default_rng(seed))


def _values(contrast: Mapping, records: pd.DataFrame) -> tuple[list[np.ndarray], int]:
    """Values of each side [problems, trainings, samples] over shared problems, and the number of
    records."""
    check(contrast)
    records = _by_training(records)
    arm, measure = contrast["arm"], contrast["measure"]
    sides = [(arm, measure)]
    if "control" in contrast or "control_measure" in contrast:
        sides.append((contrast.get("control", arm), contrast.get("control_measure", measure)))
    rows = {arm: _select(contrast, arm, records) for arm, _ in sides}
    if any(selected.empty for selected in rows.values()):
        return [], 0
    for arm, selected in rows.items():
        _refuse_pooling(arm, selected)
    tables = [_table(rows[arm], measure, contrast.get("within")) for arm, measure in sides]
    with_value = [{problem for problem, cells in table.items()
                   if not np.isnan([*cells.values()]).all()} for table in tables]  # fmt: skip
    problems = with_value[0] & with_value[-1]
    if not problems:
        return [], 0
    count = sum(problem in problems for r in rows.values() for problem in _problem(r))
    return [_array(table, sorted(problems)) for table in tables], count


def _array(table: Mapping, problems: list) -> np.ndarray:
    """A table of `problems` as [problems, trainings, samples], NaN where it has no value."""
    samples = {}  # by training
    for training, *sample in sorted({key for cells in table.values() for key in cells}):
        samples.setdefault(training, []).append(tuple(sample))
    places = {(training, *sample): (row, column) for row, training in enumerate(samples)
              for column, sample in enumerate(samples[training])}  # fmt: skip
    array = np.full((len(problems), len(samples), max(map(len, samples.values()))), np.nan)
    for number, problem in enumerate(problems):
        for key, value in table[problem].items():
            array[number, *places[key]] = value
    return array


def _by_training(records: pd.DataFrame) -> pd.DataFrame:
    """Records with the column `training`, 0 where a model was not trained here or once."""
    of = records[TRAINING].fillna(0) if TRAINING in records else 0
    return records.assign(**{TRAINING: of})


def _problem(rows: pd.DataFrame) -> Iterable[tuple[str, str]]:
    return zip(*(rows[name].tolist() for name in PROBLEM), strict=True)


def listed(contrast: Mapping, key: str) -> list:
    """The value or values that a contrast has for a key; none where it lacks the key."""
    values = contrast.get(key, [])
    return values if isinstance(values, list) else [values]


def _select(contrast: Mapping, arm: str, records: pd.DataFrame) -> pd.DataFrame:
    """Rows of one arm that pass the filters of the contrast."""
    if records.empty:
        return records
    rows = records[records[contrast.get("by", "arm")] == arm]
    for key, column in FILTERS.items():
        if key not in contrast:
            continue
        values = listed(contrast, key)
        if key == "model":
            names = rows["model"].str.casefold()
            keep = [any(part.casefold() in name for part in values) for name in names]
            rows = rows[np.array(keep, dtype=bool)]
        else:
            rows = rows[rows[column].isin(values)]
    if "sampled" in contrast:
        rows = rows[(rows["temperature"] > 0) == contrast["sampled"]]
    return rows


def _refuse_pooling(arm: str, rows: pd.DataFrame) -> None:
    """ValueError if an arm mixes models, policies or the like, or holds a sample twice."""
    for column in ("arm", "model", "weights_hash", "policy", "temperature"):
        if len({*rows[column].tolist()}) > 1 and rows[column].nunique() > 1:  # the first is quick
            values = ", ".join(sorted(map(str, rows[column].unique())))
            raise ValueError(f"{arm!r} has records of more than one {column}: {values}; name one")
    columns = [*PROBLEM, TRAINING, *SAMPLE]
    if len({*zip(*(rows[name].tolist() for name in columns), strict=True)}) < len(rows):
        row = rows[rows.duplicated(columns)].iloc[0]
        where = f"problem {row['problem_id']!r}, seed {row['seed']}, sample {row['sample']}"
        raise ValueError(f"{arm!r} has two records of {where}; give them different arms")


def _table(rows: pd.DataFrame, measure: str, within: int | None) -> dict[tuple, dict]:
    """By problem, then by (training, seed, sample): 0, 1 or NaN. A pivot of pandas takes ten times
    as long on a few hundred rows, and tables are made of thousands of such groups."""
    finished = rows["finish"] == "stop"
    if within is not None:
        finished &= rows["prompt_tokens"] + rows["new_tokens"] <= within
    correct = rows["correct"].astype(bool) & (finished | (within is None))
    if measure == "majority":
        rows = _majority(rows.assign(counted=correct))
        values = rows["value"]
    else:
        values = {
            "accuracy": correct,
            "accuracy_given_finished": correct.astype(float).where(finished),
            "compliance": rows["compliant"],
            "finished": finished,
            "boxed": rows["method"] == "boxed",
        }[measure]
    table, keys = {}, zip(*(rows[name].tolist() for name in [TRAINING, *SAMPLE]), strict=True)
    for problem, key, value in zip(
        _problem(rows), keys, values.astype(float).tolist(), strict=True
    ):
        table.setdefault(problem, {})[key] = value
    return table


def _majority(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per problem and training: whether the majority vote over its samples is correct;
    answers that the grader calls equal are one."""
    votes = []
    rows = rows[rows["temperature"] > 0]
    for where, samples in rows.sort_values(SAMPLE).groupby([*PROBLEM, TRAINING]):
        if len(samples) >= MIN_VOTES:
            winner = pareto.majority(samples["extracted"].tolist(), samples["correct"].tolist())
            votes.append((*where, 0, 0, float(samples["counted"].iloc[max(winner, 0)])))
    return pd.DataFrame(votes, columns=[*PROBLEM, TRAINING, *SAMPLE, "value"])


def twins(records: pd.DataFrame, first: Iterable[str] = ()) -> dict[str, str]:
    """Arms without prompts of their own, each with the arm whose prompts they repeat, problem by
    problem, with as many samples at the same temperature. Those in `first` are never repeats."""
    first, prompts = [*first], {}
    for arm, rows in records.groupby("arm"):
        keys = rows[[*PROBLEM, "prompt_id", "temperature", *SAMPLE]]
        prompts[arm] = {tuple(key) for key in keys.itertuples(index=False)}
    problems = {arm: {key[:2] for key in keys} for arm, keys in prompts.items()}
    order = sorted(prompts, key=lambda arm: (arm not in first, -len(problems[arm]), arm))
    twin_of: dict[str, str] = {}
    for arm in order:
        for other in order[: order.index(arm)]:
            same = {key for key in prompts[other] if key[:2] in problems[arm]} == prompts[arm]
            if same and arm not in first and other not in twin_of:
                twin_of[arm] = other
                break
    return twin_of


# Frames: the records of an arm, over the seeds of its training


def pooled(arm: str, trainings: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """Records of models that differ in their training seed only, as those of one arm, with that
    seed as `training`."""
    whole = {"arm": arm, "model": "", "weights_hash": ""}
    return pd.concat(
        [frame.assign(training=seed, **whole) for seed, frame in trainings.items()],
        ignore_index=True,
    )


def constant(base: pd.DataFrame, answers: Mapping[str, str]) -> pd.DataFrame:
    """The control of one who gives the same answer to every problem of a family: the records of
    `base` that have a family in `answers`, with that answer and its grade."""
    base = base[base["family"].isin(answers)].reset_index(drop=True)
    texts = [f"Answer: {answers[family]}" for family in base["family"]]
    golds = base["answer"].tolist()
    grades = grader.grade_many(texts, golds, prompts.FORM, base["asks"].tolist())
    graded = pd.DataFrame([asdict(grade) for grade in grades])
    return base.assign(arm="constant", text=texts, finish="stop", new_tokens=0, **graded)


def commonest(records: pd.DataFrame) -> pd.DataFrame:
    """The commonest answer to each family, empty ones included, and its share in percent."""
    rows = []
    for family, answers in records.groupby("family")["extracted"]:
        counts = answers.value_counts()
        rows.append((family, counts.index[0], 100 * counts.iloc[0] / len(answers)))
    return pd.DataFrame(rows, columns=["family", "answer", "share"]).set_index("family")


def spread(records: pd.DataFrame) -> tuple[float, float]:
    """Accuracy of the least and of the best training of `pooled`, percent."""
    each = 100 * records.groupby(TRAINING)["correct"].mean()
    return each.min(), each.max()


def index_records(frames: Mapping[str, pd.DataFrame], keys: list[str]) -> list[dict]:
    """The positions in `keys` of the records of each arm and training (`seed`), in order;
    `restore_frames` reads it."""
    at = {key: number for number, key in enumerate(keys)}
    return [
        {"arm": arm, "seed": seed, "at": [at[key] for key in part["key"]]}
        for arm, frame in frames.items()
        for seed, part in _by_training(frame).groupby(TRAINING)
    ]


def restore_frames(
    index: Iterable[Mapping], keys: list[str], records: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """The frames by arm that `index_records` described; KeyError where `records` lacks one."""
    index, by_arm, end = [*index], {}, 0
    order = [keys[number] for one in index for number in one["at"]]
    whole = records.set_index("key", drop=False).loc[order].reset_index(drop=True)  # at once: fast
    for one in index:
        start, end = end, end + len(one["at"])
        rows = whole.iloc[start:end].reset_index(drop=True)
        by_arm.setdefault(one["arm"], {})[one["seed"]] = rows
    return {arm: pooled(arm, trainings) for arm, trainings in by_arm.items()}
