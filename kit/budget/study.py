"""The study of a memory budget: the sweep of several models, and solved problems kept in five
places.

The sweep of one model is `kit.budget.sweep`, effects and frontiers are `kit.analysis.effects`.

Source of the questions: https://arxiv.org/abs/2510.10964, findings 1 to 5; blocks that a question
fetches are those of https://arxiv.org/abs/2510.02375, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd

from kit.analysis import contrasts, effects
from kit.budget import advisor, ledger, ray_sweep, sweep
from kit.budget.ledger import Configuration, Packing
from kit.budget.sweep import Grid, LoadEvictor, SweepRun
from kit.evaluation.store import Store
from kit.inference.policies import Full, Window
from kit.models import quantization
from kit.models.load import Model, load
from kit.parametric.study import FactStudy, Layout
from kit.parametric.train import MemoryTrainConfig
from kit.schema import Prompt

IN_WEIGHTS = {"blocks": "fetched", "trained": "continued"}  # place: arm of a FactStudy
CACHES = (16, 8, 4, 2)  # bits of keys and values whose bytes are compared


@dataclass(frozen=True)
class ScenarioSet:
    """Scenarios, what each solves, and the records behind them."""

    table: pd.DataFrame  # a row per scenario [C], see `sweep.scenarios`
    outcomes: np.ndarray  # what each solves: [C, P]
    frames: Mapping[str, pd.DataFrame]  # column "key", by run and budget of tokens, in order
    missing: Mapping[str, str] = field(default_factory=dict)  # what had no room, why
    generations: int = 0  # that the scenarios derive from

    @property
    def keys(self) -> list[str]:
        """Of all records, in order."""
        return sorted({key for frame in self.frames.values() for key in frame["key"]})

    @property
    def summary(self) -> str:
        """How much there is, and what had no room, for display."""
        lines = [f"{len(self.table)} scenarios from {self.generations} generations"]
        lines += [f"not measured, {name}: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)


def sweep_models(
    base: Model,
    names: Sequence[str],
    grid: Grid,
    prompts: Mapping[bool, Sequence[Prompt]],
    store: Store,
    samples: int,
    batch_size: int,
    load_evictor: LoadEvictor | None = None,
) -> ScenarioSet:
    """The scenarios of `grid` on the models of `names`, of which `base` is the first, loaded; their
    accuracies as column `interval`. Runs that cannot fit are refused before a model is loaded; the
    others are done by processes on Ray where the environment asks for them. MemoryError where
    nothing fits."""
    parts, missing, generations = [], {}, 0
    longest = max(len(prompt.problem.question) for prompt in prompts[False]) // 2  # tokens, at most
    for name in names:
        config = base.weights.config
        sizes = ledger.architecture(config) if name == names[0] else advisor.sizes(name)
        failed = sweep.refused(sizes, grid, longest)
        if len(failed) < len(grid.runs):
            model = base if name == names[0] else load(name)
            job = model, grid, prompts, store, samples
            how = {"batch_size": batch_size, "load_evictor": load_evictor}
            if ray_sweep.requested_workers():
                failed = ray_sweep.generate(*job, failed=failed, **how)
            parts.append(sweep.sweep(*job, failed=failed, **how))
            failed = parts[-1].failed
        generations += (len(grid.runs) - len(failed)) * len(prompts[False]) * samples
        missing |= {f"{name}, {run.name}": why for run, why in failed.items()}
    if not parts:
        raise MemoryError(f"no model fits into the memory here: {missing}")
    outcomes = np.concatenate([part.outcomes for part in parts])
    table = pd.concat([part.table for part in parts], ignore_index=True)
    table["interval"] = effects.accuracies(outcomes, np.random.default_rng(0))
    keys = [pd.DataFrame({"key": each, "training": 0}) for part in parts for each in part.keys]
    frames = {str(number): frame for number, frame in enumerate(keys)}
    return ScenarioSet(table, outcomes, frames, missing, generations)


def in_weights(
    study: FactStudy,
    layout: Layout,
    recipe: MemoryTrainConfig,
    grid: Grid,
    prompts: Sequence[Prompt],
    store: Store,
    samples: int,
    batch_size: int,
    refused: Mapping[str, str] | None = None,
) -> ScenarioSet:
    """The sentences of `study` in blocks that a question fetches, the whole bank counted as held,
    and in the model itself; `prompts` are without memory. The table has a column `place`; it is
    empty where the run with the whole cache is among those `refused`, by name, which these need
    too."""
    tables, outcomes, frames, missing = [], [], {}, {}
    room = f"{study.model.name}, {SweepRun().name}" not in (refused or {})
    for place, arm in IN_WEIGHTS.items() if room else ():
        model, bank = study.arm(arm, layout, recipe)
        model = replace(model, name=study.model.name)
        try:
            records = sweep.generate(model, SweepRun(), grid, prompts, store, samples,
                                     batch_size=batch_size, bank=bank,
                                     report=partial(print, place))  # fmt: skip
        except sweep.OUT_OF_MEMORY as error:
            missing[f"{model.name}, {place}"] = f"{sweep.OUT}: {error}"
            continue
        held = bank.nbytes() if bank else {"fetched": 0, "bank": 0}
        table, solved = sweep.scenarios(model, SweepRun(), grid, records, batch_size,
                                        fetched=held["fetched"], resident=held["bank"])  # fmt: skip
        tables.append(table.assign(place=place))
        outcomes.append(solved)
        frames |= {f"{place} at {cut}": sweep.at(records, cut) for cut in grid.tokens}
    count = len(tables) * len(prompts) * samples
    if not tables:
        return ScenarioSet(pd.DataFrame(), np.empty((0, len(prompts))), frames, missing, count)
    return ScenarioSet(pd.concat(tables), np.concatenate(outcomes), frames, missing, count)


def single_places(swept: ScenarioSet, model: str) -> ScenarioSet:
    """The scenarios of one model that use at most one place of memory, named in the column `place`,
    see `effects.single_factor`."""
    table = swept.table[swept.table["model"] == model].drop(columns="interval")
    table = table.assign(place=[effects.single_factor(row) for row in table.to_dict("records")])
    table = table[table["place"] != ""]
    widths = len(swept.table) // len(swept.frames)  # which lie side by side
    names = [*swept.frames]
    frames = {names[row // widths]: swept.frames[names[row // widths]] for row in table.index}
    return ScenarioSet(table, swept.outcomes[table.index], frames)


def joined(*sets: ScenarioSet) -> ScenarioSet:
    """All scenarios of several sets over the same problems."""
    return ScenarioSet(
        pd.concat([each.table for each in sets], ignore_index=True),
        np.concatenate([each.outcomes for each in sets]),
        {name: frame for each in sets for name, frame in each.frames.items()},
        {name: why for each in sets for name, why in each.missing.items()},
        sum(each.generations for each in sets),
    )


def results(swept: ScenarioSet, places: ScenarioSet) -> dict:
    """Entries of the stage's results from which `kit.report.recompute` makes its tables again."""
    keys = sorted({*swept.keys, *places.keys})
    frames = {"scenarios": swept.frames, "places": places.frames}
    return {
        "keys": keys,
        "frames": {name: contrasts.index_records(each, keys) for name, each in frames.items()},
        "scenarios": swept.table.rename(columns={"interval": "accuracy"}).to_dict("records"),
        "places": places.table.to_dict("records"),
        "generations": swept.generations,
        "missing": {**swept.missing, **places.missing},
    }


def allocated(model: Model, configuration: Configuration) -> dict[str, int]:
    """Bytes by part that are really allocated for a configuration of random keys and values."""
    c = configuration
    length = c.tokens + c.strategies
    policy = Window(round(c.kept * length)) if c.kept < 1 else Full()
    parts: dict[str, int] = ledger.measured_weights(model.weights)
    parts["keys and values"] = ledger.measured_cache(
        model.weights, c.width, length, policy, c.quantized, c.kept
    )
    return parts


def formula_against_allocation(model: Model, bits: Sequence[int]) -> pd.DataFrame:
    """Bytes of weights of each of `bits`, and of the cache of four sequences of 1,024 tokens at
    each precision, by formula and as allocated."""
    sizes, native = ledger.architecture(model.weights.config), 8 * model.dtype.itemsize
    rows = []
    for each in bits:
        packing = (
            Packing(each, quantization.GROUP, 16, native, 0, native)
            if each < 16
            else Packing(native, native_bits=native)
        )
        weights = quantization.quantize(model, each).weights
        pair = ledger.weights(sizes, packing), ledger.measured_weights(weights)
        rows.append([f"weights, {each if each < 16 else native} bit", *map(_total, pair)])
    for each in CACHES:
        quantized = ledger.cache(sizes, each)
        formula = 4 * ledger.keys_and_values(sizes, 1024, quantized, native)
        measured = ledger.measured_cache(model.weights, 4, 1024, Full(), quantized)
        name = f"cache of 4 x 1,024 tokens, {native if each == 16 else each} bit"
        rows.append([name, formula, measured])
    table = pd.DataFrame(rows, columns=["what", "formula_bytes", "allocated_bytes"])
    return table.assign(off_percent=100 * (table["allocated_bytes"] / table["formula_bytes"] - 1))


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())
