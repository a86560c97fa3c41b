"""Two processes of one machine, by `accelerate launch` and the shipped configurations: killed and
started again they end as if nothing had been. FSDP shards over gloo, see sharded.py."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from kit import paths
from kit.training.sft import history


def start(name: str, model, folder, **environment) -> tuple[int, list[dict]]:
    """The exit status of a training in `folder`, and what its first process reported."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", paths.DATA / "launch" / f"{name}.yaml", "--mixed_precision", "no"]
    command += [paths.ROOT / "tests" / "training" / "sharded.py", model, folder]
    environment |= {"KIT_DTYPE": "float32", "PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*map(str, command)], env=os.environ | environment, capture_output=True, text=True
    )
    print(run.stderr)  # shown where the test fails
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return run.returncode, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_go_on_after_a_kill_and_end_the_same(name, tiny_folder, tmp_path):
    status, unbroken = start(name, tiny_folder, tmp_path / "whole")
    assert status == 0 and [row["step"] for row in unbroken] == [1, 2, 3, 4]
    assert any(row["grad_norm"] > 0 for row in unbroken) and unbroken[-1]["kl"] > 0
    status, before = start(name, tiny_folder, tmp_path / "cut", DIES_AT="3")
    assert status != 0 and len(before) <= 3
    assert not [*tmp_path.glob("cut/*/model")] and [*tmp_path.glob("cut/*/checkpoints/*-2")]
    status, after = start(name, tiny_folder, tmp_path / "cut")
    assert status == 0 and [row["step"] for row in after] == [3, 4]
    curves, weights = [], []
    for run in ("whole", "cut"):
        (place,) = tmp_path.glob(f"{run}/*/model")
        curves.append([(row["loss"], row["reward"], row["grad_norm"]) for row in history(place)])
        weights.append(load_file(place / "model.safetensors"))
    assert curves[0] == curves[1] and weights[0].keys() == weights[1].keys()
    assert all(weights[1][name].equal(value) for name, value in weights[0].items())
    first = load_file(tiny_folder / "model.safetensors")
    assert any(not first[name].half().equal(value) for name, value in weights[0].items())
