"""The time of a profile: it follows its parameters, fits the runs that are known, is measured."""

import json
from dataclasses import replace

import pytest

from kit import estimate
from kit.analysis import claims
from kit.pipeline.stages import load_stages
from tests.conftest import loaded

OLD = {"start": 8.0, "decoded": 108.0, "trained": 200.0}  # two old cores, see LOG.md
OLD |= {"device": "cpu", "dtype": "float32"}


def minutes(profile: str, speed: dict = OLD, model: str = "") -> dict[str, float]:
    every = load_stages(profile, model=model)
    return {stage.name: estimate.seconds(stage, speed) / 60 for stage in every}


def test_the_laptop_profile_takes_about_what_it_took():
    # 02 took 41, with one bank; two more draws of it are 10 by their count of tokens.
    known = {"01_baseline": 8, "02_strategies": 41 + 10, "03_dms": 43, "04_phase2": 115,
             "05_parametric": 28, "06_memory_budget": 24}  # fmt: skip
    before = {  # what the profile had when it was timed
        "02_strategies": {"CONTROLS": [0, 0], "MAX_NEW_TOKENS": 96, "TRAIN": 70, "TEST": 147,
                          "FURTHER": 42},
        # Four rivals, each once; now each has two sizes.
        "03_dms": {"TEXTS": [56, 8, 0], "PROBLEMS": 28, "RIVALS": ["Window", "TOVA"]},
        "04_phase2": {"PROBLEMS": [140, 70, 250], "PLAN": {},
                      "SFT": {"arms": ["own", "kept", "internalised", "unfiltered"], "seeds": 3,
                              "keep_every": 16}},
    }  # fmt: skip
    timed = [replace(stage, overrides=stage.overrides | before.get(stage.name, {}))
             for stage in load_stages("laptop", model="")]  # fmt: skip
    found = {stage.name: estimate.seconds(stage, OLD) / 60 for stage in timed}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=0.2)


def test_by_default_a_quarter_of_an_hour_is_enough_and_five_minutes_where_they_were_timed():
    native = {"start": 8.6, "decoded": 391.0, "trained": 269.0}  # two cores of an AMD EPYC
    took = {"00_tour": 13, "01_baseline": 20, "02_strategies": 39, "03_dms": 67, "04_phase2": 52,
            "05_parametric": 55, "06_memory_budget": 40, "07_verdicts": 8}  # fmt: skip
    found = {name: 60 * each for name, each in minutes("quick", native).items()}
    assert found == pytest.approx(took, rel=0.2)
    assert sum(minutes("quick").values()) < 15
    assert sum(minutes("workstation").values()) > 100 * sum(minutes("laptop").values())


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("01_baseline", "PROBLEMS", 112),
        ("01_baseline", "MODELS", ["hub:Qwen/Qwen3-0.6B"]),
        ("02_strategies", "FURTHER", 7),
        ("03_dms", "RAMP_STEPS", 40),
        ("04_phase2", "ROUNDS", 3),
        ("05_parametric", "ARMS", {"flat": 1, "shared": 1}),
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


SMALL, LARGE = "bundled:qwen2.5-coder-0.5b", "bundled:qwen2.5-coder-1.5b"


def test_a_measured_rate_of_a_model_outranks_its_size():
    by_size = estimate.rate_of(LARGE, OLD)
    assert by_size["decoded"] == pytest.approx(108 * 0.135 / 1.5)
    twice = OLD | {"models": {LARGE: {name: 2 * rate for name, rate in by_size.items()}}}
    slow, fast = (minutes("laptop", speed, LARGE)["02_strategies"] for speed in (OLD, twice))
    fixed = estimate.FIXED["02_strategies"] * OLD["start"] / 60
    assert (slow - fixed) / (fast - fixed) == pytest.approx(2)


@pytest.mark.parametrize(
    ("speed", "large", "chosen", "measured"),
    [
        (1, 1, "", []),  # both would take days by their size
        (10, 0.1, SMALL, [LARGE, SMALL]),
        (10, 10, LARGE, [LARGE]),
        (60, None, LARGE, [LARGE]),
        (60, 0, SMALL, [LARGE, SMALL]),  # it cannot be fetched
    ],
)
def test_the_largest_model_on_which_a_profile_fits_into_its_hours_is_chosen(
    monkeypatch, speed, large, chosen, measured
):
    """`speed` is that of this machine over an old one, `large` that of the larger model over what
    its size says."""
    asked = []

    def rates(models=()):
        asked.extend(models)
        if LARGE in models and large == 0:
            raise ValueError("no network")
        bundled = OLD | {name: OLD[name] * speed for name in ("decoded", "trained")}
        factor = {LARGE: large or 1, SMALL: 1}
        own = {name: {kind: rate * factor[name] for kind, rate in
                      estimate.rate_of(name, bundled).items()} for name in models}  # fmt: skip
        return bundled | {"models": own}

    monkeypatch.setattr(estimate, "rates", rates)
    monkeypatch.setattr(estimate, "memory_limit_bytes", lambda: 64_000_000_000)
    said = []
    found = estimate.choose("laptop", said.append)
    assert found["model"] == chosen and asked == measured
    hours = sum(minutes("laptop", found["rates"], chosen).values()) / 60
    assert said == found["why"] and said[-1].startswith(chosen or "the models of the notebooks")
    assert f": {hours:.1f} hours for all" in said[-1] and said[-1].endswith(": taken")
    assert hours <= 2 or not chosen
    words = "no network" if large == 0 else "measured" if LARGE in measured else "by its size"
    assert words in said[0]


@pytest.mark.parametrize(
    ("device", "gigabytes", "chosen"),
    [
        ("cpu", 32, LARGE),
        ("cpu", 16, SMALL),
        ("cpu", 5, ""),
        ("cuda", 24, LARGE),
        ("cuda", 11, SMALL),
    ],
)
def test_a_model_without_room_in_memory_is_not_chosen(monkeypatch, device, gigabytes, chosen):
    """By its trainings in 04, in the memory of the machine or of its card."""
    ram, card = (gigabytes, 1) if device == "cpu" else (999, gigabytes)
    monkeypatch.setattr(estimate, "memory_limit_bytes", lambda: ram * 10**9)
    monkeypatch.setattr(estimate, "gpus", lambda: [{"memory_mib": card * 10**9 // 2**20}])
    monkeypatch.setattr(estimate, "rates", lambda models=(): {
        "start": 1.0, "decoded": 1e5, "trained": 1e5, "device": device, "dtype": "bfloat16",
        "models": {name: {"decoded": 1e5, "trained": 1e5} for name in models}})  # fmt: skip
    found = estimate.choose("laptop", lambda line: None)
    assert found["model"] == chosen
    refused = [why for why in found["why"] if "GB at its peak with gradient checkpointing" in why]
    assert [why.split(": 04 takes ")[0] for why in refused] == [LARGE, SMALL][: len(refused)]
    assert len(refused) == {LARGE: 0, SMALL: 1, "": 2}[chosen]


def test_a_model_that_is_named_counts_where_a_profile_leaves_it_open(monkeypatch):
    monkeypatch.setattr(estimate, "rates", lambda models, began: OLD)
    monkeypatch.setenv("KIT_MODEL", SMALL)
    found = estimate.estimates(["laptop", "quick"])["profiles"]
    for profile, model in (("laptop", SMALL), ("quick", "")):
        spent = {name: row["seconds"] / 60 for name, row in found[profile].items()}
        assert spent == pytest.approx(minutes(profile, OLD, model))


@pytest.mark.parametrize("of", ["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def test_the_rates_of_this_machine_make_the_times(of, tiny_folder, monkeypatch):
    """Of the bundled model in a process of its own, as a run measures them; of a tiny one here."""
    if of == "bundled":
        found = estimate.measure("tour")
    else:
        tiny = loaded(tiny_folder, "float32")
        monkeypatch.setattr("kit.models.load.load", lambda name: tiny)
        found = json.loads(json.dumps(estimate.estimates(["tour"])))
    assert found["rates"]["decoded"] > 0 and found["rates"]["trained"] > 0
    rows = found["profiles"]["tour"]
    for name, spent in minutes("tour", found["rates"]).items():
        assert rows[name]["seconds"] == pytest.approx(60 * spent)
    assert sum(row["decides"] for row in rows.values()) == 15
    assert not any(row["weak"] for row in rows.values())
    assert rows["06_memory_budget"]["decides"] == 12


def test_claims_that_a_profile_is_too_small_for_are_known_before_it_runs():
    published = {claim.id: claim for claim in claims.load()}
    by_name = {stage.name: stage for stage in load_stages("laptop", model="")}
    sizes = {"dms-short-context-loss": 7, "rbslm-memory-compliance": 112, "rb-k1-against-k0": 21,
             "hier-memory-over-rag": 138, "hier-late-over-early": 118, "rbslm-format-accuracy": 112,
             "openrs-sober-rs1-amc23": 40, "nab-weights-4b-4bit": None}  # fmt: skip
    for name, n in sizes.items():
        claim = published[name]
        assert estimate.problems(by_name[claim.notebook], claim) == n, name
    weak = estimate._weak(by_name["03_dms"], published.values())
    assert [row[:2] for row in weak if row[0].startswith("dms")] == [("dms-short-context-loss", 7)]
    assert all(power < 20 for *_, power in weak)
