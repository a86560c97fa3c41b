"""A published run renewed in place, after a new grader or new rules, without decoding.

Every answer is graded again; the tables, figures, numbers and verdicts that follow from records are
made again from these. What does not follow stays as it is and is named: what was trained or
retrieved when the run was made, notebooks as they were executed, and what needs records that
nobody published. Results of a renewed stage say so under `renewed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kit.analysis import calibration, effects, pareto, plots, tables
from kit.analysis.plots import Picture
from kit.budget.plots import budget_frontier
from kit.dms import plots as dms_plots
from kit.evaluation.grader import GRADE_VERSION
from kit.parametric import plots as parametric_plots
from kit.pipeline.provenance import write_json
from kit.report import bundle, exhibits, recompute, regrading, verify
from kit.report.bundle import RECORDS, VERDICTS, Run
from kit.training import plots as training_plots

ADVICE = "What to run here"
# Entries of the results that are tables, by caption.
ENTRIES = {
    "04_phase2": {"arms": recompute.TRAINED, "rounds": recompute.COMPOUNDING,
                  "contrasts": recompute.TAUGHT},
    "05_parametric": {"arms": recompute.KNOWN, "recall": recompute.RECALL,
                      "contrasts": recompute.FETCHED, "recalled": recompute.RECALLED,
                      "bytes": recompute.BYTES},
    "06_memory_budget": {"gaps": recompute.GAPS, "best": recompute.PLACES},
}  # fmt: skip


@dataclass(frozen=True)
class Renewed:
    """What a renewal changed, and what it could not make again."""

    grades: pd.DataFrame  # by stage and arm: answers, graded otherwise, now right, now wrong
    tables: list[str]  # those that read otherwise now
    kept: list[str]  # tables, figures and measurements that stay as they were


def renew(folder: Path) -> Renewed:
    """Renew the run in `folder`, which is as outputs/published/<profile>: see the module."""
    old = bundle.read(folder)
    regrading.graded(old.every).to_parquet(folder / RECORDS, index=False)
    run = Run({**old.files, RECORDS: (folder / RECORDS).read_bytes()})
    changed, kept = [], []
    for stage, found in run.results.items():
        where = folder / "exhibits" / stage
        before = _read(where)
        shown = _tables(stage, [*before], found, run)
        found = found | _entries(stage, found, shown, run)
        given = run.stamps[stage].get("parameters", {})
        if "kl" in found:  # older kits did not say of which model
            found = {"model": given["MODEL"]} | found
        drawn = {name: figure(name, found, shown, run.records[stage], given) for name in before}
        drawn = {name: picture for name, picture in drawn.items() if picture}
        if ADVICE in before:
            shown[ADVICE] = advice(found, given)
        left = exhibits.renew(where, shown, drawn) if before else []
        after = _read(where)
        changed += [f"{stage}: {name}" for name in before if before[name] != after[name]]
        measurements, more = _measurements(stage, found, run)
        left += more
        kept += [f"{stage}: {name}" for name in left]
        if measurements or "measurements" in found:
            found["measurements"] = measurements
        found |= {"renewed": {"grade_version": GRADE_VERSION, "kept": left}}
        write_json(folder / "results" / f"{stage}.json", exhibits.plain(found, stage))
    judge(folder)
    return Renewed(_grades(old, run), changed, kept)


def judge(folder: Path) -> None:
    """Write the verdicts that the claims of this kit get from the records and measurements of the
    run in `folder` into its results, where these have any."""
    run = bundle.read(folder)
    judged = verify.rejudged(run)
    rows = judged.drop(columns="n")
    for stage, found in run.results.items():
        if "verdicts" in found:
            every = f"results/{stage}.json" == VERDICTS
            mine = {claim.id for claim in run.published if every or claim.notebook == stage}
            found["verdicts"] = rows[rows["claim"].isin(mine)].to_dict("records")
            if every:
                found["headline"] = verify.headline(run, judged)
                chance = calibration.by_chance(run.published, judged.to_dict("records"))
                found["by_chance"] = chance
            write_json(folder / "results" / f"{stage}.json", exhibits.plain(found, stage))


def _read(folder: Path) -> dict[str, list | None]:
    """The rows of each table in `folder` as a reader sees them, by caption; None for a figure."""
    return {each.caption: getattr(each, "rows", None) for each in exhibits.load(folder)}


def _tables(stage: str, captions: list[str], found: Mapping, run: Run) -> dict[str, pd.DataFrame]:
    made = {name: recompute.table(stage, name, found, run.records[stage]) for name in captions}
    return {name: frame for name, frame in made.items() if frame is not None}


def _entries(stage: str, found: Mapping, shown: Mapping[str, pd.DataFrame], run: Run) -> dict:
    """The entries of the results that follow from records, measurements and verdicts aside."""
    records = run.records[stage]
    made = {name: shown[caption].to_dict("records")
            for name, caption in ENTRIES.get(stage, {}).items() if caption in shown}  # fmt: skip
    if stage == "01_baseline":
        arms = tables.arms(records).itertuples()
        made["accuracy"] = {f"{row.model} {row.arm}": row.accuracy for row in arms}
    if stage == "02_strategies":
        compared = recompute.strategies(records)
        differences = recompute.against(stage, compared, {*compared["arm"]})
        made["contrasts"] = differences.to_dict("records")
    if stage == "06_memory_budget" and "frames" in found:
        rows = pd.DataFrame(found["scenarios"])
        outcomes = recompute.outcomes(found, "scenarios", records)
        shares = effects.accuracies(outcomes, np.random.default_rng(0))
        made["scenarios"] = rows.assign(accuracy=shares).to_dict("records")
        switch = effects.threshold(rows, outcomes, np.random.default_rng(0))
        made["threshold"] = switch.to_dict("records")
        caption = recompute.STEPS.format(len(rows), found["generations"])
        made |= {"marginal": shown[caption].to_dict("records")} if caption in shown else {}
    return {name: value for name, value in made.items() if name in found}


def _measurements(stage: str, found: Mapping, run: Run) -> tuple[dict, list[str]]:
    """Measurements of the claims that there are now, and those of them that no record holds."""
    mine = {claim.id for claim in run.published if claim.notebook == stage}
    said = {name: value for name, value in found.get("measurements", {}).items() if name in mine}
    every = found | {"measurements": dict.fromkeys(mine)}
    again = recompute.measured(stage, every, run.records[stage], run.published)
    exact = {name for name, value in said.items() if value["low"] == value["high"]}
    left = [f"measurement of {name}" for name in sorted({*said} - {*again} - exact)]
    return said | {name: vars(value) for name, value in again.items()}, left


def figure(
    caption: str, found: Mapping, shown: Mapping[str, pd.DataFrame], records: pd.DataFrame,
    given: Mapping,
) -> Picture | None:  # fmt: skip
    """The figure of a stage by its caption, as its notebook draws it: from results, tables by
    caption, records and parameters. None where it does not follow from these."""
    if caption == "Accuracy without memory, by family and level":
        first = records[records["model"] == given["MODELS"][0]]
        by_arm = {arm: tables.by_family(first, arm) for arm in ("plain", "format")}
        return plots.accuracy_by_family(by_arm)
    if caption == "Retrieved strategies minus each control":
        return plots.forest(pd.DataFrame(found["contrasts"]))
    if caption == "KL to full attention against what is kept":
        rows = shown[recompute.QUALITY]
        return dms_plots.quality(rows[rows["policy"] != "full"])
    if caption == "Compounding, with and without the bank":
        return training_plots.rounds(shown[recompute.COMPOUNDING])
    told = {"By how often a fact was told": recompute.KNOWN,
            "Recall by how often a fact was told": recompute.RECALL}  # fmt: skip
    if caption in told:
        arms = shown[told[caption]]
        best = arms["arm"].isin(["plain", "larger anchor", "fetched", *given["ARMS"], "rag"])
        return parametric_plots.accuracy_by_frequency(arms[best], found["buckets"])
    if caption == "Accuracy against bytes read":
        return parametric_plots.accuracy_by_bytes(shown[recompute.BYTES])
    by = {"Accuracy against bytes, weights shared": ("scenarios", "cache"),
          "Five memories on one axis of bytes": ("places", "place")}  # fmt: skip
    return _frontier(*by[caption], found, records, given["BATCH"]) if caption in by else None


def _frontier(
    name: str, by: str, found: Mapping, records: pd.DataFrame, batch: int
) -> Picture:  # fmt: skip
    """The `scenarios` or `places` of a sweep against bytes where `batch` questions share the
    weights, a colour per value of `by`."""
    rows, solved = pd.DataFrame(found[name]), recompute.outcomes(found, name, records)
    if name == "places":
        front, _ = effects.places(rows, solved, np.random.default_rng(0))
    else:
        rows = rows.rename(columns={"accuracy": "interval"})
        rows["cache"] = [f"{p}, {b} bit" for p, b in zip(rows["policy"], rows["kv_bits"])]
        front = pareto.table(rows, "shared_bytes", solved, np.random.default_rng(0))
    label = f"MiB, weights shared by {batch}"
    return budget_frontier(front, "shared_bytes", label, by, 2**20)


def advice(found: Mapping, given: Mapping) -> pd.DataFrame:
    """What the advisor says of the scenarios of a sweep, with the parameters of its notebook."""
    from kit.budget import advisor  # imports torch

    room, context = advisor.size(given["CARD"][0]), advisor.tokens(given["CARD"][1])
    known = [row for row in found["scenarios"] if row["model"] == given["MODELS"][0]]
    options = advisor.measured(advisor.sizes(given["MODELS"][0]), context, known)
    rows = advisor.table(advisor.narrow(options, advisor.choose(options, room)[0]), room)
    return pd.DataFrame(rows, columns=["configuration", "GiB", "fits", "accuracy"])


def _grades(before: Run, after: Run) -> pd.DataFrame:
    """How many answers of each stage and arm are graded otherwise; arms without any left out."""
    rows = []
    for stage, records in before.records.items():
        again = after.records[stage]
        if records.empty:
            continue
        marks = pd.DataFrame({
            "arm": records["arm"], "answers": 1,
            "graded otherwise": regrading.differing(records, again).astype(int),
            "now right": (again["correct"] & ~records["correct"]).astype(int),
            "now wrong": (~again["correct"] & records["correct"]).astype(int),
        })  # fmt: skip
        found = marks.groupby("arm").sum().reset_index()
        rows.append(found[found["graded otherwise"] > 0].assign(stage=stage))
    names = ["stage", "arm", "answers", "graded otherwise", "now right", "now wrong"]
    return pd.concat(rows, ignore_index=True)[names] if rows else pd.DataFrame(columns=names)
