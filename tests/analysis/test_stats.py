"""kit.analysis.stats against published numbers, other libraries, brute force and simulated
coverage."""

from itertools import combinations, product
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.weightstats import ttost_paired

from kit.analysis import stats


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def discordance(n: int, wins: float, losses: float):
    """All (b, c) that n pairs can show, with their probabilities."""
    b, c = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    b, c = b[b + c <= n], c[b + c <= n]
    table = np.stack([b, c, n - b - c], axis=1)
    chance = scipy_stats.multinomial.pmf(table, n, [wins, losses, 1 - wins - losses])
    likely = chance > 1e-9
    return b[likely], c[likely], chance[likely]


def nested(reps: int, n: int, k: int, gain: float, seed: int):
    """Two arms of reps x n problems x k samples; problems differ in difficulty."""
    draw = rng(seed)
    base = draw.beta(1, 2, size=(reps, n, 1)) * (1 - gain)
    control = draw.random((reps, n, k)) < base
    treatment = draw.random((reps, n, k)) < base + gain
    return treatment.astype(float), control.astype(float)


# ------------------------------------------------------------------ published numbers


@pytest.mark.parametrize(
    ("pairs", "difference", "low", "high", "p"),
    [
        ((32, 16, 8, 44), 0.08, -0.015, 0.175, 0.152),  # reasoning-bank-slm as reported
        ((43, 15, 9, 33), 0.06, -0.035, 0.155, 0.307),  # regraded by script
    ],
)
def test_pairs_match_the_published_audit(pairs, difference, low, high, p):
    found = stats.paired(*pairs)
    assert found.difference.estimate == pytest.approx(difference)
    assert found.difference.low == pytest.approx(low, abs=0.006)  # published: Wald, rounded
    assert found.difference.high == pytest.approx(high, abs=0.006)
    assert found.p == pytest.approx(p, abs=0.0006)


def test_mcnemar_of_14_against_10():
    assert stats.mcnemar(14, 10) == pytest.approx(0.541, abs=0.0005)


def test_tango_matches_published_intervals():
    # airway hyper-responsiveness, Fagerland, Lydersen and Laake 2014, table II
    found = stats.tango(1, 7, 21)
    assert (found.low, found.high) == pytest.approx((-0.517, -0.026), abs=0.0005)
    # R package PropCIs, scoreci.mp(25, 28, 618) at 90%
    found = stats.tango(28, 25, 618, level=0.90)
    assert (found.low, found.high) == pytest.approx((-0.0148, 0.0247), abs=0.00005)


def test_wilson_matches_published_intervals():
    assert stats.wilson(40, 100).low == pytest.approx(0.309, abs=0.0005)
    assert stats.wilson(40, 100).high == pytest.approx(0.498, abs=0.0005)
    assert stats.wilson(48, 100).high == pytest.approx(0.577, abs=0.0005)


def test_required_pairs_match_the_published_power():
    assert stats.pairs_needed(0.16, 0.08) == 292
    assert stats.pairs_needed(0.14, 0.10) == 1175


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_the_difference_that_an_interval_can_tell_from_zero(power):
    """Against statsmodels, where n differences have a standard deviation of 1."""
    n, half = 154, scipy_stats.norm.ppf(0.975) / 154**0.5
    effect = NormalIndPower(ddof=0).solve_power(nobs1=n, alpha=0.05, power=power, ratio=0)
    assert stats.minimum_detectable(3 - half, 3 + half, power) == pytest.approx(effect, rel=1e-4)


def test_best_of_eight_checkpoints_flatters_by_twelve_points():
    assert stats.best_of_optimism(0.3, 30, 8) == pytest.approx(0.12, abs=0.005)


# ------------------------------------------------------------------ other libraries, brute force


def test_mcnemar_equals_statsmodels_and_enumeration():
    for b, c in product(range(9), repeat=2):
        exact = stats.mcnemar(b, c)
        oracle = statsmodels_mcnemar([[3, b], [c, 3]], exact=True).pvalue
        assert exact == pytest.approx(min(oracle, 1.0))
        chances = [comb(b + c, x) / 2 ** (b + c) for x in range(b + c + 1)]
        rarer = sum(q for q in chances if q < chances[b] - 1e-12)
        ties = sum(q for q in chances if abs(q - chances[b]) < 1e-12)
        assert exact == pytest.approx(rarer + ties)


def test_tango_excludes_zero_exactly_where_asymptotic_mcnemar_rejects():
    for b, c in product(range(21), repeat=2):
        found = stats.tango(b, c, 40)
        rejects = b + c > 0 and abs(b - c) / (b + c) ** 0.5 > 1.959964
        assert (found.low > 0 or found.high < 0) == rejects, (b, c)
        assert -1 <= found.low <= found.estimate <= found.high <= 1


def test_tango_with_nothing_or_everything_discordant():
    z2 = 1.959964**2
    none = stats.tango(0, 0, 50)  # closed form of the score equation
    assert (none.low, none.high) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)))
    assert stats.tango(50, 0, 50).high == 1 and stats.tango(0, 50, 50).low == -1


def test_unpaired_equals_the_closed_form_and_survives_awkward_counts():
    found = stats.unpaired((48, 100), (40, 100))
    p1, p0 = 49 / 102, 41 / 102  # Agresti and Caffo: one success and one failure more per arm
    se = (p1 * (1 - p1) / 102 + p0 * (1 - p0) / 102) ** 0.5
    assert found.difference.low == pytest.approx(p1 - p0 - 1.959964 * se)
    assert found.p == pytest.approx(2 * scipy_stats.norm.sf((p1 - p0) / se))
    awkward = stats.unpaired((32, 40), (25, 40)).difference
    assert awkward.low < 0.175 < awkward.high


def test_welch_equals_scipy_on_data_with_these_moments():
    draw = rng().normal(size=(2, 10))
    draw = (draw - draw.mean(1, keepdims=True)) / draw.std(1, ddof=1, keepdims=True)
    a, b = 29.7 + 4.6 * draw[0], 28.7 + 4.8 * draw[1]
    oracle = scipy_stats.ttest_ind(a, b, equal_var=False)
    found = stats.welch((29.7, 4.6), (28.7, 4.8), runs=10)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx(
        tuple(oracle.confidence_interval())
    )


def crossed(n: int, k: int, spread: float, gain: float, draw: np.random.Generator):
    """Two arms of n problems x k trainings x one sample; a training shifts all of its answers."""
    skill = draw.beta(1.2, 2.4, size=(n, 1, 1))
    shifts = [more + draw.normal(0, spread, size=(1, k, 1)) for more in (gain, 0.0)]
    return [(draw.random((n, k, 1)) < skill + shift).astype(float) for shift in shifts]


def test_trainings_are_crossed_as_in_an_analysis_of_variance():
    treatment, control = crossed(30, 3, 0.15, 0.1, rng(4))
    difference = treatment.mean((1, 2)) - control.mean((1, 2))
    parts = [difference.var(ddof=1) / 30]
    freedoms = [29.0]
    for side in (treatment, control):
        at = np.indices((30, 3)).reshape(2, -1)
        frame = pd.DataFrame({"y": side.ravel(), "problem": at[0], "training": at[1]})
        table = anova_lm(ols("y ~ C(problem) + C(training)", frame).fit())
        between, noise = (table.loc[row, "mean_sq"] for row in ("C(training)", "Residual"))
        assert between > noise, "the draw is one in which both count"
        parts += [between / 30 / 3, -noise / 30 / 3]
        freedoms += [2, 58]
    variance = sum(parts)
    freedom = variance**2 / sum(part**2 / each for part, each in zip(parts, freedoms))
    half = scipy_stats.t.ppf(0.975, freedom) * variance**0.5
    found = stats.paired_interval(treatment, control, rng())
    assert (found.estimate, found.n) == (pytest.approx(difference.mean()), 30)
    assert (found.low, found.high) == pytest.approx(
        (difference.mean() - half, difference.mean() + half)
    )
    expected = 2 * scipy_stats.t.sf(abs(difference.mean()) / variance**0.5, freedom)
    assert stats.paired_p(treatment, control, rng()) == pytest.approx(expected)


def test_trainings_that_problems_do_not_tell_apart_are_compared_by_welchs_t():
    levels = [0.31, 0.42, 0.36], [0.12, 0.25, 0.31, 0.22]
    sides = [np.tile(np.reshape(each, (1, -1, 1)), (2000, 1, 1)) for each in levels]
    oracle = scipy_stats.ttest_ind(*levels, equal_var=False)
    found = stats.paired_interval(*sides, rng())
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))
    assert stats.paired_p(*sides, rng()) == pytest.approx(oracle.pvalue)


def test_one_training_is_nested_and_samples_of_a_training_are():
    flat = nested(reps=1, n=40, k=4, gain=0.2, seed=8)
    one = [side[0][:, None, :] for side in flat]
    assert stats.paired_interval(*one, rng()) == stats.paired_interval(
        flat[0][0], flat[1][0], rng()
    )
    assert stats.mean_interval(one[0], rng()) == stats.mean_interval(flat[0][0], rng())
    several = [side[0].reshape(40, 2, 2) for side in flat]  # of two trainings two samples each
    assert stats.paired_interval(*several, rng()).method == "t, trainings crossed"
    gaps = several[0].mean((1, 2)) - several[1].mean((1, 2))
    assert stats.paired_interval(*several, rng()).estimate == pytest.approx(gaps.mean())


def test_p_is_below_five_percent_exactly_where_the_interval_excludes_zero():
    kinds = {
        "pairs": lambda draw, gain: [side[0] for side in nested(1, 60, 1, gain, draw)],
        "nested": lambda draw, gain: [side[0] for side in nested(1, 60, 3, gain, draw)],
        "few": lambda draw, gain: [side[0] for side in nested(1, 9, 3, 2 * gain, draw)],
        "crossed": lambda draw, gain: crossed(60, 3, 0.05, gain, rng(draw)),
    }
    for name, make in kinds.items():
        excludes = 0
        for draw in range(60):
            sides = make(draw, 0.15)
            found = stats.paired_interval(*sides, rng())
            outside = found.low > 0 or found.high < 0
            assert (stats.paired_p(*sides, rng()) < 0.05) == outside, (name, draw)
            excludes += outside
        assert 3 < excludes < 57, name


def test_p_of_nested_samples_is_near_the_permutation_test():
    treatment, control = (side[0] for side in nested(reps=1, n=80, k=3, gain=0.08, seed=9))
    oracle = scipy_stats.permutation_test(
        (treatment.mean(1) - control.mean(1),), np.mean, permutation_type="samples", rng=rng()
    ).pvalue
    assert 0.01 < oracle < 0.5
    assert stats.paired_p(treatment, control, rng()) == pytest.approx(oracle, rel=0.3)


def test_bootstrap_equals_enumeration_and_weighs_problems_equally():
    ragged = np.array([[1, 1, 1, 0], [0, np.nan, np.nan, np.nan], [1, 0, np.nan, np.nan]])
    ragged = np.vstack([ragged] * 4)  # twelve problems, eight away from the median
    means = np.array([0.75, 0.0, 0.5] * 4)
    found = stats.cluster_bootstrap(ragged, rng(), draws=200_000)
    sums = np.zeros(12 * 3 + 1)  # distribution of the sum of twelve draws in units of 1/4
    sums[0] = 1
    for _ in range(12):
        sums = sum(np.roll(sums, int(4 * value)) / 3 for value in (0.75, 0.0, 0.5))
    cumulative = sums.cumsum()
    low, high = (np.searchsorted(cumulative, q) / 48 for q in (0.025, 0.975))
    assert found.estimate == pytest.approx(means.mean())
    # fewer than ten deviate, so the floor applies on top of the enumerated quantiles
    floor = 1.959964**2 / (12 + 1.959964**2)
    assert found.low == pytest.approx(min(low, means.mean() - floor), abs=0.011)
    assert found.high == pytest.approx(max(high, means.mean() + floor), abs=0.011)


def test_bootstrap_quantiles_equal_enumeration_where_no_floor_applies():
    means = np.array([0.0, 1.0] * 15)
    found = stats.cluster_bootstrap(means, rng(), draws=100_000)
    oracle = scipy_stats.binom.ppf([0.025, 0.975], 30, 0.5) / 30
    assert (found.low, found.high) == pytest.approx(tuple(oracle), abs=1e-9)


def equivalent(treatment, control, margin: float) -> bool:
    """Two one-sided tests at 5%, as the rule "equivalence" of verdicts has them."""
    interval = stats.paired_interval(treatment, control, rng(), level=0.90)
    return -margin < interval.low and interval.high < margin


def test_the_90_percent_interval_agrees_with_tost_of_statsmodels_on_nested_samples():
    treatment, control = nested(reps=150, n=120, k=6, gain=0.03, seed=3)
    agree, yes = 0, 0
    for a, b in zip(treatment, control, strict=True):
        oracle = ttost_paired(a.mean(1), b.mean(1), -0.06, 0.06)[0] < 0.05
        agree += equivalent(a, b, 0.06) == oracle
        yes += oracle
    assert 20 < yes < 130  # the comparison is not trivial
    assert agree >= 145  # a bootstrap and a t-test may differ at the border


def test_equivalence_refuses_losses_as_well_as_gains():
    ahead, behind = np.ones((300, 1)), np.ones((300, 1))
    behind[:60] = 0
    assert not equivalent(ahead, behind, 0.05)
    assert not equivalent(behind, ahead, 0.05)
    assert equivalent(behind, ahead, 0.30)


def test_holm_steps_down():
    pvalues = [0.04, 0.01, 0.03, 0.005]
    order = np.argsort(pvalues)
    expected, running = np.empty(4), 0.0
    for rank, i in enumerate(order):
        running = max(running, (4 - rank) * pvalues[i])
        expected[i] = min(running, 1.0)
    assert stats.holm(pvalues) == pytest.approx(expected)


def test_pass_at_k_equals_all_subsets():
    correct = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, np.nan]])
    for k in (1, 2, 3, 4):
        per_problem = []
        for row in correct:
            row = row[~np.isnan(row)]
            subsets = list(combinations(row, k))
            per_problem.append(np.mean([max(subset) for subset in subsets]))
        assert stats.pass_at_k(correct, k) == pytest.approx(np.mean(per_problem))
    assert np.isfinite(stats.pass_at_k(np.eye(3000)[:2], 1500))


def test_best_of_optimism_equals_enumeration():
    n, p, m = 3, 0.4, 2
    chance = [comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)]
    best = sum(chance[x] * chance[y] * max(x, y) for x, y in product(range(n + 1), repeat=m))
    assert stats.best_of_optimism(p, n, m) == pytest.approx(best / n - p)
    assert stats.best_of_optimism(p, n, 1) == pytest.approx(0)


# ------------------------------------------------------------------ coverage and error rates


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.8])
def test_wilson_covers(p):
    n, reps = 300, 20_000
    drawn, times = np.unique(rng(1).binomial(n, p, size=reps), return_counts=True)
    found = [stats.wilson(int(x), n) for x in drawn]
    covers = np.array([interval.low <= p <= interval.high for interval in found])
    assert 0.93 < (covers * times).sum() / reps < 0.97


@pytest.mark.parametrize(("wins", "losses"), [(0.16, 0.08), (0.12, 0.12), (0.25, 0.05)])
def test_paired_interval_covers(wins, losses):
    b, c, chance = discordance(100, wins, losses)  # exact: every outcome with its probability
    found = [stats.tango(int(x), int(y), 100) for x, y in zip(b, c, strict=True)]
    covers = np.array([interval.low <= wins - losses <= interval.high for interval in found])
    assert 0.93 < (covers * chance).sum() < 0.97


def test_required_pairs_have_the_stated_power():
    b, c, chance = discordance(292, 0.16, 0.08)
    rejects = np.abs(b - c) > 1.959964 * np.sqrt(b + c)
    assert (rejects * chance).sum() == pytest.approx(0.80, abs=0.015)


def test_cluster_bootstrap_covers_where_pooling_does_not():
    values, _ = nested(reps=2000, n=80, k=8, gain=0.0, seed=5)
    covers = pooled = 0
    for matrix in values:
        found = stats.mean_interval(matrix, rng(1), draws=1000)
        covers += found.low <= 1 / 3 <= found.high  # mean of beta(1, 2)
        naive = stats.wilson(int(matrix.sum()), matrix.size)
        pooled += naive.low <= 1 / 3 <= naive.high
    assert 0.93 < covers / 2000 < 0.97
    assert pooled / 2000 < 0.85


@pytest.mark.parametrize("k", [2, 6])
def test_paired_bootstrap_covers(k):
    treatment, control = nested(reps=2000, n=80, k=k, gain=0.1, seed=7)
    covers = 0
    for a, b in zip(treatment, control, strict=True):
        found = stats.paired_interval(a, b, rng(1), draws=1000)
        covers += found.low <= 0.1 <= found.high
    assert 0.93 < covers / 2000 < 0.97


@pytest.mark.parametrize("spread", [0.0, 0.04])
def test_two_equal_ways_of_training_are_told_apart_in_five_percent(spread):
    draw, found, naive = rng(6), 0, 0
    for _ in range(600):
        sides = crossed(200, 3, spread, 0.0, draw)
        interval = stats.paired_interval(*sides, rng())
        found += interval.low > 0 or interval.high < 0
        means = [side.mean((1, 2)) for side in sides]
        naive += scipy_stats.ttest_rel(*means).pvalue < 0.05  # as if trainings were samples
    assert found / 600 <= 0.05 + 0.018
    assert (naive / 600 > 0.15) == (spread > 0)


def test_a_share_over_trainings_covers_and_stays_a_share():
    draw, covers = rng(3), 0
    for _ in range(600):
        side, _ = crossed(150, 3, 0.04, 0.0, draw)
        found = stats.mean_interval(side, rng())
        covers += found.low <= 1.2 / 3.6 <= found.high
    assert covers / 600 >= 0.93
    rare = np.zeros((40, 3, 1))
    rare[0, 0] = rare[1, 2] = 1
    found = stats.mean_interval(rare, rng())
    assert 0 < found.low < found.estimate < found.high < 0.2
    none = stats.mean_interval(np.zeros((40, 3, 1)), rng())
    assert (none.low, none.high) == pytest.approx((0, stats.wilson(0, 40).high))


def test_equivalence_errs_in_one_of_twenty_at_the_margin():
    b, c, chance = discordance(400, 0.15, 0.10)  # the true difference is the margin
    cells = zip(b, c, strict=True)
    shown = [stats.tango(int(x), int(y), 400, level=0.90).high < 0.05 for x, y in cells]
    assert (np.array(shown) * chance).sum() == pytest.approx(0.05, abs=0.01)


# ------------------------------------------------------------------ honesty at the edges


def test_few_problems_without_a_difference_prove_nothing():
    same = np.ones((10, 4))
    found = stats.paired_interval(same, same, rng())
    assert found.low < -0.25 and found.high > 0.25
    assert not equivalent(same, same, 0.05)
    assert stats.mean_interval(same, rng()).low < 0.75
    many = np.ones((200, 4))
    assert equivalent(many, many, 0.05)


def test_single_samples_use_the_exact_counts():
    treatment, control = np.array([[1], [1], [0], [1.0]]), np.array([[0], [1], [0], [0.0]])
    assert stats.paired_interval(treatment, control, rng()) == stats.tango(2, 0, 4)
    assert stats.mean_interval(treatment, rng()) == stats.wilson(3, 4)


def test_same_generator_same_interval():
    treatment, control = nested(reps=1, n=30, k=3, gain=0.1, seed=2)
    one, two, other = (
        stats.paired_interval(treatment[0], control[0], rng(seed), draws=500) for seed in (1, 1, 2)
    )
    assert one == two and one != other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(5, 0), "5 correct of 0"),
        (lambda: stats.tango(3, 4, 5), "do not fit into 5 pairs"),
        (lambda: stats.pairs_needed(0.1, 0.1), "two different discordance rates"),
        (lambda: stats.pass_at_k(np.ones((2, 3)), 4), "needs 4 samples"),
        (lambda: stats.cluster_bootstrap(np.full((2, 2), np.nan), rng()), "at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
