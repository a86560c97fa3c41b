"""The pipeline on tiny real notebooks: real kernels, real deaths, no model."""

import fcntl
import inspect
import json
import math
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kit import notebook, paths
from kit.models.bundled import FetchError
from kit.pipeline import errors, imports, parameters, provenance, stages
from kit.pipeline import run as pipeline
from kit.pipeline.errors import UserError
from kit.report import exhibits

ROOT = Path(__file__).resolve().parents[2]
TRACE = "open('trace.txt', 'a').write('{}\\n')"
FIRST = [
    "PROFILE = 'tour'  # set by the pipeline\nSEED = 7\nSIZE = 2\nBATCH = 8",
    TRACE.format("01_first") + "\nimport getpass, os, socket\nfrom pathlib import Path",
    "from kit import alpha\nfrom kit.notebook import record_fingerprint, save_results, show",
    "record_fingerprint('model', 'abc123')\nshow(alpha.answer)",
    "user, host = getpass.getuser(), socket.gethostname()\nhere = Path.cwd() / 'data'",
    "print(here, Path.home() / 'x', f'/scratch/{user}/y', f'{user}@{host}')",
    "if Path('raise').exists():\n    raise ValueError('one\\ntwo')",
    "import time\nballast = b'x' * (150_000_000 * Path('die').exists())",
    "if ballast:\n    time.sleep(1.5)\n    os.kill(os.getpid(), 9)",
    "save_results('01_first', {'size': SIZE, 'answer': alpha.answer()}, PROFILE)",
]
SECOND = [
    "LIMIT = 1",
    TRACE.format("02_second") + "\nimport os, time\nfrom pathlib import Path",
    "from kit.report.exhibits import load_results\nfound = load_results('tour')",
    "Path('pid.txt').write_text(str(os.getpid()))",
    "while Path('wait').exists():\n    time.sleep(0.05)",
    "LIMIT",
]


def write_notebook(path: Path, sources: list[str]) -> None:
    cells = [new_markdown_cell("# A tiny stage"), *map(new_code_cell, sources)]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project of two notebooks whose tour has run once."""
    root = tmp_path_factory.mktemp("one") / "with {brace}"
    shutil.copytree(ROOT / "kit", root / "kit", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "kit" / "alpha.py").write_text(
        "def answer():\n    from kit.beta import B\n    return B"
    )
    (root / "kit" / "beta.py").write_text("B = 42\n")
    (root / "kit" / "gamma.py").write_text("unrelated = True\n")
    (root / "data").mkdir()
    (root / "data" / "claims.toml").write_text("x = 1\n")
    (root / "requirements.lock").write_text("numpy==2\n")
    (root / "notebooks" / "profiles").mkdir(parents=True)
    write_notebook(root / "notebooks" / "01_first.ipynb", FIRST)
    write_notebook(root / "notebooks" / "02_second.ipynb", SECOND)
    assert run(root) == 0
    return root


@pytest.fixture
def project(finished, tmp_path) -> Path:
    """A copy of the finished project to break."""
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    (root / "trace.txt").unlink()
    return root


def run(root: Path, profile: str = "tour", **options) -> int:
    places = {"notebooks_dir": root / "notebooks", "outputs_dir": root / "outputs"}
    return pipeline.run(profile, **places, **options)


def trace(root: Path) -> list[str]:
    """Names of the notebooks that really ran, in order."""
    file = root / "trace.txt"
    return file.read_text().split() if file.exists() else []


def states(root: Path, profile: str = "tour") -> list[tuple[str, str]]:
    every = stages.load_stages(profile, root / "notebooks", root / "outputs")
    return [stages.freshness(stage, every[:i]) for i, stage in enumerate(every)]


def executed(root: Path, name: str = "01_first") -> Path:
    return root / "outputs" / "tour" / "notebooks" / f"{name}.ipynb"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_stages_run_once_in_order(finished):
    assert trace(finished) == ["01_first", "02_second"]
    assert json.loads((finished / "outputs/tour/results/01_first.json").read_text()) == {
        "answer": 42,
        "size": 2,
    }
    assert not list(finished.glob("outputs/tour/notebooks/*.*.ipynb"))  # none running or failed


def test_a_second_run_executes_nothing(project, capsys):
    assert run(project) == 0
    assert trace(project) == []
    assert capsys.readouterr().out.count("up to date") == 2


CHANGES = {
    "a cell of the notebook": (("notebooks/01_first.ipynb", "one", "eins"), "the notebook", [0]),
    "an imported kit module": (("kit/alpha.py", "return B", "return 0+B"), "kit modules", [0]),
    "a module that it imports": (("kit/beta.py", "42", "43"), "kit modules", [0]),
    "an unrelated kit module": (("kit/gamma.py", "True", "False"), "", []),
    "data": (("data/claims.toml", "1", "2"), "data/", [0, 1]),
    "the lock": (("requirements.lock", "2", "3"), "requirements.lock", [0, 1]),
    "its own results": (("outputs/tour/results/01_first.json", "42", "41"), "results file", [0]),
    "the executed notebook": (("outputs/tour/notebooks/02_second.ipynb", "LIMIT", "L"), "", [1]),
    "its outputs only": (("notebooks/01_first.ipynb", '"execution_count": null',
                          '"execution_count": 4'), "", []),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_a_stage_stale(project, name):
    (file, old, new), why, touched = CHANGES[name]
    edit(project / file, old, new)
    for i, (word, reason) in enumerate(states(project)):
        upstream = i == 1 and name == "its own results"  # the second stage reads the first's
        if i in touched or upstream:
            assert (word, ("an earlier stage" if upstream else why) in reason) == ("stale", True)
        else:
            assert (word, reason) == ("fresh", "")


def test_a_changed_file_of_the_readers_own_makes_stale_what_names_it(tmp_path):
    """A file, one that a TOML names, those of a folder, and weights."""
    (tmp_path / "notebooks").mkdir()
    sources = ["PROBLEM_SET, MODELS, GRID = '', [], {}"]
    write_notebook(tmp_path / "notebooks" / "01_first.ipynb", sources)
    (stage,) = stages.load_stages("tour", tmp_path / "notebooks", tmp_path / "outputs")
    mine = ["mine.csv", "rows.csv", "set.toml", "folder/test.jsonl", "weights/model.safetensors",
            "data/rows.csv"]  # fmt: skip
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    (tmp_path / "set.toml").write_text("file = 'rows.csv'\n")
    named = {
        "PROBLEM_SET": "mine.csv",
        "MODELS": [f"{tmp_path}/set.toml", "weights"],
        "GRID": {"sets": [str(tmp_path / "folder"), "data/rows.csv", "", "x" * 9000]},
    }
    stage = replace(stage, overrides=named)
    assert stages.inputs(stage, [])["files"] == (before := stages.inputs(stage, [])["files"])
    for name in mine:
        (tmp_path / name).write_text("another")
        changed = stages.inputs(stage, [])["files"] != before
        assert changed == (name != "data/rows.csv"), name  # hashed with data/, where it is one
        before = stages.inputs(stage, [])["files"]


def test_a_word_that_is_also_a_folder_of_the_project_names_no_file():
    """PROTOCOL = "kit": each edit of the kit would make the stage stale."""
    named_files = stages.named_files
    assert (paths.ROOT / "kit").is_dir() and (paths.ROOT / "data" / "problems").is_dir()
    assert named_files({"PROTOCOL": "kit", "SUITE": "data/problems"}, paths.ROOT) == []
    assert named_files(["requirements.lock"], paths.ROOT) == [paths.ROOT / "requirements.lock"]


def test_new_results_reach_later_stages_and_equal_ones_do_not(project):
    edit(project / "kit/alpha.py", "return B", "return B + 0")
    assert run(project) == 0
    assert trace(project) == ["01_first"]
    edit(project / "kit/beta.py", "42", "43")
    assert run(project) == 0
    assert trace(project)[1:] == ["01_first", "02_second"]


def test_profile_values_reach_the_notebook_and_a_changed_one_reruns_it(project):
    profile = project / "notebooks/profiles/big.toml"
    profile.write_text('["01_first"]\nSIZE = 500\n')
    assert run(project, "big", only="1") == 0
    results = json.loads((project / "outputs/big/results/01_first.json").read_text())
    assert results["size"] == 500  # PROFILE arrived too, or this file would be the tour's
    profile.write_text('["01_first"]\nSIZE = 501\n')
    assert states(project, "big")[0] == ("stale", "its parameters changed")
    assert states(project)[0] == ("fresh", "")


def test_kit_dtype_reaches_the_notebooks_that_name_it_before_the_profile(project, monkeypatch):
    edit(project / "notebooks/01_first.ipynb", "SEED = 7", "SEED = 7\\nDTYPE = 'auto'")
    (project / "notebooks/profiles/big.toml").write_text('["01_first"]\nDTYPE = "float16"\n')

    def dtypes(profile: str) -> list:
        every = stages.load_stages(profile, project / "notebooks", project / "outputs")
        return [stage.parameters.get("DTYPE") for stage in every]

    monkeypatch.delenv("KIT_DTYPE", raising=False)
    assert run(project) == 0
    assert dtypes("tour") == ["auto", None] and dtypes("big") == ["float16", None]
    monkeypatch.setenv("KIT_DTYPE", "float32")
    assert dtypes("tour") == dtypes("big") == ["float32", None]
    assert states(project)[0] == ("stale", "its parameters changed")
    monkeypatch.setenv("KIT_DTYPE", "auto")
    assert states(project)[0] == ("fresh", "")
    monkeypatch.setenv("KIT_DTYPE", "fp32")
    with pytest.raises(UserError, match="DTYPE is 'fp32'; take one of: auto, float32, bfloat16"):
        dtypes("tour")


@pytest.mark.parametrize(
    ("model", "suite"),
    [("bundled:qwen2.5-coder-0.5b", "laptop"), ("bundled:qwen2.5-coder-1.5b", "school"),
     ("hub:a/b-3B", "school")],  # which has no table, so that of the first
)  # fmt: skip
def test_some_stages_of_a_profile_run_on_the_model_that_was_chosen(
    tmp_path, monkeypatch, model, suite
):
    on = ["01", "02", "04", "06"]

    def of(profile="laptop"):
        return {s.number: s for s in stages.load_stages(profile, outputs=tmp_path)}

    small = of()
    provenance.write_json(tmp_path / "laptop" / "model.json", {"model": model, "why": ["it fits"]})
    large = of()
    assert [number for number in large if large[number].models == [model]] == on
    assert [number for number in large if large[number].why] == on
    suites = [large[number].parameters["PROBLEM_SET"] for number in ("01", "02", "04")]
    assert [*suites, large["06"].parameters["PROBLEMS"][0]] == 4 * [suite]
    assert {number: s for number, s in large.items() if number not in on} == {
        number: s for number, s in small.items() if number not in on
    }
    monkeypatch.setenv("KIT_MODEL", "bundled:smollm2-135m")
    assert of()["02"].parameters == small["02"].parameters
    assert of()["02"].why == "MODEL=bundled:smollm2-135m"
    assert not of("quick")["02"].why  # for which a run of laptop is compared with it
    with pytest.raises(UserError, match="MODEL is for profiles with a table .larger., which quick"):
        pipeline.run("quick", outputs_dir=tmp_path)
    monkeypatch.setenv("KIT_MODEL", "bundled:qwen")
    with pytest.raises(UserError, match="MODEL is 'bundled:qwen'; the kit bundles .*coder-0.5b"):
        pipeline.run("laptop", outputs_dir=tmp_path)


def test_from_only_and_force(project, capsys):
    assert run(project, only="01") == 0
    assert trace(project) == []
    assert run(project, from_="02_second") == 0
    assert trace(project) == ["02_second"]
    assert run(project, only="2", force=True) == 0
    assert trace(project)[1:] == ["02_second"]


def test_several_goals_a_value_for_once_and_a_plan(project, capsys):
    where = {"notebooks_dir": project / "notebooks", "outputs_dir": project / "outputs"}

    def planned(**how) -> dict[str, str]:
        return {stage.name: why for stage, why in pipeline.plan("tour", **where, **how)}

    assert planned(only="2,first") == {"01_first": "", "02_second": ""}
    assert [*planned(only="second")] == ["02_second"]
    once = {"SIZE": "3"}
    assert planned(values=once) == {"01_first": "its parameters changed",
                                   "02_second": "an earlier stage runs"}  # fmt: skip
    assert planned(from_="02") == {"02_second": "asked for again"}
    assert trace(project) == []  # a plan runs nothing
    assert run(project, only="02 01", values=once) == 0
    assert trace(project) == ["01_first", "02_second"]
    done = json.loads((project / "outputs/tour/results/01_first.json").read_text())
    assert done["size"] == 3
    stamp = nbformat.read(project / "outputs/tour/notebooks/01_first.ipynb", 4).metadata["kit"]
    assert stamp["parameters"]["SIZE"] == 3 and stamp["parameters"]["SEED"] == 7
    assert planned()["01_first"] == "its parameters changed"  # to what they are without it
    for given, words in (({"SIZE": "ten"}, "SIZE, as it was set, is 'ten', a text"),
                         ({"SPEED": "1"}, "has the parameter SPEED to be set; they have: BATCH, "),
                         ({"PROFILE": "big"}, "parameter PROFILE to be set")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            run(project, values=given)
    with pytest.raises(UserError, match="parameter LIMIT to be set"):
        run(project, only="01", values={"LIMIT": "2"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": "09"}, ["no stage 09", "01_first, 02_second"]),
        ({"only": "01 09"}, ["no stage 09", "01_first, 02_second"]),
        ({"from_": "x"}, ["no stage x"]),
        ({"from_": "01", "only": "02"}, ["exclude each other"]),
        ({"profile": "huge"}, ["no profile 'huge'", "tour"]),
        ({"profile": "../tour"}, ["no profile"]),
    ],
)
def test_unknown_stage_or_profile(project, options, words):
    with pytest.raises(UserError) as refusal:
        run(project, **options)
    assert all(word in str(refusal.value) for word in words)
    assert refusal.value.code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('["01_first"]\nSPEED = 1', ["big.toml", "01_first", "SPEED", "SEED"]),
        ('["03_third"]\nSIZE = 1', ["big.toml", "03_third", "02_second"]),
        ("SIZE = 1", ["big.toml", "SIZE", "table"]),
        ("[", ["big.toml", "not valid TOML"]),
        ('["01_first"]\nSIZE = "ten"', ["SIZE is 'ten', a text; the notebook has an integer, 2"]),
        ('["01_first"]\nSIZE = 2.5', ["SIZE is 2.5, a number; the notebook has an integer, 2"]),
        ('["01_first"]\nSIZE = true', ["SIZE is True, true or false"]),
        ('["01_first"]\nSIZE = [2]', ["SIZE is [2], a list"]),
        ('["01_first"]\nSIZE = 2026-11-26', ["big.toml", "01_first", "SIZE holds a date"]),
        ('["01_first"]\nPROFILE = "nope"', ["01_first", "PROFILE is 'nope'", "'big'"]),
    ],
)
def test_a_wrong_profile_names_file_table_and_key(project, text, words):
    (project / "notebooks/profiles/big.toml").write_text(text)
    with pytest.raises(UserError) as refusal:
        run(project, "big")
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("value", "default", "wrong"),
    [
        (2, 0.5, ""),
        (True, 0.5, "true or false; the notebook has a number"),
        (1, False, "an integer; the notebook has true or false"),
        ({}, {"a": 1}, ""),
        ({"a": "x", "b": "y"}, {"a": 1}, "has a, which is 'x', a text; the"),
        ({"a": {"b": [2, 0.5]}}, {"a": {"b": [1]}}, "has a, which has b, which holds 0.5, a"),
        (["laptop", "3"], ["laptop", 3], ""),
        (["two", 4], [64], "holds 'two', a text; the notebook has [64]"),
        ([2], [0.5], ""),
        ([2], [], ""),
        ([], {}, "a list; the notebook has a table"),
        ([1], ["laptop", 3], ""),
        ("x", None, ""),
        (3, parameters.Expression("2 + 1"), ""),
        ({"a": [date(2026, 11, 26)]}, {}, "a date"),
    ],
)
def test_the_type_of_a_value_is_that_of_the_parameters_cell(value, default, wrong):
    found = parameters.misfit(value, default)
    assert found == "" if wrong == "" else wrong in found


def test_a_run_that_keeps_going_does_all_that_does_not_need_the_failed_stage(project, capsys):
    (project / "raise").touch()
    edit(project / "kit/beta.py", "42", "43")
    edit(project / "notebooks/02_second.ipynb", "LIMIT = 1", "LIMIT = 2")
    assert run(project, keep_going=True) == 1
    assert trace(project) == ["01_first", "02_second"]
    assert "failed: 01_first; the others went on without" in capsys.readouterr().out
    assert states(project) == [("failed", "cell 8 raised ValueError: one"), ("fresh", "")]
    (project / "raise").unlink()
    assert run(project, keep_going=True) == 0
    assert trace(project)[2:] == ["01_first", "02_second"]  # which reads the new results


def test_notebooks_in_a_folder_of_their_own_run_this_kit(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "mine", ignore=shutil.ignore_patterns(".*"))
    mine, ours = stages.load_stages("tour", tmp_path / "mine"), stages.load_stages("tour")
    assert stages.inputs(mine[3], []) == stages.inputs(ours[3], [])


def test_no_notebook_reads_the_results_of_another_but_the_last():
    *alone, last = stages.load_stages("tour")
    assert last.judges and not any(stage.judges for stage in alone)
    report = ROOT / "kit" / "report"
    readers = {
        report / f"{name}.py" for name in ("bundle", "latex", "recompute", "published", "html")
    }
    assert readers <= {*report.iterdir()}
    code = [text for stage in alone for text in stages._code(stage.cells)]
    reading = {*imports.kit_modules(code, ROOT / "kit")}
    assert reading & readers <= {report / "recompute.py"}  # which is given its results


def test_records_that_are_gone_make_stale_what_names_them(project):
    """Real notebooks store records; here their files stand in for them."""
    data = project / "outputs/tour/store/records.lance/data"
    data.mkdir(parents=True)
    (data / "0101.lance").touch()
    edit(project / "notebooks/01_first.ipynb", "{'size': SIZE,", "{'keys': ['k'], 'size': SIZE,")
    assert run(project) == 0
    (data / "0102.lance").touch()  # of another stage, later
    assert states(project) == [("fresh", ""), ("fresh", "")]
    (data / "0101.lance").unlink()
    lost = "store/ lost 1 of its 1 files, and records with them"
    assert states(project) == [("stale", lost), ("fresh", "")]


def test_a_damaged_status_file_is_a_stage_to_run_again(project):
    for text in ("", "{", "\x00", "[]"):
        (project / "outputs/tour/status/01_first.json").write_text(text)
        assert states(project)[0] == ("stale", "its status file is damaged"), text


@pytest.mark.parametrize("name", pipeline.WRITTEN)
def test_what_stands_in_the_way_of_a_run_is_told_before_its_first_stage(project, name, monkeypatch):
    place = project / "outputs/tour" / name
    place.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:  # root may write everywhere, so no mode would tell
        patch.setattr(os, "access", lambda folder, mode: Path(folder) != place)
        with pytest.raises(PermissionError) as refusal:
            run(project, force=True)
    assert refusal.value.filename == str(place)
    shutil.rmtree(place)
    place.write_text("a file")
    with pytest.raises(UserError, match=f"{name} is a file where a folder should be; move it"):
        run(project, force=True)
    assert trace(project) == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, os.strerror(28), "results/01.json"),
         ["The disk is full: free some space first."]),
        (UserError("results/01.json is damaged; delete it"), []),
        (FetchError("results/01.json is for a test"), []),
    ],
)  # fmt: skip
def test_what_is_told_in_a_sentence_has_no_traceback(project, error, advice):
    stage = stages.load_stages("tour", project / "notebooks", project / "outputs")[0]
    said = f"cell 9 raised {type(error).__name__}: {error}"
    ended = SimpleNamespace(problem=said, killed=False, detail="Traceback", cell=9, source="save()")
    lines = pipeline._failure(stage, ended).splitlines()
    assert lines[:-2] == [f"01_first: {said}", *advice] and "results/01.json" in said
    assert lines[-2].endswith("01_first.failed.ipynb") and lines[-1].endswith("FROM=01")


def test_each_error_that_needs_no_traceback_is_one_of_the_kit():
    sources = "\n".join(file.read_text() for file in (ROOT / "kit").rglob("*.py"))
    assert all(f"\nclass {name}(" in sources for name in errors.KNOWN_ERRORS)


def test_a_damaged_results_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    notebook.save_results("01_x", {"a": 1}, "tour")
    file = tmp_path / "tour/results/01_x.json"
    file.write_text('{"a": ')
    with pytest.raises(UserError, match=f"{file} is damaged .*run its notebook again"):
        exhibits.load_results("tour")


def test_a_mistyped_profile_in_a_notebook_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    with pytest.raises(ValueError, match="no profile 'nope'; PROFILE is one of: tour, laptop"):
        paths.run_dir("nope")
    assert paths.run_dir("laptop") == tmp_path / "laptop"


def test_a_damaged_failed_notebook_still_says_failed(project):
    executed(project, "01_first.failed").write_text("{")
    assert states(project)[0] == ("failed", "01_first.failed.ipynb is damaged")


def test_a_failing_cell_is_shown_and_kept_and_the_run_goes_on_from_it(project, capsys):
    (project / "raise").touch()
    edit(project / "kit/alpha.py", "return B", "return B + 0")
    before = executed(project).read_bytes()
    assert run(project) == 1
    said = capsys.readouterr().out
    assert "cell 8 of 11 in 01_first.ipynb" in said
    assert "raise ValueError('one\\ntwo')" in said
    assert "ValueError: one" in said
    assert "\x1b" not in said
    assert "make reproduce PROFILE=tour FROM=01" in said
    assert trace(project) == ["01_first"]  # the second was not tried
    failed = executed(project, "01_first.failed")
    assert "ValueError" in failed.read_text()
    assert executed(project).read_bytes() == before
    assert states(project)[0] == ("failed", "cell 8 raised ValueError: one")
    (project / "raise").unlink()
    assert run(project) == 0
    assert trace(project)[1:] == ["01_first"]
    assert not failed.exists()


def test_a_killed_kernel_is_not_a_finished_one(project, capsys):
    (project / "die").touch()
    edit(project / "kit/beta.py", "42", "43")
    assert run(project) == 1
    said = capsys.readouterr().out
    assert "killed in cell 10, most likely for memory: peak " in said
    peak = float(said.partition("peak ")[2].split()[0])
    assert 0.15 <= peak < 2
    assert "lower BATCH" in said
    assert states(project)[0][0] == "failed"
    left = json.loads(executed(project, "01_first.failed").read_text())
    status = {cell["metadata"]["papermill"]["status"] for cell in left["cells"][1:]}
    assert status == {"completed"}  # why papermill's own word is not taken


def test_sys_exit_does_not_pass_for_the_end(project, capsys):
    write_notebook(project / "notebooks/02_second.ipynb", ["A = 1", "exit()", "import sys", "A"])
    edit(project / "notebooks/02_second.ipynb", "exit()", "raise SystemExit(0)")
    assert run(project) == 1
    assert "before the last cell" in capsys.readouterr().out
    assert states(project)[1][0] == "failed"


def test_kill_of_the_pipeline_itself_repeats_only_the_stage_in_flight(project):
    (project / "wait").touch()
    (project / "pid.txt").unlink()
    command = [sys.executable, "-m", "kit", "reproduce", "--profile", "tour", "--from", "02"]
    env = os.environ | {"KIT_OUTPUTS": str(project / "outputs")}
    child = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.DEVNULL)
    wait_until((project / "pid.txt").exists)
    first, second = stages.load_stages("tour", project / "notebooks", project / "outputs")
    wait_until(lambda: pipeline.running(second) == "cell 6 of 7")
    assert pipeline.running(first) == ""
    with pytest.raises(UserError, match=f"process {child.pid}") as refusal:
        run(project)
    assert refusal.value.code == pipeline.LOCKED
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert second.running.exists() and pipeline.running(second) == ""
    kernel = int((project / "pid.txt").read_text() or 0)
    wait_until(lambda: not psutil.pid_exists(kernel))  # it notices that its parent is gone
    (project / "wait").unlink()
    edit(project / "notebooks/02_second.ipynb", "LIMIT = 1", "LIMIT = 2")
    assert run(project) == 0
    assert trace(project) == ["02_second", "02_second"]
    assert states(project) == [("fresh", ""), ("fresh", "")]


def wait_until(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for a minute in vain")


def test_the_lock_goes_with_its_holder(project):
    with open(project / "outputs/tour/run.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            run(project)
    assert run(project) == 0


def test_an_executed_notebook_opens_with_its_provenance(finished):
    book = nbformat.read(executed(finished), as_version=4)
    nbformat.validate(book)
    top, stamp = book.cells[0], book.metadata["kit"]
    assert top.metadata["tags"] == ["provenance"]
    lock = provenance.file_hash(finished / "requirements.lock")
    for text in ("commit", lock, "SIZE=2", "| seed | 7 |", "`abc123`", " core", "numpy", "GiB"):
        assert text in top.source
    assert stamp["parameters"] == {"PROFILE": "tour", "SEED": 7, "SIZE": 2, "BATCH": 8}
    assert stamp["fingerprints"] == {"model": "abc123"}
    assert stamp["versions"]["numpy"] == np.__version__
    assert stamp["peak_memory_bytes"] > 10e6
    assert stamp["started"] <= stamp["finished"]
    assert "def answer" in str(book.cells[6].outputs)


def test_no_folder_user_or_host_of_this_machine_is_left(finished):
    book = nbformat.read(executed(finished), as_version=4)
    assert book.cells[8].outputs[0].text == "./data ~/x /scratch/user/y user@host\n"
    assert str(finished) not in executed(finished).read_text()
    assert f"{Path.home()}/" not in executed(finished).read_text()


SCRUBBED = {
    "/work/kit/data/x.toml": "./data/x.toml",
    "/work/kit2/data": "/work/kit2/data",
    "see /work/kit.": "see ..",
    "\x1b[32m/work/kit/a.py\x1b[39m:3": "\x1b[32m./a.py\x1b[39m:3",
    "file:///work/kit/a": "file://./a",
    "PATH=/home/max/bin:/work/kit": "PATH=~/bin:.",
    "/disk/out/laptop": "outputs/laptop",
    "/scratch/max/job": "/scratch/user/job",
    "max 3, min/max, a/max = 1": "max 3, min/max, a/max = 1",
    "max@gpu7.example.org on gpu7": "user@host on host",
    "gpu70 and gpu7-b": "gpu70 and gpu7-b",
}


@pytest.mark.parametrize("text", SCRUBBED)
def test_scrubbing(text):
    scrub = provenance.scrubber(
        Path("/work/kit"), Path("/disk/out"), Path("/home/max"), "max", "gpu7.example.org"
    )
    assert scrub(text) == SCRUBBED[text]


def test_scrubbing_leaves_pictures_and_english_host_names_alone():
    scrub = provenance.scrubber(Path("/work/kit"), None, Path("/"), "max", "table")
    output = {"image/png": "AA /work/kit AA", "text/plain": ["/work/kit table", "ssh://table"]}
    assert provenance.scrub_tree(output, scrub) == {
        "image/png": "AA /work/kit AA",
        "text/plain": [". table", "ssh://host"],
    }


def test_a_written_file_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "x.json"
    provenance.write_json(file, {"b": 1, "a": 2})
    assert json.loads(file.read_text()) == {"a": 2, "b": 1}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*deep/x.json'"):
        provenance.write_json(file, {"c": 3})
    assert json.loads(file.read_text()) == {"a": 2, "b": 1}
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


def test_results_keep_twelve_digits_and_say_what_they_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    values = {"third": 1 / 3, "n": np.int64(3), "none": math.nan, "row": (np.float32(0.5), True)}
    notebook.save_results("01_x", values, "tour")
    assert exhibits.load_results("tour") == {
        "01_x": {"third": 0.333333333333, "n": 3, "none": None, "row": [0.5, True]}
    }
    with pytest.raises(TypeError, match=r"02_x\.a\[1\] is a Path|02_x\.a\[1\] is a PosixPath"):
        notebook.save_results("02_x", {"a": [1, Path("x")]}, "tour")


def test_imports_of_the_kit_are_followed(tmp_path):
    for name, text in {
        "__init__": "__version__ = '1'",
        "a": "import kit.b as bee",
        "b": "def f():\n    from . import c",
        "c": "import json",
        "d": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = imports.kit_modules(("%matplotlib inline\nfrom kit import a, __version__",), tmp_path)
    assert [file.name for file in found] == ["__init__.py", "a.py", "b.py", "c.py"]


@pytest.fixture
def folders(tmp_path) -> Path:
    """A kit of packages, two of them nested, whose modules import each other in several ways."""
    files = {
        "__init__.py": '"""The kit, with decode."""',
        "paths.py": "ROOT = 1",
        "inference/__init__.py": "from kit.paths import ROOT as root",
        "inference/decode.py": "from . import cache\nfrom ..models.load import load",
        "inference/cache.py": "import json",
        "inference/unrelated.py": "",
        "models/__init__.py": "",
        "models/load.py": "import kit.models.formats.gguf",
        "models/formats/__init__.py": "",
        "models/formats/gguf.py": "from ... import paths\nfrom .other import *\nfrom . import twin",
        "models/formats/other.py": "",
        "models/formats/twin/__init__.py": "def f():\n    from .deep import g",
        "models/formats/twin/deep.py": "",
    }
    for name, text in files.items():
        file = tmp_path / "kit" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "kit"


@pytest.mark.parametrize(
    "source",
    [
        "from kit.inference.decode import decode",
        "from kit.inference import decode",
        "import kit.inference.decode",
        "import kit.inference.decode as d, os",
        "def f():\n    from kit.inference.decode import *",
    ],
)
def test_imports_are_followed_through_folders_of_any_depth(folders, source):
    found = imports.kit_modules((source,), folders)
    every = {*folders.rglob("*.py")}
    assert {*found} == every - {folders / "inference" / "unrelated.py"} and found == sorted(found)
    (alone, package) = imports.kit_modules(("from kit import models",), folders)
    assert (alone.parent, package.parent) == (folders, folders / "models")


@pytest.mark.parametrize(
    "source, missing",
    [
        ("from kit import decode", "kit/decode.py"),  # a word of the docstring
        ("import kit.inference.sampling", "kit/inference/sampling.py"),
        ("from kit.inference import root, sampling", "kit/inference/sampling.py"),
        ("from kit.decode.fast import decode", "kit/decode.py"),
    ],
)
def test_an_import_without_a_file_is_an_error(folders, source, missing):
    with pytest.raises(ModuleNotFoundError, match=missing):
        imports.kit_modules((source,), folders)


def test_a_notebook_that_imports_no_file_is_refused_in_a_sentence(project):
    edit(project / "notebooks/01_first.ipynb", "from kit import alpha", "from kit import alfa")
    with pytest.raises(
        UserError, match=r"01_first.ipynb imports.* does not exist: kit.alfa .*alfa"
    ):
        states(project)


def test_each_import_of_the_kit_in_a_notebook_is_the_file_that_python_finds():
    for stage in stages.load_stages("tour"):
        code = stages._code(stage.cells)
        found = {*imports.kit_modules(code, ROOT / "kit")}
        for name in {name for text in code for name in imports.imported(text)}:
            value = pkgutil.resolve_name(name)
            module = value if inspect.ismodule(value) else sys.modules[name.rpartition(".")[0]]
            assert Path(module.__file__) in found, f"{stage.name}: {name}"


def test_the_hash_of_the_sources_covers_all_folders(folders):
    seen = [provenance.collect(folders.parent)["kit_sha256"]]
    for name in ("paths.py", "inference/decode.py", "models/formats/twin/deep.py"):
        edit(folders / name, "", "# more\n")
        seen.append(provenance.collect(folders.parent)["kit_sha256"])
    assert len({*seen}) == 4


def test_a_clock_reads_as_a_clock():
    assert [pipeline.clock(s) for s in (6.6, 185, 3599.7)] == ["0:07", "3:05", "1:00:00"]
