"""Judges a run again, without its models: a bundle, zipped or unpacked, or a published run.

Every hash is checked; every answer is graded again from its text by `kit.report.regrading`; from
the records the tables and measurements of `kit.report.recompute` are made again, and every verdict.
Verdicts on what no record holds (a ledger's bytes, a training curve) are made again from the
measurements that the results hold. Imports no torch and no store.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from kit import paths
from kit.analysis import claims, tables
from kit.analysis.contrasts import Measurement
from kit.analysis.verdicts import headline as headline_of
from kit.pipeline import declared
from kit.pipeline.refusals import Refused
from kit.report import bundle, exhibits, html, recompute, regrading
from kit.report.bundle import FOLDERS, RECORDS, SUMS, VERDICTS, Damaged, Run

UNVOUCHED = f"every file: there is no {SUMS}, so nothing says whether one was changed"
AS_STORED = "notebooks, figures, CSV and LaTeX: not made again"


@dataclass(frozen=True)
class Checked:
    """What came of judging a run again."""

    run: Run
    wrong: list[str] = field(default_factory=list)  # what differs, a sentence each
    left: list[str] = field(default_factory=list)  # what was not made again, and is taken as it is
    verdicts: pd.DataFrame | None = None  # made again; None where they cannot be
    whole: bool = False  # all that a report shows can be read


def published() -> list[Path]:
    """Folders of the published runs; what else is published, such as figures of a GPU, is none."""
    found = sorted(file.parent.parent for file in paths.PUBLISHED.glob(f"[!.]*/{VERDICTS}"))
    if not found:
        raise Refused(f"{paths.PUBLISHED} holds no run; name a bundle or a folder")
    return found


def check(place: Path, tell: Callable[[str], object] = lambda line: None) -> Checked:
    """Judge the run at `place` again; `tell` hears a line for each part. Damaged where there is no
    run to judge."""
    run = bundle.read(place)
    packed = SUMS in run.files
    if not packed and RECORDS not in run.files:
        raise Damaged(
            f"{place} has no {RECORDS}: pack the run with `make bundle` and verify the bundle."
        )
    wrong = _hashes(run) if packed else []
    left = [AS_STORED] if packed else [UNVOUCHED, AS_STORED]
    try:
        tell(f"{len(run.every):,} records, {len(run.published)} claims")
        wrong += [f"{stage}: {what}" for stage in run.results for what in _lost(run, stage)]
        left += _other_claims(run) + _declared(run)
        tell("grading the answers again")
        otherwise, untold = regrading.check(run.every)
        wrong += [f"{RECORDS}: {line}" for line in otherwise]
        left += untold
    except (ValueError, KeyError, TypeError) as error:
        return Checked(run, [*wrong, f"cannot be judged: {error}"], left)
    whole = True
    for stage in run.results:
        try:
            made = _tables(run, stage, wrong, left) + _measured(run, stage, wrong, left)
            tell(f"{stage}: {made} tables and measurements made again")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            files = f"results/{stage}.json or exhibits/{stage}/{exhibits.LIST}"
            wrong.append(f"{stage} cannot be made again, {files} is damaged ({error!r})")
            whole = False
    try:
        verdicts = rejudged(run)
        return Checked(run, wrong + _judged(run, verdicts), left, verdicts, whole)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Checked(run, [*wrong, f"verdicts cannot be made again ({error!r})"], left)


def rejudged(run: Run) -> pd.DataFrame:
    """Every claim's verdict made again from the records and measurements of `run`."""
    profile = run.stamps["07_verdicts"]["profile"]
    return tables.verdicts(run.published, run.results, run.records, profile)


def headline(run: Run, verdicts: pd.DataFrame) -> list[str]:
    """The four sentences of `verdicts.headline` on a run whose verdicts were made again."""
    audits = tables.audits(run.published)
    return headline_of(verdicts.to_dict("records"), audits, tables.models(run.every))


def summary(checked: Checked) -> list[str]:
    """Whether the run holds, and what was taken as it is: lines."""
    held = "Nothing differs: every verdict, measurement and table follows from the records"
    lines = [f"Differs: {line}" for line in checked.wrong] or [held]
    return [*lines, *(f"Taken as it is: {line}" for line in checked.left)]


def write_report(checked: Checked) -> Path | None:
    """Lay the run out under outputs/verified/<profile> with a report of the verdicts made again,
    in place of one that was there; None where what it would show is damaged."""
    run, verdicts = checked.run, checked.verdicts
    if verdicts is None or not checked.whole:
        return None
    stamp = run.stamps["07_verdicts"]
    if not re.fullmatch(r"\w[\w.-]*", str(stamp["profile"] or "")):
        raise Damaged(f"the run says that its profile is {stamp['profile']!r}, which is no name")
    folder = paths.OUTPUTS / "verified" / stamp["profile"]
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in run.files.items():
        parts = PurePosixPath(name).parts
        if parts[0] in FOLDERS and ".." not in parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    commits = {stage: f"{of['commit'][:10]}{' with uncommitted changes' * bool(of['dirty'])}"
               for stage, of in run.stamps.items() if of}  # fmt: skip
    every_commit = "; ".join(f"{stage} {commit}" for stage, commit in commits.items())
    made_by = stamp | {"commit": every_commit, "dirty": False}
    records = run.records.get("01_baseline", run.every.iloc[:0])
    audits, again = tables.audits(run.published), (checked.wrong, checked.left)
    try:
        return html.write(stamp["profile"], records, verdicts, audits, run.results,
                            folder=folder, made_by=made_by, again=again)  # fmt: skip
    except KeyError as error:
        raise Damaged(f"its notebooks or status files do not say {error}") from error


def _hashes(run: Run) -> list[str]:
    listed = {line[66:]: line[:64] for line in run.files[SUMS].decode().splitlines()}
    wrong = [f"{name} is missing" for name in sorted(set(listed) - set(run.files))]
    wrong += [f"{name} is not in {SUMS}" for name in sorted(set(run.files) - {*listed, SUMS})]
    return wrong + [
        f"{name} is not what {SUMS} says: it was changed"
        for name in sorted(set(listed) & set(run.files))
        if hashlib.sha256(run.files[name]).hexdigest() != listed[name]
    ]


def _lost(run: Run, stage: str) -> list[str]:
    """Whether records that a stage reports are gone."""
    keys = {*run.results[stage].get("keys", [])}
    lost = keys.difference(run.every["key"])
    return [f"{RECORDS} lacks {len(lost):,} of the {len(keys):,} records it reports"] * bool(lost)


def _other_claims(run: Run) -> list[str]:
    """In what the claims of a bundle are not those of this kit."""
    if "claims.toml" not in run.files:
        return []
    here = {claim.id: asdict(claim) for claim in claims.load()}
    there = {claim.id: asdict(claim) for claim in run.published}
    differ = [f"{name} not in both" for name in sorted({*here} ^ {*there})]
    for name in sorted({*here} & {*there}):
        fields = [key for key in here[name]
                  if key != "declared" and here[name][key] != there[name][key]]  # fmt: skip
        differ += [f"{name} ({', '.join(fields)})"] * bool(fields)
    return [f"judged by its own claims.toml, other than this kit's: {'; '.join(differ)}"] * bool(
        differ
    )


def _declared(run: Run) -> list[str]:
    """Stages that ran before declarations were kept, and those whose primary contrast changed."""
    stages = [stage for stage in run.results if stage in claims.NOTEBOOKS]
    unknown = [stage for stage in stages if not run.results[stage].get("declared")]
    lines = [f"when the claims of {', '.join(unknown)} were declared: not recorded"] * bool(unknown)
    for stage in stages:
        first = run.results[stage].get("declared", {}).get(declared.PRIMARY)
        if first and first != declared.now(stage).get(declared.PRIMARY):
            lines.append(f"{stage}: its primary contrast was {declared.CHANGED}")
    return lines


def _tables(run: Run, stage: str, wrong: list[str], left: list[str]) -> int:
    """How many tables of a stage were made again; adds what differs, and what cannot be made."""
    count = 0
    for row in run.json(f"exhibits/{stage}/{exhibits.LIST}") or []:
        if "file" in row:  # a figure
            if (name := f"exhibits/{stage}/{row['file']}") not in run.files:
                raise ValueError(f"{name} is missing")
            continue
        made = recompute.table(stage, row["caption"], run.results[stage], run.records[stage])
        count += made is not None
        if made is None:
            left.append(f"{stage}, table {row['caption']!r}: does not follow from records")
        elif exhibits.as_table(row["caption"], made).rows != row["rows"]:
            wrong.append(f"{stage}, table {row['caption']!r} is not what the records say")
    return count


def _measured(run: Run, stage: str, wrong: list[str], left: list[str]) -> int:
    """How many measurements of a stage were made again; adds those that come out otherwise, and
    those that no record holds, such as arithmetic."""
    found = run.results[stage]
    again = recompute.measured(stage, found, run.records[stage], run.published)
    for claim, made in again.items():
        said = Measurement(**found["measurements"][claim]).texts()
        if made.texts() != said:
            wrong.append(f"{claim} measured {' ['.join(said)}] in the results, "
                         f"{' ['.join(made.texts())}] from the records")  # fmt: skip
    if others := sorted({*found.get("measurements", {})} - {*again}):
        left.append(f"{stage}, measurements that no record holds: {', '.join(others)}")
    return len(again)


def _judged(run: Run, verdicts: pd.DataFrame) -> list[str]:
    """Verdicts that come out otherwise when they are made again."""
    return [
        f"{row['claim']}: {key} is {before.get(key)!r} in the results, "
        f"{row[key]!r} from the records"
        for row in verdicts.to_dict("records")
        for before in [run.verdicts.get(row["claim"], {})]
        for key in ("measured", "interval", "on", "verdict")
        if before.get(key) != row[key]
    ]
