"""Error rates of the verdicts, by simulation: the power that was stated, and few false words."""

import pytest

from kit.analysis import calibration

STUDIES = 400  # a rate is within five points of itself, twenty to one


@pytest.fixture(scope="module")
def rates():
    table = calibration.error_rates(STUDIES)
    assert table[list(calibration.WORDS)].sum(axis=1).to_numpy() == pytest.approx(100)
    return table.set_index(["rule", "truth", "problems"]).sort_index()


def test_a_true_effect_is_reproduced_with_the_stated_power(rates):
    for rule in ("direction", "size"):
        found = rates.loc[(rule, "the published gain", calibration.POWERED)]
        assert found["reproduced"] + found["direction only"] == pytest.approx(80, abs=6), rule
        assert found["contradicted"] == 0
    assert rates.loc[("equivalence", "no difference", calibration.POWERED), "reproduced"] > 70
    for truth in ("no loss", "a gain"):
        assert rates.loc[("non_inferiority", truth, calibration.POWERED), "reproduced"] > 70
    assert rates.loc[("threshold", "the published threshold", 292), "reproduced"] > 90


def test_what_is_not_there_is_reproduced_in_at_most_five_percent(rates):
    truths = rates.index.get_level_values("truth")
    false = rates[truths.str.startswith(("no gain", "a loss", "another"))]
    assert len(false) == 10
    found = false["reproduced"] + false["direction only"]
    assert (found <= 5 + 2.2).all()  # 400 studies
    assert rates.loc[("direction", "a loss as large", 292), "contradicted"] > 75


def test_a_study_that_is_too_small_is_inconclusive(rates):
    small = rates[rates.index.get_level_values("problems") == calibration.SMALL]
    assert len(small) == 6 and (small["undecided"] > 65).all()
    assert (small["contradicted"] <= 5).all()


def test_it_repeats(rates):
    again = calibration.error_rates(20)
    assert again.equals(calibration.error_rates(20)) and not again.equals(
        calibration.error_rates(20, seed=1)
    )
