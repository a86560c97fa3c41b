"""Verdicts: one word for a claim and what was measured here, by the claim's rule.

`verdict` gives one of `WORDS` with its reason; the rules are written out in `RULES`. What records
do not hold (a ledger's bytes, a training curve) comes in as a ready Measurement.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

import pandas as pd

from kit.analysis.claims import Claim, measure
from kit.analysis.contrasts import Measurement

WORDS = ("reproduced", "not reproduced", "contradicted", "inconclusive", "out of reach here")
UNMEASURED = "not measured yet"  # what people read where a verdict is ""
RULES = {
    "direction": "The 95% interval of the difference excludes zero on the claimed side: "
    "reproduced; on the other side: contradicted. It includes zero: not reproduced if it excludes "
    "the published effect and its half-width is no larger than that effect, else inconclusive.",
    "size": "A difference whose 95% interval excludes zero on the other side: contradicted. A "
    "half-width above the declared resolution: inconclusive. The published value outside the "
    "interval: not reproduced; inside: reproduced, or inconclusive if a difference of zero is too.",
    "no_loss": "Two one-sided 5% tests: the 90% interval lies inside the declared margin: "
    "reproduced. The 95% interval lies wholly beyond the margin: contradicted where that is a "
    "loss, not reproduced where it is a gain. Otherwise inconclusive.",
    "arithmetic": "Within the declared tolerance of the published value: reproduced, else not.",
    "threshold": "A bootstrap interval with a half-width above the declared resolution: "
    "inconclusive. The published threshold inside it: reproduced, outside: not reproduced.",
}
COLUMNS = ["claim", "system", "published", "measured", "interval", "n", "verdict", "reason"]
POWERED = 1.96 / (1.96 + 0.8416)  # half-width over effect at which a 5% test has 80% power


@dataclass(frozen=True)
class Verdict:
    """One of WORDS with its reason, or None where nothing has been measured yet."""

    claim_id: str
    word: str | None
    reason: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def verdict(claim: Claim, measurement: Measurement | None, profile: str) -> Verdict:
    """The word that the claim's rule gives to this measurement, with the reason."""
    if not claim.decided_by(profile):
        where = f"the {claim.profiles[0]} profile would decide it" if claim.profiles else ""
        return Verdict(claim.id, "out of reach here", "; ".join(filter(None, (where, claim.scope))))
    if measurement is None:
        return Verdict(claim.id, None, f"not measured yet: run {claim.notebook}")
    m, rule = measurement, {"direction": _direction, "no_loss": _no_loss, "arithmetic": _arithmetic}
    word, reason = rule.get(claim.rule, _size)(claim, m)  # a threshold is a size
    reason += f"; {claim.scope}" if claim.scope else ""
    return Verdict(claim.id, word, reason, m.estimate, m.low, m.high, m.n)


def _direction(claim: Claim, m: Measurement) -> tuple[str, str]:
    effect = claim.published
    side = -1 if effect is not None and effect < 0 else 1
    low, high = sorted((side * m.low, side * m.high))
    if low > 0:
        return "reproduced", "the interval excludes zero on the claimed side"
    if high < 0:
        return "contradicted", "the interval excludes zero on the other side"
    if not effect:
        return "inconclusive", "the interval includes zero and no size was published"
    half = (high - low) / 2
    if half > abs(effect):  # less than even odds of finding it; a lucky exclusion decides nothing
        needed = ceil(m.n * (half / abs(effect) / POWERED) ** 2)
        return "inconclusive", f"{m.n:,} problems are too few, 80% power takes about {needed:,}"
    if high < abs(effect):
        return "not reproduced", "the interval includes zero and excludes the published effect"
    return "inconclusive", "the interval includes both zero and the published effect"


def _size(claim: Claim, m: Measurement) -> tuple[str, str]:
    side = -1 if claim.published < 0 else 1
    if claim.is_contrast and max(side * m.low, side * m.high) < 0:
        return "contradicted", "the interval excludes zero on the other side"
    half = (m.high - m.low) / 2
    if half > claim.resolution:
        return "inconclusive", f"±{half:.3g} {m.unit} is wider than the declared resolution"
    if not m.low <= claim.published <= m.high:
        return "not reproduced", "the published value lies outside the interval"
    if claim.is_contrast and m.low <= 0 <= m.high:
        return "inconclusive", "the interval includes both zero and the published value"
    return "reproduced", "the published value lies inside the interval"


def _no_loss(claim: Claim, m: Measurement) -> tuple[str, str]:
    margin = claim.margin
    low90, high90 = m.inner or (m.low, m.high)
    if -margin < low90 and high90 < margin:
        return "reproduced", f"equivalent within ±{margin:g} {m.unit} (two one-sided tests)"
    if m.low > margin:
        return "not reproduced", f"differs by more than {margin:g} {m.unit}, though not as a loss"
    if m.high < -margin:
        return "contradicted", f"a loss of more than {margin:g} {m.unit}"
    return "inconclusive", f"neither a loss above {margin:g} {m.unit} nor equivalence is shown"


def _arithmetic(claim: Claim, m: Measurement) -> tuple[str, str]:
    gap = abs(m.estimate - claim.published)
    word = "reproduced" if gap <= claim.tolerance + 1e-9 else "not reproduced"  # binary fractions
    return word, f"off by {gap:.4g} {claim.unit}, tolerance {claim.tolerance:g}"


def measured_table(
    claims: Iterable[Claim],
    records: pd.DataFrame,
    profile: str,
    given: Mapping[str, Measurement] | None = None,
) -> pd.DataFrame:
    """One row per claim; `given` holds by claim id what other stages measured outside records."""
    rows = []
    for claim in claims:
        m = (given or {}).get(claim.id) or measure(claim, records)
        found = verdict(claim, m, profile)
        base = "" if claim.baseline is None else f" against {claim.baseline:g}"
        shown = f"{claim.value:g}{base} {claim.unit}" if claim.value is not None else "direction"
        row = (claim.id, claim.system, shown, *(m.texts() if m else ("", "")), m and m.n)
        rows.append((*row, found.word or "", found.reason))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"n": "Int64"})
