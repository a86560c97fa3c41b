"""One zip of a run to attach to a paper, checked without models.

A bundle holds executed notebooks (ipynb and HTML), records as Parquet, results, exhibits, the
report, claims, lock, licences, evictors, SHA256SUMS, and RO-Crate metadata of the Process Run Crate
profile. It names no folder, user or host of the machine it was made on. A Run is read from a bundle
or from a folder outputs/<profile> alike.
"""

import hashlib
import io
import json
import mimetypes
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import pandas as pd

from kit import claims, exhibits, provenance, recompute, tables
from kit.contrasts import Measurement
from kit.paths import DATA, ROOT, run_dir

SUMS, RECORDS, VERDICTS = "SHA256SUMS", "records.parquet", "results/07_verdicts.json"
CRATE = "ro-crate-metadata.json"
BESIDE = {  # name in the bundle: file of the project
    "claims.toml": DATA / "claims.toml", "LICENSES.md": DATA / "LICENSES.md",
    **{name: ROOT / name for name in ("requirements.lock", "LICENSE", "CITATION.cff")},
}  # fmt: skip
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
MEDIA = {".ipynb": "application/x-ipynb+json", ".toml": "application/toml",
         ".parquet": "application/vnd.apache.parquet", ".md": "text/markdown",
         ".cff": "application/yaml", ".safetensors": "application/octet-stream"}  # fmt: skip
DATES = (1980, 1, 1, 0, 0, 0)  # of all members: equal runs make equal bundles


class Damaged(ValueError):
    """No bundle can be read from a file."""


@dataclass(frozen=True)
class Run:
    """What a run left: files by their name in a bundle."""

    files: Mapping[str, bytes]

    def json(self, name: str) -> dict:
        """One of its files; {} where it is absent."""
        return json.loads(self.files[name]) if name in self.files else {}

    @cached_property
    def results(self) -> dict[str, dict]:
        """By stage."""
        found = sorted(name for name in self.files if name.startswith("results/"))
        return {Path(name).stem: self.json(name) for name in found}

    @cached_property
    def verdicts(self) -> dict[str, dict]:
        """By claim, as notebook 07 saved them."""
        return {row["claim"]: row for row in self.json(VERDICTS).get("verdicts", [])}

    @cached_property
    def published(self) -> list[claims.Claim]:
        """The claims that it was judged by."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "claims.toml"
            file.write_bytes(self.files["claims.toml"])
            return claims.load(file)

    @cached_property
    def environment(self) -> dict[str, str]:
        """What its executed notebooks say of code, lock, machine and versions; the newest says."""
        found: dict[str, str] = {}
        for name in sorted(n for n in self.files if re.fullmatch(r"notebooks/\d\d_\w+\.ipynb", n)):
            stamp = self.json(name)["metadata"].get("kit", {})
            keys = ("commit", "lock_sha256", "kit_sha256", "system")
            found |= {key: str(stamp[key]) for key in keys if key in stamp}
            marks = stamp.get("fingerprints", {})
            dtype = marks.get("dtype") or marks.get("model", "").partition("torch.")[2]
            found |= {"dtype": dtype} if dtype else {}
            hardware = stamp.get("hardware", {})
            found |= {f"hardware: {key}": str(value) for key, value in hardware.items()}
            found |= {f"version of {k}": v for k, v in stamp.get("versions", {}).items()}
            for key, value in stamp.get("parameters", {}).items():
                found[f"{Path(name).stem}: {key}"] = repr(value)
        return found

    @cached_property
    def every(self) -> pd.DataFrame:
        """All records."""
        if RECORDS not in self.files:
            raise ValueError(f"{RECORDS} is missing")
        return pd.read_parquet(io.BytesIO(self.files[RECORDS]))

    @cached_property
    def records(self) -> dict[str, pd.DataFrame]:
        """By stage, those that its results name."""
        every = self.every
        return {stage: every[every["key"].isin(found.get("keys", []))].reset_index(drop=True)
                for stage, found in self.results.items()}  # fmt: skip


def read(place: Path) -> Run:
    """A Run from a bundle, or from outputs/<profile>; Damaged where `place` is neither."""
    place = Path(place)
    if place.is_dir():
        wanted = ("results", "exhibits", "notebooks", "status", "paper")
        files = [file for name in wanted for file in sorted((place / name).rglob("*"))]
        files.append(place / RECORDS)  # of a published run
        files = [file for file in files if file.is_file() and file.name.count(".") == 1]
        return Run({f.relative_to(place).as_posix(): f.read_bytes() for f in files})
    try:
        with zipfile.ZipFile(place) as archive:
            return Run({name: archive.read(name) for name in archive.namelist()})
    except (OSError, zipfile.BadZipFile) as error:
        raise Damaged(
            f"{place} is no bundle ({error}); give one that `make bundle` wrote, or a folder of "
            f"outputs."
        ) from error


def write(profile: str) -> Path:
    """Write outputs/<profile>/bundle.zip, whole or not at all; ValueError where nothing has run."""
    folder = run_dir(profile)
    scrub = provenance.scrubber(ROOT, folder.parent)
    if not (folder / VERDICTS).is_file():
        raise ValueError(
            f"{profile} has no verdicts yet; `make reproduce PROFILE={profile}` makes them"
        )
    run = read(folder)
    files = {name: _clean(name, data, scrub) for name, data in run.files.items()}
    for name in [name for name in files if name.endswith(".ipynb")]:
        files[name.replace(".ipynb", ".html")] = scrub(_page(files[name])).encode()
    keys = {key for found in run.results.values() for key in found.get("keys", [])}
    from kit.store import Store  # where a bundle is only checked LanceDB may be absent

    buffer = io.BytesIO()
    records = Store(folder / "store").table(keys)
    records = records.assign(model=records["model"].map(scrub), policy=records["policy"].map(scrub))
    records.to_parquet(buffer, index=False)
    files[RECORDS] = buffer.getvalue()
    page = (folder / "report.html").read_text(encoding="utf-8")  # its notebooks are pages here
    page = re.sub(r'(href="notebooks/\w+)\.ipynb"', r'\1.html#Verdict"', page)
    files["report.html"] = page.encode()
    files |= {name: file.read_bytes() for name, file in BESIDE.items()}
    evictors = [*(DATA / "evictors").iterdir(), *folder.glob("evictors/**/*.safetensors")]
    files |= {f"evictors/{file.name}": file.read_bytes() for file in evictors}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[CRATE] = _crate(profile, files, sums, run)
    sums[CRATE] = hashlib.sha256(files[CRATE]).hexdigest()
    files[SUMS] = "".join(f"{of}  {name}\n" for name, of in sorted(sums.items())).encode()
    made = folder / "bundle.zip"
    temporary = made.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, DATES), data, zipfile.ZIP_DEFLATED)
    return temporary.replace(made)


def _clean(name: str, data: bytes, scrub) -> bytes:
    """`data` without names of this machine; notebooks keep their pictures as they are."""
    if name.endswith(".ipynb"):
        tree = provenance.scrub_tree(json.loads(data), scrub)
        return json.dumps(tree, indent=1, ensure_ascii=False).encode()
    binary = name.endswith((".pdf", ".png", ".svg"))
    return data if binary else scrub(data.decode()).encode()


def _page(notebook: bytes) -> str:
    from nbconvert import HTMLExporter  # takes a second

    return HTMLExporter(embed_images=True).from_notebook_node(
        nbformat.reads(notebook.decode(), as_version=4)
    )[0]


def of_stage(name: str, stage: str) -> bool:
    """Whether the file `name` of a run is what `stage` left."""
    return Path(name).stem == stage or name.startswith(f"exhibits/{stage}/")


def _crate(profile: str, files: Mapping[str, bytes], sums: Mapping[str, str], run: Run) -> bytes:
    """RO-Crate metadata: one CreateAction per stage, see PROFILE."""
    from rocrate.model.contextentity import ContextEntity
    from rocrate.rocrate import ROCrate

    crate, where = ROCrate(version="1.1"), "https://www.apache.org/licenses/LICENSE-2.0"
    crate.name = f"Memory instead of parameters: run of the {profile} profile"
    crate.description = "Executed notebooks, records, tables, figures, verdicts and their sources."
    about = {"@type": "CreativeWork", "name": "Apache License 2.0", "identifier": "Apache-2.0"}
    crate.license = licence = crate.add(ContextEntity(crate, where, about))
    done = [run.json(name).get("finished") for name in run.files if name.startswith("status/")]
    crate.datePublished = max(filter(None, done), default="1980-01-01")
    about = {"@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    crate.root_dataset["conformsTo"] = crate.add(ContextEntity(crate, PROFILE, about))
    commit = run.environment.get("commit", "unknown")
    about = {"@type": "SoftwareApplication", "name": "the kit", "version": commit}
    kit = crate.add(ContextEntity(crate, "#kit", about))
    kit["license"] = licence
    types = mimetypes.MimeTypes(())  # whatever this machine knows
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).write_bytes(data)
        known = {name: crate.add_file(Path(scratch) / name, name, properties={
            "contentSize": str(len(data)), "sha256": sums[name],
            "encodingFormat": MEDIA.get(Path(name).suffix)
            or types.guess_type(name)[0] or "text/plain",
        }) for name, data in files.items()}  # fmt: skip
        inputs = [known[name] for name in ("claims.toml", "requirements.lock")]
        for stage in run.results:
            made = [file for name, file in known.items() if of_stage(name, stage)]
            status = run.json(f"status/{stage}.json")
            about = {"name": f"{stage}, {profile}",
                     "description": f"make reproduce PROFILE={profile} ONLY={stage[:2]}",
                     "startTime": status.get("started"), "endTime": status.get("finished"),
                     "actionStatus": "http://schema.org/CompletedActionStatus"}  # fmt: skip
            about = {key: value for key, value in about.items() if value}
            action = crate.add_action(kit, f"#run-{stage}", inputs, made, about)
            crate.root_dataset.append_to("mentions", action)
        return json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False).encode()


def verify(place: Path) -> tuple[list[str], list[str]]:
    """What differs in a bundle, and what could not be recomputed; models are not needed.

    Every hash is checked; from the records the tables and measurements of `kit.recompute` are made
    again, and every verdict. Verdicts on what no record holds (a ledger's bytes, a training curve)
    are made again from the measurements that the results hold.
    """
    run = read(place)
    if SUMS not in run.files:
        raise Damaged(f"{place} has no {SUMS}; it is no bundle that `make bundle` wrote.")
    listed = {line[66:]: line[:64] for line in run.files[SUMS].decode().splitlines()}
    wrong = [f"{name} is missing" for name in sorted(set(listed) - set(run.files))]
    wrong += [f"{name} is not in {SUMS}" for name in sorted(set(run.files) - {*listed, SUMS})]
    wrong += [
        f"{name} is not what {SUMS} says: it was changed"
        for name in sorted(set(listed) & set(run.files))
        if hashlib.sha256(run.files[name]).hexdigest() != listed[name]
    ]
    try:
        left = _tables(run, wrong)
        return [*wrong, *_measured(run), *_judged(run)], left
    except (ValueError, KeyError, OSError) as error:
        return [*wrong, f"records, results or claims cannot be read: {error}"], []


def rejudged(run: Run) -> pd.DataFrame:
    """Every claim's verdict made again from the records and measurements of `run`."""
    return tables.verdicts(run.published, run.results, run.records, _profile(run))


def _measured(run: Run) -> list[str]:
    """Measurements that come out otherwise when they are made again."""
    wrong = []
    for stage, found in run.results.items():
        again = recompute.measured(stage, found, run.records[stage], run.published)
        for claim, made in again.items():
            said = Measurement(**found["measurements"][claim]).texts()
            if made.texts() != said:
                wrong.append(f"{claim} measured {' ['.join(said)}] in the results, "
                             f"{' ['.join(made.texts())}] from the records")  # fmt: skip
    return wrong


def _judged(run: Run) -> list[str]:
    """Verdicts that come out otherwise when they are made again."""
    return [
        f"{row['claim']}: {key} is {before.get(key)!r} in the results, "
        f"{row[key]!r} from the records"
        for row in rejudged(run).to_dict("records")
        for before in [run.verdicts.get(row["claim"], {})]
        for key in ("measured", "interval", "verdict")
        if before.get(key) != row[key]
    ]


def _profile(run: Run) -> str:
    stamp = run.json("notebooks/07_verdicts.ipynb")["metadata"]["kit"]
    return stamp["profile"]


def _tables(run: Run, wrong: list[str]) -> list[str]:
    """Names what cannot be made again; adds to `wrong` what comes out otherwise."""
    left, records = [], run.records
    for stage in run.results:
        for row in run.json(f"exhibits/{stage}/{exhibits.LIST}") or []:
            if "file" in row:  # a figure
                continue
            found = run.results[stage], records[stage]
            made = recompute.table(stage, row["caption"], *found)
            if made is None:
                left.append(f"{stage}: {row['caption']}")
            elif exhibits.as_table(row["caption"], made).rows != row["rows"]:
                wrong.append(f"{stage}, table {row['caption']!r} is not what the records say")
    return left
