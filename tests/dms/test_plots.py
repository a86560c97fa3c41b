"""Figures of learned eviction: what is drawn is what the table or the cache says."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kit.dms import plots


def quality_table() -> pd.DataFrame:
    rows = [
        (name, x, 1 / x, (kl / x, kl / x / 2, kl / x * 2), 1e6 / x)
        for name, kl in (("dms", 1.0), ("window", 3.0), ("<b>", 2.0))
        for x in (2, 4)
    ]
    return pd.DataFrame(
        rows, columns=["policy", "compression_x", "kept_fraction", "kl", "kv_bytes"]
    )


@pytest.mark.filterwarnings("error")
def test_divergences_that_are_not_positive_have_no_logarithm():
    rounded = quality_table().assign(kl=[(-1e-4, -2e-4, 0.0)] * len(quality_table()))
    assert plots.quality(rounded).axes[0].get_yscale() == "linear"
    assert plots.quality(quality_table()).axes[0].get_yscale() == "log"


def test_quality_draws_every_policy_and_names_the_best():
    picture = plots.quality(quality_table())
    (axes,) = picture.axes
    assert axes.get_yscale() == "log" and len(axes.containers) == 3
    assert picture.alt.endswith("dms at 2x, dms at 4x.")
    FigureCanvasAgg(picture).draw()


def test_allocated_bytes_are_drawn_against_what_is_kept():
    picture = plots.allocated(quality_table())
    (axes,) = picture.axes
    for line in axes.lines:
        kept, mebibytes = line.get_data()
        assert list(mebibytes) == pytest.approx([1e6 * share / 2**20 for share in kept])
    FigureCanvasAgg(picture).draw()


def test_training_shows_gates_schedule_and_kl():
    history = [dict(step=i, kl=0.1 * i, closed=0.2 * i, target=0.25 * i) for i in range(1, 4)]
    picture = plots.training(history)
    upper, lower = picture.axes
    assert [list(line.get_ydata()) for line in upper.lines][1] == pytest.approx([0.2, 0.4, 0.6])
    assert list(lower.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    assert "0.60" in picture.alt and "0.75" in picture.alt
    FigureCanvasAgg(picture).draw()


def test_what_is_kept_is_drawn_per_layer_and_head_and_shaded_in_the_text():
    kept = [[np.array([0, 1, 2]), np.array([2])], [np.array([2, 3]), np.array([2])]]
    picture = plots.kept_heatmap(kept, 4)
    image = picture.axes[0].images[0].get_array()
    assert image.T.tolist() == [[0.75, 0.25], [0.5, 0.25]]
    assert "from 0.25 to 0.75" in picture.alt
    page = plots.kept_text(["a", "<script>", "c", "d"], kept)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert [int(n) for n in re.findall(r"kept by (\d) of 4", page)] == [1, 1, 4, 1]


def test_the_frontier_is_named_in_l_w_cr():
    columns = ["length", "width", "compression", "reads", "accuracy", "on_frontier"]
    rows = [
        (64, 1, "1x", 10.0, 0.2, True),
        (64, 2, "4x", 12.0, 0.3, True),
        (64, 4, "1x", 40.0, 0.1, False),
    ]
    picture = plots.scaling_frontier(
        pd.DataFrame(rows, columns=columns), "reads", "KV reads, tokens"
    )
    assert picture.alt.endswith("64-1-1x, 64-2-4x.")
    FigureCanvasAgg(picture).draw()


def test_the_mechanism_shows_which_keys_a_query_reads():
    seen = np.tril(np.ones((4, 4)))
    later = seen.copy()
    later[3, 1] = 0
    picture = plots.gate_mechanism({"full": seen, "evicted": later})
    first, second = (axes.images[0].get_array() for axes in picture.axes)
    assert first[3, 1] and not second[3, 1] and second[2, 1] and not second[0, 3]
    assert picture.alt.endswith("full 10, evicted 9.")
    FigureCanvasAgg(picture).draw()
