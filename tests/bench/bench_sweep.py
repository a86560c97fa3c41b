"""`sweep_overhead_ms`: what a scenario costs on Ray beside its generations.

A sweep is done in this process first; then Ray's workers go through the same grid on the same
store, where they find everything: what they take is asking, looking up and answering. From the
moment when the workers have loaded their models to the last answer. Needs `make cluster`.
"""

import tempfile
import time
from pathlib import Path

from kit.budget import ray_sweep, sweep
from kit.budget.sweep import Grid
from kit.data import problems, prompts
from kit.evaluation.store import Store
from kit.models.load import BUNDLED, load

GRID = Grid(
    bits=(16,), policies=("full", "window 32", "tova 32", "h2o 32"), kv_bits=(16, 8, 4),
    tokens=(2, 4, 6), widths=(1, 2, 3),
)  # fmt: skip
PASSES = 3


def run() -> dict:
    """Three passes of two workers."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return {"sweep_overhead_ms": {"skipped": "Ray is not installed; run `make cluster`"}}
    base = load(BUNDLED)
    asked = {False: prompts.build(prompts.plain, problems.load("laptop", "test", n=4).problems)}
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        sweep.sweep(base, GRID, asked, store, 3, report=lambda line: None)
        for _ in range(PASSES):
            marks: list[float] = []
            ray_sweep.generate(
                base, GRID, asked, store, 3, workers=2,
                report=lambda line, marks=marks: marks.append(time.perf_counter()),
                started=lambda pids, marks=marks: marks.append(time.perf_counter()),
            )  # fmt: skip
            found.append(1000 * (marks[-1] - marks[0]) / len(GRID))
    each = sorted(found)
    return {
        "sweep_overhead_ms": {
            "value": each[len(each) // 2], "unit": "ms", "against": "20 ms a scenario",
            "n": len(GRID), "spread": [each[0], each[-1]],
        }
    }  # fmt: skip
