"""Windows compared at equal memory, on a tiny model."""

import dataclasses

import pytest

from kit.dms import delay, evictor
from tests.toys import tokens, toy

QUICK = dataclasses.replace(
    evictor.LAPTOP, context=48, batch=2, ramp_steps=2, hold_steps=30, compression_x=2,
    hinge_weight=50.0, learning_rate=5e-3,
)  # fmt: skip


def test_windows_are_compared_at_equal_memory(tmp_path):
    model, data = toy("llama"), tokens(6, 48)
    job = model, data, tokens(3, 48, 1), QUICK, tmp_path, 0.7
    found = delay.compare_windows(*job, windows=(1, 8, 40), seeds=(0, 1))
    assert found.groupby(["window", "seed"]).size().tolist() == [3] * 6
    kept = found.groupby("window")["kept_fraction"].mean()
    assert kept[1] == pytest.approx(0.7, abs=0.03) and kept[8] == pytest.approx(0.7, abs=0.03)
    assert kept[40] > 0.9, "the window alone fills more"
    assert (found["kl"] > 0).all()
    again = delay.compare_windows(*job, windows=(8,), seeds=(1,))
    expected = found.query("window == 8 and seed == 1").reset_index(drop=True)
    assert again.equals(expected), "trained once, kept"


def test_a_recipe_that_changes_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recipe paper changes the model"):
        delay.compare_windows(toy(), tokens(4, 48), tokens(2, 48), evictor.PAPER, tmp_path, 0.5)
