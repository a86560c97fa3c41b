"""Error rates of the verdicts, by simulation: the power that was stated, and few false words; and
the chances of a claim's words, against these rates."""

from dataclasses import replace

import pytest

from kit.analysis import calibration, claims
from kit.analysis.calibration import HOLD, OUTCOMES, POWERED, SMALL

STUDIES = 400  # a rate is within five points of itself, twenty to one
CLAIMS = {claim.id: claim for claim in claims.load()}


@pytest.fixture(scope="module")
def rates():
    table = calibration.error_rates(STUDIES)
    assert table[list(OUTCOMES)].sum(axis=1).to_numpy() == pytest.approx(100)
    table["holds"] = table["reproduced"] + table["direction only"]
    return table.set_index(["rule", "truth", "problems"]).sort_index()


def test_a_true_effect_is_reproduced_with_the_stated_power(rates):
    for rule in ("direction", "size"):
        found = rates.loc[(rule, "the published gain", POWERED)]
        assert found["holds"] == pytest.approx(80, abs=6), rule
        assert found["contradicted"] == 0
        assert found["direction only"] + found["not reproduced"] <= 5 + 2.2, rule
    assert rates.loc[("direction", "the gain over both of 2 controls", POWERED), "holds"] > 55
    assert rates.loc[("size", "the published share", POWERED), "holds"] > 90
    assert rates.loc[("equivalence", "no difference", POWERED), "reproduced"] > 70
    for truth in ("no loss", "a gain"):
        assert rates.loc[("non_inferiority", truth, POWERED), "reproduced"] > 70


def test_what_is_not_there_is_reproduced_in_at_most_five_percent(rates):
    truths = rates.index.get_level_values("truth")
    false = rates[truths.str.startswith(("no gain", "a loss", "another", "the gain over 1"))]
    assert len(false) == 13
    assert (false["holds"] <= 5 + 2.2).all()  # 400 studies
    for truth in ("a share 20 points lower", "three times the published gain"):
        assert rates.loc[("size", truth, POWERED), "not reproduced"] > 80
    assert rates.loc[("direction", "a loss as large", POWERED), "contradicted"] > 75
    assert rates.loc[("direction", "no gain, both arms solve 1%", POWERED), "floor"] > 90


def test_a_published_threshold_without_its_error_is_taken_as_exact(rates):
    """Two studies of equal error differ by more than the interval of one in 17% of cases."""
    found = rates.loc[("threshold", "the published threshold", POWERED)]
    assert found["not reproduced"] == pytest.approx(17, abs=5)


def test_a_study_that_is_too_small_is_undecided(rates):
    small = rates[rates.index.get_level_values("problems") == SMALL]
    small = small[small.index.get_level_values("rule") != "threshold"]
    assert len(small) == 6 and (small["contradicted"] <= 5).all()
    one_sided = small.index.get_level_values("rule") == "non_inferiority"
    assert (small.loc[~one_sided, "undecided"] > 65).all()
    assert (small.loc[one_sided, "reproduced"] < 50).all()


def test_it_repeats():
    again = calibration.error_rates(5)
    assert again.equals(calibration.error_rates(5))
    assert not again.equals(calibration.error_rates(5, seed=1))


def test_chances_are_those_of_simulated_studies(rates):
    claim = replace(
        calibration.CLAIM, value=48.0, baseline=40.0, pairs=(32, 16, 8, 44),
        contrast={"measure": "accuracy", "arm": "a", "control": "b"},
    )  # fmt: skip
    for rule, truth, true in (
        ("direction", "the published gain", None),
        ("direction", "no gain", 0.0),
        ("equivalence", "no difference", None),
        ("non_inferiority", "a loss of the margin", -8.0),
    ):
        found = calibration.chances(replace(claim, rule=rule), POWERED, true)
        assert sum(found.values()) == pytest.approx(100)
        holds = sum(found.get(word, 0) for word in HOLD)
        assert holds == pytest.approx(rates.loc[(rule, truth, POWERED), "holds"], abs=6)


def test_a_claim_that_its_size_cannot_decide_has_no_power():
    loss = CLAIMS["dms-short-context-loss"]
    assert calibration.power(loss, 28) == pytest.approx(10, abs=1)  # by a lucky gain alone
    assert calibration.power(loss, 5_000) == 100
    for benchmark, n in (("openrs-sober-rs2-aime24", 30), ("openrs-sober-rs3-amc23", 40)):
        assert calibration.power(CLAIMS[benchmark], n) == 0
    gain = CLAIMS["rbslm-memory-gain"]
    assert calibration.power(gain, 28) < 20 < 75 < calibration.power(gain, 292)
    assert calibration.power(CLAIMS["nab-voting-pays-above"], 300) is None  # no size published
    assert calibration.power(CLAIMS["nab-scale-threshold"], 300) is None
    assert calibration.power(CLAIMS["rbslm-baseline-accuracy"], 20) == 0  # ±22 against ±10


def test_what_chance_alone_would_give_is_counted_by_system():
    row = {"on": "stand-in model", "n": 120}
    rows = [
        row | {"claim": "hier-memory-over-rag", "system": "parametric"},
        row | {"claim": "hier-late-over-early", "system": "parametric"},
        row | {"claim": "dms-delayed-eviction", "system": "dms", "n": 8},
        row | {"claim": "nab-scale-threshold", "system": "budget"},  # has no null
        row | {"claim": "rbslm-memory-gain", "system": "bank", "on": "needs the laptop profile"},
    ]
    for claim in ("hier-memory-over-rag", "dms-delayed-eviction"):
        assert calibration.false_alarm(CLAIMS[claim], 120) == 2.5
    margin = CLAIMS["nab-voting-idle-below"]
    assert calibration.false_alarm(margin, 120) == 5
    said = calibration.by_chance(CLAIMS.values(), rows)
    assert "the 3 differences" in said and "0.08 would" in said and "parametric 0.05, dms" in said
    assert calibration.by_chance(CLAIMS.values(), rows[-2:]) == ""
