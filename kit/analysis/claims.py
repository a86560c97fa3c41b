"""Published claims: what their own numbers can bear, and what this machine's records say of them.

`load` reads data/claims.toml. `audit` needs no model: interval, p-value and required n from the
published counts alone. `measure` computes a claim's contrast from records, `verdict` turns it into
one of `WORDS` by the claim's rule, written out in `RULES`. What records do not hold (a ledger's
bytes, a training curve) comes in as a ready Measurement. No torch, no store, no typed verdicts.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from math import ceil
from pathlib import Path

import pandas as pd
from statsmodels.stats.power import NormalIndPower, TTestIndPower
from statsmodels.stats.proportion import proportion_effectsize

from kit.analysis import contrasts, stats
from kit.analysis.contrasts import Measurement
from kit.paths import DATA

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
NEEDS = {"direction": (), "no_loss": ("margin",), "arithmetic": ("value", "tolerance")}
NEEDS |= dict.fromkeys(("size", "threshold"), ("value", "resolution"))  # fields a rule needs
NOTEBOOKS = (
    *("01_baseline", "02_strategies", "03_dms"),
    *("04_phase2", "05_parametric", "06_memory_budget"),
)
GRADES = ("FULL", "CODE", "DATA", "NOTE", "BRIEF", "ISSUE", "CALC")  # how a number was seen
ALLOWED = {"grade": GRADES, "notebook": NOTEBOOKS, "rule": tuple(RULES)}
PROFILES = ("any", "quick", "laptop", "workstation")  # "any": arithmetic
COLUMNS = ["claim", "system", "published", "measured", "interval", "n", "verdict", "reason"]
POWERED = 1.96 / (1.96 + 0.8416)  # half-width over effect at which a 5% test has 80% power


@dataclass(frozen=True)
class Claim:
    """One published number, where it stands, and how this kit would decide it."""

    id: str
    system: str
    statement: str  # one sentence
    metric: str
    unit: str  # "percent" for shares, "points" for differences published without their arms
    source: str  # paper and table, or repository and file
    grade: str  # of evidence, as in GRADES
    notebook: str
    profiles: tuple[str, ...]  # where it can be decided, smallest first; empty: beyond any profile
    rule: str
    contrast: (
        Mapping  # see kit.analysis.contrasts.check; {value = "name"} for what records do not hold
    )
    value: float | None = None  # None only where a direction was published without a size
    baseline: float | None = None
    n: int | None = None  # items of one run, where a percentage is a share of them
    counts: tuple[int, int] | None = None  # successes, items
    baseline_counts: tuple[int, int] | None = None
    pairs: tuple[int, int, int, int] | None = None  # both, only treatment, only control, neither
    sds: tuple[float, float] | None = None  # over runs: of value, of baseline
    runs: int | None = None
    resolution: float | None = None
    margin: float | None = None
    tolerance: float | None = None
    scope: str = ""  # what a verdict here does not cover, or why none is possible

    def decided_by(self, profile: str) -> bool:
        """Whether a run of this profile is large enough for a verdict; "any" decides in all."""
        return bool({"any", profile} & {*self.profiles})

    @property
    def is_contrast(self) -> bool:
        """Whether the claim is about a difference between two arms."""
        controlled = {"control", "control_measure"} & {*self.contrast}
        return self.baseline is not None or self.unit == "points" or bool(controlled)

    @property
    def published(self) -> float | None:
        """The number a measurement is held against: the value, or value minus baseline."""
        return self.value if self.baseline is None else self.value - self.baseline


@dataclass(frozen=True)
class Audit:
    """What the published counts alone can bear."""

    claim_id: str
    interval: stats.Interval | None  # in the claim's unit
    p: float | None
    n_needed: int | None  # for 80% power at the published effect
    reading: str


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


def load(path: Path = DATA / "claims.toml") -> list[Claim]:
    """All claims of a file; ValueError names the claim and the field that is wrong."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["claim"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ValueError(f"{path.name} is no TOML file with [[claim]] tables: {error}") from error
    claims = [_claim(row, str(row.get("id", f"number {i}"))) for i, row in enumerate(rows, 1)]
    ids = pd.Series([claim.id for claim in claims])
    if not ids.is_unique:
        raise ValueError(f"claim {ids[ids.duplicated()].iloc[0]}: id is used twice")
    return claims


def _claim(row: dict, name: str) -> Claim:
    def check(good: bool, key: str, what: str) -> None:
        if not good:
            raise ValueError(f"claim {name}: {key} {what}")

    known = {f.name: f.default is MISSING for f in fields(Claim)}
    for key in {*row, *known}:
        check(key in known, key, "is no field of a claim; see kit.analysis.claims.Claim")
        check(key in row or not known[key], key, "is missing")
    for key, words in ALLOWED.items():
        check(row[key] in words, key, f"is {row[key]!r}; use one of {', '.join(words)}")
    for key in NEEDS[row["rule"]]:
        check(key in row, key, f"is missing; the rule {row['rule']} needs it")
    for key, length in (("counts", 2), ("baseline_counts", 2), ("pairs", 4), ("sds", 2)):
        check(len(row.get(key, range(length))) == length, key, f"must hold {length} numbers")
    check(set(row["profiles"]) <= set(PROFILES), "profiles", f"may hold {', '.join(PROFILES)}")
    check(bool(row["profiles"] or row.get("scope")), "scope", "must say why no profile decides it")
    claim = Claim(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
    if "value" not in claim.contrast and claim.profiles:
        try:
            contrasts.check(claim.contrast)
        except ValueError as error:
            raise ValueError(f"claim {name}: contrast: {error}") from error
    return claim


def audit(claim: Claim) -> Audit:
    """Interval, p-value and required n from the published counts, with no model and no records."""
    found, needed, units, scale = _from_counts(claim)
    if found is None:
        return Audit(claim.id, None, None, None, "no counts published")
    interval = found if isinstance(found, stats.Interval) else found.difference
    low, high, estimate = (scale * x for x in (interval.low, interval.high, interval.estimate))
    interval = replace(interval, low=low, high=high, estimate=estimate)
    unit = "points" if claim.unit == "percent" else claim.unit
    if isinstance(found, stats.Interval):
        reading = f"{low:.1f} to {high:.1f} {claim.unit} from n = {interval.n}"
        return Audit(claim.id, interval, None, None, reading)
    p = f"p = {found.p:.2g}" if found.p >= 0.001 else "p < 0.001"
    if found.p < 0.05:
        reading = f"{p}: the counts bear a difference of {low:.1f} to {high:.1f} {unit}"
    else:
        reading = f"{p}: cannot tell {abs(claim.published):.3g} {unit} from none"
        reading += f"; {needed:,} {units} needed" if needed else ""
    if not (claim.counts or claim.pairs or claim.sds):
        reading += " (counts implied by the percentages, taken as unpaired)"
    return Audit(claim.id, interval, found.p, needed, reading)


def _from_counts(claim: Claim):
    """(Interval, Comparison or None; n for 80% power; what n counts; factor to the claim's unit)"""
    if claim.pairs:
        n, (_, wins, losses, _) = sum(claim.pairs), claim.pairs
        needed = stats.pairs_needed(wins / n, losses / n) if wins != losses else None
        return stats.paired(*claim.pairs), needed, "pairs", 100
    if claim.sds:
        found = stats.welch((claim.value, claim.sds[0]), (claim.baseline, claim.sds[1]), claim.runs)
        effect = abs(claim.published) / (sum(sd**2 for sd in claim.sds) / 2) ** 0.5
        needed = TTestIndPower().solve_power(effect, power=0.8, alpha=0.05) if effect else None
        return found, needed and ceil(needed), "runs per arm", 1
    shares = (claim.value, claim.counts), (claim.baseline, claim.baseline_counts)
    arm, control = (_counts(claim, share, counts) for share, counts in shares)
    if arm and control:
        effect = proportion_effectsize(arm[0] / arm[1], control[0] / control[1])
        needed = NormalIndPower().solve_power(effect, power=0.8, alpha=0.05) if effect else None
        return stats.unpaired(arm, control), needed and ceil(needed), "items per arm", 100
    return (stats.wilson(*arm) if arm and not claim.is_contrast else None), None, "", 100


def _counts(claim: Claim, share: float | None, counts: tuple | None) -> tuple[int, int] | None:
    """Published counts, else those implied by a share of `n` items."""
    if counts or not claim.n or share is None or claim.unit != "percent":
        return counts
    return round(share * claim.n / 100), claim.n


def measure(claim: Claim, records: pd.DataFrame, seed: int = 0) -> Measurement | None:
    """The claim's contrast on these records; None when they hold no such arms."""
    if "measure" not in claim.contrast:
        return None
    try:
        found = contrasts.compute(claim.contrast, records, seed)
    except ValueError as error:
        raise ValueError(f"claim {claim.id}: {error}") from error
    return found and replace(found, origin=claim.notebook)


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
