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
        found = found | recompute.entries(stage, found, shown, run.records[stage])
        given = run.stamps[stage].get("parameters", {})
        if "kl" in found:  # older kits did not say of which model
            found = {"model": given["MODEL"]} | found
        drawn = {name: redraw.figure(name, found, shown, run.records[stage], given)
                 for name in before}  # fmt: skip
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
            mine = {claim.id for claim in run.claims if every or claim.notebook == stage}
            found["verdicts"] = rows[rows["claim"].isin(mine)].to_dict("records")
            if every:
                found["headline"] = verify.headline(run, judged)
                chance = calibration.by_chance(run.claims, judged.to_dict("records"))
                found["by_chance"] = chance
            write_json(folder / "results" / f"{stage}.json", exhibits.plain(found, stage))


def _read(folder: Path) -> dict[str, list | None]:
    """The rows of each table in `folder` as a reader sees them, by caption; None for a figure."""
    return {each.caption: getattr(each, "rows", None) for each in exhibits.load(folder)}


def _tables(stage: str, captions: list[str], found: Mapping, run: Run) -> dict[str, pd.DataFrame]:
    made = {name: recompute.table(stage, name, found, run.records[stage]) for name in captions}
    return {name: frame for name, frame in made.items() if frame is not None}


def _measurements(stage: str, found: Mapping, run: Run) -> tuple[dict, list[str]]:
    """Measurements of the claims that there are now, and those of them that no record holds."""
    mine = {claim.id for claim in run.claims if claim.notebook == stage}
    said = {name: value for name, value in found.get("measurements", {}).items() if name in mine}
    every = found | {"measurements": dict.fromkeys(mine)}
    again = recompute.measured(stage, every, run.records[stage], run.claims)
    exact = {name for name, value in said.items() if value["low"] == value["high"]}
    left = [f"measurement of {name}" for name in sorted({*said} - {*again} - exact)]
    return said | {name: vars(value) for name, value in again.items()}, left


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
