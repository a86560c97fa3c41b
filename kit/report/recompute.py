"""Tables and measured numbers made again from the records of a run, without its models.

`kit.report.bundle` compares them with what the run says of itself. Results name the records of
each arm and training seed under `frames`, see `kit.analysis.contrasts.index_records`, and hold the
divergence of each held-out sequence; allocated bytes stay as the results have them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from kit.analysis import calibration, claims, contrasts, effects, pareto, tables
from kit.analysis.contrasts import Measurement
from kit.report import exhibits

STEPS = "What a step buys, over {} scenarios from {} generations"
RATES = "How often each verdict comes out, percent of {} simulated studies"
TRAINED = "What each way of training teaches"
COMPOUNDING = "Compounding, by round"
PHASE2_DIFFERENCES = "Internalised against every other arm"
KNOWN = "Who knows what, by frequency"
RECALL = "Free answers, by how often a fact was told"
FETCHED = "Fetched against every other arm"
RECALLED = "Fetched against every other arm, free answers"
BYTES = "Bytes held and read"
SIZES = ("fetched", "stored", "trained")  # parameters, parameters, tokens of training
GAPS = "Frontiers of cache settings at equal bytes"
READ = "Where the gold answer is read"
PLANTED_GAINS = "Planted rules, retrieved against each control"
HANDWRITTEN = "Hand-written strategies against each control"
TOOL_USE = "Calls of the calculator"
# Arms of the strategy study's first two steps, and of other draws of its bank.
CONTROLS = r"(?:no-hint$|hint-|planted-|retrieved-draw)"
PLACES = "Five memories, the best of each alone"
QUALITY = "Quality at equal live tokens"
BY_TEXT = "Quality by kind of text"
# Entries of the results that are tables, by caption.
ENTRIES = {
    "04_phase2": {"arms": TRAINED, "rounds": COMPOUNDING, "contrasts": PHASE2_DIFFERENCES},
    "05_parametric": {"arms": KNOWN, "recall": RECALL, "contrasts": FETCHED,
                      "recalled": RECALLED, "bytes": BYTES},
    "06_memory_budget": {"gaps": GAPS, "best": PLACES},
}  # fmt: skip


def table(stage: str, caption: str, results: Mapping, records: pd.DataFrame) -> pd.DataFrame | None:
    """The table of a stage by its caption, from its results and records; None where it does not
    follow from these."""
    simulated = re.fullmatch(RATES.format(r"(\d+)"), caption)
    if simulated:
        return calibration.error_rates(int(simulated[1]))
    if caption == QUALITY:
        return quality(pd.DataFrame(results["sequences"]))
    if caption == BY_TEXT:
        return by_text(pd.DataFrame(results["texts"]))
    if "frames" not in results:
        return _of_arms(stage, caption, records)
    frames = {name: contrasts.restore_frames(at, results["keys"], records)
              for name, at in results["frames"].items()}  # fmt: skip
    if stage == "04_phase2":
        if "constants" in results:
            base = frames["arms"]["base"]
            frames["arms"]["constant"] = contrasts.constant(base, results["constants"])
        return _trained(caption, results["families"], frames)
    if stage == "05_parametric":
        return _recall_table(caption, results, frames)
    return _swept(caption, results, frames)


def quality(sequences: pd.DataFrame) -> pd.DataFrame:
    """`tables.quality` of rows by sequence, policy and compression."""
    rows = sequences.groupby(["policy", "compression_x"], sort=False)
    return tables.quality({key: frame.reset_index(drop=True) for key, frame in rows})


def by_text(sequences: pd.DataFrame) -> pd.DataFrame:
    """`quality` of each kind of text, from rows by sequence that name it."""
    parts = []
    for name, rows in sequences.groupby("text", sort=False):
        parts.append(quality(rows))
        parts[-1].insert(0, "text", name)
    return pd.concat(parts, ignore_index=True).drop(columns="kv_bytes")


def _of_arms(stage: str, caption: str, records: pd.DataFrame) -> pd.DataFrame | None:
    if (stage, caption) == ("01_baseline", exhibits.BASELINE):
        return tables.arms(records)
    if stage == "02_strategies":
        return _of_strategies(caption, records)
    if (stage, caption) == ("03_dms", "Accuracy with a thinned cache"):
        frame = tables.arms(records.assign(arm=records["policy"]))
        return frame.drop(columns=["model", "compliance"])
    return None


def _of_strategies(caption: str, records: pd.DataFrame) -> pd.DataFrame | None:
    if caption in (READ, PLANTED_GAINS):
        from kit.reasoning_bank import ladder  # imports torch

        planted = records["arm"].str.startswith("planted-")
        return (
            ladder.planted_gains(records[planted])
            if caption == PLANTED_GAINS
            else ladder.placements(records)
        )
    records = strategies(records)
    if caption == "Every arm of the strategy study":
        return tables.arms(records).drop(columns="model")
    if caption == "Retrieved strategies against each control":
        return against("02_strategies", records, {*records["arm"]}).drop(columns="primary")
    if caption == HANDWRITTEN:
        return handwritten(records).drop(columns="primary")
    if caption == TOOL_USE:
        from kit.reasoning_bank import arms  # imports torch

        return arms.tool_use(records)
    return None


def handwritten(records: pd.DataFrame) -> pd.DataFrame:
    """Hand-written strategies minus their declared control, first, and minus other arms."""
    declared = claims.secondary()["02_strategies"]
    others = [arm for arm in ("plain", "irrelevant", "retrieved") if arm in {*records["arm"]}]
    return tables.against(records, declared["arm"], others, declared["control"])


def strategies(records: pd.DataFrame) -> pd.DataFrame:
    """The arms of the strategy study that are compared: neither its earlier controls, which are on
    other problems, nor other draws of the bank, nor arms that repeat the prompts of another."""
    primary = claims.primary()["02_strategies"]
    records = records[~records["arm"].str.match(CONTROLS)]
    repeated = contrasts.twins(records, (primary["control"], primary["arm"]))
    return records[~records["arm"].isin(repeated)]


def _trained(caption: str, families: list[str], frames: dict) -> pd.DataFrame | None:
    if caption == TRAINED:
        return tables.trained(frames["arms"], families)
    if caption == COMPOUNDING:
        return tables.compounded(frames["rounds"], families)
    return phase2_differences(frames["arms"], families) if caption == PHASE2_DIFFERENCES else None


def phase2_differences(frames: Mapping[str, pd.DataFrame], families: list[str]) -> pd.DataFrame:
    """Phase 2's declared arm minus every other one, on the families trained on."""
    records = pd.concat(frames.values(), ignore_index=True)
    records = records[records["family"].isin(families)]
    return against("04_phase2", records, frames).drop(columns="primary")


def _recall_table(caption: str, results: Mapping, frames: dict) -> pd.DataFrame | None:
    if caption == KNOWN:
        return tables.recall_by_frequency(frames["options"], frames["free"], results["buckets"])
    if caption == RECALL:
        return tables.recall_by_frequency(frames["free"], {}, results["buckets"]).drop(
            columns="free"
        )
    if caption in (FETCHED, RECALLED):
        return fetched(frames["options" if caption == FETCHED else "free"])
    if caption == BYTES:
        rows = []
        for row in results["bytes"]:
            frame = frames["options"][row["arm"]]
            cells = {"arm": row["arm"], "accuracy": tables.share(frame)}
            if "free" in row:
                cells["free"] = tables.share(frames["free"][row["arm"]])
            sizes = (*SIZES, "held_bytes", "read_bytes")
            cells |= {name: row[name] for name in sizes if name in row}
            rows.append(cells | {"prompt_tokens": frame["prompt_tokens"].mean()})
        return pd.DataFrame(rows)
    return None


def fetched(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Fetched blocks minus every other arm."""
    records = pd.concat(frames.values())
    return against("05_parametric", records, frames).drop(columns="primary")


def against(stage: str, records: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """The stage's declared arm minus every other one, its declared control first."""
    primary = claims.primary()[stage]
    controls = sorted({*arms} - {primary["arm"]})
    return tables.against(records, primary["arm"], controls, primary["control"])


def _swept(caption: str, results: Mapping, frames: dict) -> pd.DataFrame | None:
    rows = pd.DataFrame(results["scenarios"])
    if caption == STEPS.format(len(rows), results["generations"]):
        return effects.marginal_effects(rows, _outcomes(rows, frames["scenarios"]), _rng())
    if caption == GAPS:
        outcomes = _outcomes(rows, frames["scenarios"])
        return effects.gap_rows(effects.gaps(rows, outcomes, _rng()))
    if caption == PLACES:
        rows = pd.DataFrame(results["places"])
        return effects.places(rows, _outcomes(rows, frames["places"]), _rng())[1]
    return None


def _outcomes(rows: pd.DataFrame, frames: Mapping[str, pd.DataFrame]) -> np.ndarray:
    """The problems that each scenario solves, [C, P]: the widths of a budget of tokens lie side by
    side."""
    widths_of = [frame for frame in frames.values() for _ in range(rows["width"].nunique())]
    pairs = zip(widths_of, rows["width"], strict=True)
    return np.array([pareto.votes(frame, width) for frame, width in pairs])


def outcomes(results: Mapping, name: str, records: pd.DataFrame) -> np.ndarray:
    """The problems that each row of the `scenarios` or `places` of a sweep solves: [C, P]."""
    frames = contrasts.restore_frames(results["frames"][name], results["keys"], records)
    return _outcomes(pd.DataFrame(results[name]), frames)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def on_sequences(kl: Mapping[str, list[float]], model: str = "") -> dict[str, Measurement]:
    """Measurements on held-out sequences, by claim: by how many percent immediate eviction
    diverges more from full attention than delayed eviction. `kl` has nats per token, by kind of
    training."""
    if not {"delayed", "immediate"} <= {*kl}:
        return {}
    excess = contrasts.excess_of(kl["immediate"], kl["delayed"], "held-out sequences")
    return {"dms-delayed-eviction": replace(excess, model=model)} if excess else {}


def on_facts(
    published: Iterable[claims.Claim],
    options: Mapping[str, pd.DataFrame],
    free: Mapping[str, pd.DataFrame],
    where: str,
) -> dict[str, Measurement]:
    """Measurements on the answers of the parametric study, by claim: chosen among options, or
    free where the claim's `probe` says so; the `fetched` arm is also that of its layers, as
    "fetched-late"."""
    of = {}
    for probe, frames in (("options", options), ("free", free)):
        layers = [frames["fetched"].assign(arm=f"fetched-{where}")] if "fetched" in frames else []
        parts = [*frames.values(), *layers]
        of[probe] = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    measurements = {claim.id: claims.measure(claim, of[claim.contrast.get("probe", "options")])
                    for claim in published if "measure" in claim.contrast}  # fmt: skip
    return {name: number for name, number in measurements.items() if number}


def on_prose(nats: Mapping[str, list[float]], model: str = "") -> dict[str, Measurement]:
    """Measurements on unrelated texts, by claim: by how many percent fetched blocks
    make them more surprising; `nats` per token of each text, by arm."""
    if not nats.get("fetched"):
        return {}
    excess = contrasts.excess_of(nats["fetched"], nats["plain"], "texts about other things")
    return {"hier-posthoc-common-loss": replace(excess, model=model)} if excess else {}


def on_scenarios(
    published: Iterable[claims.Claim], rows: pd.DataFrame, outcomes: np.ndarray
) -> dict[str, Measurement]:
    """Measurements on a sweep, by claim: of gaps of frontiers, of two scenarios, and of the
    scale threshold."""
    measurements: dict[str, Measurement] = {}
    gaps = effects.gaps(rows, outcomes, _rng())
    evicted, quantized = effects.evicted_or_quantized(rows)
    pairs = {"frontier_gap_with_kv_compression": (evicted, (quantized[0], evicted[1])),
             "accuracy_evicted_minus_quantised_at_equal_bytes": (evicted, quantized)}  # fmt: skip
    for claim in published:
        kind, interval = claim.contrast.get("value"), None
        if kind in pairs:
            interval = gaps.get(pairs[kind])
        elif kind == "accuracy_difference":
            sides = claim.contrast["scenario"], claim.contrast["against"]
            interval = effects.difference(rows, outcomes, _rng(), *sides)
        elif kind == "scale_threshold_gib":
            curve = effects.threshold(rows, outcomes, _rng())
            if len(curve):
                ends = [size / 2**30 for size in effects.switch(curve)]
                measurements[claim.id] = Measurement(
                    *ends, outcomes.shape[1], "GiB", origin="bootstrap of problems"
                )
        if interval:
            measurements[claim.id] = contrasts.points(interval, "paired by problem")
    models = ", ".join(sorted({*rows["model"]}))
    return {name: replace(number, model=models) for name, number in measurements.items()}


def entries(
    stage: str, results: Mapping, frames: Mapping[str, pd.DataFrame], records: pd.DataFrame
) -> dict:
    """The entries of the results of a stage that follow from its records and its tables by caption,
    measurements and verdicts aside."""
    values = {name: frames[caption].to_dict("records")
              for name, caption in ENTRIES.get(stage, {}).items() if caption in frames}  # fmt: skip
    if stage == "01_baseline":
        arms = tables.arms(records).itertuples()
        values["accuracy"] = {f"{row.model} {row.arm}": row.accuracy for row in arms}
    if stage == "02_strategies":
        compared = strategies(records)
        differences = against(stage, compared, {*compared["arm"]})
        values["contrasts"] = differences.to_dict("records")
        values["handwritten"] = handwritten(compared).to_dict("records")
    if stage == "06_memory_budget" and "frames" in results:
        rows, correct = pd.DataFrame(results["scenarios"]), outcomes(results, "scenarios", records)
        shares = effects.accuracies(correct, _rng())
        values["scenarios"] = rows.assign(accuracy=shares).to_dict("records")
        values["threshold"] = effects.threshold(rows, correct, _rng()).to_dict("records")
        caption = STEPS.format(len(rows), results["generations"])
        values |= {"marginal": frames[caption].to_dict("records")} if caption in frames else {}
    return {name: value for name, value in values.items() if name in results}


def measured(
    stage: str, results: Mapping, records: pd.DataFrame, published: Iterable[claims.Claim]
) -> dict[str, Measurement]:
    """The measurements in the results of a stage that follow from its records, by claim."""
    stage_claims = [claim for claim in published if claim.id in results.get("measurements", {})]
    if stage == "03_dms":
        return on_sequences(results.get("kl", {}), results.get("model", ""))
    if stage == "05_parametric" and "frames" in results:
        options, free = (
            contrasts.restore_frames(results["frames"].get(probe, []), results["keys"], records)
            for probe in ("options", "free")
        )
        prose = on_prose(results.get("nats", {}), results.get("model", ""))
        return on_facts(stage_claims, options, free, results["where"]) | prose
    if stage == "06_memory_budget" and "frames" in results:
        frames = contrasts.restore_frames(results["frames"]["scenarios"], results["keys"], records)
        rows = pd.DataFrame(results["scenarios"])
        return on_scenarios(stage_claims, rows, _outcomes(rows, frames))
    return {}
