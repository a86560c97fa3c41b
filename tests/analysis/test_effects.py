"""Effects over a grid, on grids whose effects are known."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from kit.analysis import claims, effects, tables
from kit.report import recompute

RNG = np.random.default_rng


def grid(rate, problems: int = 400, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Scenarios of weights, cache and tokens whose problems are solved at `rate(row)`."""
    rows = [
        dict(bits=bits, policy=policy, kv_bits=16, tokens=tokens, width=width)
        for bits, policy, tokens, width in product((4, 8, 16), ("window", "full"), (8, 16), (1, 4))
    ]
    table = pd.DataFrame(rows)
    table["weight_bytes"] = table["bits"] * 2**20
    cache = table["tokens"] * table["width"] * np.where(table["policy"] == "full", 2, 1)
    table["bytes"] = table["weight_bytes"] + cache * 2**14
    shared = RNG(seed).random(problems)
    outcomes = np.array([(shared < rate(row)).astype(float) for row in rows])
    return table, outcomes


def test_a_step_is_worth_what_it_adds():
    def rate(row):
        return 0.2 + 0.1 * (row["tokens"] == 16) + 0.02 * row["bits"] / 4

    table, outcomes = grid(rate, 4000)
    found = effects.marginal_effects(table, outcomes, RNG(1)).set_index(["place", "from", "to"])
    points, low, high = found.loc[("tokens", "8", "16"), "points"]
    assert low < points < high and points == pytest.approx(10, abs=1.5)
    row = found.loc[("policy", "window", "full")]
    assert row["points"][0] == 0 and max(map(abs, row["points"])) < 0.1
    assert row["MiB"] == pytest.approx(12 * 2.5 * 2**14 / 2**20)
    assert row["pairs"] == 12
    assert found.loc[("bits", "8", "16"), "MiB"] == 8
    per = found.loc[("tokens", "8", "16"), "points per MiB"][0]
    assert per == pytest.approx(points / found.loc[("tokens", "8", "16"), "MiB"])
    assert "kv_bits" not in found.index.get_level_values(0)


def test_does_eviction_cost_more_at_four_bit():
    def rate(row):
        return 0.6 - 0.3 * (row["policy"] == "window" and row["bits"] == 4)

    table, outcomes = grid(rate)
    effect, of = ("policy", "full", "window"), ("bits", 16, 4)
    found = effects.interaction(table, outcomes, RNG(0), effect, of)
    assert found.high < 0 and found.estimate == pytest.approx(-0.3, abs=0.06)
    other = effects.interaction(table, outcomes, RNG(0), effect, ("width", 1, 4))
    assert other.estimate == 0
    assert effects.interaction(table, outcomes, RNG(0), ("policy", "full", "dms"), of) is None


def test_all_pairs_of_ends_are_a_table_of_differences_of_differences():
    def rate(row):  # a window costs nothing at 16 bit, 0.3 at 4 bit
        return 0.6 - 0.3 * (row["policy"] == "window" and row["bits"] == 4)

    table, outcomes = grid(rate)
    ends = [("policy", "full", "window"), ("bits", 16, 4), ("tokens", 8, 16)]
    rows = effects.interactions(table, outcomes, ends)
    assert rows["effect"].tolist() == ["policy, full to window"] * 2 + ["bits, 16 to 4"]
    assert rows["changes_with"].tolist() == ["bits, 16 to 4"] + ["tokens, 8 to 16"] * 2
    alone = effects.interaction(table, outcomes, RNG(0), *ends[:2]).percent
    assert rows["difference"][0] == alone and alone[0] == pytest.approx(-30, abs=6)
    assert rows["difference"][1][1] < 0 < rows["difference"][1][2]


def test_the_threshold_is_where_tokens_begin_to_buy_more():
    def rate(row):  # at 4 bit weights buy all, from 8 bit on tokens do
        return 0.1 if row["bits"] == 4 else 0.4 + 0.3 * (row["tokens"] == 16)

    found = effects.threshold(*grid(rate), RNG(0))
    assert found["first"].tolist() == [0, 1, 0]
    small, large = found.iloc[0], found.iloc[1]
    assert small["as weights"] > small["as tokens"] == 0
    assert large["as tokens"] > large["as weights"] == 0
    never = effects.threshold(*grid(lambda row: 0.02 * row["bits"]), RNG(0))
    assert never["first"].tolist() == [0, 0, 1] and np.isnan(never["weight_bytes"].iloc[-1])


def test_a_threshold_that_the_data_do_not_decide_is_spread():
    def rate(row):
        return 0.3 + 0.002 * row["bits"] + 0.01 * (row["tokens"] == 16)

    first = effects.threshold(*grid(rate, 60), RNG(0))["first"]
    assert first.sum() == pytest.approx(1) and first.max() < 1
    table, outcomes = grid(lambda row: 0.5)
    one = table["bits"] == 4
    assert not len(effects.threshold(table[one].reset_index(drop=True), outcomes[one], RNG(0)))


def test_scenarios_of_two_models_pair_within_each():
    table, outcomes = grid(lambda row: 0.02 * row["bits"])
    both = pd.concat([table.assign(model="a", bytes=table["bytes"]), table.assign(
        model="b", bytes=table["bytes"] + 2**20)], ignore_index=True)  # fmt: skip
    solved = np.concatenate([outcomes, np.ones_like(outcomes)])
    before, after = effects.pairs(both, "tokens", 8, 16)
    assert len(before) == 24 and (both["model"][before].to_numpy() == both["model"][after]).all()
    steps = effects.marginal_effects(both, solved, RNG(0)).set_index("place")
    assert steps.loc["model", "points"][0] == pytest.approx(100 * (1 - outcomes.mean()))
    assert steps.loc["model", "MiB"] == pytest.approx(1)


def test_two_named_scenarios_are_compared_problem_by_problem():
    table, outcomes = grid(lambda row: 0.3 + 0.2 * (row["tokens"] == 16))
    table = table.assign(model="hub:org/small-1B", memory=False)
    one, other = {"model": "small", "bits": 8, "tokens": 16}, {"bits": 16, "tokens": 8}
    found = effects.difference(table, outcomes, RNG(0), one, other)
    assert found.low < 0.2 < found.high and found.n == 400
    assert effects.difference(table, outcomes, RNG(0), {"model": "large"}, other) is None


def test_the_gap_between_two_caches():
    def rate(row):
        return 0.4 + 0.02 * row["bits"] / 4 - 0.2 * (row["policy"] == "window")

    table, outcomes = grid(rate, 2000)
    table["shared_bytes"] = table["bytes"].where(table["policy"] == "full", table["bytes"] * 1.001)
    found = effects.gap(table, outcomes, RNG(0), ("window", 16), ("full", 16))
    assert found.low < -0.2 < found.high and found.high < -0.15


def test_accuracies_and_where_the_threshold_is_switched():
    table, outcomes = grid(lambda row: 0.5)
    estimate, low, high = effects.accuracies(outcomes, RNG(0))[0]
    assert 0 < low < estimate == 100 * outcomes[0].mean() < high < 100
    found = pd.DataFrame({"weight_bytes": [1.0, 2.0, np.nan], "first": [0.01, 0.59, 0.4]})
    assert effects.switch(found) == (2, 2, 4)
    assert effects.switch(found.assign(first=[0.1, 0.1, 0.8])) == (4, 1, 4)


def without(hole) -> tuple[pd.DataFrame, np.ndarray]:
    """A grid with cache precisions of which the runs in `hole` had no room."""
    table, outcomes = grid(lambda row: 0.3 + 0.2 * (row["tokens"] == 16))
    table = pd.concat([table, table.assign(kv_bits=4, bytes=table["bytes"] * 0.9)])
    table = table.assign(model="a", memory=False, shared_bytes=table["bytes"] / 2)
    outcomes = np.concatenate([outcomes, outcomes])
    there = ~hole(table).to_numpy()
    return table[there].reset_index(drop=True), outcomes[there]


def test_runs_without_room_leave_effects_unmeasured_and_no_others():
    """As on every GPU to 141 GB: the whole cache in 16 bits has no room at any bits of weights."""
    table, outcomes = without(lambda t: (t["policy"] == "full") & (t["kv_bits"] == 16))
    policy, cache = ("policy", "full", "window"), ("kv_bits", 16, 4)
    assert effects.interaction(table, outcomes, RNG(0), policy, cache) is None
    assert effects.interaction(table, outcomes, RNG(0), policy, ("bits", 16, 4)).estimate == 0
    steps = effects.marginal_effects(table, outcomes, RNG(0)).set_index("place")
    assert (steps["pairs"] > 0).all(), "the window is there in both precisions, 4 bits of both"
    window, whole = ("window", 16), ("full", 4)
    gaps = effects.gaps(table, outcomes, RNG(0))
    assert gaps[window, ("full", 16)] is None and gaps[window, whole] is not None
    assert effects.evicted_or_quantized(table) == (window, whole)
    shown = effects.gap_rows(gaps)
    assert shown["difference"].isna().tolist() == [True, True, True, False]
    assert len(effects.threshold(table, outcomes, RNG(0))) == 3
    given = recompute.on_scenarios(claims.load(), table, outcomes)
    assert "nab-eviction-over-quantisation" in given and "nab-kv-compression-helps" not in given


def test_without_the_whole_cache_nothing_is_compared_with_it():
    table, outcomes = without(lambda t: t["policy"] == "full")
    assert {*effects.gaps(table, outcomes, RNG(0))} == {(("window", 4), ("window", 16))}
    given = recompute.on_scenarios(claims.load(), table, outcomes)
    assert not {"nab-eviction-over-quantisation", "nab-kv-compression-helps"} & set(given)


def test_a_step_without_pairs_is_shown_as_not_measured():
    """16-bit weights had room for short answers only, 4-bit ones for long ones only."""
    table, outcomes = without(lambda t: (t["bits"] == 16) == (t["tokens"] == 16))
    table, outcomes = (x[(table["bits"] != 8).to_numpy()] for x in (table, outcomes))
    steps = effects.marginal_effects(table.reset_index(drop=True), outcomes, RNG(0)).set_index(
        "place"
    )
    assert steps.loc["bits", "pairs"] == 0 and pd.isna(steps.loc["bits", "points"])
    assert tables.text(steps)["points"]["bits"] == "–" and steps.loc["policy", "pairs"] > 0
    assert not len(effects.threshold(table.reset_index(drop=True), outcomes, RNG(0)))
