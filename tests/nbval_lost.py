"""What nbval hides, for `pytest -p tests.nbval_lost`: where a kernel died or hung.

nbval sends the kernel's stderr to /dev/null, and waits the whole time limit for a kernel that is
gone. Here its stderr is kept, death is noticed within seconds, and a kernel that neither answers
nor can be interrupted is aborted, whereupon faulthandler writes the Python stack of each thread.
If kernels were lost so, and nothing else failed, pytest ends with status 75: worth another try.
"""

import builtins
import os
import signal
import time
from pathlib import Path
from queue import Empty

import nbval.kernel
import nbval.plugin
import pytest

from kit import paths

LOST = 75  # EX_TEMPFAIL of sysexits.h
SLICE = 1.0  # seconds between two looks at whether the kernel lives
LOG = Path(paths.OUTPUTS) / "nbval-kernels.log"
lost: list[str] = []


class Kernel(nbval.kernel.RunningKernel):
    """A kernel that is missed when it is gone."""

    interrupted = False

    def get_message(self, stream, timeout=None):
        until = time.monotonic() + (timeout or float("inf"))
        while True:
            left = until - time.monotonic()
            try:
                message = super().get_message(stream, max(0.01, min(SLICE, left)))
            except Empty:
                if left <= SLICE or not self.is_alive():
                    raise
            else:
                if message["content"].get("execution_state") == "idle":
                    self.interrupted = False  # it obeyed
                return message

    def interrupt(self):
        if self.is_alive():
            super().interrupt()
        self.interrupted = True

    def stop(self):
        if self.interrupted:
            lost.append(self.km.kernel_id)
            if self.is_alive():
                os.kill(self.km.provisioner.pid, signal.SIGABRT)
                time.sleep(1)
        super().stop()


def _open(file, *args, **kwargs):
    """For nbval's kernel module: what it would send to /dev/null goes to the log."""
    return builtins.open(LOG, "a") if file == os.devnull else builtins.open(file, *args, **kwargs)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that starts those of xdist, or is alone
        LOG.parent.mkdir(parents=True, exist_ok=True)
        LOG.unlink(missing_ok=True)
    os.environ["PYTHONFAULTHANDLER"] = "1"
    nbval.kernel.open, nbval.plugin.RunningKernel = _open, Kernel


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    lost.extend(getattr(node, "workeroutput", {}).get("lost", []))


@pytest.hookimpl(hookwrapper=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["lost"] = lost
    yield
    if lost and session.testsfailed == len(lost):
        session.exitstatus = LOST


def pytest_terminal_summary(terminalreporter):
    if lost:
        said = LOG.read_text(errors="replace").split("\n\n")  # a thread each
        ours = "Fatal", f"{paths.ROOT}/kit/", "ipykernel_"
        own = [part for part in said if any(mark in part for mark in ours)]
        terminalreporter.section(f"{len(lost)} kernel(s) lost; what their threads did ({LOG})")
        terminalreporter.write_line("\n\n".join(own)[-10000:])
