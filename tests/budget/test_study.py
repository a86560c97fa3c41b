"""The study of a budget: several models in one table, places of memory side by side, and bytes."""

import json

import numpy as np
import pandas as pd
import pytest

from kit.analysis import contrasts, effects
from kit.budget import ledger, study, sweep
from kit.budget.ledger import Configuration, Packing
from kit.budget.sweep import Grid, SweepRun
from kit.data import problems, prompts
from kit.evaluation.store import Store
from kit.models import embedder
from kit.parametric.study import FactStudy, Layout, solved_as_facts
from kit.parametric.train import MemoryTrainConfig
from kit.report import exhibits, recompute

SUMS = problems.load("laptop", "test", families=["chain_sum"], levels=[1]).problems[:3]
PLAIN = prompts.build(prompts.plain, SUMS)
PROMPTS = {False: PLAIN, True: PLAIN}
GRID = Grid(bits=(16, 8), policies=("full", "window 12"), tokens=(3, 6), widths=(1, 2))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("budget") / "store")


@pytest.fixture(scope="module")
def swept(tiny, store) -> study.ScenarioSet:
    return study.sweep_models(tiny, [tiny.name], GRID, PROMPTS, store, 2, 4)


@pytest.fixture(scope="module")
def solutions(tiny, tmp_path_factory) -> FactStudy:
    sentences = tuple(solved_as_facts(tiny, PLAIN))
    facts, folder = tuple(each.fact for each in sentences), tmp_path_factory.mktemp("places")
    return FactStudy(tiny, embedder.load(), facts, sentences, folder)


@pytest.fixture(scope="module")
def stored(solutions, store) -> study.ScenarioSet:
    layout = Layout(branching=2, sizes=(4, 2), layers=1)
    recipe = MemoryTrainConfig(batch=2, context=64)
    return study.in_weights(solutions, layout, recipe, GRID, PLAIN, store, 2, 4)


def test_a_sweep_of_one_model_is_its_scenarios_with_intervals(tiny, swept, store):
    alone = sweep.sweep(tiny, GRID, PROMPTS, store, 2, lambda line: None, batch_size=4)
    assert swept.table.drop(columns="interval").equals(alone.table)
    assert np.array_equal(swept.outcomes, alone.outcomes)
    assert swept.keys == sorted({key for each in alone.keys for key in each})
    assert swept.generations == 4 * 3 * 2 and not swept.missing
    assert swept.summary == "16 scenarios from 24 generations"


def test_what_has_no_room_is_named_and_nothing_at_all_is_an_error(
    tiny, store, monkeypatch, tmp_path
):
    def refused(a, grid, *_):
        return {run: "too large" for run in grid.runs if run.policy == policy or policy == "all"}

    monkeypatch.setattr(sweep, "refused", refused)
    policy = "full"
    left = study.sweep_models(tiny, [tiny.name], GRID, PROMPTS, store, 2, 4)
    assert {*left.table["policy"]} == {"window 12"} and left.generations == 2 * 3 * 2
    assert f"not measured, {tiny.name}, {SweepRun().name}: too large" in left.summary
    policy = "all"
    with pytest.raises(MemoryError, match="no model fits into the memory here: .*too large"):
        study.sweep_models(tiny, [tiny.name], GRID, PROMPTS, store, 2, 4)


def test_blocks_are_counted_and_a_trained_model_is_not(tiny, swept, stored):
    assert stored.table["place"].tolist() == ["blocks"] * 4 + ["trained"] * 4
    assert {*stored.table["model"]} == {tiny.name}
    plain = swept.table[(swept.table["bits"] == 16) & (swept.table["policy"] == "full")]
    places = (stored.table[stored.table["place"] == one] for one in ("blocks", "trained"))
    plain, blocks, trained = (  # the cache is that of the answers, which are others in each place
        (frame["bytes"] - frame["kv_bytes"]).to_numpy() for frame in (plain, *places)
    )
    assert trained.tolist() == plain.tolist()
    more = blocks - plain
    shape = Layout(branching=2, sizes=(4, 2), layers=1).shape(tiny)
    held, fetched = more[0] - (more[1] - more[0]), more[1] - more[0]  # of one and of two votes
    assert fetched == 2 * shape.fetched and held > 2 * shape.parameters


def test_places_need_the_whole_cache(solutions, store):
    layout, recipe = Layout(branching=2, sizes=(4, 2), layers=1), MemoryTrainConfig()
    refused = {f"{solutions.model.name}, {SweepRun().name}": "too large"}
    none = study.in_weights(solutions, layout, recipe, GRID, PLAIN, store, 2, 4, refused)
    assert none.table.empty and none.outcomes.shape == (0, 3) and none.generations == 0


def test_five_places_are_those_with_one_factor_each_and_come_again_from_records(
    tiny, swept, stored, store
):
    five = study.joined(study.single_places(swept, tiny.name), stored)
    counts = five.table["place"].value_counts().to_dict()
    assert counts == {"as it is": 4, "weights": 4, "cache": 4, "blocks": 4, "trained": 4}
    assert len(five.outcomes) == 20 == 2 * len(five.frames)
    results = json.loads(json.dumps(exhibits.plain(study.results(swept, five), "results")))
    records = store.table(set(results["keys"]))
    for name, of in (("scenarios", swept), ("places", five)):
        assert np.array_equal(recompute.outcomes(results, name, records), of.outcomes)
    _, best = effects.places(five.table, five.outcomes, np.random.default_rng(0))
    again = recompute.table("06_memory_budget", recompute.PLACES, results, records)
    assert again["place"].tolist() == best["place"].tolist()
    assert again["interval"].tolist() == best["interval"].tolist()
    assert contrasts.restore_frames(results["frames"]["places"], results["keys"], records)


def test_the_ledger_agrees_with_what_is_allocated(tiny):
    table = study.formula_against_allocation(tiny, (16, 8)).set_index("what")
    assert [*table.index[:2]] == ["weights, 32 bit", "weights, 8 bit"] and len(table) == 6
    assert table.loc["weights, 32 bit", "allocated_bytes"] == 4 * sum(
        value.numel() for value in tiny.weights.parameters()
    )
    assert table["off_percent"].abs().max() < 5
    sizes = ledger.architecture(tiny.weights.config)
    config = Configuration(sizes, Packing(32, native_bits=32), tokens=256, width=2, kept=0.5)
    parts = study.allocated(tiny, config)
    assert parts["keys and values"] == pytest.approx(config.parts()["keys and values"], rel=0.2)
    assert pd.Series(parts).drop("keys and values").to_dict() == ledger.measured_weights(
        tiny.weights
    )
