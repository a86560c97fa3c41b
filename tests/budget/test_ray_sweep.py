"""The sweep on a local Ray cluster, workers killed, against the same sweep in one process."""

import os
import signal
import sys
import threading
import time

import pytest

from kit.budget import ray_sweep, sweep
from kit.budget.sweep import Grid, SweepRun
from kit.data import problems, prompts
from kit.evaluation.store import Store
from kit.models.load import load

SUMS = problems.load("laptop", "test", families=["chain_sum"], levels=[1]).problems[:6]
GRID = Grid(bits=(16,), policies=("full", "window 12", "tova 12"), tokens=(4, 16), widths=(1, 2))
ASKED = {False: prompts.build(prompts.plain, SUMS), True: []}
HOW = dict(batch_size=4)


@pytest.mark.slow
def test_killed_workers_are_replaced_and_the_store_ends_the_same(tiny_folder, tmp_path):
    pytest.importorskip("ray")
    said, shared = [], tmp_path / "shared"

    def kill(pids: list[int]) -> None:
        """One before it has begun, another one in the middle of the work."""
        os.kill(pids[0], signal.SIGKILL)

        def later() -> None:
            while not len(Store(shared).keys()):
                time.sleep(0.1)
            os.kill(pids[1], signal.SIGKILL)

        threading.Thread(target=later, daemon=True).start()

    how = dict(report=said.append, started=kill, **HOW)
    base = load(str(tiny_folder), "float32")
    failed = ray_sweep.generate(base, GRID, ASKED, Store(shared), 2, workers=2, **how)
    assert not failed and any("its worker died; a new one goes on" in line for line in said)
    store = Store(tmp_path / "alone")
    alone = sweep.sweep(base, GRID, ASKED, store, 2, said.append, **HOW)
    assert Store(shared).logical_hash() == store.logical_hash()
    keys = Store(shared).table()["key"]
    assert keys.is_unique and len(keys) == len(GRID.runs) * 6 * 2 * 2
    again = sweep.sweep(base, GRID, ASKED, Store(shared), 2, said.append, **HOW)
    assert again[0].drop(columns="seconds").equals(alone[0].drop(columns="seconds"))


def test_a_run_that_has_no_room_is_told_by_the_worker(tiny_folder, tmp_path, monkeypatch):
    worker = ray_sweep.Worker(str(tiny_folder), "float32", str(tmp_path))

    def full(*args, **how):
        raise MemoryError("No memory for 9 slots")

    monkeypatch.setattr(sweep, "generate", full)
    assert worker.generate(SweepRun(), GRID, ASKED[False], 2, HOW) == (
        "out of memory: No memory for 9 slots"
    )


def test_the_environment_says_how_many(monkeypatch):
    for name in ("WORKERS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert ray_sweep.requested_workers() == 0
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ray_sweep.requested_workers() == 1
    monkeypatch.setenv("WORKERS", "4")
    assert ray_sweep.requested_workers() == 4
    monkeypatch.setenv("WORKERS", "many")
    with pytest.raises(ValueError, match="WORKERS is 'many'; give a number of processes"):
        ray_sweep.requested_workers()


def test_without_ray_it_says_how_to_get_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match="an extra: run `make cluster`, or unset them"):
        ray_sweep.generate(tiny, GRID, ASKED, Store(tmp_path), 2, workers=2)


def test_there_are_no_more_workers_than_gpus(monkeypatch):
    """More would wait for a GPU for ever."""
    said = []
    assert ray_sweep.capped(4, 0, said.append) == 4 and not said, "without CUDA none is asked for"
    monkeypatch.setattr(ray_sweep.torch.cuda, "is_available", lambda: True)
    assert ray_sweep.capped(2, 2.0, said.append) == 2 and not said
    assert ray_sweep.capped(4, 1.0, said.append) == 1
    assert said == ["1 workers, not 4: each has a GPU of its own"]
    with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
        ray_sweep.capped(4, 0, said.append)
