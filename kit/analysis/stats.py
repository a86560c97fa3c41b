"""Intervals, paired tests, power: what turns graded records into a statement with an error bar.

scipy and statsmodels do the arithmetic where they can. Own code covers what they lack: Tango's
interval for paired proportions, power of paired proportions, trainings crossed with problems,
votes, optimism of a best-of-m. Values are [problems, samples] or [problems, trainings, samples], 0
or 1 or NaN where there is no sample; rows of two arms are the same problems in the same order.
Samples, sampling seeds included, are nested in their problem; trainings are crossed with problems,
since a lucky one answers many of them better, and with several the interval covers the next one.
Whatever is random takes a numpy Generator. Effects are fractions, not percent. No tables here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy import optimize, stats
from statsmodels.stats import proportion
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05  # a p of at least this does not tell a difference from zero
FEW = 10  # with fewer problems that deviate from the median, a bootstrap interval is too narrow


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval."""

    estimate: float
    low: float
    high: float
    n: int  # independent units: problems, or runs
    method: str
    level: float = 0.95

    @property
    def percent(self) -> tuple[float, float, float]:
        """Estimate and ends of a share in percent, of a difference of shares in points."""
        return 100 * self.estimate, 100 * self.low, 100 * self.high


@dataclass(frozen=True)
class Comparison:
    """A difference, treatment minus control, with its two-sided p-value."""

    difference: Interval
    p: float
    test: str


def wilson(correct: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of `correct` out of `n`."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n} is not a proportion; give 0 <= correct <= n")
    low, high = proportion.proportion_confint(correct, n, alpha=1 - level, method="wilson")
    return Interval(correct / n, float(low), float(high), n, "Wilson", level)


def unpaired(treatment: tuple[int, int], control: tuple[int, int]) -> Comparison:
    """Two independent proportions, each (correct, n): Agresti and Caffo's interval and test."""
    if not all(0 <= correct <= n and n for correct, n in (treatment, control)):
        raise ValueError(
            f"{treatment} against {control}: give (correct, n) with n above 0 for both"
        )
    # statsmodels' score interval finds no root for some counts, 32/40 against 25/40 is one
    counts, how = (*treatment, *control), {"compare": "diff", "method": "agresti-caffo"}
    low, high = proportion.confint_proportions_2indep(*counts, **how)
    test = proportion.test_proportions_2indep(*counts, **how)
    estimate = treatment[0] / treatment[1] - control[0] / control[1]
    smaller = min(treatment[1], control[1])
    low, high = max(float(low), -1.0), min(float(high), 1.0)  # the interval overshoots near an end
    interval = Interval(estimate, low, high, smaller, "Agresti-Caffo")
    return Comparison(interval, float(test.pvalue), "Agresti-Caffo, unpaired")


def welch(treatment: tuple[float, float], control: tuple[float, float], runs: int) -> Comparison:
    """Two means over `runs` runs each, given as (mean, sd): Welch's t. Covers run noise only."""
    (mean1, sd1), (mean0, sd0) = treatment, control
    if runs < 2 or not sd1 + sd0 > 0:
        raise ValueError(f"Welch's t needs two runs or more that differ; there are {runs}, with "
                         f"standard deviations {sd1:g} and {sd0:g}")  # fmt: skip
    v1, v0 = sd1**2 / runs, sd0**2 / runs
    freedom = (v1 + v0) ** 2 / ((v1**2 + v0**2) / (runs - 1))
    half = float(stats.t.ppf(0.975, freedom)) * sqrt(v1 + v0)
    test = stats.ttest_ind_from_stats(mean1, sd1, runs, mean0, sd0, runs, equal_var=False)
    gap = mean1 - mean0
    interval = Interval(gap, gap - half, gap + half, runs, "Welch")
    return Comparison(interval, test.pvalue, "Welch's t")


# Paired proportions


def mcnemar(only_treatment: int, only_control: int) -> float:
    """Two-sided exact McNemar p-value from the discordant counts."""
    total = only_treatment + only_control
    return float(stats.binomtest(only_treatment, total, 0.5).pvalue) if total else 1.0


def tango(only_treatment: int, only_control: int, n: int, level: float = 0.95) -> Interval:
    """Tango's score interval of a paired difference (Statistics in Medicine 17, 1998).

    Inverts the asymptotic McNemar test, so it excludes zero exactly when that test rejects;
    stays honest when no pair is discordant, where Wald's has no width.
    """
    b, c = only_treatment, only_control
    if n <= 0 or b + c > n or min(b, c) < 0:
        raise ValueError(f"{b} and {c} discordant pairs do not fit into {n} pairs")
    z = stats.norm.ppf((1 + level) / 2)
    estimate = (b - c) / n

    def score(delta: float, sign: int) -> float:
        # q is the probability of "control only" that is likeliest under this difference
        linear = (2 * n - b + c) * delta - b - c
        q = (sqrt(max(linear**2 + 8 * n * c * delta * (1 - delta), 0)) - linear) / (4 * n)
        return b - c - n * delta - sign * z * sqrt(max(n * (2 * q + delta * (1 - delta)), 0))

    # just beside the estimate: with no discordant pair the estimate itself is a spurious root
    below, above = estimate - 1e-9, estimate + 1e-9
    low = optimize.brentq(score, -1, below, args=(1,)) if below > -1 else -1.0
    high = optimize.brentq(score, above, 1, args=(-1,)) if above < 1 else 1.0
    return Interval(estimate, low, high, n, "Tango score", level)


def paired(both: int, only_treatment: int, only_control: int, neither: int) -> Comparison:
    """Published pair counts to difference, Tango interval and exact McNemar p-value."""
    n = both + only_treatment + only_control + neither
    interval = tango(only_treatment, only_control, n)
    return Comparison(interval, mcnemar(only_treatment, only_control), "exact McNemar")


def pairs_needed(only_treatment: float, only_control: float, power: float = 0.8) -> int:
    """Pairs for `power` of McNemar's 5% test at these rates of discordance (Connor 1987)."""
    effect, discordant = abs(only_treatment - only_control), only_treatment + only_control
    if effect == 0 or discordant > 1:
        raise ValueError("power needs two different discordance rates that sum to at most 1")
    z_test, z_power = stats.norm.ppf(0.975), stats.norm.ppf(power)
    root = z_test * sqrt(discordant) + z_power * sqrt(discordant - effect**2)
    return ceil((root / effect) ** 2)


def minimum_detectable(low: float, high: float, power: float = 0.8) -> float:
    """The true difference which a study as precise as one with this 95% interval tells from zero
    with `power`, in the interval's unit (minimum detectable effect, Bloom 1995,
    https://doi.org/10.1177/0193841X9501900504)."""
    z_test, z_power = stats.norm.ppf(0.975), stats.norm.ppf(power)
    return (high - low) / 2 * (z_test + z_power) / z_test


# Problems x samples, problems x trainings x samples


def _last_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is there; NaN where nothing is."""
    counts = (~np.isnan(values)).sum(axis=-1)
    sums = np.nansum(values, axis=-1)
    return np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def problem_means(values: np.ndarray) -> np.ndarray:
    """Mean over the samples of each problem, by training first where there are several; NaN for a
    problem without any."""
    values = np.asarray(values, dtype=float)
    for _ in range(values.ndim - 1):
        values = _last_mean(values)
    return values


def cluster_bootstrap(
    values: np.ndarray,
    rng: np.random.Generator,
    level: float = 0.95,
    draws: int = 10_000,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """Percentile bootstrap of the mean of problem means; a problem is drawn with all its samples.

    Where fewer than `FEW` problems deviate from the median, the interval is widened to what
    Wilson and Tango allow when nothing deviates, z^2 / (n + z^2): ten problems without a
    difference are no proof of none.
    """
    means = problem_means(values)
    means = means[~np.isnan(means)]
    if len(means) == 0:
        raise ValueError("no problem has a sample; a bootstrap needs at least one")
    tails = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(_resampled(means, rng, draws), tails)
    return _widened(means, low, high, level, bounds, "cluster bootstrap")


def _resampled(means: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Means of `draws` bootstrap samples of problems."""
    if len(means) == 1:
        return means
    resamples = stats.bootstrap(
        (means,), np.mean, n_resamples=draws, batch=1 + 2_000_000 // len(means),
        method="percentile", rng=rng,
    )  # fmt: skip
    return resamples.bootstrap_distribution


def _few(means: np.ndarray) -> bool:
    return np.count_nonzero(means != np.median(means)) < FEW


def _widened(
    means: np.ndarray, low: float, high: float, level: float, bounds: tuple, method: str
) -> Interval:
    """The interval, widened where few problems deviate from the median, within `bounds`."""
    n, estimate = len(means), float(means.mean())
    if _few(means):
        z = stats.norm.ppf((1 + level) / 2)
        floor = float(z**2 / (n + z**2))
        low, high = min(low, estimate - floor), max(high, estimate + floor)
    low, high = max(float(low), bounds[0]), min(float(high), bounds[1])
    return Interval(estimate, low, high, n, method, level)


@dataclass(frozen=True)
class _Crossed:
    """A mean over problems and trainings, with its variance and degrees of freedom."""

    means: np.ndarray  # of each problem
    variance: float
    freedom: float

    def half(self, level: float) -> float:
        return float(stats.t.ppf((1 + level) / 2, self.freedom)) * sqrt(self.variance)

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of zero."""
        at = abs(self.means.mean()) / sqrt(self.variance) if self.variance else np.inf
        return float(2 * stats.t.sf(at, self.freedom))


def _crossed(*sides: np.ndarray) -> _Crossed | None:
    """The mean of one side, or treatment minus control, with trainings crossed with problems; None
    where no side has several trainings, or a single problem.

    Its variance is that of the (paired) problem means over n, and for each side with k trainings
    that between trainings over k, less what the answers' noise makes of it (two-way analysis of
    variance); degrees of freedom by Satterthwaite, Biometrics Bulletin 2 (1946). Of a side with one
    training the interval covers that model alone.
    """
    several = [side for side in sides if side.ndim == 3 and side.shape[1] > 1]
    means = problem_means(sides[0]) - (problem_means(sides[1]) if len(sides) == 2 else 0)
    valid = ~np.isnan(means)
    means = means[valid]
    if not several or len(means) < 2:
        return None
    parts = [(float(means.var(ddof=1)) / len(means), len(means) - 1)]
    for side in several:
        parts += _between(_last_mean(side[valid]))
    variance = sum(part for part, _ in parts)
    squares = sum(part**2 / freedom for part, freedom in parts)
    return _Crossed(means, variance, max(1.0, variance**2 / squares) if squares else np.inf)


def _between(cells: np.ndarray) -> list[tuple[float, float]]:
    """The variance that trainings add to a mean over [problems, trainings], in parts with their
    degrees of freedom; nothing where they differ by no more than noise makes them differ."""
    cells = cells[:, ~np.isnan(cells).all(axis=0)]
    n, k = cells.shape
    if k < 2:
        return []
    centred = cells - _last_mean(cells)[:, None]
    effects = np.nanmean(centred, axis=0)  # of each training
    freedom = max(1, int((~np.isnan(cells)).sum()) - n - k + 1)
    noise = float(np.nansum((centred - effects) ** 2)) / freedom / n
    spread = float(effects.var(ddof=1))
    return [(spread / k, k - 1), (-noise / k, freedom)] if spread > noise else []


def _nested(values: np.ndarray) -> np.ndarray:
    """Values as floats, [problems, samples] where there is one training."""
    values = np.asarray(values, dtype=float)
    return values[:, 0] if values.ndim == 3 and values.shape[1] == 1 else values


def _single(values: np.ndarray) -> bool:
    """Whether every problem has at most one sample and every sample is 0 or 1."""
    observations = values[~np.isnan(values)]
    once = values.ndim == 1 or bool(((~np.isnan(values)).sum(axis=-1) <= 1).all())
    return values.ndim < 3 and once and bool(np.isin(observations, (0.0, 1.0)).all())


def mean_interval(
    values: np.ndarray, rng: np.random.Generator, level: float = 0.95, draws: int = 10_000
) -> Interval:
    """Mean over problems of what lies in [0, 1]: Wilson for one sample per problem, else the
    cluster bootstrap.

    With several trainings, Wilson's interval at the number of answers that has the variance of
    `_crossed` (of problems at most, where few deviate), and with its t for the normal quantile:
    within [0, 1], as a t interval is not.
    """
    values = _nested(values)
    means = problem_means(values)
    means = means[~np.isnan(means)]
    if len(means) and _single(values):
        return wilson(int(means.sum()), len(means), level)
    crossed = _crossed(values)
    if crossed is None:
        return cluster_bootstrap(means, rng, level, draws, bounds=(0.0, 1.0))
    p, n = float(means.mean()), len(means)
    most = n if _few(means) else int((~np.isnan(values)).sum())
    size = min(most, p * (1 - p) / crossed.variance) if crossed.variance else n
    z2 = float(stats.t.ppf((1 + level) / 2, crossed.freedom)) ** 2 / size
    middle, half = (p + z2 / 2) / (1 + z2), sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    ends = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(p, *ends, n, "Wilson, trainings crossed", level)


def paired_interval(
    treatment: np.ndarray,
    control: np.ndarray,
    rng: np.random.Generator,
    level: float = 0.95,
    draws: int = 10_000,
) -> Interval:
    """Treatment minus control over the problems that both have, equal weight per problem.

    Tango's interval for one sample per problem and arm, a t interval with trainings crossed with
    problems where an arm has several, else the cluster bootstrap of the per-problem differences.
    """
    treatment, control = _nested(treatment), _nested(control)
    difference = problem_means(treatment) - problem_means(control)
    difference = difference[~np.isnan(difference)]
    if len(difference) and _single(treatment) and _single(control):
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        return tango(wins, losses, len(difference), level)
    crossed = _crossed(treatment, control)
    if crossed is None:
        return cluster_bootstrap(difference, rng, level, draws, bounds=(-1.0, 1.0))
    ends = difference.mean() - crossed.half(level), difference.mean() + crossed.half(level)
    return _widened(difference, *ends, level, (-1.0, 1.0), "t, trainings crossed")


def paired_p(
    treatment: np.ndarray, control: np.ndarray, rng: np.random.Generator, draws: int = 10_000
) -> float:
    """Two-sided p-value of no difference: of the test that `paired_interval` inverts, so that it is
    below 0.05 where the 95% interval excludes zero."""
    treatment, control = _nested(treatment), _nested(control)
    difference = problem_means(treatment) - problem_means(control)
    difference = difference[~np.isnan(difference)]
    if _single(treatment) and _single(control):
        wins, losses = (difference > 0).sum(), (difference < 0).sum()
        return float(2 * stats.norm.sf(abs(wins - losses) / sqrt(max(1, wins + losses))))
    crossed, n, size = _crossed(treatment, control), len(difference), abs(difference.mean())
    if crossed:
        p = crossed.p
    else:
        resamples = _resampled(difference, rng, draws)
        p = 2 * (1 + min((resamples <= 0).sum(), (resamples >= 0).sum())) / (1 + len(resamples))
    if _few(difference):  # the level at which the widened interval ends at zero
        p = max(p, 2 * stats.norm.sf(sqrt(n * size / (1 - size)))) if size < 1 else p
    return min(1.0, float(p))


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values, in the order given."""
    return multipletests(pvalues, method="holm")[1]


# Several samples of one problem, several checkpoints of one run


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Unbiased pass@k, mean over problems (Chen et al. 2021, arXiv 2107.03374, section 2.1)."""
    correct = np.asarray(correct, dtype=float)
    samples, right = (~np.isnan(correct)).sum(axis=1), np.nansum(correct, axis=1)
    if samples.min() < k:
        raise ValueError(f"pass@{k} needs {k} samples per problem; one has {samples.min()}")
    # no right answer among k drawn without replacement, which stays finite for many samples
    return float(np.mean(1 - stats.hypergeom.pmf(0, samples, right, k)))


def best_of_optimism(p: float, n: int, m: int) -> float:
    """Expected accuracy of the best of `m` equal checkpoints on `n` items, minus the true `p`."""
    below = stats.binom.cdf(np.arange(n), n, p) ** m  # P(best <= x); E[best] = sum P(best > x)
    return float((1 - below).sum() / n - p)
