"""Worker processes that compare two answers within bounds of CPU time and memory.

Built on pebble: a worker that exceeds a bound is killed and replaced, and the caller gets a reason
instead of an exception. At most `WORKERS` are spawned, when the first pair needs one, and end with
the interpreter. They never import the caller's `__main__`, so scripts need no
`if __name__ == "__main__"`.
"""

import atexit
import logging
import multiprocessing.spawn
import os
import resource
import signal
import sys
import threading
from concurrent.futures import TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess

from pebble import ProcessExpired, ProcessPool

from kit.evaluation.equivalence import equal, symbolic

CPU_SECONDS = 1.0  # of a worker, per pair: does not depend on how busy the machine is
WALL_SECONDS = 60.0  # per pair, against a worker that sleeps
MEMORY_BYTES = 2 << 30  # address space of a worker, on Linux
WORKERS = max(1, min(os.cpu_count() or 1, 8))
_NAME = "kit_grade_worker"


def _start_worker() -> None:
    """Bound the memory of this worker and import what every task needs."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # end at once, even inside a long C call
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    symbolic("x", "x+1")
    if sys.platform == "linux":  # macOS maps more than this at the start, and raises
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _judge(gold: str, answer: str, seconds: float) -> str:
    """The reason for one pair; the kernel kills this process if it takes too much CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF's default action is to terminate
    try:
        return "equal" if equal(gold, answer, symbolic) else "different"
    except MemoryError:
        return "memory"
    except Exception:  # sympy raises anything on hostile input, and not all of it can be pickled
        return "incomparable"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class _Worker(SpawnProcess):
    """A spawned process with a name of its own, so that `_preparation` can tell it apart."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = _NAME


class _Context(SpawnContext):
    Process = _Worker


def _preparation(name: str, original=multiprocessing.spawn.get_preparation_data) -> dict:
    """Data for a spawned process; for our workers without the caller's script to run again.

    A worker needs nothing of `__main__`, and an unguarded script would start a pool in it.
    """
    data = original(name)
    if name == _NAME:
        data = {key: value for key, value in data.items() if not key.startswith("init_main")}
    return data


multiprocessing.spawn.get_preparation_data = _preparation


class _Workers:
    """The process pool: started at the first pair that needs it, restarted if it breaks."""

    def __init__(self):
        self.pool: ProcessPool | None = None
        self.lock = threading.Lock()

    def schedule(self, pair: tuple[str, str]):
        with self.lock:
            if self.pool is not None and not self.pool.active:
                self._end()
            if self.pool is None:
                self.pool = ProcessPool(WORKERS, initializer=_start_worker, context=_Context())
            args = (*pair, CPU_SECONDS)
            future = self.pool.schedule(_judge, args=args, timeout=WALL_SECONDS)
            future.pool = self.pool
            return future

    def stop(self) -> None:
        with self.lock:
            if self.pool is not None:
                self._end()

    def _end(self) -> None:
        self.pool.stop()
        self.pool.join()
        self.pool = None


_workers = _Workers()
atexit.register(_workers.stop)
os.register_at_fork(after_in_child=_workers.__init__)  # a fork has none of the pool's threads


def compare(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The reason for each distinct (gold, answer), tidied: "equal", "different", "timeout", ...

    Also "memory" (or a crash), "incomparable" (sympy raised an error), "no worker" (none starts).
    """
    futures = {pair: _workers.schedule(pair) for pair in dict.fromkeys(pairs)}
    try:
        return {pair: _verdict(pair, future) for pair, future in futures.items()}
    finally:
        for future in futures.values():
            future.cancel()  # after an interrupt no worker goes on


def _verdict(pair: tuple[str, str], future, retry: bool = True) -> str:
    try:
        while not wait([future], timeout=1).done:
            if not future.pool.active:  # it broke while scheduling the pair, which is lost
                raise BrokenProcessPool
        return future.result()
    except TimeoutError:
        return "timeout"
    except ProcessExpired as death:
        return "timeout" if death.exitcode == -signal.SIGPROF else "memory"
    except BrokenProcessPool:
        return _verdict(pair, _workers.schedule(pair), retry=False) if retry else "no worker"
