"""One notebook in one kernel: run it through papermill and say honestly how it ended.

The kernel is always this interpreter, whatever kernelspecs are registered on the machine; it
talks over IPC sockets in a private folder, since TCP ports collide between parallel runs. A
thread watches the memory of the kernel and its workers. Imports papermill, so `kit.pipeline.run`
imports this only when a stage has to run.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellTimeoutError
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets import default

LOG = "kernel.log"  # what a kernel says outside of any cell
TAIL = 30  # lines of a traceback or log
SAMPLE_SECONDS = 0.2
CHILDREN_SECONDS = 2.0  # listing processes walks all of /proc, so less often
START_SECONDS = 300  # a loaded machine takes its time
IOPUB_SECONDS = 120  # papermill's 4 s fails cells with much output on a loaded machine
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONHASHSEED": "0",
}
logging.getLogger("papermill").setLevel(logging.CRITICAL)  # we report failures ourselves


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `problem` is empty only after the last cell has run."""

    problem: str  # one sentence
    killed: bool  # from outside, which nearly always is the kernel of the OS, for memory
    detail: str  # last lines of the traceback, without colour codes
    cell: int  # the last cell started, counted from 1 in the source notebook
    source: str  # of that cell
    seconds: float
    peak_bytes: int  # resident memory of the kernel and all its children, summed


class Watch(threading.Thread):
    """Samples the kernel's memory and calls `tick(cell)` several times a second."""

    def __init__(self, tick: Callable[[int], None]):
        super().__init__(daemon=True)
        self.tick = tick
        self.cell, self.source = 0, ""
        self.injected = 0  # cells of papermill before it
        self.peak_bytes = 0
        self.exit_code: int | None = None  # of a kernel that nobody asked to end
        self.kernel: psutil.Process | None = None
        self.family: set[psutil.Process] = set()
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        listed = float("-inf")
        while not self._stop_event.wait(SAMPLE_SECONDS):
            if self.kernel is not None and time.monotonic() - listed > CHILDREN_SECONDS:
                listed = time.monotonic()
                self._list_family(self.kernel)
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, self.family)))
            self.tick(self.cell)

    def stop(self) -> None:
        """End the thread, and every worker that outlived its kernel."""
        self._stop_event.set()
        self.join()
        for process in self.family:
            with suppress(psutil.NoSuchProcess):  # psutil knows a reused process id
                process.kill()

    def _list_family(self, kernel: psutil.Process) -> None:
        try:
            self.family |= {kernel, *kernel.children(recursive=True)}
        except psutil.NoSuchProcess:
            self.kernel = None


def execute(
    notebook: Path, output: Path, parameters: dict, root: Path, env: dict, tick: Callable
) -> Outcome:
    """Run `notebook` into `output` with `root` as working directory; `tick(cell)` as in Watch.

    Raises what is no fault of the notebook: KeyboardInterrupt, OSError on a full disk.
    """
    watch, began = Watch(tick), time.monotonic()
    problem = detail = ""
    watch.start()
    try:
        with _private_folder() as folder, open(folder / LOG, "w+", errors="replace") as log:
            manager = _manager(folder, ENVIRONMENT | _path(root) | env, watch, log)
            try:
                _papermill(notebook, output, parameters, root, watch, manager)
            except PapermillExecutionError as error:
                # Not the last cell started, where one tagged raises-exception let the run go on.
                watch.cell, watch.source = error.cell_index + 1 - watch.injected, error.source
                problem = f"cell {watch.cell} raised {error.ename}: {_first_line(error.evalue)}"
                detail = _tail("\n".join(error.traceback))
            except (RuntimeError, CellTimeoutError) as error:  # DeadKernelError is the former
                problem = _death(watch, str(error))
                log.seek(0)
                detail = _tail(log.read())
            except KeyboardInterrupt:
                # nbclient leaves its tasks behind, to complain of a kernel that we ended.
                ensure_event_loop().set_exception_handler(lambda loop, context: None)
                raise
    finally:
        watch.stop()
    problem = problem or _unfinished(output)
    seconds = time.monotonic() - began
    killed = watch.exit_code == -signal.SIGKILL and "killed" in problem
    return Outcome(problem, killed, detail, watch.cell, watch.source, seconds, watch.peak_bytes)


def _path(root: Path) -> dict[str, str]:
    """The kit of `root` comes first, whatever kit the caller's PYTHONPATH has."""
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for the kernel's sockets, whose paths hold about 100 characters in all."""
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"
    with tempfile.TemporaryDirectory(
        prefix="kit-", dir=place, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _papermill(
    notebook: Path, output: Path, parameters: dict, root: Path, watch: Watch, manager: type
) -> None:
    papermill.execute_notebook(
        _literal(notebook),
        _literal(output),
        parameters=parameters,
        kernel_name="python3",  # a label in the output; `manager` decides
        language="python",
        cwd=str(root),
        progress_bar=False,
        start_timeout=START_SECONDS,
        iopub_timeout=IOPUB_SECONDS,
        kernel_manager_class=manager,
        # All is stored by now, and a process that holds models takes seconds to end by itself.
        shutdown_kernel="immediate",
        on_cell_start=_follow(watch),
    )


def _manager(folder: Path, env: dict, watch: Watch, log: TextIO) -> type[AsyncKernelManager]:
    """A kernel manager class that knows one kernel: this interpreter, with `env`."""
    # Own IPython folder: start-up files and settings in the home folder must not leak in.
    env = env | {"IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, env=env, language="python", display_name="kit")

        @default("transport")
        def _ipc(self) -> str:
            return "ipc"

        @default("connection_file")
        def _private_file(self) -> str:
            return str(folder / "k.json")

        async def start_kernel(self, **kwargs) -> None:
            await super().start_kernel(stdout=log, stderr=log, **kwargs)
            watch.kernel = psutil.Process(self.provisioner.pid)

        async def _async_is_alive(self) -> bool:
            alive = await super()._async_is_alive()
            if not (alive or self.shutting_down) and self.provisioner is not None:
                watch.exit_code = await self.provisioner.poll()
            return alive

    return ThisPython


def _follow(watch: Watch) -> Callable:
    """A hook for papermill that passes to the watch which cell of the source notebook runs."""

    def on_cell_start(cell, cell_index: int) -> None:
        watch.injected += "injected-parameters" in cell.metadata.get("tags", [])
        watch.cell, watch.source = cell_index + 1 - watch.injected, cell.source

    return on_cell_start


def _death(watch: Watch, message: str) -> str:
    if watch.cell == 0:
        return f"the kernel did not start: {message}"
    if watch.exit_code is None:
        return f"cell {watch.cell} was given up: {_first_line(message)}"
    if watch.exit_code >= 0:
        return f"the kernel ended in cell {watch.cell} with exit status {watch.exit_code}"
    name = signal.Signals(-watch.exit_code).name
    if name == "SIGKILL":
        return f"the kernel was killed in cell {watch.cell}, most likely for memory"
    return f"the kernel crashed in cell {watch.cell} ({name})"


def _unfinished(output: Path) -> str:
    """papermill marks notebooks as complete that are not, so look at the last code cell."""
    cells = nbformat.read(output, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    if code and code[-1].execution_count is None:
        return "the run stopped before the last cell, which has no execution count"
    return ""


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _literal(path: Path) -> str:
    """papermill formats paths like f-strings; a brace in a folder name must survive."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _first_line(text: str) -> str:
    return strip_color(text).strip().partition("\n")[0]


def _tail(text: str) -> str:
    return "\n".join(strip_color(text).splitlines()[-TAIL:])
