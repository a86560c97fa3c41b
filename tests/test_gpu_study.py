"""gpu-study: what is packed, the way there and back, and all of it on the CPU at a tiny size."""

import json
import os
import subprocess
import sys

import pytest

from kit import paths
from kit.models import bundled
from kit.pipeline import stages
from kit.report import verify
from tests import gpu_pack, gpu_run, gpu_study


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A pack of three pieces: one wheel, and files in the place of models."""
    models = tmp_path / "models"
    for folder in (models, models / "minilm"):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(os.urandom(90_000))
    monkeypatch.setattr(paths, "MODELS", models)
    monkeypatch.setattr(gpu_study, "PIECE", 80_000)
    monkeypatch.setattr(bundled, "fetch", lambda model, place: [
        (models / "minilm" if model is bundled.MINILM else models) / "weights"])  # fmt: skip
    monkeypatch.setattr(gpu_pack, "fetch", lambda names, folder: [
        (folder / f"{name}.whl").write_bytes(b"wheel") for name in names])  # fmt: skip
    (tmp_path / "work").mkdir()
    folder = tmp_path / "pack"
    made = gpu_study.pack(bundled.CODER, ["one"], {"01": {"PROBLEMS": 2}}, "tour", folder)
    return folder, made, models


def test_a_machine_lacks_what_neither_torch_nor_transformers_bring():
    names = gpu_study.lacking()
    assert {"lancedb", "dspy", "papermill", "trl", "math-verify", "pebble", "hqq"} <= {*names}
    assert not {"torch", "transformers", "tokenizers", "safetensors", "jupyterlab"} & {*names}
    assert all("==" in gpu_pack.pinned(name) for name in names)


def test_the_stages_set_parameters_that_their_notebooks_have():
    books = {stage.name[:2]: stage for stage in stages.load_stages(gpu_study.PROFILE)}
    for number, values in gpu_study.STAGES.items():
        assert {*values} <= {*books[number].parameters}, number
    assert [*gpu_study.STAGES][-1] == "07"


def test_pieces_join_to_what_was_packed(packed, tmp_path):
    folder, made, models = packed
    assert len(made) == 3 and all(file.stat().st_size <= 80_000 for file in made)
    manifest = gpu_run.join(folder, tmp_path / "there")
    assert (tmp_path / "there" / "wheels" / "one.whl").read_bytes() == b"wheel"
    for name in ("weights", "minilm/weights"):
        unpacked = tmp_path / "there" / "cache" / "models" / name
        assert unpacked.read_bytes() == (models / name).read_bytes()
    variables = gpu_run.environment(tmp_path / "there", manifest)
    assert variables["KIT_MODEL"] == bundled.CODER.name and variables["HF_HUB_OFFLINE"] == "1"
    assert variables["PYTHONPATH"].startswith(str(tmp_path / "there" / "site"))


def test_a_piece_that_is_missing_or_damaged_is_named_and_nothing_runs(packed, tmp_path, capsys):
    folder, made, _ = packed
    where = [str(folder), str(tmp_path / "out"), "--work", str(tmp_path / "there")]
    whole = made[1].read_bytes()
    made[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert gpu_run.main(where) == 2
    assert f"not the piece that was packed: {made[1].name}" in capsys.readouterr().out
    made[1].unlink()
    assert gpu_run.main(where) == 2 and made[1].name in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_comes_back_is_cut_and_follows_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "MOST", 10)
    source, out, known = tmp_path / "run", tmp_path / "out", {}
    for name, size in (("store/a", 25), ("results/b", 10), ("models/c", 5)):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_bytes(os.urandom(size))
    gpu_run.bring(source, out, known)
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {"store/a.part000", "store/a.part001", "store/a.part002", "results/b"}
    parts = sorted((out / "store").iterdir())
    assert b"".join(file.read_bytes() for file in parts) == (source / "store/a").read_bytes()
    (source / "store/a").write_bytes(b"short")
    gpu_run.bring(source, out, known)
    assert [file.name for file in (out / "store").iterdir()] == ["a"]


def test_a_stage_that_is_cut_leaves_time_for_the_verdicts(tmp_path, monkeypatch):
    said = tmp_path / "said"
    program = f"import sys, time; open({str(said)!r}, 'a').write(sys.argv[1] + ' '); "
    program += "time.sleep(60 if sys.argv[1] == '01' else 0)"
    real = subprocess.Popen

    def started(command, **how):
        number = command[command.index("--only") + 1]
        return real([sys.executable, "-c", program, number], **how)

    monkeypatch.setattr(gpu_run.subprocess, "Popen", started)
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    manifest = {"profile": "tour", "stages": {"01": {}, "06": {}, "07": {}}, "environment": {}}
    end = gpu_run.time.monotonic() + gpu_run.JUDGE + 2
    assert not gpu_run.run(tmp_path, tmp_path / "out", manifest, end)
    assert said.read_text().split() == ["01", "07"], "06 had no time left"


@pytest.mark.slow
def test_a_tiny_study_goes_there_and_comes_back_and_is_verified(tmp_path):
    tiny = {"01": {"PROBLEMS": 2, "SAMPLES": 1, "MAX_NEW_TOKENS": 4}, "07": {"STUDIES": 20}}
    pieces = gpu_study.pack(None, [], tiny, "tour", tmp_path / "pack")
    assert max(file.stat().st_size for file in pieces) <= 60 * 2**20
    out, work = tmp_path / "out", tmp_path / "there"
    command = [sys.executable, "-m", "tests.gpu_run", tmp_path / "pack", out, "--work", work]
    done = subprocess.run(
        [*command, "--limit", "900"], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(file.stat().st_size for file in out.rglob("*")) <= gpu_run.MOST
    command = "from pathlib import Path; from tests import gpu_study; "
    command += f"print(gpu_study.publish(Path({str(out)!r}), Path({str(tmp_path / 'shelf')!r})))"
    done = subprocess.run([sys.executable, "-c", command], cwd=paths.ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (place,) = (tmp_path / "shelf").iterdir()
    assert str(place) == done.stdout.split()[-1]
    records = json.loads((place / "results" / "01_baseline.json").read_text())["keys"]
    assert len(records) == 2 * 2
    assert not verify.check(place).differences
