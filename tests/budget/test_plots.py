"""Figures of memory budgets: bars are the bytes, a frontier says how sure each point is."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kit.analysis import pareto
from kit.budget import plots


def test_the_ledger_stacks_what_it_is_given():
    bars = {"formula": {"weights": 3 * 2**20, "norms": 0, "cache": 2**20}}
    bars["allocated"] = {"weights": 4 * 2**20, "cache": 2**20}
    picture = plots.ledger_bars(bars)
    (axes,) = picture.axes
    ends = [(box.get_x(), box.get_x() + box.get_width()) for box in axes.patches]
    assert ends == [(0, 3), (0, 4), (3, 4), (4, 5)]  # weights of both, then caches of both
    assert (
        "formula 4.0 MiB (weights 3.00, cache 1.00)" in picture.alt and "norms" not in picture.alt
    )
    FigureCanvasAgg(picture).draw()


@pytest.mark.parametrize("most", [3.0, 300.0])
def test_a_frontier_shows_how_sure_each_point_is(most):
    table = pd.DataFrame(
        dict(bytes=[1.0, 2.0, most, most], place=["a", "b", "a", "b"]),
    ).assign(interval=[(10.0, 5.0, 20.0), (5.0, 1.0, 9.0), (30.0, 20.0, 40.0), (30.0, 20.0, 40.0)])
    outcomes = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=float)
    found = pareto.table(table, "bytes", outcomes, np.random.default_rng(0))
    picture = plots.budget_frontier(found, "bytes", "bytes in all", "place")
    (axes,) = picture.axes
    alphas = np.concatenate([group.get_alpha() for group in axes.collections[:2]])
    assert alphas.min() == plots.FAINT and alphas.max() <= 1
    assert picture.alt.count("% at") == 2 and "33% at 1 (a, on it in" in picture.alt
    FigureCanvasAgg(picture).draw()
    texts = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    low, high = axes.get_xlim()
    assert sum(low <= float(text) <= high for text in texts) >= 2
