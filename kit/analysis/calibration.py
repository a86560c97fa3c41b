"""How often a verdict is wrong: the rules applied to studies whose truth is known.

A simulated study asks `n` problems of two arms; its claim was published with a gain of 8 points,
where the arms differ on 24% of the problems, for which 292 problems give 80% power. `error_rates`
says how often each word comes out.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from kit.analysis import contrasts, stats, verdicts
from kit.analysis.claims import Claim
from kit.analysis.contrasts import Measurement

GAIN, DIFFER, POWERED, SMALL = 0.08, 0.24, 292, 60
SAMPLES = 3  # of a problem, where they are nested
DRAWS = 1_000  # of each bootstrap
CLAIM = Claim(
    "simulated", "simulated", "", "accuracy", "percent", "", "CALC", "01_baseline",
    ("laptop",), "direction", {}, ("simulated",), "published", value=48.0, baseline=40.0,
    resolution=10.0, margin=8.0,
)  # fmt: skip
WORDS = (*verdicts.WORDS_THERE, "undecided")
STUDIES = (  # rule, what is true, gain in shares, problems, whether samples are nested
    ("direction", "the published gain", GAIN, POWERED, False),
    ("direction", "no gain", 0.0, POWERED, False),
    ("direction", "a loss as large", -GAIN, POWERED, False),
    ("direction", "the published gain", GAIN, SMALL, False),
    ("direction", "no gain", 0.0, SMALL, False),
    ("direction", "no gain, 3 samples a problem", 0.0, SMALL, True),
    ("size", "the published gain", GAIN, POWERED, False),
    ("size", "twice the published gain", 2 * GAIN, POWERED, False),
    ("size", "no gain", 0.0, POWERED, False),
    ("size", "the published gain", GAIN, SMALL, False),
    ("equivalence", "no difference", 0.0, POWERED, False),
    ("equivalence", "a loss of the margin", -GAIN, POWERED, False),
    ("equivalence", "a loss of twice the margin", -2 * GAIN, POWERED, False),
    ("equivalence", "no difference", 0.0, SMALL, False),
    ("non_inferiority", "no loss", 0.0, POWERED, False),
    ("non_inferiority", "a gain", GAIN, POWERED, False),
    ("non_inferiority", "a loss of the margin", -GAIN, POWERED, False),
    ("non_inferiority", "a loss of twice the margin", -2 * GAIN, POWERED, False),
    ("threshold", "the published threshold", 0.0, POWERED, False),
    ("threshold", "another, two resolutions off", 2.0, POWERED, False),
    ("threshold", "the published threshold", 0.0, SMALL, False),
)


def error_rates(studies: int, seed: int = 0) -> pd.DataFrame:
    """Percent of `studies` simulated studies that get each word: a row per rule, truth and size."""
    rows = []
    for number, (rule, truth, gain, n, nested) in enumerate(STUDIES):
        rng, claim = np.random.default_rng([seed, number]), replace(CLAIM, rule=rule)
        measure = _nested if nested else _threshold if rule == "threshold" else _paired
        if rule == "threshold":
            claim = replace(claim, value=4.0, baseline=None, unit="GiB", resolution=1.0)
        drawn = (replace(measure(gain, n, rng), model="simulated") for _ in range(studies))
        words = [verdicts.verdict(claim, each, "laptop").word for each in drawn]
        row = {"rule": rule, "truth": truth, "problems": n}
        rows.append(row | {word: 100 * words.count(word) / studies for word in WORDS})
    return pd.DataFrame(rows)


def _paired(gain: float, n: int, rng: np.random.Generator) -> Measurement:
    """One answer per problem and arm."""
    differ = max(DIFFER, abs(gain))
    wins, losses, _ = rng.multinomial(n, [(differ + gain) / 2, (differ - gain) / 2, 1 - differ])
    outer, inner = (stats.tango(wins, losses, n, level) for level in (0.95, 0.90))
    return replace(contrasts.points(outer), inner=inner.percent[1:])


def _nested(gain: float, n: int, rng: np.random.Generator) -> Measurement:
    """SAMPLES answers per problem and arm; how likely each is differs between problems."""
    skill = np.repeat(rng.beta(1, 2, size=(n, 1)), SAMPLES, axis=1)
    sides = (rng.random(skill.shape) < np.clip(skill + more, 0, 1) for more in (gain, 0.0))
    values = [side.astype(float) for side in sides]
    return contrasts.points(stats.paired_interval(*values, rng, draws=DRAWS))


def _threshold(off: float, n: int, rng: np.random.Generator) -> Measurement:
    """A threshold found with a normal error that is a third of the resolution at POWERED."""
    error = (POWERED / n) ** 0.5 / 3
    found = 4.0 + off + error * rng.normal()
    return Measurement(found, found - 1.96 * error, found + 1.96 * error, n, "GiB")
