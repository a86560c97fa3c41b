"""A small run as the pipeline leaves it, for the tests of bundles and of what judges them again."""

import shutil
import zipfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import numpy as np
import pandas as pd
import pytest

from kit import notebook, paths
from kit.analysis import claims, plots, tables
from kit.analysis.verdicts import measured_table
from kit.data import problems
from kit.data.prompts import FORM
from kit.evaluation import grader
from kit.evaluation.store import Store
from kit.pipeline import provenance
from kit.report import bundle, exhibits, html, latex
from kit.schema import Record

FIGURE = "Accuracy without memory, by family and level"
CAPTION, SUITE = exhibits.BASELINE, problems.load("laptop", "test").problems
TIMES = {"started": "2026-11-22T00:00:00+00:00", "finished": "2026-11-22T00:01:00+00:00"}


def record(arm: str, number: int, correct: bool) -> Record:
    problem = SUITE[number]
    text = "Answer: " * (arm == "format") + (problem.answer if correct else "1234567")
    graded = asdict(grader.grade(text, problem.answer, FORM, problem.asks))
    return Record(
        key=f"{arm}{number}", generation_key="g", model="bundled:smollm2-135m",
        weights_hash="abcdef012345", arm=arm, policy="full", source="laptop",
        problem_id=problem.id, family="gcd", level=1, sample=0, seed=0, temperature=0.0,
        question="q", answer=problem.answer, asks=problem.asks, prompt_id="p", text=text,
        finish="stop", prompt_tokens=9, new_tokens=7, seconds=0.1, kv_reads_tokens=90.0,
        kv_peak_tokens=15.0, kv_peak_bytes=345600, **graded,
    )  # fmt: skip


def executed(folder: Path, stage: str, profile: str, commit: str, failure: str = "") -> None:
    """A notebook as the pipeline leaves it, its output naming a folder of this machine."""
    output = nbformat.v4.new_output("stream", text=f"read {paths.ROOT}/data/claims.toml\n")
    cells = [nbformat.v4.new_markdown_cell("# title"), nbformat.v4.new_markdown_cell("## Verdict"),
             nbformat.v4.new_code_cell("1", outputs=[output])]  # fmt: skip
    made = nbformat.v4.new_notebook(cells=cells)
    hardware = {"cpu": "a CPU", "cores": 2, "ram_gib": 8, "gpus": []}
    stamp = {"profile": profile, "commit": commit, "dirty": False, "lock_sha256": "l",
             "kit_sha256": "k", "system": "Linux", "hardware": hardware, "failure": failure,
             "versions": {"python": "3.11"},
             "parameters": {"SEED": 0, "MODELS": ["bundled:smollm2-135m"]}} | TIMES  # fmt: skip
    made.metadata["kit"] = stamp
    nbformat.write(made, folder / "notebooks" / f"{stage}{'.failed' * bool(failure)}.ipynb")


def ran(profile: str = "laptop", seed: int = 0, gain: float = 0.2, commit: str = "c0") -> Path:
    """The folder of a small run: two arms, its verdicts, one table and two figures, of which the
    second does not follow from records; its paper."""
    assert paths.OUTPUTS != paths.ROOT / "outputs", "this would overwrite the reader's own run"
    folder = paths.run_dir(profile)
    made = Path(_made(profile, seed, gain, commit).name) / "run"
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder


@cache
def _made(profile: str, seed: int, gain: float, commit: str) -> TemporaryDirectory:
    """That run, made once for all tests of a process."""
    kept = TemporaryDirectory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUTS", Path(kept.name))
        _run(profile, seed, gain, commit).rename(Path(kept.name) / "run")
    return kept


def _run(profile: str, seed: int, gain: float, commit: str) -> Path:
    rng, folder = np.random.default_rng(seed), paths.run_dir(profile)
    (folder / "notebooks").mkdir(parents=True)
    records = [record(arm, i, bool(rng.random() < 0.3 + gain * (arm == "format")))
               for arm in ("plain", "format") for i in range(112)]  # fmt: skip
    store = Store(folder / "store")
    store.append(records)
    frame = store.table()
    forest = tables.against(frame, "format", ["plain"], "plain")
    by_arm = {arm: tables.by_family(frame, arm) for arm in ("plain", "format")}
    drawn = {FIGURE: plots.accuracy_by_family(by_arm), "Format against plain": plots.forest(forest)}
    notebook.save_results("01_baseline", {"keys": sorted(frame["key"])}, profile,
                          {CAPTION: tables.arms(frame)}, drawn)  # fmt: skip
    published = claims.load()
    parts = []
    for stage in dict.fromkeys(claim.notebook for claim in published):
        mine = [claim for claim in published if claim.notebook == stage]
        of_stage = frame if stage == "01_baseline" else frame.iloc[:0]
        parts.append(measured_table(mine, of_stage, profile))
    verdicts = pd.concat(parts, ignore_index=True)
    columns = ["claim", "system", "published", "measured", "interval", "on", "verdict", "reason"]
    rows = {"verdicts": verdicts[columns].to_dict("records")}
    notebook.save_results("07_verdicts", rows, profile)
    for stage in ("01_baseline", "07_verdicts"):
        executed(folder, stage, profile, commit)
        done = {"inputs": {}, "wall_seconds": 1.0, "peak_memory_bytes": 1} | TIMES
        provenance.write_json(folder / "status" / f"{stage}.json", done)
    records = {"01_baseline": frame}
    html.write(profile, records, verdicts, tables.audits(published), exhibits.load_results(profile))
    latex.write(profile)
    return folder


@cache
def _packed() -> bytes:
    ran()
    return bundle.write("laptop").read_bytes()


def bundled() -> Path:
    """The bundle of that run, packed once for all tests of a process, beside its folder."""
    data, made = _packed(), ran() / "bundle.zip"
    made.write_bytes(data)
    return made


def published(made: Path, place: Path) -> Path:
    """The folder `place` with what a bundle has of a run, as it is published."""
    with zipfile.ZipFile(made) as archive:
        kept = ("results/", "exhibits/", "notebooks/", "status/", "records.parquet")
        archive.extractall(place, [name for name in archive.namelist() if name.startswith(kept)])
    return place


def tampered(made: Path, name: str, change, sign: bool = False) -> Path:
    """A copy of a bundle with one file changed, added or, where `change` is None, left out; with
    `sign` its sums are made anew, as anyone can."""
    other = made.with_name("tampered.zip")
    with zipfile.ZipFile(made) as old:
        files = {member: old.read(member) for member in old.namelist()}
    if change:
        files[name] = change(files.get(name, b""))
    else:
        del files[name]
    if sign:
        del files[bundle.SUMS]
        files[bundle.SUMS] = bundle.sums(files)
    with zipfile.ZipFile(other, "w") as new:
        for member, content in files.items():
            new.writestr(member, content)
    return other
