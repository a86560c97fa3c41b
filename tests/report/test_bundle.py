"""A bundle: what is in it, that it names nobody, that tampering is caught; what runs differ in."""

import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rocrate.rocrate import ROCrate

from kit import cli, notebook, paths
from kit.evaluation.store import Store
from kit.pipeline import provenance, stages
from kit.report import bundle, summary, verify
from kit.report import published as reference
from kit.schema import Record
from tests.runs import TIMES, bundled, executed, ran

PAGE = "report.html"
PROCESS_RUN = "https://w3id.org/ro/wfrun/process/0.5"


def test_a_bundle_holds_what_a_paper_needs_and_verifies():
    made = bundle.write("laptop") if ran() else None
    names = set(bundle.read(made).files)
    for name in ("notebooks/01_baseline.ipynb", "notebooks/01_baseline.html", "records.parquet",
                 "results/07_verdicts.json", "claims.toml", "requirements.lock", "LICENSE",
                 "LICENSES.md", "CITATION.cff", "report.html", "ro-crate-metadata.json",
                 "exhibits/01_baseline/format-against-plain.pdf", "SHA256SUMS",
                 "evictors/smollm2-135m-seed0-4x.safetensors"):  # fmt: skip
        assert name in names, name
    checked = verify.check(made)
    assert checked.differences == []
    first = made.read_bytes()
    assert bundle.write("laptop").read_bytes() == first


def test_verdicts_link_to_their_records_and_to_the_cell_that_made_them():
    folder = ran()
    links = re.findall(r'href="(\w[^":#]+)"', (folder / PAGE).read_text())
    assert {*links} == {"results/01_baseline.json", "notebooks/01_baseline.ipynb"}
    assert len(links) == 2 and all((folder / link).is_file() for link in links)
    files = bundle.read(bundled()).files
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


def test_trained_evictors_keep_their_folders_and_states_of_trainings_stay_out():
    folder = ran()
    for variant in ("delayed", "immediate"):
        for name in ("4x", "state"):
            file = folder / "evictors" / variant / "ab12" / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{variant} {name}")
    files = bundle.read(bundle.write("laptop")).files
    for variant in ("delayed", "immediate"):
        assert files[f"evictors/{variant}/ab12/4x.safetensors"] == f"{variant} 4x".encode()
    assert not [name for name in files if "state" in Path(name).name]


WHY = "cell 9 raised ValueError: full attention differs"


def test_a_bundle_of_an_incomplete_run_says_so(capsys):
    folder = ran()
    executed(folder, "03_dms", "laptop", "c0", failure=WHY)
    assert cli.main(["bundle", "--profile", "laptop"]) == 0
    said, made = capsys.readouterr().out, bundle.read(folder / "bundle.zip")
    readme, crate = made.files["README.md"].decode(), made.json(bundle.CRATE)["@graph"]
    left = f"INCOMPLETE: 00_tour not run yet; 02_strategies not run yet; 03_dms failed ({WHY}); "
    for text in (said, readme, next(e for e in crate if e["@id"] == "./")["description"]):
        assert left in text.replace("**", "")
    assert f"| 03_dms | failed: {WHY} | – |" in readme and "| 01_baseline | done | 2026" in readme
    (action,) = [entity for entity in crate if entity["@id"] == "#run-03_dms"]
    assert action["actionStatus"].endswith("/FailedActionStatus") and action["error"] == WHY
    assert action["endTime"] == TIMES["finished"]
    assert {"@id": "notebooks/03_dms.failed.ipynb"} in action["result"]
    assert "notebooks/03_dms.failed.html" in made.files
    for stage in stages.load_stages("laptop", outputs=folder.parent):
        done = {"inputs": {}, "wall_seconds": 1.0, "peak_memory_bytes": 1} | TIMES
        provenance.write_json(stage.status_file, done)
        stage.failed.unlink(missing_ok=True)
    assert cli.main(["bundle", "--profile", "laptop"]) == 0
    made = bundle.read(folder / "bundle.zip")
    assert "INCOMPLETE" not in capsys.readouterr().out + str(made.json(bundle.CRATE))
    assert "Every stage ran to its end." in made.files["README.md"].decode()


def test_without_the_records_that_results_name_there_is_no_bundle():
    folder = ran()
    kept = Store(folder / "store").table()
    shutil.rmtree(folder / "store")
    with pytest.raises(ValueError, match="laptop: the store is missing; .*FORCE=1"):
        bundle.write("laptop")
    assert not (folder / "store").exists()  # looking for it makes none
    Store(folder / "store").append([Record(**row) for row in kept.head(200).to_dict("records")])
    with pytest.raises(ValueError, match="lacks 24 of the 224 records that 01_baseline reports"):
        bundle.write("laptop")
    for file in (folder / "store").rglob("*.lance"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="the store is damaged"):
        bundle.write("laptop")
    assert not (folder / "bundle.zip").exists()


@pytest.mark.parametrize(
    "name", ["results/01_baseline.json", "status/01_baseline.json", "notebooks/07_verdicts.ipynb",
             "exhibits/01_baseline/exhibits.json"],
)  # fmt: skip
def test_a_damaged_file_is_named_and_nothing_is_written(name, capsys):
    folder = ran()
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    assert cli.main(["bundle", "--profile", "laptop"]) == 2
    said = capsys.readouterr().err
    assert f"{folder}: {name} is damaged" in said and len(said.splitlines()) == 1
    assert not (folder / "bundle.zip").exists()


def test_a_bundle_is_read_as_people_have_it(tmp_path):
    made = bundled()
    files = bundle.read(made).files
    out = tmp_path / "unpacked" / "their-bundle"
    with zipfile.ZipFile(made) as archive:
        archive.extractall(out)
    (out / "notes.txt").write_text("mine")  # a file beside is none of the bundle's
    (out / ".DS_Store").write_text("")
    assert bundle.read(out).files == files == bundle.read(out.parent).files
    for base, junk in ((out, []), (out.parent, ["__MACOSX/._SHA256SUMS"])):
        again = tmp_path / f"{base.name}.zip"
        with zipfile.ZipFile(again, "w") as archive:
            for path in sorted(base.rglob("*")):  # with an entry for each directory
                if path.name not in ("notes.txt", ".DS_Store"):
                    archive.write(path, path.relative_to(base))
            for name in junk:
                archive.writestr(name, b"")
        assert any(name.endswith("/") for name in zipfile.ZipFile(again).namelist())
        assert bundle.read(again).files == files
    shutil.copytree(out, out.with_name("other"))
    with pytest.raises(bundle.BundleError, match="it holds 2 of them"):
        bundle.read(out.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(bundle.BundleError, match="neither SHA256SUMS nor results"):
        bundle.read(tmp_path / "empty")


def test_the_crate_is_a_process_run(tmp_path):
    with zipfile.ZipFile(bundled()) as archive:
        archive.extractall(tmp_path / "out")
    crate = ROCrate(tmp_path / "out")
    assert crate.root_dataset["conformsTo"].id == PROCESS_RUN
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
    same = reference.diff(bundle.read(one), bundle.read(bundled()))
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
    summary.print_reference("laptop", tmp_path / "published")
    assert capsys.readouterr().out == ""
    with zipfile.ZipFile(bundled()) as archive:
        archive.extractall(tmp_path / "published" / "laptop")
    summary.print_reference("laptop", tmp_path / "published")
    said = capsys.readouterr().out
    assert "of 1 claims measured in both, 0 moved beyond noise, 0 verdicts differ" in said
    ran("workstation", seed=1, gain=-0.3)
    (tmp_path / "published" / "laptop").rename(tmp_path / "published" / "workstation")
    summary.print_reference("workstation", tmp_path / "published")
    said = capsys.readouterr().out
    assert "1 moved beyond noise" in said and "  rbslm-format-accuracy: " in said


def test_runs_stand_side_by_side_and_a_profile_is_the_published_one_where_it_has_not_run(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reference, "PUBLISHED_RUNS", tmp_path / "published")
    into = reference.publish("laptop", tmp_path / "published") if ran("laptop") else None
    other = ran("workstation", seed=1, gain=-0.2)
    assert reference.place("laptop") == tmp_path / "laptop"
    shutil.rmtree(tmp_path / "laptop")
    (tmp_path / "laptop").mkdir()  # a run that has measured the machine and nothing else
    assert reference.place("laptop") == into and reference.place(str(other)) == other
    assert reference.place("quick") == tmp_path / "quick"
    assert cli.main(["diff", "laptop", "workstation"]) == 0
    assert "numbers: 1 differ" in capsys.readouterr().out
    assert cli.main(["compare", "laptop", "workstation", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    published = bundle.read(into).verdicts[row["claim"]]
    assert row["claim"] == "rbslm-format-accuracy"
    assert row["laptop"].startswith(published["measured"]) and row["laptop"] != row["workstation"]
    assert row["laptop"].endswith(": " + published["verdict"])
    assert cli.main(["compare", "laptop", "quick"]) == 2 and "no bundle" in capsys.readouterr().err


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
    assert not any(name.endswith(".html") for name in first.files) and len(first.all_records) == 224
    assert first.verdicts == bundle.read(here).verdicts
    page = (place / "report.html").read_text()
    assert "rbslm-format-accuracy" in page and first.environment["commit"][:10] in page
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
    assert {one: measured.pop(one) for one in kept} == kept and len(both.all_records) == 224
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
    assert "4.62 billion" in line and "*agrees*" in line
    assert "18.8" in page or "accuracy" in page  # the key table of the stage


def test_the_pages_say_what_was_published(subtests):
    for file, made in reference.pages().items():
        with subtests.test(file.name):
            page = file.read_text(encoding="utf-8")
            stale = "stale: run `python -m kit publish`"
            assert reference.renewed(page, made) == page, stale
            with pytest.raises(ValueError, match="README.md or docs/results.md lacks the lines"):
                reference.renewed(page.replace(reference.END, ""), made)
