"""A bundle: what is in it, that it names nobody, that tampering is caught; what runs differ in."""

import io
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from rocrate.rocrate import ROCrate

from kit import (
    bundle,
    claims,
    cli,
    exhibits,
    figures,
    notebook,
    paths,
    provenance,
    reference,
    report,
    tables,
)
from kit.schema import Record
from kit.store import Store

CAPTION = exhibits.BASELINE
PAGE = "report.html"


def record(arm: str, number: int, correct: bool) -> Record:
    return Record(
        key=f"{arm}{number}", generation_key="g", model="bundled:smollm2-135m",
        weights_hash="abcdef012345", arm=arm, policy="full", source="laptop",
        problem_id=f"p{number}", family="gcd", level=1, sample=0, seed=0, temperature=0.0,
        question="q", answer="2", prompt_id="p", text="2", finish="stop", prompt_tokens=9,
        new_tokens=7, seconds=0.1, kv_reads_tokens=90.0, kv_peak_tokens=15.0, kv_peak_bytes=345600,
        correct=correct, extracted="2", reason="equal", method="last number",
        compliant=arm == "format",
    )  # fmt: skip


def executed(folder: Path, stage: str, profile: str, commit: str) -> None:
    """A notebook as the pipeline leaves it, its output naming a folder of this machine."""
    output = nbformat.v4.new_output("stream", text=f"read {paths.ROOT}/data/claims.toml\n")
    cells = [nbformat.v4.new_markdown_cell("# title"), nbformat.v4.new_markdown_cell("## Verdict"),
             nbformat.v4.new_code_cell("1", outputs=[output])]  # fmt: skip
    made = nbformat.v4.new_notebook(cells=cells)
    stamp = {"profile": profile, "commit": commit, "lock_sha256": "l", "kit_sha256": "k",
             "system": "Linux", "hardware": {"cores": 2}, "versions": {"python": "3.11"},
             "parameters": {"SEED": 0}}  # fmt: skip
    made.metadata["kit"] = stamp
    nbformat.write(made, folder / "notebooks" / f"{stage}.ipynb")


def ran(profile: str = "laptop", seed: int = 0, gain: float = 0.2, commit: str = "c0") -> Path:
    """The folder of a small run: two arms, its verdicts, one table and one figure."""
    rng, folder = np.random.default_rng(seed), paths.run_dir(profile)
    (folder / "notebooks").mkdir(parents=True)
    records = [record(arm, i, bool(rng.random() < 0.3 + gain * (arm == "format")))
               for arm in ("plain", "format") for i in range(112)]  # fmt: skip
    store = Store(folder / "store")
    store.append(records)
    frame = store.table()
    forest = tables.against(frame, "format", ["plain"], "plain")
    notebook.save_results(
        "01_baseline", {"keys": sorted(frame["key"])}, profile, {CAPTION: tables.arms(frame)},
        {"Format against plain": figures.forest(forest)},
    )  # fmt: skip
    published = claims.load()
    parts = []
    for stage in dict.fromkeys(claim.notebook for claim in published):
        mine = [claim for claim in published if claim.notebook == stage]
        of_stage = frame if stage == "01_baseline" else frame.iloc[:0]
        parts.append(claims.measured_table(mine, of_stage, profile))
    verdicts = pd.concat(parts, ignore_index=True)
    columns = ["claim", "system", "published", "measured", "interval", "verdict", "reason"]
    rows = {"verdicts": verdicts[columns].to_dict("records")}
    notebook.save_results("07_verdicts", rows, profile)
    for stage in ("01_baseline", "07_verdicts"):
        executed(folder, stage, profile, commit)
        done = {"started": "2026-11-22T00:00:00+00:00", "finished": "2026-11-22T00:01:00+00:00"}
        provenance.write_json(folder / "status" / f"{stage}.json", done)
    report.write(profile, frame, verdicts, tables.audits(published), notebook.load_results(profile))
    return folder


@pytest.fixture(autouse=True)
def _outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    here = provenance.collect()
    monkeypatch.setattr(provenance, "collect", lambda: here)
    status = {"wall_seconds": 1.0, "peak_memory_bytes": 1, "finished": "now"}
    monkeypatch.setattr(report.stages.Stage, "status", lambda self: status)


def tampered(made: Path, name: str, change) -> Path:
    """A copy of a bundle with one file changed, added or, where `change` is None, left out."""
    other = made.with_name("tampered.zip")
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(other, "w") as new:
        files = {member: old.read(member) for member in old.namelist()}
        data = change(files.pop(name, b"")) if change else files.pop(name) and None
        for member, content in (files | ({name: data} if change else {})).items():
            new.writestr(member, content)
    return other


def test_a_bundle_holds_what_a_paper_needs_and_verifies():
    made = bundle.write("laptop") if ran() else None
    names = set(bundle.read(made).files)
    for name in ("notebooks/01_baseline.ipynb", "notebooks/01_baseline.html", "records.parquet",
                 "results/07_verdicts.json", "claims.toml", "requirements.lock", "LICENSE",
                 "LICENSES.md", "CITATION.cff", "report.html", "ro-crate-metadata.json",
                 "exhibits/01_baseline/format-against-plain.pdf", "SHA256SUMS",
                 "evictors/smollm2-135m-seed0-4x.safetensors"):  # fmt: skip
        assert name in names, name
    wrong, left = bundle.verify(made)
    assert wrong == [] and left == []  # the one table follows from the records
    first = made.read_bytes()
    assert bundle.write("laptop").read_bytes() == first


def test_verdicts_link_to_their_records_and_to_the_cell_that_made_them():
    folder = ran()
    links = re.findall(r'href="(\w[^":#]+)"', (folder / PAGE).read_text())
    assert {*links} == {"results/01_baseline.json", "notebooks/01_baseline.ipynb"}
    assert len(links) == 4 and all((folder / link).is_file() for link in links)
    files = bundle.read(bundle.write("laptop")).files
    packed = re.findall(r'href="(\w+/\w+\.\w+)(#\w+)?"', files[PAGE].decode())
    assert {*packed} == {("results/01_baseline.json", ""),
                         ("notebooks/01_baseline.html", "#Verdict")}  # fmt: skip
    assert b'id="Verdict"' in files["notebooks/01_baseline.html"]


def test_a_bundle_names_neither_folder_nor_user_nor_host(tmp_path):
    ran()
    files = bundle.read(bundle.write("laptop")).files
    assert b"data/claims.toml" in files["notebooks/01_baseline.ipynb"]
    for name, data in files.items():
        if not name.endswith((".png", ".pdf", ".safetensors", ".parquet")):
            for needle in (paths.ROOT, tmp_path, Path.home() / "x"):
                assert str(needle).encode() not in data, (name, needle)


@pytest.mark.parametrize(
    "name",
    ["notebooks/01_baseline.ipynb", "exhibits/01_baseline/format-against-plain.svg", "claims.toml",
     "records.parquet", "results/01_baseline.json", "LICENSE"],
)  # fmt: skip
def test_what_was_changed_missing_or_added_is_named(name):
    ran()
    made = bundle.write("laptop")
    wrong, _ = bundle.verify(tampered(made, name, lambda data: data + b" "))
    assert f"{name} is not what SHA256SUMS says: it was changed" in wrong
    wrong, _ = bundle.verify(tampered(made, name, None))
    assert f"{name} is missing" in wrong
    wrong, _ = bundle.verify(tampered(made, "extra.txt", lambda data: b"new"))
    assert wrong == ["extra.txt is not in SHA256SUMS"]


def test_records_that_do_not_bear_the_results_are_found_though_the_hashes_are_made_anew():
    ran()
    made = bundle.write("laptop")

    def better(data: bytes) -> bytes:
        frame, buffer = pd.read_parquet(io.BytesIO(data)), io.BytesIO()
        frame.loc[frame["arm"] == "plain", "correct"] = True
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()

    wrong, _ = bundle.verify(tampered(made, "records.parquet", better))
    assert any(line.startswith("rbslm-format-") and "from the records" in line for line in wrong)
    assert f"01_baseline, table {CAPTION!r} is not what the records say" in wrong

    def reproduced(data: bytes) -> bytes:
        results = json.loads(data)
        for row in results["verdicts"]:
            row["verdict"] = "reproduced"
        return json.dumps(results).encode()

    wrong, _ = bundle.verify(tampered(made, "results/07_verdicts.json", reproduced))
    assert any("rbslm-memory-gain: verdict is 'reproduced' in the results" in w for w in wrong)


def test_it_is_verified_where_there_are_no_models(tmp_path):
    ran()
    made = bundle.write("laptop")
    heavy = ("torch", "transformers", "dspy", "trl", "lancedb", "papermill")
    code = "\n".join([
        "import sys", "class Absent:", "    def find_spec(self, name, *rest):",
        f"        if name.split('.')[0] in {heavy}: raise ImportError(name)",
        "sys.meta_path.insert(0, Absent())", "from kit import bundle",
        f"print(bundle.verify({str(made)!r}))",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "([], [])", done.stderr[-2000:]


def test_the_crate_is_a_process_run(tmp_path):
    ran()
    with zipfile.ZipFile(bundle.write("laptop")) as archive:
        archive.extractall(tmp_path / "out")
    crate = ROCrate(tmp_path / "out")
    assert crate.root_dataset["conformsTo"].id == bundle.PROFILE
    actions = [entity for entity in crate.get_entities() if entity.type == "CreateAction"]
    assert {action["name"] for action in actions} == {"01_baseline, laptop", "07_verdicts, laptop"}
    for action in actions:
        assert action["instrument"].type == "SoftwareApplication" and action["instrument"]["name"]
        assert action["instrument"]["version"] == "c0" and action["endTime"] > action["startTime"]
        assert {file.id for file in action["object"]} == {"claims.toml", "requirements.lock"}
        made = {file.id for file in action["result"]}
        assert any(name.startswith("notebooks/") for name in made)
        assert action in crate.root_dataset["mentions"]
    for entity in crate.data_entities:
        assert (tmp_path / "out" / entity.id).is_file()
    assert crate.root_dataset["license"]["name"] and crate.root_dataset["datePublished"]
    kinds = {entity.id: entity["encodingFormat"] for entity in crate.data_entities}
    assert kinds["records.parquet"] == "application/vnd.apache.parquet" and all(kinds.values())
    assert kinds["report.html"] == "text/html" and kinds["LICENSE"] == "text/plain"


def test_two_runs_differ_in_what_moved_and_in_what_made_them():
    one, other = ran("laptop"), ran("workstation", seed=1, gain=-0.2, commit="c1")
    found = reference.diff(bundle.read(one), bundle.read(other))
    moved = {row[0]: row[3] for row in found["numbers"]}
    assert moved["rbslm-format-accuracy"] == "beyond noise"
    assert ["commit", "c0", "c1"] in found["environment"]
    assert "rbslm-format-accuracy" in {row[0] for row in found["verdicts"]}
    same = reference.diff(bundle.read(one), bundle.read(bundle.write("laptop")))
    assert same == {"numbers": [], "verdicts": [], "environment": []}
    exact = [{"claim": "c", "measured": f"{n} steps", "interval": "", "verdict": ""}
             for n in (300, 301)]  # fmt: skip
    steps = [bundle.Run({bundle.VERDICTS: json.dumps({"verdicts": [row]}).encode()})
             for row in exact]  # fmt: skip
    assert reference.diff(*steps)["numbers"] == [["c", "300 steps", "301 steps", "beyond noise"]]
    again = replace(bundle.read(one), files=bundle.read(one).files)
    assert reference.diff(again, again)["numbers"] == []


def test_a_run_is_held_against_the_published_one(tmp_path, capsys):
    ran(seed=0)
    cli.print_reference("laptop", tmp_path / "published")
    assert capsys.readouterr().out == ""
    with zipfile.ZipFile(bundle.write("laptop")) as archive:
        archive.extractall(tmp_path / "published" / "laptop")
    cli.print_reference("laptop", tmp_path / "published")
    said = capsys.readouterr().out
    assert "of 2 claims measured in both, 0 moved beyond noise, 0 verdicts differ" in said
    ran("workstation", seed=1, gain=-0.3)
    (tmp_path / "published" / "laptop").rename(tmp_path / "published" / "workstation")
    cli.print_reference("workstation", tmp_path / "published")
    said = capsys.readouterr().out
    assert "1 moved beyond noise" in said and "  rbslm-format-accuracy: " in said


def test_what_ran_in_another_dtype_is_said_to():
    runs = []
    for marks in ({"model": "tiny ab torch.float32"}, {"dtype": "bfloat16"}, {"dtype": "float32"}):
        stamp = {"metadata": {"kit": {"fingerprints": marks}}}
        runs.append(bundle.Run({"notebooks/01_baseline.ipynb": json.dumps(stamp).encode()}))
    (line,) = reference.against(runs[0], runs[1])[1:]
    assert "the models were float32 there and bfloat16 here" in line and "DTYPE=float32" in line
    assert len(reference.against(runs[0], runs[2])) == 1
    assert reference.diff(*runs[:2])["environment"] == [["dtype", "float32", "bfloat16"]]


def test_stages_are_published_one_by_one(tmp_path, monkeypatch):
    here, into = ran(), tmp_path / "published"
    place = reference.publish("laptop", into)
    first = bundle.read(place)
    assert {"records.parquet", "results/01_baseline.json", "exhibits/01_baseline/exhibits.json",
            "notebooks/01_baseline.ipynb"} < set(first.files)  # fmt: skip
    assert not any(name.endswith(".html") for name in first.files) and len(first.every) == 224
    assert first.verdicts == bundle.read(here).verdicts
    # On another machine only another stage has run; what was published of the first one stays.
    kept = {one: row for one, row in first.verdicts.items() if row["measured"]}
    other = tmp_path / "elsewhere"
    monkeypatch.setattr(paths, "OUTPUTS", other)
    folder = ran(seed=1, gain=-0.3)
    (folder / "results" / "01_baseline.json").unlink()
    given = {"hier-bank-parameters": {"estimate": 4.62, "low": 4.62, "high": 4.62, "n": 1,
                                      "unit": "billion", "origin": "computed"}}  # fmt: skip
    notebook.save_results("05_parametric", {"keys": [], "measurements": given}, "laptop")
    both = bundle.read(reference.publish("laptop", into))
    measured = {one: row for one, row in both.verdicts.items() if row["measured"]}
    assert {one: measured.pop(one) for one in kept} == kept and len(both.every) == 224
    assert [*measured] == ["hier-bank-parameters"]
    again = bundle.read(reference.publish("laptop", into))
    assert again.files == both.files and sorted(into.iterdir()) == [into / "laptop"]
    rename = Path.rename

    def killed(self, target):
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        reference.publish("laptop", into)
    assert not (into / "laptop").is_dir()
    again = bundle.read(reference.publish("laptop", into))
    assert again.files == both.files and sorted(into.iterdir()) == [into / "laptop"]
    page = reference.text(into)
    line = next(line for line in page.splitlines() if "ONLY=05" in line)
    assert "4.62 billion" in line and "*reproduced*" in line
    assert "18.8" in page or "accuracy" in page  # the key table of the stage


def test_the_readme_says_what_was_published():
    file = paths.ROOT / "README.md"
    readme = file.read_text(encoding="utf-8")
    assert reference.renewed(readme) == readme, "stale: run `python -m kit.reference`"
    with pytest.raises(ValueError, match="README.md lacks the lines"):
        reference.renewed(readme.replace(reference.END, ""))


def test_the_commands(tmp_path, capsys, monkeypatch):
    assert cli.main(["bundle", "--profile", "laptop"]) == 2
    assert "laptop has no verdicts yet; `make reproduce PROFILE=laptop`" in capsys.readouterr().err
    ran()
    assert cli.main(["bundle", "--profile", "laptop"]) == 0
    made = tmp_path / "laptop" / "bundle.zip"
    assert cli.main(["verify", str(made)]) == 0 and "agrees" in capsys.readouterr().out
    broken = tampered(made, "LICENSE", lambda data: b"")
    assert cli.main(["verify", str(broken), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differs"] == [
        "LICENSE is not what SHA256SUMS says: it was changed"
    ]
    (tmp_path / "note.txt").write_text("no zip")
    assert cli.main(["verify", str(tmp_path / "note.txt")]) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert cli.main(["diff", str(made), str(tmp_path / "laptop")]) == 0
    assert "numbers: 0 differ" in capsys.readouterr().out
