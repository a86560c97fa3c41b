"""Verdicts: on what a claim was measured, and one word for what came out, by the claim's rule.

`verdict` answers both questions apart: `on` is one of `CLASSES`, the word one of `VERDICTS`. Only
what was measured on the published model and task is a reproduction; elsewhere a claim holds or does
not. The rules are written out in `RULES`. What records do not hold (a ledger's bytes, a training
curve) comes in as a ready Measurement.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, hypot

import pandas as pd

from kit.analysis import stats
from kit.analysis.claims import PROFILES, Claim, audit, impossible, measure
from kit.analysis.contrasts import Measurement, listed

PUBLISHED, OTHER_TASK, STAND_IN = (
    "published model and task",
    "published model, other task",
    "stand-in model",
)
RECOMPUTED, AUDIT, DOCUMENTARY = "recomputed", "audit", "documentary"
BEYOND, UNMEASURED, NEEDS = "beyond this kit", "not measured yet", "needs the {} profile"
CLASSES = {
    PUBLISHED: "measured here on the published model, by the published problems and protocol",
    OTHER_TASK: "measured here on the published model, with other problems, prompt or grader",
    STAND_IN: "measured here on another model, which takes the place of the published one",
    RECOMPUTED: "a published number made again by arithmetic",
    AUDIT: "judged by the published counts alone, with no model",
    DOCUMENTARY: "quoted from an issue thread or from two versions of a text",
    NEEDS.format("workstation"): "a run of this profile decides it, this one does not",
    BEYOND: "no profile of this kit decides it",
}
ON_MODELS = (PUBLISHED, OTHER_TASK, STAND_IN)
HOLDS, SMALLER, NOT, OPPOSITE, UNDECIDED, FLOOR, CEILING = range(7)
WORDS_THERE = ("reproduced", "direction only", "not reproduced", "contradicted")
WORDS_HERE = ("holds here", "direction only", "not here", "opposite here")
WORDS_ALIKE = ("undecided", "floor", "ceiling")
AGREES, BEARS, CANNOT = ("agrees", "differs"), "bears it", "cannot tell"
VERDICTS = {  # what each word says, in the order in which they are shown
    "reproduced": "on the published model and task the claim stands",
    "holds here": "on other models or tasks the claim stands",
    "direction only": "the difference is on the claimed side, of another size than published",
    "not reproduced": "on the published model and task the published size is ruled out",
    "not here": "on other models or tasks the published size is ruled out",
    "contradicted": "on the published model and task the difference is on the other side",
    "opposite here": "on other models or tasks the difference is on the other side",
    "undecided": "the interval is too wide for a word",
    "floor": "the measure could not move: both arms are near 0, or a check of the set-up failed",
    "ceiling": "the measure could not move: both arms are near 100 percent",
    "agrees": "the arithmetic comes to the published number",
    "differs": "the arithmetic comes to another number",
    BEARS: "the published counts alone exclude zero, or give the published share",
    CANNOT: "the published counts alone do not exclude zero",
    "impossible": "no count of items gives the published percentage",
    "quoted": "a document is quoted",
}
PLURAL = {"agrees": "agree", "differs": "differ", "holds here": "hold here"}
PLURAL |= {NEEDS.format(size): f"need the {size} profile" for size in PROFILES}
EDGE = 5  # percent from 0 or 100 within which both arms of a difference cannot move
RULES = {
    "direction": "The claim holds if the 95% interval of the difference excludes zero on the "
    "claimed side; in direction only, if the measured size also differs from the published one "
    "(two studies, each with its own sampling error). Zero excluded on the other side: opposite. "
    "Zero included: not, if the size differs from the published one and the half-width is no "
    "larger than that; else undecided.",
    "size": "The claim holds if measured and published value do not differ (two studies, each with "
    "its own sampling error), the half-width measured here is within the declared resolution, and "
    "a difference excludes zero. They differ: not. A difference that excludes zero on the other "
    "side: opposite. Else undecided.",
    "equivalence": "The claim holds if the 90% interval lies within the declared margin on both "
    "sides (two one-sided 5% tests). The 95% interval wholly beyond the margin: not. Else "
    "undecided.",
    "non_inferiority": "The claim holds if the 90% interval lies above minus the declared margin "
    "(one one-sided 5% test), whatever the gain. The 95% interval wholly below it: opposite. Else "
    "undecided.",
    "arithmetic": "The number agrees if it is within the declared tolerance of the published one.",
    "threshold": "As size, with the bootstrap interval of a threshold.",
    "quoted": "Nothing is measured; a document is quoted.",
}
COLUMNS = ["claim", "system", "published", "measured", "interval", "n", "on", "verdict", "reason"]
POWERED = 1.96 / (1.96 + 0.8416)  # half-width over effect at which a 5% test has 80% power


@dataclass(frozen=True)
class Verdict:
    """On what a claim was judged, and one of VERDICTS, or "" where nothing is; with its reason."""

    claim_id: str
    on: str
    word: str
    reason: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def verdict(claim: Claim, measurement: Measurement | None, profile: str) -> Verdict:
    """The class and the word that this measurement gives to the claim, with the reason."""
    m, scope = measurement, f"; {claim.scope}" if claim.scope else ""
    if claim.rule == "quoted":
        return Verdict(claim.id, DOCUMENTARY, "quoted", claim.scope or "nothing is measured")
    if not claim.profiles:
        return _audited(claim)
    if not claim.decided_by(profile):
        needed = claim.profiles[0]
        reason = f"the {needed} profile would decide it{scope}"
        return Verdict(claim.id, NEEDS.format(needed), "", reason)
    if m is None:
        names = listed(claim.contrast, "model") if "measure" in claim.contrast else []
        on = f" on {' or '.join(names)}" * bool(names)
        return Verdict(claim.id, UNMEASURED, "", f"not measured yet: run {claim.notebook}{on}")
    if claim.rule == "arithmetic":
        gap = abs(m.estimate - claim.reported_value)
        word = AGREES[gap > claim.tolerance + 1e-9]  # binary fractions
        on, reason = RECOMPUTED, f"off by {gap:.4g} {claim.unit}, tolerance {claim.tolerance:g}"
    else:
        on, (outcome, reason) = _on(claim, m), _outcome(claim, m)
        word = (*(WORDS_THERE if on == PUBLISHED else WORDS_HERE), *WORDS_ALIKE)[outcome]
    return Verdict(claim.id, on, word, reason + scope, m.estimate, m.low, m.high, m.n)


def _on(claim: Claim, m: Measurement) -> str:
    """Whether the published model was measured, and on the published task."""
    name = m.model.casefold()
    if not any(part.casefold() in name for part in claim.model):
        return STAND_IN
    return PUBLISHED if claim.task == "published" else OTHER_TASK


def _audited(claim: Claim) -> Verdict:
    """A claim that no profile decides: what its own counts say, where they are published."""
    reading = audit(claim)
    if impossible(claim):
        return Verdict(claim.id, AUDIT, "impossible", f"{reading.reading}; {claim.scope}")
    if reading.interval is None:
        return Verdict(claim.id, BEYOND, "", claim.scope)
    bears = reading.p is None or reading.p < stats.ALPHA
    return Verdict(claim.id, AUDIT, BEARS if bears else CANNOT, f"{reading.reading}; {claim.scope}")


def _outcome(claim: Claim, m: Measurement) -> tuple[int, str]:
    """The result by the rule, and why; what could not move is at its floor or ceiling."""
    if m.failed:
        return FLOOR, m.failed
    rule = {
        "direction": _direction,
        "equivalence": _equivalence,
        "non_inferiority": _non_inferiority,
    }.get(claim.rule, _size)  # a threshold is a size
    outcome, reason = rule(claim, m)
    moved = m.low > 0 or m.high < 0
    for end, edge in ((FLOOR, max), (CEILING, lambda sides: 100 - min(sides))):
        if m.sides and edge(m.sides) <= EDGE and not moved:
            arm, control = m.sides
            edge_reason = (
                f"{arm:.1f} against {control:.1f} percent: both arms are too near the end to move"
            )
            return end, edge_reason
    if m.control:
        over = f"over {', '.join(m.beaten)}" if m.beaten else "over none of the controls"
        reason += f"; against {m.control}, the hardest control to beat; it holds {over}"
    return outcome, reason


def _gap(claim: Claim, m: Measurement) -> tuple[float, float]:
    """Ends of the 95% interval of measured minus published, with the published sampling error where
    it is known: two independent estimates, by their own intervals (Newcombe 1998, method 10)."""
    reported = claim.reported_interval
    value = claim.reported_value if reported is None else reported.estimate
    below, above = (value, value) if reported is None else (reported.low, reported.high)
    gap = m.estimate - value
    low = gap - hypot(m.estimate - m.low, above - value)
    return low, gap + hypot(m.high - m.estimate, value - below)


def _differs(claim: Claim, m: Measurement) -> str:
    """In what words the measured size differs from the published one; "" where it does not."""
    low, high = _gap(claim, m)
    if low <= 0 <= high:
        return ""
    if claim.reported_interval is None:
        return f"the published {claim.reported_value:g} lies outside (its own error is not known)"
    return f"{low:.1f} to {high:.1f} {m.unit} off the published {claim.reported_value:.3g}"


def _direction(claim: Claim, m: Measurement) -> tuple[int, str]:
    effect = claim.reported_value
    side = -1 if effect is not None and effect < 0 else 1
    low, high = sorted((side * m.low, side * m.high))
    if high < 0:
        return OPPOSITE, "the interval excludes zero on the other side"
    if low > 0:
        reason = "the interval excludes zero on the claimed side"
        if effect is None:
            return HOLDS, f"{reason}; no size was published"
        off = _differs(claim, m)
        if off and claim.reported_interval:
            return SMALLER, f"direction holds, size does not: {off}"
        return HOLDS, f"{reason}; {off}" if off else f"{reason} and agrees with the published size"
    if not effect:
        return UNDECIDED, "the interval includes zero and no size was published"
    half = (high - low) / 2
    if half > abs(
        effect
    ):  # less than even odds of finding it; excluding zero by chance decides nothing
        needed = ceil(m.n * (half / abs(effect) / POWERED) ** 2)
        return UNDECIDED, f"{m.n:,} problems are too few, 80% power takes about {needed:,}"
    if off := _differs(claim, m):
        return NOT, f"the interval includes zero; {off}"
    return UNDECIDED, "the interval includes zero and does not differ from the published effect"


def _size(claim: Claim, m: Measurement) -> tuple[int, str]:
    side = -1 if claim.reported_value < 0 else 1
    if claim.is_contrast and max(side * m.low, side * m.high) < 0:
        return OPPOSITE, "the interval excludes zero on the other side"
    if off := _differs(claim, m):
        return NOT, off
    half = (m.high - m.low) / 2
    if half > claim.resolution:
        return UNDECIDED, f"±{half:.3g} {m.unit} is wider than the declared resolution"
    if claim.is_contrast and m.low <= 0 <= m.high:
        return UNDECIDED, "the interval includes zero and does not differ from the published value"
    return HOLDS, "agrees with the published value within both sampling errors"


def _equivalence(claim: Claim, m: Measurement) -> tuple[int, str]:
    margin, (low90, high90) = claim.margin, m.inner or (m.low, m.high)
    if -margin < low90 and high90 < margin:
        return HOLDS, f"equal within ±{margin:g} {m.unit} (two one-sided tests)"
    if m.low > margin or m.high < -margin:
        return NOT, f"differs by more than {margin:g} {m.unit}"
    return UNDECIDED, f"neither equality within ±{margin:g} {m.unit} nor a difference is shown"


def _non_inferiority(claim: Claim, m: Measurement) -> tuple[int, str]:
    margin, (low90, _) = claim.margin, m.inner or (m.low, m.high)
    if low90 > -margin:
        return HOLDS, f"loses less than {margin:g} {m.unit} (one one-sided test)"
    if m.high < -margin:
        return OPPOSITE, f"a loss of more than {margin:g} {m.unit}"
    return UNDECIDED, f"a loss above {margin:g} {m.unit} is neither shown nor excluded"


def measured_table(
    claims: Iterable[Claim],
    records: pd.DataFrame,
    profile: str,
    measurements: Mapping[str, Measurement] | None = None,
) -> pd.DataFrame:
    """One row per claim; `measurements` has by claim id what stages measured outside records."""
    rows = []
    for claim in claims:
        m = (measurements or {}).get(claim.id)
        if m is None and "probe" not in claim.contrast:  # which the stage alone can tell apart
            m = measure(claim, records)
        judged = verdict(claim, m, profile)
        row = (
            claim.id,
            claim.system,
            as_published(claim),
            *(m.texts() if m else ("", "")),
            m and m.n,
        )
        rows.append((*row, judged.on, judged.word, judged.reason))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"n": "Int64"})


def counted(rows: Iterable[Mapping]) -> str:
    """How many claims of `measured_table` were judged, how, and why not the others: a sentence or
    two."""
    rows = [*rows]
    words = Counter(row["verdict"] for row in rows if row["verdict"])
    others = Counter(row["on"] for row in rows if not row["verdict"])
    tally, rest = _tally(words), _tally(others)
    head = f"Of {len(rows)} published claims {words.total() or 'none'} got a verdict here"
    return f"{head}{': ' * bool(tally)}{tally}." + f" Without one: {rest}." * bool(rest)


def _tally(words: Counter) -> str:
    """How often each word occurs, the most frequent first."""
    return ", ".join(f"{n} {word if n == 1 else PLURAL.get(word, word)}"
                     for word, n in words.most_common())  # fmt: skip


def as_published(claim: Claim) -> str:
    """The published number as a table shows it."""
    if claim.value is None:
        return "direction"
    base = "" if claim.baseline is None else f" against {claim.baseline:g}"
    return f"{claim.value:g}{base} {claim.unit}"


def headline(rows: Iterable[Mapping], audits: pd.DataFrame, models: str = "") -> list[str]:
    """Four sentences: what came out on published models, on stand-ins, by the audit of published
    counts, by arithmetic. `rows` is `measured_table`, `audits` is `tables.audits` of the same
    claims; `models` names what was measured."""
    notes, by = {*audits.loc[audits["grade"] == "NOTE", "claim"]}, {}
    for row in rows:
        if row["verdict"]:
            by.setdefault(row["on"], []).append(row)

    def judged(on: str) -> str:
        known_from_notes = sum(row["claim"] in notes for row in by[on])
        suffix = (
            f" ({known_from_notes} known from third-party notes only)" if known_from_notes else ""
        )
        return _tally(Counter(row["verdict"] for row in by[on])) + suffix

    name = f" ({models})" if models else ""
    on_published, other, on_stand_in, again = (
        f"{len(by[on])} claim{'s' * (len(by[on]) > 1)}, {judged(on)}" if on in by else ""
        for on in (PUBLISHED, OTHER_TASK, STAND_IN, RECOMPUTED)
    )
    effects = audits.dropna(subset=["p"])
    unsure = int((effects["p"] >= stats.ALPHA).sum())
    return [
        f"On the published models and tasks: {on_published or 'nothing measured yet'}."
        + f" On the published models with other tasks: {other}." * bool(other),
        f"On a stand-in model{name * bool(on_stand_in)}: {on_stand_in or 'nothing measured yet'}.",
        f"Of {len(effects)} published differences with known counts, {unsure} cannot be told from "
        f"zero by their own numbers.",
        f"Published numbers recomputed by arithmetic: {again or 'none yet'}.",
    ]
