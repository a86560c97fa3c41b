"""How often a verdict is wrong: the rules applied to studies whose truth is known.

`error_rates` simulates two studies at a time. The published one asked ITEMS problems of two arms
that solve 48 and 40% of them, or of one that solves 48%, and published what it found, if that was
on the claimed side; the one here asks `n` problems, of which two arms answer 24% differently, for
which 292 have 80% power. `chances` says without drawing how likely each word is for a claim at a
number of problems: before a run what it cannot decide, after it how many words chance alone gives.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import norm

from kit.analysis import contrasts, stats, verdicts
from kit.analysis.claims import Claim
from kit.analysis.contrasts import Measurement

SHARE, GAIN, DIFFER, POWERED, SMALL = 0.48, 0.08, 0.24, 292, 60
ITEMS = 300  # problems of the published study, each arm its own
SAMPLES, TRAININGS, SPREAD = 3, 3, 0.04  # of a problem; of an arm, and the sd between them
DRAWS = 1_000  # of each bootstrap
CLAIM = Claim(
    "simulated", "simulated", "", "accuracy", "percent", "", "CALC", "01_baseline",
    ("laptop",), "direction", {}, ("simulated",), "published", resolution=10.0, margin=8.0,
)  # fmt: skip
OUTCOMES = (*verdicts.WORDS_THERE, "undecided", "floor")
HOLD = ("reproduced", "holds here", "direction only")  # words by which a claim's side is borne
QUANTILES = norm.ppf((np.arange(200) + 0.5) / 200)  # of an estimate, for `chances`
WEAK = 20  # percent of power below which a run says beforehand that it is too small for a claim
Draw = np.random.Generator


def _paired(gain: float, n: int, rng: Draw) -> Measurement:
    """One answer per problem and arm."""
    differ = max(DIFFER, abs(gain))
    wins, losses, _ = rng.multinomial(n, [(differ + gain) / 2, (differ - gain) / 2, 1 - differ])
    return _of_pairs(int(wins), int(losses), n)


@cache
def _of_pairs(wins: int, losses: int, n: int) -> Measurement:
    outer, inner = (stats.tango(wins, losses, n, level) for level in (0.95, 0.90))
    return replace(contrasts.points(outer), inner=inner.percent[1:])


def _nested(gain: float, n: int, rng: Draw) -> Measurement:
    """SAMPLES answers per problem and arm; how likely each is differs between problems."""
    skill = np.repeat(rng.beta(1, 2, size=(n, 1)), SAMPLES, axis=1)
    sides = (rng.random(skill.shape) < np.clip(skill + more, 0, 1) for more in (gain, 0.0))
    values = [side.astype(float) for side in sides]
    return contrasts.points(stats.paired_interval(*values, rng, draws=DRAWS))


def _crossed(gain: float, n: int, rng: Draw) -> Measurement:
    """TRAININGS of each arm, one answer per problem and training, which shifts all its answers."""
    skill = rng.beta(1.2, 2.4, size=(n, 1, 1))
    shifts = (more + SPREAD * rng.normal(size=(1, TRAININGS, 1)) for more in (gain, 0.0))
    values = [(rng.random((n, TRAININGS, 1)) < skill + shift).astype(float) for shift in shifts]
    return contrasts.points(stats.paired_interval(*values, rng))


def _controls(gains: tuple[float, ...], n: int, rng: Draw) -> Measurement:
    """As `_paired`, against several controls: the hardest to beat, as `claims.measure` takes it."""
    return min((_paired(gain, n, rng) for gain in gains), key=lambda measurement: measurement.low)


def _floor(share: float, n: int, rng: Draw) -> Measurement:
    """Two arms that solve the same small share of the problems, each its own."""
    wins, losses = (int(count) for count in rng.binomial(n, share, size=2))
    return replace(_of_pairs(wins, losses, n), sides=(100 * wins / n, 100 * losses / n))


def _share(off: float, n: int, rng: Draw) -> Measurement:
    """The share that one arm solves."""
    interval = stats.wilson(int(rng.binomial(n, SHARE + off)), n)
    return replace(contrasts.points(interval), unit="percent")


def _threshold(off: float, n: int, rng: Draw) -> Measurement:
    """A threshold found with a normal error that is a third of the resolution at POWERED."""
    error = (POWERED / n) ** 0.5 / 3
    estimate = 4.0 + off + error * rng.normal()
    return Measurement(estimate, estimate - 1.96 * error, estimate + 1.96 * error, n, "GiB")


STUDIES: tuple[tuple[str, str, Callable, float | tuple, int], ...] = (
    ("direction", "the published gain", _paired, GAIN, POWERED),
    ("direction", "a quarter of the published gain", _paired, GAIN / 4, POWERED),
    ("direction", "no gain", _paired, 0.0, POWERED),
    ("direction", "a loss as large", _paired, -GAIN, POWERED),
    ("direction", "the published gain", _paired, GAIN, SMALL),
    ("direction", "no gain", _paired, 0.0, SMALL),
    ("direction", "no gain, 3 samples a problem", _nested, 0.0, SMALL),
    ("direction", "no gain, 3 trainings an arm", _crossed, 0.0, POWERED),
    ("direction", "the gain over both of 2 controls", _controls, (GAIN, GAIN), POWERED),
    ("direction", "the gain over 1 of 2 controls", _controls, (GAIN, 0.0), POWERED),
    ("direction", "no gain, both arms solve 1%", _floor, 0.01, POWERED),
    ("size", "the published gain", _paired, GAIN, POWERED),
    ("size", "three times the published gain", _paired, 3 * GAIN, POWERED),
    ("size", "no gain", _paired, 0.0, POWERED),
    ("size", "the published gain", _paired, GAIN, SMALL),
    ("size", "the published share", _share, 0.0, POWERED),
    ("size", "a share 20 points lower", _share, -0.2, POWERED),
    ("equivalence", "no difference", _paired, 0.0, POWERED),
    ("equivalence", "a loss of the margin", _paired, -GAIN, POWERED),
    ("equivalence", "a loss of twice the margin", _paired, -2 * GAIN, POWERED),
    ("equivalence", "no difference", _paired, 0.0, SMALL),
    ("non_inferiority", "no loss", _paired, 0.0, POWERED),
    ("non_inferiority", "a gain", _paired, GAIN, POWERED),
    ("non_inferiority", "a loss of the margin", _paired, -GAIN, POWERED),
    ("non_inferiority", "a loss of twice the margin", _paired, -2 * GAIN, POWERED),
    ("non_inferiority", "no loss", _paired, 0.0, SMALL),
    ("threshold", "the published threshold", _threshold, 0.0, POWERED),
    ("threshold", "another, two resolutions off", _threshold, 2.0, POWERED),
    ("threshold", "the published threshold", _threshold, 0.0, SMALL),
)


def error_rates(studies: int, seed: int = 0) -> pd.DataFrame:
    """Percent of `studies` simulated studies that get each word: a row per rule, truth and size."""
    rows = []
    for number, (rule, truth, measure, how, n) in enumerate(STUDIES):
        rng, words = np.random.default_rng([seed, number]), Counter()
        for _ in range(studies):
            claim = _published(rule, measure is _share, rng)
            measurement = replace(measure(how, n, rng), model="simulated")
            words[verdicts.verdict(claim, measurement, "laptop").word] += 1
        row = {"rule": rule, "truth": truth, "problems": n}
        rows.append(row | {word: 100 * words[word] / studies for word in OUTCOMES})
    return pd.DataFrame(rows)


def _published(rule: str, alone: bool, rng: Draw) -> Claim:
    """A claim as a study of ITEMS problems came to publish it; of a threshold, whose error nobody
    publishes, by a study as precise as POWERED problems make it here."""
    if rule == "threshold":
        value = 4.0 + rng.normal() / 3
        return replace(CLAIM, rule=rule, value=value, unit="GiB", resolution=1.0)
    arm = control = 0
    while arm <= control:  # a loss would not have been claimed
        arm, control = (int(x) for x in rng.binomial(ITEMS, (SHARE, SHARE - GAIN)))
        control = -1 if alone else control
    claim = replace(CLAIM, rule=rule, value=100 * arm / ITEMS, counts=(arm, ITEMS))
    if alone:
        return claim
    return replace(claim, baseline=100 * control / ITEMS, baseline_counts=(control, ITEMS))


# Of one claim at a number of problems


def chances(claim: Claim, n: int, true: float | None = None) -> dict[str, float]:
    """Percent chance of each word at `n` problems, one answer per problem and arm, where `true` is
    the true number: as published where None, of equivalence and non-inferiority no difference.

    Normal, and half as many problems answered differently as by independent arms where no pairs
    are published (half of the problems solved where no shares are). {} for what is no share or
    difference of shares, or was published without a size.
    """
    equal = claim.rule in ("equivalence", "non_inferiority")
    true = (0.0 if equal else claim.reported_value) if true is None else true
    if true is None or not claim.profiles or not (equal or claim.rule in ("direction", "size")):
        return {}
    if true and claim.unit not in ("percent", "points"):
        return {}
    sides = None
    if not _alone(claim):
        control = 0.5 if claim.baseline is None else claim.baseline / 100
        arm = min(1.0, max(0.0, control + true / 100))
        differ = (arm * (1 - control) + control * (1 - arm)) / 2
        if claim.pairs:
            differ = sum(claim.pairs[1:3]) / sum(claim.pairs)
        variance = max(differ, abs(true) / 100) - (true / 100) ** 2
        sides = (100 * arm, 100 * control) if claim.baseline is not None else None
    else:
        variance = true / 100 * (1 - true / 100)
    error, words = 100 * (variance / n) ** 0.5, Counter()
    where, unit = {"model": claim.model[0], "sides": sides}, claim.unit
    for estimate in true + error * QUANTILES:
        ends = [(estimate - z * error, estimate + z * error) for z in norm.ppf((0.975, 0.95))]
        measurement = Measurement(estimate, *ends[0], n, unit, ends[1], **where)
        words[verdicts.verdict(claim, measurement, claim.profiles[0]).word] += 1
    return {word: 100 * count / len(QUANTILES) for word, count in words.items()}


def _alone(claim: Claim) -> bool:
    """Whether a claim is about a share alone; all others are held against a difference of zero."""
    return claim.rule == "size" and not claim.is_contrast


def power(claim: Claim, n: int) -> float | None:
    """Percent chance that a true claim holds at `n` problems; None where `chances` has none."""
    words = chances(claim, n)
    return sum(words.get(word, 0.0) for word in HOLD) if words else None


def false_alarm(claim: Claim, n: int) -> float | None:
    """Percent chance that a claim of which nothing is true holds at `n` problems: no difference, or
    a loss of the margin; None where there is no such null, as of a single share."""
    if _alone(claim):
        return None
    words = chances(claim, n, -claim.margin if claim.margin else 0.0)
    return sum(words.get(word, 0.0) for word in HOLD) if words else None


def by_chance(claims: Iterable[Claim], rows: Iterable[Mapping]) -> str:
    """How many of the claims that were judged on a model, in `rows` of `measured_table`, would hold
    if nothing were true of any, by system: a sentence, "" where there are none."""
    by_id, expected, number_judged = {claim.id: claim for claim in claims}, Counter(), 0
    for row in rows:
        if row["on"] in verdicts.ON_MODELS and row["claim"] in by_id:
            chance = false_alarm(by_id[row["claim"]], int(row["n"]))
            expected[row["system"]] += (chance or 0.0) / 100
            number_judged += chance is not None
    if not number_judged:
        return ""
    each = ", ".join(f"{system} {number:.2f}" for system, number in expected.items())
    return (
        f"If nothing were true of the {number_judged} differences judged on models, "
        f"{expected.total():.2f} would still be expected to hold by chance: {each}."
    )
