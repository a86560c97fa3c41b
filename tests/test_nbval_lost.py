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
RIGHT = "1"


@pytest.mark.parametrize(
    ("sources", "status", "said"),
    [
        (
            [DIES, HANGS, RIGHT],
            LOST,
            ["Segmentation fault", "Fatal Python error: Aborted", "1 passed"],
        ),
        ([DIES, SLOW], 1, ["KeyboardInterrupt"]),  # which was interrupted, and is not lost
    ],
    ids=["die and hang", "dies beside a slow one"],
)
def test_lost_kernels(tmp_path, sources, status, said):
    for number, source in enumerate(sources):
        cells = [nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{number}.ipynb")
    options = ["-p", "tests.nbval_lost", "-p", "no:cacheprovider", "--nbval-lax"]
    options += ["--nbval-current-env", "--nbval-cell-timeout=4"]
    options += ["-n", "2", "--dist", "loadfile", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options],
        cwd=paths.ROOT,
        env=os.environ | {"KIT_OUTPUTS": str(tmp_path / "outputs")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == status, ran.stdout[-3000:]
    assert all(words in ran.stdout for words in said), ran.stdout[-3000:]
