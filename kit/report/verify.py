"""Judges a run again, without its models: a bundle, zipped or unpacked, or a published run.

Every hash is checked; every answer is graded again from its text by `kit.report.regrading`; from
the records the tables, figures and measurements of `kit.report.remake` are made again with their
files, and every verdict; the LaTeX of the paper from these. Verdicts on what no record holds (a
ledger's bytes, a training curve) are made again from the measurements that the results hold. What
else the run holds is named whole: a hash alone vouches for it. Imports no torch and no store.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from kit import paths
from kit.analysis import calibration, claims, tables
from kit.analysis.verdicts import headline as headline_of
from kit.pipeline import declared
from kit.pipeline.errors import UserError
from kit.report import bundle, exhibits, html, latex, regrading, remake
from kit.report.bundle import FOLDERS, RECORDS, SUMS, VERDICTS, BundleError, Run

BY_HASH = "by its hash alone"
UNVOUCHED = f"without a {SUMS}, so that nothing says whether it was changed"


@dataclass(frozen=True)
class Judgement:
    """The result of judging a run again."""

    run: Run
    differences: list[str] = field(default_factory=list)  # a sentence each
    unchecked: list[str] = field(default_factory=list)  # was not made again, is taken as it is
    verdicts: pd.DataFrame | None = None  # made again; None where they cannot be
    whole: bool = False  # all that a report shows can be read


def published_runs() -> list[Path]:
    """Folders of the published runs; what else is published, such as figures of a GPU, is none."""
    folders = sorted(file.parent.parent for file in paths.PUBLISHED_RUNS.glob(f"[!.]*/{VERDICTS}"))
    if not folders:
        raise UserError(f"{paths.PUBLISHED_RUNS} holds no run; name a bundle or a folder")
    return folders


def check(place: Path, report: Callable[[str], object] = lambda line: None) -> Judgement:
    """Judge the run at `place` again; `report` takes a line for each part. BundleError where it is
    no run."""
    run = bundle.read(place)
    packed = SUMS in run.files
    if not packed and RECORDS not in run.files:
        raise BundleError(
            f"{place} has no {RECORDS}: pack the run with `make bundle` and verify the bundle."
        )
    differences = _hashes(run) if packed else []
    unchecked = []
    try:
        report(f"{len(run.all_records):,} records, {len(run.claims)} claims")
        differences += [
            f"{stage}: {what}" for stage in run.results for what in _missing_records(run, stage)
        ]
        unchecked += _other_claims(run) + _declared(run)
        report("grading the answers again")
        different, undecided = regrading.check(run.all_records)
        differences += [f"{RECORDS}: {line}" for line in different]
        unchecked += undecided
    except (ValueError, KeyError, TypeError) as error:
        return Judgement(run, [*differences, f"cannot be judged: {error}"], unchecked)
    readable, files = True, {SUMS, RECORDS, "claims.toml", *_of_the_kit(run)}
    for stage in run.results:
        try:
            remade = remake.stage(run, stage)
            report(f"{stage}: {remade.count} tables, figures and measurements made again")
            differences += remade.differences
            unchecked += remade.unchecked
            files |= remade.files
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            damaged = f"results/{stage}.json or exhibits/{stage}/{exhibits.LIST}"
            differences.append(f"{stage} cannot be made again, {damaged} is damaged ({error!r})")
            readable = False
    try:
        verdicts = rejudged(run)
        differences += _judged(run, verdicts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        differences.append(f"verdicts cannot be made again ({error!r})")
        return Judgement(run, differences, unchecked)
    if readable:
        paper = _paper(run)
        differences += [f"{name} is not what the tables say" for name, text in paper.items()
                  if run.files[name] != text]  # fmt: skip
        files |= {*paper}
    unmade = {*run.files} - files - {f"results/{stage}.json" for stage in run.results}
    reason = BY_HASH if packed else UNVOUCHED
    unchecked += [f"{reason}: {', '.join(sorted(unmade))}"] * bool(unmade)
    return Judgement(run, differences, unchecked, verdicts, readable)


def rejudged(run: Run) -> pd.DataFrame:
    """Every claim's verdict made again from the records and measurements of `run`."""
    profile = run.stamps["07_verdicts"]["profile"]
    return tables.verdicts(run.claims, run.results, run.records, profile)


def headline(run: Run, verdicts: pd.DataFrame) -> list[str]:
    """The four sentences of `verdicts.headline` on a run whose verdicts were made again."""
    audits = tables.audits(run.claims)
    return headline_of(verdicts.to_dict("records"), audits, tables.models(run.all_records))


def summary(judgement: Judgement) -> list[str]:
    """Whether the run holds, and what was taken as it is: lines."""
    all_well = "Nothing differs: every verdict, measurement and table follows from the records"
    lines = [f"Differs: {line}" for line in judgement.differences] or [all_well]
    return [*lines, *(f"Taken as it is: {line}" for line in judgement.unchecked)]


def write_report(judgement: Judgement) -> Path | None:
    """Lay the run out under outputs/verified/<profile> with a report of the verdicts made again,
    in place of one that was there; None where what it would show is damaged."""
    run, verdicts = judgement.run, judgement.verdicts
    if verdicts is None or not judgement.whole:
        return None
    stamp = run.stamps["07_verdicts"]
    if not re.fullmatch(r"\w[\w.-]*", str(stamp["profile"] or "")):
        raise BundleError(
            f"the run says that its profile is {stamp['profile']!r}, which is no name"
        )
    folder = paths.OUTPUTS / "verified" / stamp["profile"]
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in run.files.items():
        parts = PurePosixPath(name).parts
        if parts[0] in FOLDERS and ".." not in parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return page(run, verdicts, folder, (judgement.differences, judgement.unchecked))


def page(
    run: Run,
    verdicts: pd.DataFrame,
    folder: Path,
    again: tuple[list[str], list[str]] | None = None,
) -> Path:
    """Write the report of `run`, which lies in `folder`, with `verdicts` of `rejudged`, into it;
    `again` as `html.write` takes it. BundleError where a stage lacks what the page shows."""
    commits = {stage: f"{of['commit'][:10]}{' with uncommitted changes' * bool(of['dirty'])}"
               for stage, of in run.stamps.items() if of}  # fmt: skip
    different = {*commits.values()}
    every = "; ".join(f"{stage} {commit}" for stage, commit in commits.items())
    stamp = run.stamps["07_verdicts"]
    made_by = stamp | {"commit": every if len(different) > 1 else min(different), "dirty": False}
    try:
        return html.write(stamp["profile"], run.records, verdicts, tables.audits(run.claims),
                          run.results, folder=folder, made_by=made_by, again=again)  # fmt: skip
    except KeyError as error:
        raise BundleError(f"its notebooks or status files do not say {error}") from error


def _hashes(run: Run) -> list[str]:
    digests = {line[66:]: line[:64] for line in run.files[SUMS].decode().splitlines()}
    differences = [f"{name} is missing" for name in sorted(set(digests) - set(run.files))]
    added = sorted(set(run.files) - {*digests, SUMS})
    differences += [f"{name} is not in {SUMS}" for name in added]
    return differences + [
        f"{name} is not what {SUMS} says: it was changed"
        for name in sorted(set(digests) & set(run.files))
        if hashlib.sha256(run.files[name]).hexdigest() != digests[name]
    ]


def _missing_records(run: Run, stage: str) -> list[str]:
    """Whether records that a stage reports are gone."""
    keys = {*run.results[stage].get("keys", [])}
    missing = keys.difference(run.all_records["key"])
    return [f"{RECORDS} lacks {len(missing):,} of the {len(keys):,} records it reports"] * bool(
        missing
    )


def _paper(run: Run) -> dict[str, bytes]:
    """The LaTeX files of a run, made again from its results and tables."""
    lists = {stage: run.json(f"exhibits/{stage}/{exhibits.LIST}") for stage in run.results}
    exhibits_of = {stage: [*map(exhibits.listed, rows)] for stage, rows in lists.items()}
    texts = latex.files(run.stamps["07_verdicts"]["profile"], run.results, exhibits_of)
    texts = {f"paper/{name}": text.encode() for name, text in texts.items()}
    return {name: text for name, text in texts.items() if name in run.files}


def _of_the_kit(run: Run) -> list[str]:
    """Files of a bundle that are, byte by byte, those of this kit."""
    own_files = bundle.BESIDE | bundle.evictors()
    return [name for name, file in own_files.items()
            if file.is_file() and run.files.get(name) == file.read_bytes()]  # fmt: skip


def _other_claims(run: Run) -> list[str]:
    """In what the claims of a bundle are not those of this kit."""
    if "claims.toml" not in run.files:
        return []
    kit_claims = {claim.id: asdict(claim) for claim in claims.load()}
    run_claims = {claim.id: asdict(claim) for claim in run.claims}
    differ = [f"{name} not in both" for name in sorted({*kit_claims} ^ {*run_claims})]
    for name in sorted({*kit_claims} & {*run_claims}):
        fields = [key for key in kit_claims[name]
                  if key != "declared"
                  and kit_claims[name][key] != run_claims[name][key]]  # fmt: skip
        differ += [f"{name} ({', '.join(fields)})"] * bool(fields)
    return [f"judged by its own claims.toml, other than this kit's: {'; '.join(differ)}"] * bool(
        differ
    )


def _declared(run: Run) -> list[str]:
    """Stages that ran before declarations were kept, and those whose own contrasts changed."""
    stages = [stage for stage in run.results if stage in claims.NOTEBOOKS]
    unknown = [stage for stage in stages if not run.results[stage].get("declared")]
    lines = [f"when the claims of {', '.join(unknown)} were declared: not recorded"] * bool(unknown)
    for stage in stages:
        first, now = run.results[stage].get("declared", {}), declared.current(stage)
        changed = [name for name in (declared.PRIMARY, declared.SECONDARY)
                   if name in first and first[name] != now.get(name)]  # fmt: skip
        if first and declared.SECONDARY not in first and run.results[stage].get("handwritten"):
            changed.append(declared.SECONDARY)  # which the run shows, but had not declared
        lines += [f"{stage}: its {name} was {declared.CHANGED}" for name in changed]
    return lines


def _judged(run: Run, verdicts: pd.DataFrame) -> list[str]:
    """Verdicts, and sentences on all of them, that come out otherwise when they are made again."""
    stored, headline_now = run.json(VERDICTS), headline(run, verdicts)
    chance = calibration.by_chance(run.claims, verdicts.to_dict("records"))
    sentences = {"headline": headline_now, "by_chance": chance}
    return [
        f"{VERDICTS}: {name!r} is not what the verdicts say"
        for name, value in sentences.items()
        if name in stored and stored[name] != value
    ] + [
        f"{row['claim']}: {key} is {stored_row.get(key)!r} in the results, "
        f"{row[key]!r} from the records"
        for row in verdicts.to_dict("records")
        for stored_row in [run.verdicts.get(row["claim"], {})]
        for key in ("measured", "interval", "on", "verdict")
        if stored_row.get(key) != row[key]
    ]
