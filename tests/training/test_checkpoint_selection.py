"""Choosing a checkpoint, and what the published checkpoints of Open-RS can bear."""

import pytest
from scipy.stats import fisher_exact

from kit.training import checkpoint_selection


def test_the_best_on_validation_is_chosen_and_the_earliest_of_equals():
    assert checkpoint_selection.select({50: 0.2, 100: 0.3, 150: 0.3}) == 100
    with pytest.raises(ValueError, match="No checkpoint has a validation accuracy"):
        checkpoint_selection.select({})


def test_the_published_table_is_that_of_the_logs():
    """RS1 is step 100 of experiment 1, RS2 and RS3 are step 50 of experiments 2 and 3."""
    logs = checkpoint_selection.open_rs_logs().set_index(["experiment", "step", "benchmark"])
    share = (100 * logs["correct"] / logs["items"]).round(1)
    assert [share[1, 100, b] for b in ("aime24", "math500", "amc23")] == [30.0, 83.8, 70.0]
    assert [share[2, 50, b] for b in ("aime24", "math500", "amc23")] == [30.0, 85.4, 80.0]
    assert [share[3, 50, b] for b in ("aime24", "math500", "amc23")] == [46.7, 84.4, 72.5]
    assert len(logs) == 63 and logs["items"].groupby("benchmark").first().to_dict() == {
        "aime24": 30, "amc23": 40, "math500": 500,
    }  # fmt: skip
    estimate, low, high = logs["accuracy"][3, 50, "aime24"]
    assert (round(low, 1), round(high, 1)) == (30.2, 63.9), "Wilson of 14 of 30"


def test_few_ups_and_downs_exceed_noise():
    logs = checkpoint_selection.open_rs_logs()
    found = checkpoint_selection.against_first(logs)
    assert len(found) == 63 - 9 and (found["holm"] > 0.05).all(), "none of 54 is beyond noise"
    least = found.loc[found["p"].idxmin()]
    assert (least["experiment"], least["benchmark"], least["step"]) == (1, "math500", 300)
    table = [[378, 500 - 378], [419, 500 - 419]]
    assert least["p"] == pytest.approx(fisher_exact(table).pvalue, rel=0.3), "another test"


def test_most_of_the_gain_of_the_best_checkpoint_is_expected():
    table = checkpoint_selection.selection_bias(checkpoint_selection.open_rs_logs())
    row = table.set_index(["experiment", "benchmark"]).loc[(3, "aime24")]
    assert row["best"] == pytest.approx(100 * 14 / 30) and row["checkpoints"] == 8
    assert row["expected optimism"] == pytest.approx(12, abs=1)
    assert row["gain"] == pytest.approx(14.6, abs=0.1)
