"""The sweep on a Ray cluster: one actor per device or core group, each with its model.

Ray is an extra (`make cluster`). With RAY_ADDRESS the sweep joins that cluster, otherwise one is
started here. An actor does whole runs and stores them itself, in the one store, which all must
reach. A run whose actor died is given to a new one, which does what is missing; one that takes two
actors with it is recorded as out of memory. What is stored does not depend on who did it.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from kit.budget import sweep
from kit.budget.sweep import Grid, SweepRun
from kit.evaluation.store import Store
from kit.models.load import Model, load
from kit.schema import Prompt

ATTEMPTS = 2  # actors that may die of one run


def requested_workers() -> int:
    """Actors that the environment asks for: WORKERS; 1 with RAY_ADDRESS alone; 0 for none."""
    workers = os.environ.get("WORKERS", "")
    if workers and not workers.isdecimal():
        raise ValueError(f"WORKERS is {workers!r}; give a number of processes, or leave it out")
    return int(workers or bool(os.environ.get("RAY_ADDRESS")))


class Worker:
    """A model in a process of its own."""

    def __init__(self, name: str, dtype: str, store: str):
        self.base, self.store = load(name, dtype), Store(store)

    def pid(self) -> int:
        """Process id."""
        return os.getpid()

    def generate(
        self, run: SweepRun, grid: Grid, prompts: Sequence[Prompt], samples: int, how: dict
    ):
        """Store the records of a run; returns "", or why it did not fit into memory."""
        try:
            sweep.generate(
                self.base, run, grid, prompts, self.store, samples, report=lambda line: None, **how
            )
        except sweep.OUT_OF_MEMORY as error:
            return f"{sweep.OUT}: {error}"
        return ""


def capped(workers: int, gpus: float, report: Callable[[str], None] = print) -> int:
    """`workers`, but at most `gpus` where each needs one: further ones would wait forever."""
    if not torch.cuda.is_available() or workers <= gpus:
        return workers
    if gpus < 1:
        raise ValueError(
            "the Ray cluster has no GPU, and a worker is to have one here; start its nodes with "
            "--num-gpus, or unset WORKERS and RAY_ADDRESS"
        )
    report(f"{int(gpus)} workers, not {workers}: each has a GPU of its own")
    return int(gpus)


def _joined(workers: int) -> ModuleType:
    """Ray, connected to the cluster of RAY_ADDRESS or to one of `workers` processes here."""
    try:
        import ray
    except ImportError as error:
        raise ModuleNotFoundError(
            "WORKERS and RAY_ADDRESS need Ray, an extra: run `make cluster`, or unset them."
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, ignore_reinit_error=True, **local)
    return ray


def generate(
    base: Model,
    grid: Grid,
    prompts: dict[bool, Sequence[Prompt]],
    store: Store,
    samples: int,
    workers: int = 0,
    report: Callable[[str], None] = print,
    started: Callable[[list[int]], None] = lambda pids: None,
    failed: dict[SweepRun, str] | None = None,
    **how,
) -> dict[SweepRun, str]:
    """Do all runs of `grid` on `workers` actors that load `base` by its name, for `sweep.sweep` to
    find in the store; the runs that did not fit into memory, with the reason.

    By default there are `requested_workers`, and never more than the cluster has GPUs, where there
    are any. What has `failed` before is not tried again; `started`
    gets the process ids of the actors.
    """
    workers = workers or requested_workers()
    ray = _joined(workers)
    workers = capped(workers, ray.cluster_resources().get("GPU", 0), report)
    actor = ray.remote(num_cpus=1, num_gpus=int(torch.cuda.is_available()))(Worker)
    place = str(store.folder)
    place = place if "://" in place else str(Path(place).resolve())
    begin = partial(actor.remote, base.name, base.dtype_name, place)
    try:
        failed, died = dict(failed or {}), dict.fromkeys(grid.runs, 0)
        todo = deque(run for run in grid.runs if run not in failed)
        idle = [begin() for _ in range(min(workers, len(todo)))]
        started(ray.get([worker.pid.remote() for worker in idle]))
        busy: dict = {}
        while todo or busy:
            while todo and idle:
                worker, run = idle.pop(), todo.popleft()
                task = worker.generate.remote(run, grid, prompts[run.memory], samples, how)
                busy[task] = worker, run
            (ready,), _ = ray.wait([*busy], num_returns=1)
            worker, run = busy.pop(ready)
            try:
                why = ray.get(ready)
                idle.append(worker)
            except ray.exceptions.RayActorError:
                died[run] += 1
                idle.append(begin())
                if died[run] < ATTEMPTS:
                    report(f"{run.name}: its worker died; a new one goes on")
                    todo.appendleft(run)
                    continue
                why = f"{sweep.OUT}: {ATTEMPTS} workers died of it"
            if why:
                failed[run] = why
            report(f"{run.name}: {why or 'done'}, {len(todo) + len(busy)} runs left")
    finally:
        ray.shutdown()
    return failed
