"""A notebook whose kernel dies or hangs says where, and is told apart from one that is wrong."""

import os
import subprocess
import sys

import nbformat
import pytest

from kit import paths
from tests.nbval_lost import LOST

DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
SLOW = "import time\ntime.sleep(60)"
WRONG = "1 / 0"


@pytest.mark.parametrize(
    ("sources", "status", "said"),
    [
        ([DIES, HANGS], LOST, ["Segmentation fault", "Fatal Python error: Aborted"]),
        ([DIES, WRONG], 1, ["ZeroDivisionError"]),
        ([SLOW], 1, ["KeyboardInterrupt"]),
        (["1"], 0, ["1 passed"]),
    ],
    ids=["die and hang", "dies beside a wrong one", "slow", "right"],
)
def test_lost_kernels(tmp_path, sources, status, said):
    for number, source in enumerate(sources):
        cells = [nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{number}.ipynb")
    options = ["-p", "tests.nbval_lost", "-p", "no:cacheprovider", "--nbval-lax"]
    options += ["--nbval-current-env", "--nbval-cell-timeout=4"]
    options += ["-n", f"{len(sources)}", "--dist", "loadfile", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options],
        cwd=paths.ROOT,
        env=os.environ | {"KIT_OUTPUTS": str(tmp_path / "outputs")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == status, ran.stdout[-3000:]
    assert all(words in ran.stdout for words in said), ran.stdout[-3000:]
