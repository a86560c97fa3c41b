"""A published run renewed in place, after a new grader or new rules, without decoding.

Every answer is graded again; the tables, figures, numbers and verdicts that follow from records are
made again from these. What does not follow stays as it is and is named: what was trained or
retrieved when the run was made, notebooks as they were executed, and what needs records that
nobody published. Results of a renewed stage say so under `renewed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kit.analysis import calibration
from kit.evaluation.grader import GRADE_VERSION
from kit.pipeline.provenance import write_json
from kit.report import bundle, exhibits, recompute, redraw, regrading, verify
from kit.report.bundle import RECORDS, VERDICTS, Run

ADVICE = "What to run here"


@dataclass(frozen=True)
class Renewal:
    """The changes of a renewal, and what it could not make again."""

    grades: pd.DataFrame  # by stage and arm: answers, graded otherwise, now right, now wrong
    tables: list[str]  # those that read otherwise now
    unchanged: list[str]  # tables, figures and measurements that stay as they were


def renew(folder: Path) -> Renewal:
    """Renew the run in `folder`, which is as outputs/published/<profile>: see the module."""
    old = bundle.read(folder)
    regrading.graded(old.all_records).to_parquet(folder / RECORDS, index=False)
    run = Run({**old.files, RECORDS: (folder / RECORDS).read_bytes()})
    changed, unchanged = [], []
    for stage, results in run.results.items():
        exhibits_folder = folder / "exhibits" / stage
        before = _read(exhibits_folder)
        frames = _tables(stage, [*before], results, run)
        results = results | recompute.entries(stage, results, frames, run.records[stage])
        parameters = run.stamps[stage].get("parameters", {})
        if "kl" in results:  # older kits did not say of which model
            results = {"model": parameters["MODEL"]} | results
        pictures = {name: redraw.figure(name, results, frames, run.records[stage], parameters)
                    for name in before}  # fmt: skip
        pictures = {name: picture for name, picture in pictures.items() if picture}
        if ADVICE in before:
            frames[ADVICE] = advice(results, parameters)
        unchanged_here = exhibits.renew(exhibits_folder, frames, pictures) if before else []
        after = _read(exhibits_folder)
        changed += [f"{stage}: {name}" for name in before if before[name] != after[name]]
        measurements, unrecorded = _measurements(stage, results, run)
        unchanged_here += unrecorded
        unchanged += [f"{stage}: {name}" for name in unchanged_here]
        if measurements or "measurements" in results:
            results["measurements"] = measurements
        results |= {"renewed": {"grade_version": GRADE_VERSION, "kept": unchanged_here}}
        write_json(folder / "results" / f"{stage}.json", exhibits.plain(results, stage))
    judge(folder)
    return Renewal(_grades(old, run), changed, unchanged)


def judge(folder: Path) -> None:
    """Write the verdicts that the claims of this kit get from the records and measurements of the
    run in `folder` into its results, where these have any, and the report of them beside."""
    run = bundle.read(folder)
    verdicts = verify.rejudged(run)
    rows = verdicts.drop(columns="n")
    for stage, results in run.results.items():
        if "verdicts" in results:
            is_last = f"results/{stage}.json" == VERDICTS
            claim_ids = {claim.id for claim in run.claims if is_last or claim.notebook == stage}
            results["verdicts"] = rows[rows["claim"].isin(claim_ids)].to_dict("records")
            if is_last:
                results["headline"] = verify.headline(run, verdicts)
                chance = calibration.by_chance(run.claims, verdicts.to_dict("records"))
                results["by_chance"] = chance
            write_json(folder / "results" / f"{stage}.json", exhibits.plain(results, stage))
    verify.page(bundle.read(folder), verdicts, folder)


def _read(folder: Path) -> dict[str, list | None]:
    """The rows of each table in `folder` as a reader sees them, by caption; None for a figure."""
    return {exhibit.caption: getattr(exhibit, "rows", None) for exhibit in exhibits.load(folder)}


def _tables(stage: str, captions: list[str], results: Mapping, run: Run) -> dict[str, pd.DataFrame]:
    frames = {name: recompute.table(stage, name, results, run.records[stage]) for name in captions}
    return {name: frame for name, frame in frames.items() if frame is not None}


def _measurements(stage: str, results: Mapping, run: Run) -> tuple[dict, list[str]]:
    """Measurements of the claims that there are now, and those of them that no record holds."""
    claim_ids = {claim.id for claim in run.claims if claim.notebook == stage}
    stored = {
        name: value for name, value in results.get("measurements", {}).items() if name in claim_ids
    }
    results_with_all = results | {"measurements": dict.fromkeys(claim_ids)}
    again = recompute.measured(stage, results_with_all, run.records[stage], run.claims)
    exact = {name for name, value in stored.items() if value["low"] == value["high"]}
    unrecorded = [f"measurement of {name}" for name in sorted({*stored} - {*again} - exact)]
    return stored | {name: vars(value) for name, value in again.items()}, unrecorded


def advice(results: Mapping, parameters: Mapping) -> pd.DataFrame:
    """The advice on the scenarios of a sweep, with the parameters of its notebook."""
    from kit.budget import advisor  # imports torch

    memory, context = advisor.size(parameters["CARD"][0]), advisor.tokens(parameters["CARD"][1])
    rows_of_model = [row for row in results["scenarios"] if row["model"] == parameters["MODELS"][0]]
    options = advisor.measured(advisor.sizes(parameters["MODELS"][0]), context, rows_of_model)
    rows = advisor.table(advisor.narrow(options, advisor.choose(options, memory)[0]), memory)
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
        counts = marks.groupby("arm").sum().reset_index()
        rows.append(counts[counts["graded otherwise"] > 0].assign(stage=stage))
    names = ["stage", "arm", "answers", "graded otherwise", "now right", "now wrong"]
    return pd.concat(rows, ignore_index=True)[names] if rows else pd.DataFrame(columns=names)
