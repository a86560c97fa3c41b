"""One function per published table: records or claims in, a DataFrame out.

Shares are percent, intervals 95% over problems and kept as (estimate, low, high); nothing is
rounded before `text`, which gives the cells that a reader sees. `style` is that for notebooks,
`kit.report.html` puts the same texts into its page. No statistics of its own: see
`kit.analysis.contrasts`.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
import pandas as pd

from kit.analysis import contrasts, stats
from kit.analysis.claims import Claim, audit
from kit.analysis.contrasts import Measurement
from kit.analysis.verdicts import as_published, measured_table
from kit.pipeline import declared
from kit.schema import digest

MEASURES = ("accuracy", "majority", "finished", "compliance", "accuracy_given_finished")
CUT = 5.0  # points in the share of ended answers, above which a length limit may make a difference
ENDED = 95.0  # percent of the answers that a length limit should let end
MOST = 999  # the largest end of an interval of divergences that a table spells out
COSTS = ("new_tokens", "kv_reads_tokens", "kv_peak_bytes", "seconds")  # mean over samples
LABELS = {  # heading of a column, where its name does not do; units where they are not obvious
    "accuracy": "accuracy, %",
    "majority": "majority vote, %",
    "finished": "finished, %",
    "compliance": "compliance, %",
    "accuracy_given_finished": "accuracy given finished, %",
    "new_tokens": "new tokens, mean",
    "kv_reads_tokens": "KV reads, tokens, mean",
    "kv_peak_bytes": "peak KV, mean",
    "seconds": "seconds, mean",
    "difference": "difference, points",
    "equal finish": "at equal finish, points",
    "of_control": "of the control, %",
    "n_needed": "n needed",
    "compression_x": "compression, x",
    "live_tokens": "live tokens, mean",
    "kept_fraction": "kept fraction",
    "kl": "KL, nats per token",
    "kl_ratio": "KL over that of dms, x",
    "kv_bytes": "KV allocated, mean",
    "on_frontier": "on the frontier",
    "families held out": "families held out, %",
    "one answer": "one answer, %",
    "joules": "energy, J",
    "held_bytes": "held",
    "read_bytes": "read per query",
    "fetched": "parameters fetched",
    "stored": "parameters stored",
    "trained": "tokens trained on",
    "prompt_tokens": "prompt tokens, mean",
    "nats": "nats per token",
    "changes_with": "changes with",
    "formula_bytes": "by formula",
    "allocated_bytes": "allocated",
    "off_percent": "off by, %",
    "weight_bytes": "weights",
    "shared_bytes": "bytes, weights shared",
    "membership": "on the frontier, share of draws",
}


def arms(records: pd.DataFrame) -> pd.DataFrame:
    """One row per model and arm: shares with intervals, and what an answer costs."""
    rows = []
    for (model, arm), group in records.groupby(["model", "arm"], sort=True):
        shares = {measure: share(group, measure) for measure in MEASURES}
        costs = {cost: group[cost].mean() for cost in COSTS}
        rows.append({"model": model, "arm": arm, **_counts(group), **shares, **costs})
    return pd.DataFrame(rows)


def by_family(records: pd.DataFrame, arm: str = "plain") -> pd.DataFrame:
    """One row per model, family and level of one arm, and one per model for all of them."""
    measures = [measure for measure in MEASURES if measure != "majority"]
    rows = []
    for model, of_model in records[records["arm"] == arm].groupby("model", sort=True):
        groups = [*of_model.groupby(["family", "level"], sort=True), (("all", ""), of_model)]
        for (family, level), group in groups:
            shares = {measure: share(group, measure) for measure in measures}
            row = {"model": model, "family": family, "level": level, **_counts(group), **shares}
            rows.append(row | {"new_tokens": group["new_tokens"].mean()})
    return pd.DataFrame(rows)


def ended(records: pd.DataFrame) -> str:
    """A sentence on the arms in which the length limit let fewer than ENDED percent of the answers
    end."""
    shares = 100 * (records["finish"] == "stop").groupby(records["arm"]).mean()
    cut = shares[shares < ENDED].sort_values()
    if cut.empty:
        return f"At least {ENDED:g}% of the answers ended in each of {len(shares)} arms."
    each = ", ".join(f"{arm} {share:.0f}%" for arm, share in cut.items())
    few = f"Fewer than {ENDED:g}% of the answers ended in {len(cut)} of {len(shares)} arms"
    return f"{few}: {each}."


def share(records: pd.DataFrame, measure: str = "accuracy") -> tuple[float, float, float] | None:
    """Estimate and interval, percent, of the records of one arm; None where the measure has no
    value, as a vote of two samples."""
    measurement = contrasts.compute({"measure": measure, "arm": records["arm"].iloc[0]}, records)
    return measurement and _numbers(measurement)


def _counts(records: pd.DataFrame) -> dict[str, int]:
    """How many problems and samples a row is computed from."""
    problems = records.drop_duplicates(contrasts.PROBLEM)
    return {"problems": len(problems), "samples": len(records)}


def difference(records: pd.DataFrame, arm: str, control: str, measures=MEASURES) -> pd.DataFrame:
    """Arm minus control in points, paired by problem, one row per model and measure."""
    rows = []
    for model, of_model in records.groupby("model", sort=True):
        for measure in measures:
            contrast = {"measure": measure, "arm": arm, "control": control}
            measurement = contrasts.compute(contrast, of_model)
            if measurement is not None:
                rows.append((model, measure, _numbers(measurement), measurement.n))
    return pd.DataFrame(rows, columns=["model", "measure", "difference", "problems"])


def against(records: pd.DataFrame, arm: str, controls: list[str], primary: str) -> pd.DataFrame:
    """Accuracy of `arm` minus that of each control, in points, paired by problem.

    The interval decides; `p` is of the test that it inverts, and `holm` adjusts it over all rows
    but that of `primary`, the one contrast declared beforehand, which stands first. Where the arms
    differ in how many of their answers ended by more than CUT points, `equal finish` is the
    difference over the answers that did.
    """
    rows = []
    for control in [primary, *(name for name in controls if name != primary)]:
        contrast = {"measure": "accuracy", "arm": arm, "control": control}
        measurement = contrasts.compute(contrast, records)
        if measurement is not None:
            row = {"arm": arm, "control": control, "difference": _numbers(measurement)}
            row |= {"p": contrasts.p_value(contrast, records), "problems": measurement.n}
            row |= {"equal finish": at_equal_finish(contrast, records)}
            rows.append(row | {"primary": control == primary})
    columns = ["arm", "control", "difference", "p", "problems", "equal finish", "primary"]
    table = pd.DataFrame(rows, columns=columns)
    others = ~table["primary"].astype(bool)
    table["holm"] = table["p"].astype(float)
    if others.any():
        table.loc[others, "holm"] = stats.holm(table.loc[others, "p"].astype(float))
    return table


def at_equal_finish(contrast: dict, records: pd.DataFrame) -> tuple[float, float, float] | None:
    """The difference of `contrast` over the answers that ended, where its arms differ in how many
    did by more than CUT points; else None."""
    shares = [
        100 * (records.loc[records["arm"] == contrast[side], "finish"] == "stop").mean()
        for side in ("arm", "control")
    ]
    if abs(shares[0] - shares[1]) <= CUT:
        return None
    measurement = contrasts.compute(contrast | {"measure": "accuracy_given_finished"}, records)
    return measurement and _numbers(measurement)


def quality(frames: dict[tuple[str, float], pd.DataFrame], baseline: str = "dms") -> pd.DataFrame:
    """KL and perplexity of each policy at each compression, and its KL over the baseline's.

    `frames` holds per (policy, nominal compression) what `kit.dms.fidelity.teacher_forced_kl`
    returns; rows are paired by sequence. A `kl_ratio` above 1 means worse than the baseline.
    """
    rows = []
    for (name, compression), frame in frames.items():
        kl = contrasts.mean_of(frame["kl"], "nats")
        row = {"policy": name, "compression_x": compression, "sequences": len(frame)}
        row |= {"live_tokens": frame["live_tokens"].mean()}
        row |= {"kept_fraction": frame["kept_fraction"].mean(), "kl": _numbers(kl)}
        perplexity = np.exp(frame["nats"].mean())  # which magnifies what a stored float leaves out
        row |= {"perplexity": float(f"{perplexity:.6g}"), "kl_ratio": None}
        row |= {"kv_bytes": frame["kv_bytes"].mean()}
        if name != baseline and (baseline, compression) in frames:
            excess = contrasts.excess_of(frame["kl"], frames[baseline, compression]["kl"])
            row["kl_ratio"] = excess and tuple(1 + more / 100 for more in _numbers(excess))
        rows.append(row)
    return pd.DataFrame(rows)


def _numbers(interval: stats.Interval | contrasts.Measurement) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high


def answers(records: pd.DataFrame) -> pd.DataFrame:
    """The places where the grader found the answers: share of samples per model and arm,
    percent."""
    counts = records.groupby(["model", "arm", "method"]).size().unstack(fill_value=0)
    return 100 * counts.div(counts.sum(axis=1), axis=0)


def trained(frames: Mapping[str, pd.DataFrame], families: Sequence[str]) -> pd.DataFrame:
    """Phase 2: accuracy of each arm on the families it was trained on, with its least and best
    training seed, and on those held out. `one answer`: the share of the commonest answer to a
    family, mean over families; an arm that has learnt the prior alone has 100."""
    rows = []
    for arm, frame in frames.items():
        trained_on = frame["family"].isin(families)
        inside, outside = frame[trained_on], frame[~trained_on]
        least, best = contrasts.spread(inside)
        row = {"arm": arm, "accuracy": share(inside), "least seed": least, "best seed": best}
        row |= {"families held out": share(outside) if len(outside) else None}
        row |= {name: share(inside, name) for name in ("compliance", "finished")}
        row |= {"one answer": contrasts.commonest(inside)["share"].mean()}
        rows.append(row | {"new_tokens": inside["new_tokens"].mean()})
    return pd.DataFrame(rows)


def compounded(ways: Mapping[str, pd.DataFrame], families: Sequence[str]) -> pd.DataFrame:
    """Accuracy by round, which stands for the training in `ways`, and by way of asking."""
    rows = []
    for way, frame in ways.items():
        trained_on = frame["family"].isin(families)
        for label, part in ((way, frame[trained_on]), ("families held out", frame[~trained_on])):
            for number, answers in part.groupby(contrasts.TRAINING):
                rows.append({"round": number, "way": label, "accuracy": share(answers)})
    return pd.DataFrame(rows)


def recall_by_frequency(
    frames: Mapping[str, pd.DataFrame], free: Mapping[str, pd.DataFrame], buckets: Sequence[str]
) -> pd.DataFrame:
    """Recall of the facts, by options and in free words: overall, by training seed, by frequency;
    level 1 is the first of `buckets`, None where there is no question."""
    rows = []
    for arm, frame in frames.items():
        least, best = contrasts.spread(frame)
        row = {"arm": arm, "accuracy": share(frame), "least seed": least, "best seed": best}
        for level, name in enumerate(buckets, 1):
            part = frame[frame["level"] == level]
            row[name] = None if part.empty else share(part)
        rows.append(row | {"free": share(free[arm]) if arm in free else None})
    return pd.DataFrame(rows)


def audits(claims: list[Claim]) -> pd.DataFrame:
    """What each published number supports by its own counts; NaN where none are published.

    `estimate`, `low` and `high` are in the unit that ends `published`, or in points where that
    is a difference of percentages; `n_needed` is for 80% power at the published effect.
    """
    rows = []
    for claim in claims:
        result = audit(claim)
        own = ("system", "statement", "source", "link", "grade")
        row = {key: getattr(claim, key) for key in own}
        row |= {"claim": claim.id, "published": as_published(claim), "reading": result.reading}
        if result.interval:
            row |= {key: getattr(result.interval, key) for key in ("estimate", "low", "high")}
        row |= {"p": result.p, "n_needed": result.n_needed}
        rows.append(row | {"rule": claim.rule, "notebook": claim.notebook})
    columns = ["claim", "system", "statement", "published", "estimate", "low", "high", "p"]
    columns += ["n_needed", "reading", "source", "link", "grade", "rule", "notebook"]
    numbers = dict.fromkeys(["estimate", "low", "high", "p"], float) | {"n_needed": "Int64"}
    return pd.DataFrame(rows, columns=columns).astype(numbers)


def verdicts(published: list[Claim], results: dict, records: dict, profile: str) -> pd.DataFrame:
    """`measured_table` of all claims, each judged on what its notebook left: by stage its
    results and its records."""
    parts = []
    for stage in dict.fromkeys(claim.notebook for claim in published):
        own_claims = [claim for claim in published if claim.notebook == stage]
        measured = results.get(stage, {}).get("measurements", {})
        measurements = {name: Measurement(**numbers) for name, numbers in measured.items()}
        rows = measured_table(own_claims, records.get(stage, pd.DataFrame()), profile, measurements)
        first = results.get(stage, {}).get("declared", {})
        late = [bool(first) and first.get(claim.id) != claim.declared for claim in own_claims]
        late &= (rows["measured"] != "").to_numpy()
        rows.loc[late, "reason"] = f"{declared.CHANGED}; " + rows.loc[late, "reason"]
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def models(records: pd.DataFrame) -> str:
    """The names of the models that answered, without trained ones, whose names are paths."""
    names = {name.split()[0] for name in records["model"] if ":" in name} if len(records) else {}
    return ", ".join(sorted(names))


def text(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with every cell and heading as the text that a reader sees."""
    cells = {name: [cell_text(name, cell) for cell in table[name]] for name in table}
    return pd.DataFrame(cells, index=table.index).rename(columns=LABELS)


def cell_text(name: str, cell) -> str:
    """One value of the column `name`: rounded, with its interval, "–" where there is none."""
    if isinstance(cell, tuple):
        digits = {"kl": ".3f", "kl_ratio": ".2f"}.get(name, ".1f")
        sign = "+" if name == "difference" else ""
        endless = name in ("kl", "kl_ratio") and cell[2] > MOST  # as of two sequences
        high = f"over {MOST}" if endless else f"{cell[2]:z{digits}}"
        return f"{cell[0]:{sign}z{digits}} [{cell[1]:z{digits}}, {high}]"
    if cell is None or pd.isna(cell):
        return "–"
    if name in ("kept_fraction", "membership"):
        return f"{cell:.2f}"
    if name == "dollars":
        return f"{cell:.4f}"
    if name in ("p", "holm"):
        return f"{cell:.2g}" if cell >= 0.001 else "< 0.001"
    if name.endswith("bytes"):
        return f"{cell / 2**20:.2f} MiB"
    if isinstance(cell, Integral):
        return f"{cell:,}"
    return f"{cell:z,.1f}" if isinstance(cell, float) else str(cell)


def comparison(arm: str, control: str, difference: tuple[float, float, float]) -> str:
    """The `difference` of two arms, in points, as a sentence: which is ahead, by its interval."""
    _, low, high = difference
    word = "beats" if low > 0 else "is behind" if high < 0 else "is not told apart from"
    return f"{arm} {word} {control}: {cell_text('difference', difference)} points"


def style(table: pd.DataFrame):
    """`text(table)` as a Styler: numbers right, words left as are their headings, no index, markup
    as plain text."""
    frame = text(table)
    words = [LABELS.get(name, name) for name in table if is_words(table[name])]
    left = [{"selector": "th.col_heading", "props": "text-align: left"}]
    return (
        frame.style.set_uuid(digest(frame.to_dict("list"), 8))  # random ids would never repeat
        .format(escape="html")
        .hide(axis="index")
        .set_properties(**{"text-align": "right"})
        .set_properties(subset=words, **{"text-align": "left"})
        .set_table_styles(dict.fromkeys(words, left))
    )


def is_words(column: pd.Series) -> bool:
    """Whether a column is set left: all texts."""
    return all(isinstance(cell, str) for cell in column)
