"""Gates on one head: what a query sees, by hand."""

import pytest
import torch

from kit.dms import gates
from kit.inference.block_table import MASKED


def test_an_evicted_key_is_seen_for_as_long_as_its_window_and_no_longer():
    closed = torch.tensor([0, 1, 0, 0, 0, 0]) * MASKED
    for window in (1, 3):
        weights = gates.attention_weights(closed, window)
        seen = weights > 0
        assert seen[:, 1].tolist() == [0 <= query - 1 <= window for query in range(6)]
        others = [0, 2, 3, 4, 5]
        assert seen[:, others].equal(torch.ones(6, 6).tril()[:, others] > 0)
        assert weights.sum(1).tolist() == pytest.approx([1.0] * 6)
        for row in weights:  # equal scores: what is seen is read alike
            assert row[row > 0].tolist() == pytest.approx(
                [1 / (row > 0).sum().item()] * len(row[row > 0])
            )


def test_a_half_open_gate_halves_the_odds_of_its_key():
    log_keep = torch.log(torch.tensor([0.5, 1.0, 1.0]))
    assert gates.attention_weights(log_keep, 1)[2].tolist() == pytest.approx([0.2, 0.4, 0.4])
