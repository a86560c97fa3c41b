"""gpu-check in its dry form, on the CPU and without what a machine with a GPU lacks; its runner;
and what gpu-pack packs."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")

from kit import paths
from kit.models.bundled import SMOLLM2  # noqa: E402
from tests import gpu_check, gpu_pack  # noqa: E402

ABSENT = ("lancedb", "dspy", "optuna", "papermill", "nbformat", "nbconvert", "ipykernel", "IPython")
ABSENT += ("jupyterlab", "ipywidgets", "reasoning_gym", "rocrate", "gguf", "vllm")
ON_A_GPU = {"free_memory", "vllm"}  # what a CPU cannot even pretend


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The process of a dry run in bfloat16, as on a GPU, and the folder it wrote into."""
    folder = tmp_path_factory.mktemp("gpu")
    block = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    (folder / "sitecustomize.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_check", "--dry", "--out", folder],
        env=os.environ | {"PYTHONPATH": str(folder), "KIT_DTYPE": "bfloat16"},
        cwd=paths.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return done, folder


@pytest.mark.slow
def test_every_check_runs_on_a_cpu_and_says_one_line(dry):
    done, folder = dry
    found = json.loads((folder / "gpu.json").read_text())
    assert found["dry"] and found["provenance"]["versions"]["torch"] == version("torch")
    assert list(found["checks"]) == list(gpu_check.CHECKS)
    verdicts = {name: row["verdict"] for name, row in found["checks"].items()}
    assert verdicts == {n: "skipped" if n in ON_A_GPU else "ok" for n in gpu_check.CHECKS}
    assert done.returncode == 0
    *lines, last = done.stdout.splitlines()
    for line, (name, row) in zip(lines, found["checks"].items(), strict=True):
        assert re.fullmatch(rf"{name} +{row['verdict']} +{row['seconds']} s  (.+)", line)
        assert line.endswith(row["said"])
    assert last.startswith(f"{sum(row['seconds'] for row in found['checks'].values()):.0f} s: ")


@pytest.mark.slow
def test_the_json_has_the_figures_behind_each_line(dry):
    checks = json.loads((dry[1] / "gpu.json").read_text())["checks"]
    extra = {"verdict", "seconds", "said"}
    steps = [row for name, row in checks["decode_steps"].items() if name not in extra]
    assert len(steps) == 13  # seven policies, two precisions of the cache, four of long texts
    costs = {"ms", "tokens_s", "peak_gb", "cache_gb", "live_gb"}
    assert all(costs | {"captured"} <= row.keys() for row in steps)
    same = [name for name in checks["as_on_the_cpu"] if name not in extra]
    policies = "full dms window tova h2o random knorm forced 8-bit 4-bit".split()
    assert all(any(policy in name for name in same) for policy in policies)
    for name in ("evictor_training", "bank_training", "sft_training", "grpo_training"):
        assert len(checks[name]["steps"]) >= 2
        assert checks[name].keys() >= {"s_per_step", "peak_gb"}
    assert {"kit", "transformers"} <= checks["tokens_per_second"].keys()
    assert {"us", "sdpa_us", "gbs", "share"} == checks["kernel_bandwidth"]["2 x 32"].keys()


def test_a_check_that_fails_is_told_and_stops_no_other(capsys):
    def fine(here, found):
        found["figure"] = 1
        print("In 2 steps nothing was learnt.")
        return "as it should be"

    def crashes(here, found):
        found["before"] = 2
        raise RuntimeError("first line\nsecond line")

    def wrong(here, found):
        raise AssertionError("7 is not 8")

    def poor(here, found):
        found["poor"] = "too slow"
        return "9 s"

    def swallows(here, found):
        try:
            time.sleep(30)
        except Exception:
            return "finished"

    def skips(here, found):
        raise gpu_check.Skipped("not here")

    checks = {f.__name__: (60, f) for f in (fine, crashes, wrong, poor, skips)}
    checks |= {"swallows": (3.1, swallows), "after": (60, fine)}
    kept = []
    found = gpu_check.run(checks, gpu_check.Here(dry=True), keep=lambda rows: kept.append({**rows}))
    verdicts = [row["verdict"] for row in found.values()]
    assert verdicts == ["ok", "crash", "wrong", "poor", "skipped", "late", "ok"]
    assert [len(rows) for rows in kept] == [1, 2, 3, 4, 5, 6, 7], "kept after each"
    assert found["crashes"]["before"] == 2 and "second line" in found["crashes"]["error"]
    assert found["crashes"]["said"].startswith("RuntimeError: first line second line (")
    assert found["poor"]["said"] == "too slow; 9 s"
    assert found["swallows"]["said"] == "not done after 3 s"
    assert len(capsys.readouterr().out.splitlines()) == len(checks)
    late = gpu_check.run({"fine": (60, fine)}, gpu_check.Here(dry=True), limit=1)
    assert (late["fine"]["verdict"], late["fine"]["said"]) == ("skipped", "no time left")


def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and ("needs a CUDA GPU" in said or "cannot use it" in said)
    assert not [*tmp_path.iterdir()]
    assert gpu_check.main(["--dry", "kernel"]) == 2
    assert capsys.readouterr().err.startswith("There is no check 'kernel'; known: environment, ")


def test_only_what_every_check_said_on_a_gpu_is_published_under_its_name(tmp_path):
    checks = {name: {"said": f"see {paths.ROOT}/kit"} for name in gpu_check.CHECKS}
    checks["environment"]["card"] = "NVIDIA H100 80GB HBM3"
    file = gpu_check.publish({"dry": False, "checks": checks}, tmp_path / "gpu")
    assert file == tmp_path / "gpu" / "nvidia-h100-80gb-hbm3.json"
    assert json.loads(file.read_text())["checks"]["vllm"] == {"said": "see ./kit"}
    for dry, kept in ((True, checks), (False, {"environment": checks["environment"]})):
        with pytest.raises(ValueError, match="only what every check said on a GPU"):
            gpu_check.publish({"dry": dry, "checks": kept}, tmp_path)


def test_a_check_that_was_made_again_on_the_same_card_replaces_the_first():
    def run(card, code, **checks):
        provenance = {"kit_sha256": code, "hardware": {"gpus": [{"name": card}]}}
        return {"dry": False, "provenance": provenance, "checks": checks}

    first = run("H200", "a", kernel={"verdict": "wrong"}, energy={"verdict": "ok"})
    again = run("H200", "b", kernel={"verdict": "ok"})
    assert gpu_check.joined([first, again])["checks"] == {
        "kernel": {"verdict": "ok", "kit_sha256": "b"},
        "energy": {"verdict": "ok", "kit_sha256": "a"},
    }
    with pytest.raises(ValueError, match="of several cards: H100 and H200"):
        gpu_check.joined([first, run("H100", "b")])


def test_a_pack_holds_what_is_pinned_and_prints_commands_for_any_machine(
    bundled, tmp_path, monkeypatch, capsys
):
    fetched = []
    monkeypatch.setattr(gpu_pack, "PACK", tmp_path / ".gpu")
    monkeypatch.setattr(gpu_pack, "PIECES", tmp_path / ".gpu-weights")
    monkeypatch.setattr(gpu_pack, "fetch", lambda names, folder: fetched.extend(names))
    assert gpu_pack.main([]) == 0
    assert len(fetched) == 10 and all(
        version(x) == gpu_pack.pinned(x).partition("==")[2] for x in fetched
    )
    assert {file.name for file in (tmp_path / ".gpu" / "tokenizer").iterdir()} >= {"tokenizer.json"}
    said = capsys.readouterr().out
    assert "python3 -m tests.gpu_check --out OUT" in said and "real_weights" not in said
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)\b", said)
    monkeypatch.setattr(gpu_pack, "MOST", 1000)
    assert gpu_pack.main([]) == 1 and "nothing is packed" in capsys.readouterr().out


def test_pieces_of_the_weights_make_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "PIECES", tmp_path / "pieces")
    monkeypatch.setattr(gpu_pack, "PIECE", 40)
    whole = tmp_path / SMOLLM2.files[0].name
    whole.write_bytes(bytes(range(100)))
    made = gpu_pack.pieces(whole)
    files = [file for folder in made for file in folder.iterdir()]
    assert [file.name for file in files] == [f"{whole.name}.{i}" for i in (1, 2, 3)]
    assert b"".join(file.read_bytes() for file in files) == bytes(range(100))
