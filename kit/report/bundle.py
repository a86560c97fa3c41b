"""One zip of a run to attach to a paper, checked without models.

A bundle holds executed notebooks (ipynb and HTML), records as Parquet, results, exhibits, the
report, claims, lock, licences, evictors, SHA256SUMS, and RO-Crate metadata of the Process Run Crate
profile. Its README says which stages failed or were not run. It names no folder, user or host of
the machine it was made on. A Run is read from a bundle, zipped or unpacked, or from a folder
outputs/<profile> alike; `kit.report.verify` checks it.
"""

import hashlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pandas as pd

from kit.analysis import claims
from kit.paths import DATA, ROOT, run_dir
from kit.pipeline import provenance, stages
from kit.report import notebook_page, withheld

SUMS, RECORDS, VERDICTS = "SHA256SUMS", "records.parquet", "results/07_verdicts.json"
CRATE = "ro-crate-metadata.json"
FOLDERS = ("results", "exhibits", "notebooks", "status", "paper")  # of a run
BESIDE = {  # name in the bundle: file of the project
    "claims.toml": DATA / "claims.toml", "LICENSES.md": DATA / "LICENSES.md",
    **{name: ROOT / name for name in ("requirements.lock", "LICENSE", "CITATION.cff")},
}  # fmt: skip
DATES = (1980, 1, 1, 0, 0, 0)  # of all members: equal runs make equal bundles
README = """# A run of the {profile} profile

{complete}

{table}

Made by the kit at commit {commit}. `report.html` is where to begin; `records.parquet` holds every
answer, `claims.toml` the published claims and the rules they are judged by.

Whether a file was changed: `sha256sum -c SHA256SUMS`. Whether verdicts, measurements and tables
follow from the records, without any model: `python -m kit verify FILE_OR_FOLDER`.
"""


class BundleError(ValueError):
    """No bundle can be read from a file."""


@dataclass(frozen=True)
class Run:
    """The files of a run: files by their name in a bundle."""

    files: Mapping[str, bytes]

    def json(self, name: str):
        """One of its files; {} where it is absent. ValueError names a file that is no JSON."""
        try:
            return json.loads(self.files.get(name, b"{}"))
        except ValueError as error:  # UnicodeDecodeError too
            raise ValueError(f"{name} is damaged, it is no JSON ({error})") from error

    @cached_property
    def results(self) -> dict[str, dict]:
        """By stage."""
        names = sorted(name for name in self.files if name.startswith("results/"))
        payloads = {name: self.json(name) for name in names}
        for name, value in payloads.items():
            if not isinstance(value, dict):
                raise ValueError(f"{name} is damaged, it holds a {type(value).__name__}")
        return {Path(name).stem: value for name, value in payloads.items()}

    @cached_property
    def verdicts(self) -> dict[str, dict]:
        """By claim, as notebook 07 saved them."""
        return {row["claim"]: row for row in self.json(VERDICTS).get("verdicts", [])}

    @cached_property
    def claims(self) -> list[claims.Claim]:
        """The claims that it was judged by: its own, or those of this kit where it has none."""
        if "claims.toml" not in self.files:
            return claims.load()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "claims.toml"
            file.write_bytes(self.files["claims.toml"])
            return claims.load(file)

    @cached_property
    def stamps(self) -> dict[str, dict]:
        """By stage, what its executed notebook says of its run."""
        names = [n for n in sorted(self.files) if re.fullmatch(r"notebooks/\d\d_\w+\.ipynb", n)]
        return {Path(n).stem: self.json(n).get("metadata", {}).get("kit", {}) for n in names}

    @cached_property
    def environment(self) -> dict[str, str]:
        """The code, lock, machine and versions by its executed notebooks; the newest says."""
        entries: dict[str, str] = {}
        for stage, stamp in self.stamps.items():
            keys = ("commit", "lock_sha256", "kit_sha256", "system")
            entries |= {key: str(stamp[key]) for key in keys if key in stamp}
            marks = stamp.get("fingerprints", {})
            dtype = marks.get("dtype") or marks.get("model", "").partition("torch.")[2]
            entries |= {"dtype": dtype} if dtype else {}
            hardware = stamp.get("hardware", {})
            entries |= {f"hardware: {key}": str(value) for key, value in hardware.items()}
            entries |= {f"version of {k}": v for k, v in stamp.get("versions", {}).items()}
            for key, value in stamp.get("parameters", {}).items():
                entries[f"{stage}: {key}"] = repr(value)
        return entries

    @cached_property
    def all_records(self) -> pd.DataFrame:
        """All records. ValueError where there are none to read."""
        if RECORDS not in self.files:
            raise ValueError(f"{RECORDS} is missing")
        try:
            return pd.read_parquet(io.BytesIO(self.files[RECORDS]))
        except (ValueError, OSError) as error:  # of pyarrow
            raise ValueError(f"{RECORDS} is damaged ({error})") from error

    @cached_property
    def records(self) -> dict[str, pd.DataFrame]:
        """By stage, those that its results name."""
        records = self.all_records
        return {stage: records[records["key"].isin(results.get("keys", []))].reset_index(drop=True)
                for stage, results in self.results.items()}  # fmt: skip


def evictors() -> dict[str, Path]:
    """Names in a bundle of the evictors that the kit ships: their files."""
    return {f"evictors/{file.name}": file for file in (DATA / "evictors").iterdir()}


def read(place: Path) -> Run:
    """A Run from a bundle, zipped or unpacked, or from outputs/<profile>; BundleError where `place`
    is none of these. One folder around all files, as archivers make it, is looked through."""
    place = Path(place)
    try:
        if place.is_dir():
            return Run(_of_folder(place))
        with zipfile.ZipFile(place) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            return Run(_bare({name: archive.read(name) for name in names}))
    except (OSError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{place} is no bundle ({error}); give one that `make bundle` wrote, or a folder of "
            f"outputs."
        ) from error


def _of_folder(place: Path) -> dict[str, bytes]:
    """The files of a run by their names in a bundle, and no others that lie beside them."""
    packed = [place / SUMS] if (place / SUMS).is_file() else sorted(place.glob(f"*/{SUMS}"))
    if len(packed) > 1:
        raise OSError(f"it holds {len(packed)} of them: {', '.join(map(str, packed))}")
    place = packed[0].parent if packed else place
    paths = [file for name in (*FOLDERS, "evictors") for file in (place / name).rglob("*")]
    paths += [place / name for name in (RECORDS, SUMS, CRATE, *BESIDE, "README.md", "report.html")]
    if not packed:  # of outputs/<profile> what a bundle takes over as it is
        paths = [file for file in paths if file.relative_to(place).parts[0] in (*FOLDERS, RECORDS)]
    paths = [f for f in sorted(paths) if f.is_file() and not f.name.startswith(".")]
    files = {f.relative_to(place).as_posix(): f for f in paths if ".running." not in f.name}
    if not packed and not any(name.startswith("results/") for name in files):
        raise OSError(f"it has neither {SUMS} nor results")
    return {name: file.read_bytes() for name, file in files.items()}


def _bare(files: dict[str, bytes]) -> dict[str, bytes]:
    """`files` of a zip without what Finder adds, named from where SHA256SUMS lies."""
    files = {name: data for name, data in files.items()
             if not name.startswith("__MACOSX/") and not name.endswith(".DS_Store")}  # fmt: skip
    tops = {name.removesuffix(SUMS) for name in files if re.fullmatch(rf"[^/]+/{SUMS}", name)}
    if SUMS in files or len(tops) != 1:
        return files
    (top,) = tops
    return {name.removeprefix(top): data for name, data in files.items()}


def write(profile: str) -> Path:
    """outputs/<profile>/bundle.zip, the same bytes for the same run.

    ValueError, with nothing written, where verdicts are missing, a file is damaged, or the store
    has lost records.
    """
    folder = run_dir(profile)
    scrub = provenance.scrubber(ROOT, folder.parent)
    for file in (folder / VERDICTS, folder / "report.html"):
        if not file.is_file():
            raise ValueError(
                f"{folder} has no verdicts yet; `make reproduce PROFILE={profile}` makes them"
            )
    from kit.report import crate  # half a second that reading a bundle need not take

    all_stages = stages.load_stages(profile, outputs=folder.parent)
    run = read(folder)
    try:
        files = {name: _clean(name, run, scrub) for name in run.files}
        records = _stored(folder, profile, run)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    notebooks = [name for name in files if name.endswith(".ipynb")]
    questions = {*records.loc[withheld.rows(records), "question"]}
    for name in notebooks if questions else ():
        tree = withheld.without_quotes(json.loads(files[name]), questions)
        files[name] = _json(tree)
    records = withheld.without_texts(records)
    for name in notebooks:
        html = notebook_page.page(files[name], PurePosixPath(name).stem)
        files[name.replace(".ipynb", ".html")] = scrub(html).encode()
    buffer = io.BytesIO()
    records = records.assign(model=records["model"].map(scrub), policy=records["policy"].map(scrub))
    records.to_parquet(buffer, index=False)
    files[RECORDS] = buffer.getvalue()
    page = (folder / "report.html").read_text(encoding="utf-8")  # its notebooks are pages here
    page = re.sub(r'(href="notebooks/\w+)\.ipynb"', r'\1.html#Verdict"', page)
    files["report.html"] = page.encode()
    files |= {name: file.read_bytes() for name, file in BESIDE.items()}
    files |= {name: file.read_bytes() for name, file in evictors().items()}
    trained = [f for f in folder.glob("evictors/**/*.safetensors") if f.stem != "state"]
    files |= {file.relative_to(folder).as_posix(): file.read_bytes() for file in trained}
    commit = run.environment.get("commit", "unknown")
    files["README.md"] = _readme(profile, all_stages, run, commit).encode()
    files[CRATE] = crate.metadata(profile, files, all_stages, commit).encode()
    files[SUMS] = sums(files)
    archive_file = folder / "bundle.zip"
    temporary = archive_file.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, DATES), data, zipfile.ZIP_DEFLATED)
    return temporary.replace(archive_file)


def sums(files: Mapping[str, bytes]) -> bytes:
    """The checksums of `files`, as `sha256sum -c` reads them."""
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return "".join(lines).encode()


def _json(tree) -> bytes:
    return json.dumps(tree, indent=1, ensure_ascii=False).encode()


def _clean(name: str, run: Run, scrub) -> bytes:
    """A file without names of this machine; notebooks keep their pictures as they are."""
    if name.endswith(".ipynb"):
        tree = provenance.scrub_tree(run.json(name), scrub)
        return _json(tree)
    if name.endswith(".json"):
        run.json(name)
    data = run.files[name]
    binary = name.endswith((".pdf", ".png", ".svg"))
    return data if binary else scrub(data.decode()).encode()


def _stored(folder: Path, profile: str, run: Run) -> pd.DataFrame:
    """The records that the results of a run name; ValueError where the store has lost any."""
    from kit.evaluation.store import Store  # where a bundle is only checked LanceDB may be absent

    again = f"put it back, or `make reproduce PROFILE={profile} FORCE=1` makes its records again"
    keys = {stage: {*results.get("keys", [])} for stage, results in run.results.items()}
    if any(keys.values()) and not (folder / "store").is_dir():
        raise ValueError(f"the store is missing; {again}")
    try:
        records = Store(folder / "store").table(set().union(*keys.values()))
    except (OSError, RuntimeError, ValueError) as error:  # of LanceDB
        first = str(error).partition("\n")[0]
        raise ValueError(f"the store is damaged ({first}); {again}") from error
    for stage, names in keys.items():
        if missing := names.difference(records["key"]):
            raise ValueError(f"the store lacks {len(missing):,} of the {len(names):,} records that "
                             f"{stage} reports; {again}")  # fmt: skip
    return records


def _readme(profile: str, all_stages: Sequence[stages.Stage], run: Run, commit: str) -> str:
    """The contents of the bundle, after what it lacks."""
    rows = ["| stage | state | finished (UTC) |", "|---|---|---|"]
    for stage in all_stages:
        state = f"{stage.state}: {stage.failure}" if stage.failure else stage.state
        finish_time = run.json(f"status/{stage.name}.json").get("finished", "–")
        rows.append(f"| {stage.name} | {state} | {finish_time} |".replace("\n", " "))
    unfinished = stages.incomplete(all_stages)
    complete = f"**INCOMPLETE**: {unfinished}." if unfinished else "Every stage ran to its end."
    return README.format(profile=profile, complete=complete, table="\n".join(rows), commit=commit)
