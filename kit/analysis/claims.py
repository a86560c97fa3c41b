"""Published claims, and what their own numbers can bear.

`load` reads data/claims.toml. `audit` needs no model: interval, p-value and required n from the
published counts alone. `measure` computes a claim's contrast from records, against every control
that the claim names; `kit.analysis.verdicts` judges it. No torch, no store, no typed verdicts.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from math import ceil
from pathlib import Path

import pandas as pd
from statsmodels.stats.power import NormalIndPower, TTestIndPower
from statsmodels.stats.proportion import proportion_effectsize

from kit.analysis import contrasts, stats
from kit.analysis.contrasts import Measurement
from kit.paths import DATA
from kit.pipeline import declared

NEEDS = {  # fields that a rule needs
    "direction": (),
    **dict.fromkeys(("size", "threshold"), ("value", "resolution")),
    **dict.fromkeys(("equivalence", "non_inferiority"), ("margin",)),
    "arithmetic": ("value", "tolerance"),  # a published number made again
    "quoted": (),  # documentary: an issue thread, two versions of a text
}
NOTEBOOKS = (
    *("01_baseline", "02_strategies", "03_dms"),
    *("04_phase2", "05_parametric", "06_memory_budget"),
)
GRADES = ("FULL", "CODE", "DATA", "NOTE", "BRIEF", "ISSUE", "CALC")  # how a number was seen
TASKS = ("published", "other")
ALLOWED = {"grade": GRADES, "notebook": NOTEBOOKS, "rule": tuple(NEEDS)}
# Where a claim may be decided: "any", in all of them, is arithmetic.
PROFILES = ("any", "quick", "laptop", "workstation", "reasoning-bank-slm", "reasoningbank")


@dataclass(frozen=True)
class Claim:
    """One published number, its place in the paper, and how this kit decides it."""

    id: str
    system: str
    statement: str  # one sentence
    metric: str
    unit: str  # "percent" for shares, "points" for differences published without their arms
    source: str  # paper and table, or repository and file; begins with a name of [sources]
    grade: str  # of evidence, as in GRADES
    notebook: str
    profiles: tuple[str, ...]  # where it can be decided, smallest first; empty: beyond any profile
    rule: str
    contrast: Mapping  # see contrasts.check; {value = "name"} for what records do not hold. A list
    # of controls: the claim holds only over all of them
    model: tuple[str, ...] = ()  # parts of the names of the published models; others are stand-ins
    task: str = ""  # "published" if problems, prompt, protocol and grader are, else "other"
    check: Mapping | None = None  # a contrast that must exceed its `above`, else nothing is judged
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
    link: str = ""  # of the source
    declared: str = ""  # digest of what decides its verdict, see kit.pipeline.declared

    def decided_by(self, profile: str) -> bool:
        """Whether a run of this profile is large enough for a verdict; "any" decides in all."""
        return bool({"any", profile} & {*self.profiles})

    @property
    def is_contrast(self) -> bool:
        """Whether the claim is about a difference between two arms."""
        controlled = {"control", "control_measure"} & {*self.contrast}
        return self.baseline is not None or self.unit == "points" or bool(controlled)

    @property
    def reported_value(self) -> float | None:
        """The number a measurement is held against: the value, or value minus baseline."""
        return self.value if self.baseline is None else self.value - self.baseline

    @cached_property
    def reported_interval(self) -> stats.Interval | None:
        """The published number with its own sampling error, in the claim's unit; None where no
        counts are published."""
        comparison, scale = (None, 1) if impossible(self) else _from_counts(self)
        if comparison is None:
            return None
        interval = comparison if isinstance(comparison, stats.Interval) else comparison.difference
        low, high, estimate = (scale * x for x in (interval.low, interval.high, interval.estimate))
        return replace(interval, low=low, high=high, estimate=estimate)


@dataclass(frozen=True)
class Audit:
    """The conclusion that the published counts alone support."""

    claim_id: str
    interval: stats.Interval | None  # in the claim's unit
    p: float | None
    n_needed: int | None  # for 80% power at the published effect
    reading: str


def load(path: Path = DATA / "claims.toml") -> list[Claim]:
    """All claims of a file; ValueError names the claim and the field that is wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        rows, links = document["claim"], document["sources"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ValueError(
            f"{path.name} is no TOML file with [sources] and [[claim]] tables: {error}"
        ) from error
    names = [str(row.get("id", f"number {number}")) for number, row in enumerate(rows, 1)]
    claims = [_claim(row, name, links) for row, name in zip(rows, names, strict=True)]
    ids = pd.Series([claim.id for claim in claims])
    if not ids.is_unique:
        raise ValueError(f"claim {ids[ids.duplicated()].iloc[0]}: id is used twice")
    return claims


def primary(path: Path = DATA / "claims.toml") -> dict[str, dict]:
    """The one contrast that a stage declares for itself, whatever was published, by stage."""
    return tomllib.loads(path.read_text(encoding="utf-8"))["primary"]


def secondary(path: Path = DATA / "claims.toml") -> dict[str, dict]:
    """The second contrast of a stage that was declared beforehand, by stage."""
    return tomllib.loads(path.read_text(encoding="utf-8"))["secondary"]


def _claim(row: dict, name: str, links: Mapping[str, str]) -> Claim:
    def check(good: bool, key: str, what: str) -> None:
        if not good:
            raise ValueError(f"claim {name}: {key} {what}")

    required = {f.name: f.default is MISSING for f in fields(Claim)}
    for key in {*row, *required}:
        check(key in required, key, "is no field of a claim; see kit.analysis.claims.Claim")
        check(key in row or not required[key], key, "is missing")
    for key, words in ALLOWED.items():
        check(row[key] in words, key, f"is {row[key]!r}; use one of {', '.join(words)}")
    for key in NEEDS[row["rule"]]:
        check(key in row, key, f"is missing; the rule {row['rule']} needs it")
    for key, length in (("counts", 2), ("baseline_counts", 2), ("pairs", 4), ("sds", 2)):
        check(len(row.get(key, range(length))) == length, key, f"must hold {length} numbers")
    check(set(row["profiles"]) <= set(PROFILES), "profiles", f"may hold {', '.join(PROFILES)}")
    check(bool(row["profiles"] or row.get("scope")), "scope", "must say why no profile decides it")
    prefixes = [source for source in links if row["source"].startswith(source)]
    check(bool(prefixes), "source", f"must begin with one of [sources]: {', '.join(links)}")
    row = row | {"link": links[max(prefixes, key=len)], "declared": declared.digest_of(row)}
    claim = Claim(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
    if claim.profiles and claim.rule not in ("arithmetic", "quoted"):
        check(bool(claim.model), "model", "must name the published models, as a list")
        check(claim.task in TASKS, "task", f"is {claim.task!r}; use one of {', '.join(TASKS)}")
    parts = {"contrast": claim.contrast, "check": claim.check}
    for key, contrast in parts.items() if claim.profiles else ():
        if contrast is None or (key == "contrast" and "value" in contrast):
            continue
        try:
            for control in controls(contrast):
                contrasts.check({**_plain(contrast), **control})
        except ValueError as error:
            raise ValueError(f"claim {name}: {key}: {error}") from error
    return claim


def controls(contrast: Mapping) -> list[dict]:
    """The `control` of a contrast, one a list; [{}] where it has none."""
    if "control" not in contrast:
        return [{}]
    control = contrast["control"]
    return [{"control": each} for each in (control if isinstance(control, list) else [control])]


def _plain(contrast: Mapping) -> dict:
    """A contrast without what is judged here and not computed."""
    return {key: value for key, value in contrast.items() if key != "above"}


def audit(claim: Claim) -> Audit:
    """Interval, p-value and required n from the published counts, with no model and no records."""
    if values := impossible(claim):
        reading = (
            f"{' and '.join(values)} is no share of {claim.n} items, so the counts are unknown"
        )
        return Audit(claim.id, None, None, None, reading)
    interval = claim.reported_interval
    if interval is None:
        return Audit(claim.id, None, None, None, "no counts published")
    comparison, low, high = _from_counts(claim)[0], interval.low, interval.high
    unit = "points" if claim.unit == "percent" else claim.unit
    if isinstance(comparison, stats.Interval):
        reading = f"{low:.1f} to {high:.1f} {claim.unit} from n = {interval.n}"
        return Audit(claim.id, interval, None, None, reading)
    needed, units = _needed(claim)
    p = f"p = {comparison.p:.2g}" if comparison.p >= 0.001 else "p < 0.001"
    if comparison.p < stats.ALPHA:
        reading = f"{p}: the counts bear a difference of {low:.1f} to {high:.1f} {unit}"
    else:
        reading = f"{p}: cannot tell {abs(claim.reported_value):.3g} {unit} from none"
        reading += f"; {needed:,} {units} needed" if needed else ""
    if not (claim.counts or claim.pairs or claim.sds):
        reading += " (counts implied by the percentages, taken as unpaired)"
    return Audit(claim.id, interval, comparison.p, needed, reading)


def impossible(claim: Claim) -> list[str]:
    """Published percentages that no count of `n` items rounds to (GRIM: Brown and Heathers 2017,
    doi 10.1177/1948550616673876); [] where counts are published or `n` is not."""
    shares = ((claim.value, claim.counts), (claim.baseline, claim.baseline_counts))
    if not claim.n or claim.unit != "percent":
        return []
    values = []
    for share, counts in shares:
        if share is None or counts:
            continue
        text = f"{share:.10f}".rstrip("0").rstrip(".")
        digits = len(text.partition(".")[2])
        nearest = 100 * round(share * claim.n / 100) / claim.n
        if abs(nearest - share) > 0.5 * 10**-digits + 1e-9:
            values.append(text)
    return values


def _from_counts(claim: Claim) -> tuple[stats.Interval | stats.Comparison | None, int]:
    """The effect of the published counts, and the factor to the claim's unit."""
    if claim.pairs:
        return stats.paired(*claim.pairs), 100
    if claim.sds:
        arms = (claim.value, claim.sds[0]), (claim.baseline, claim.sds[1])
        return stats.welch(*arms, claim.runs), 1
    arm, control = _arms(claim)
    if arm and control:
        return stats.unpaired(arm, control), 100
    return (stats.wilson(*arm) if arm and not claim.is_contrast else None), 100


def _needed(claim: Claim) -> tuple[int | None, str]:
    """How many of what are needed for 80% power at the published difference."""
    if claim.pairs:
        n, (_, wins, losses, _) = sum(claim.pairs), claim.pairs
        return stats.pairs_needed(wins / n, losses / n) if wins != losses else None, "pairs"
    if claim.sds:
        units, power = "runs per arm", TTestIndPower()
        effect = abs(claim.reported_value) / (sum(sd**2 for sd in claim.sds) / 2) ** 0.5
    else:
        units, power = "items per arm", NormalIndPower()
        effect = proportion_effectsize(*(right / n for right, n in _arms(claim)))
    needed = power.solve_power(effect, power=0.8, alpha=0.05) if effect else None
    return needed and ceil(needed), units


def _arms(claim: Claim) -> list[tuple[int, int] | None]:
    """Counts of the arm and of its control."""
    shares = (claim.value, claim.counts), (claim.baseline, claim.baseline_counts)
    return [_counts(claim, share, counts) for share, counts in shares]


def _counts(claim: Claim, share: float | None, counts: tuple | None) -> tuple[int, int] | None:
    """Published counts, else those implied by a share of `n` items."""
    if counts or not claim.n or share is None or claim.unit != "percent":
        return counts
    return round(share * claim.n / 100), claim.n


def measure(claim: Claim, records: pd.DataFrame, seed: int = 0) -> Measurement | None:
    """The claim's contrast on these records; None when they hold no such arms.

    Of several controls the one that is hardest to beat, with the names of those that are beaten.
    """
    if "measure" not in claim.contrast:
        return None
    side = -1 if (claim.reported_value or 0) < 0 else 1
    contrast_list = controls(claim.contrast)
    try:
        measured = [
            contrasts.compute({**claim.contrast, **each}, records, seed) for each in contrast_list
        ]
        if None in measured:
            return None
        failed = _failed(claim.check, records, seed) if claim.check else ""
    except ValueError as error:
        raise ValueError(f"claim {claim.id}: {error}") from error
    near = [min(side * m.low, side * m.high) for m in measured]  # the end of the interval near zero
    hardest = near.index(min(near))
    beaten = tuple(each["control"] for each, end in zip(contrast_list, near) if each and end > 0)
    several = (
        {"control": contrast_list[hardest]["control"], "beaten": beaten}
        if len(contrast_list) > 1
        else {}
    )
    return replace(measured[hardest], origin=claim.notebook, failed=failed, **several)


def _failed(check: Mapping, records: pd.DataFrame, seed: int) -> str:
    """The result of a manipulation check or positive control that did not pass; else ""."""
    above, contrast = check.get("above", 0), _plain(check)
    measurement = contrasts.compute(contrast, records, seed)
    if measurement and measurement.low > above:
        return ""
    outcome = "came to {} [{}]".format(*measurement.texts()) if measurement else "has no records"
    against = f" against {contrast['control']}" if "control" in contrast else ""
    checked = f"the check {contrast['measure']} of {contrast['arm']}{against}"
    return f"{checked} {outcome}, not above {above:g}"
