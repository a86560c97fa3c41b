"""The time of a profile: it follows its parameters, fits the runs that are known, is measured."""

import json
from dataclasses import replace

import pytest

from kit import estimate
from kit.analysis import claims
from kit.pipeline.stages import load_stages

OLD = {"start": 8.0, "decoded": 108.0, "trained": 200.0}  # two old cores in float32, see LOG.md


def minutes(profile: str, speed: dict = OLD) -> dict[str, float]:
    return {stage.name: estimate.seconds(stage, speed) / 60 for stage in load_stages(profile)}


def test_the_laptop_profile_takes_about_what_it_took():
    known = {"01_baseline": 8, "02_strategies": 41, "03_dms": 43, "04_phase2": 115,
             "05_parametric": 67, "06_memory_budget": 24}  # fmt: skip
    found = minutes("laptop")
    assert {name: found[name] for name in known} == pytest.approx(known, rel=0.2)


def test_by_default_a_quarter_of_an_hour_is_enough():
    assert sum(minutes("quick").values()) < 15
    assert sum(minutes("tour").values()) < sum(minutes("quick").values()) / 2
    assert sum(minutes("workstation").values()) > 100 * sum(minutes("laptop").values())


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("01_baseline", "PROBLEMS", 112),
        ("01_baseline", "MODELS", ["hub:Qwen/Qwen3-0.6B"]),
        ("02_strategies", "FURTHER", 7),
        ("03_dms", "RAMP_STEPS", 40),
        ("04_phase2", "ROUNDS", 3),
        ("05_parametric", "ARMS", ["generic", "shared"]),
        ("06_memory_budget", "SAMPLES", 9),
    ],
)
def test_more_of_anything_takes_longer(stage, name, value):
    one = next(each for each in load_stages("quick") if each.name == stage)
    more = replace(one, overrides=one.overrides | {name: value})
    assert estimate.seconds(more, OLD) > 1.05 * estimate.seconds(one, OLD)


@pytest.mark.parametrize(
    ("model", "size"),
    [("hub:Qwen/Qwen3-1.7B", 1.7), ("bundled:smollm2-135m", 0.135),
     ("hub:Qwen/Qwen3-4B-Instruct-2507", 4), ("hub:knoveleng/Open-RS1", estimate.BILLIONS)],
)  # fmt: skip
def test_a_model_says_its_size_by_its_name(model, size):
    assert estimate.billions(model) == size


def test_the_rates_of_this_machine_make_the_times():
    found = json.loads(json.dumps(estimate.measured("tour")))
    assert found["rates"]["decoded"] > 0 and found["rates"]["trained"] > 0
    rows = found["profiles"]["tour"]
    for name, spent in minutes("tour", found["rates"]).items():
        assert rows[name]["seconds"] == pytest.approx(60 * spent)
    assert sum(row["decides"] for row in rows.values()) == 15
    assert not any(row["weak"] for row in rows.values())
    assert rows["06_memory_budget"]["decides"] == 12


def test_claims_that_a_profile_is_too_small_for_are_known_before_it_runs():
    published = {claim.id: claim for claim in claims.load()}
    by_name = {stage.name: stage for stage in load_stages("laptop")}
    sizes = {"dms-short-context-loss": 28, "rbslm-memory-compliance": 147, "rb-k1-against-k0": 42,
             "hier-memory-over-rag": 120, "hier-late-over-early": 40, "rbslm-format-accuracy": 112,
             "openrs-sober-rs1-amc23": 40, "nab-weights-4b-4bit": None}  # fmt: skip
    for name, n in sizes.items():
        claim = published[name]
        assert estimate.problems(by_name[claim.notebook], claim) == n, name
    weak = estimate._weak(by_name["03_dms"], published.values())
    assert [row[:2] for row in weak if row[0].startswith("dms")] == [("dms-short-context-loss", 28)]
    assert all(power < 20 for *_, power in weak)
