"""The sweep: many allocations of one memory budget, from few generations.

A scenario combines the bits of the weights, policy and precision of the cache, retrieved examples
or none, a budget of tokens and a number of votes. One long generation per SweepRun and sample
serves every smaller budget of tokens (`kit.inference.budget_forcing`) and every smaller width
(votes over subsets of the samples, `kit.analysis.pareto`).

Source: https://arxiv.org/abs/2510.10964, whose grid the workstation profile has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from psutil import virtual_memory

from kit import paths
from kit.analysis import pareto
from kit.budget import ledger
from kit.budget.ledger import Architecture, Configuration
from kit.data.prompts import FORM
from kit.evaluation import evaluate, grader
from kit.evaluation.evaluate import Job, MemoryConfig
from kit.evaluation.store import Store
from kit.inference import policies
from kit.inference.budget_forcing import BudgetForcing
from kit.inference.kv_quantization import ITERATIONS
from kit.models import quantization
from kit.models.load import Model, collect
from kit.pipeline import progress
from kit.schema import Generation, Prompt, Sampling, digest

ANSWER_PROMPT = "\nAnswer:"  # what forces an answer
WAIT = " Wait,"  # what takes the place of a stop
END = "</think>"  # of the thoughts of a model that thinks
ANSWER_TOKENS = 8
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
OUT = "out of memory"
EVICTORS = "evictors/smollm2-135m-seed0-{}.safetensors"  # shipped ones, under data/
LoadEvictor = Callable[[Path, Model], object]  # file, model: what `policies.DMS` takes
BUDGETED = {
    "window": policies.Window,
    "tova": policies.TOVA,
    "h2o": policies.H2O,
    "snapkv": policies.SnapKV,
    "rkv": policies.RKV,
}


@dataclass(frozen=True, order=True)
class SweepRun:
    """A combination of settings that needs generations of its own."""

    bits: int = 16  # of linear weights
    policy: str = "full"  # "window 64", "tova 64", "h2o 64", "snapkv 64", "rkv 64", or "dms 4x"
    kv_bits: int = 16
    memory: bool = False  # examples retrieved into the prompt

    @property
    def name(self) -> str:
        """For people and for records."""
        settings = f"{self.policy}, kv {self.kv_bits}-bit{', memory' if self.memory else ''}"
        return f"weights {self.bits}-bit, {settings}"


@dataclass(frozen=True)
class Grid:
    """All combinations of these; ValueError where there are none, or more than `most`."""

    bits: tuple[int, ...] = (16, 8, 4)
    policies: tuple[str, ...] = ("full",)
    kv_bits: tuple[int, ...] = (16,)
    memory: tuple[bool, ...] = (False,)
    tokens: tuple[int, ...] = (64,)  # budgets of new tokens, ascending
    widths: tuple[int, ...] = (1,)
    waits: int = 0  # stops, or ends of thoughts, replaced: see kit.inference.budget_forcing
    most: int = 5_000

    def __post_init__(self):
        for name in ("bits", "policies", "kv_bits", "memory", "tokens", "widths"):
            if not getattr(self, name):
                raise ValueError(f"the grid is empty: {name} has no value; give at least one")
        for name, allowed in (("bits", (16, *quantization.BITS)), ("kv_bits", (16, *ITERATIONS))):
            if unknown := set(getattr(self, name)) - set(allowed):
                raise ValueError(f"{name} has {min(unknown)}, which cannot be made; use {allowed}")
        if len(self) > self.most:
            raise ValueError(
                f"the grid has {len(self):,} scenarios ({len(self.runs)} runs x {len(self.tokens)} "
                f"budgets x {len(self.widths)} widths), more than most={self.most:,}; take values "
                f"out, or raise most"
            )

    def __len__(self) -> int:
        return len(self.runs) * len(self.tokens) * len(self.widths)

    @property
    def runs(self) -> list[SweepRun]:
        """In the order in which they are done: weights are quantised once for all that share."""
        return [SweepRun(*values) for values in product(self.bits, self.policies, self.kv_bits,
                                                   self.memory)]  # fmt: skip

    @property
    def ends(self) -> list[tuple[str, object, object]]:
        """The first and the last value of each place that has several, tokens and votes aside."""
        values = {name: getattr(self, name) for name in ("policies", "kv_bits", "bits", "memory")}
        return [("policy" if name == "policies" else name, each[0], each[-1])
                for name, each in values.items() if len(each) > 1]  # fmt: skip


class Swept(NamedTuple):
    """The result of a sweep."""

    table: pd.DataFrame  # a row per scenario, see `scenarios`
    outcomes: np.ndarray  # what each solves: [C, P]
    failed: dict[SweepRun, str]  # runs that had too little memory, why
    keys: list[list[str]]  # of the records behind it, by run and budget of tokens


def memory_of(run: SweepRun, model: Model, load_evictor: LoadEvictor | None = None) -> MemoryConfig:
    """The cache of a run for `model`; ValueError for a policy that there is not, or for "dms"
    without `load_evictor`.

    An evictor trained on the model is used with its quantised weights too.
    """
    kind, _, size = run.policy.partition(" ")
    quantized = ledger.cache(ledger.architecture(model.weights.config), run.kv_bits)
    if run.policy == "full":
        return MemoryConfig(policies.Full(), quantized)
    if kind in BUDGETED and size.isdigit():
        return MemoryConfig(BUDGETED[kind](int(size)), quantized)
    file = paths.DATA / EVICTORS.format(size)
    if kind != "dms" or not file.is_file():
        raise ValueError(
            f"no policy {run.policy!r}; use full, {', '.join(f'{k} N' for k in BUDGETED)}, or "
            f"dms with one of the evictors in {file.parent}"
        )
    if load_evictor is None:
        raise ValueError(f"{run.policy!r} needs an evictor; pass load_evictor=evictor.load")
    return MemoryConfig(policies.DMS(load_evictor(file, model)), quantized)


def generate(
    base: Model,
    run: SweepRun,
    grid: Grid,
    prompts: Sequence[Prompt],
    store: Store,
    samples: int,
    temperature: float = 0.6,
    batch_size: int = 64,
    report: Callable[[str], None] | None = None,
    bank: object | None = None,
    load_evictor: LoadEvictor | None = None,
) -> pd.DataFrame:
    """Records of one run on `base` with weights of its bits: an answer of every prompt and sample
    at every budget of tokens, as arm "... at N". Stored ones are not made again, and those of
    another version of the grader only graded again. Each question fetches from `bank` where there
    is one, see `evaluate.MemoryConfig`; runs of "dms" open their evictor with `load_evictor`."""
    model = quantization.rename(base, run.bits)
    sampling = Sampling(max(grid.tokens), temperature, top_p=0.95 if temperature else 1.0)
    memory = replace(memory_of(run, model, load_evictor), bank=bank)
    forcing = _forcing(model, grid, thinking=any(prompt.thinking for prompt in prompts))
    jobs = evaluate.plan(model, list(prompts), sampling, samples, memory)
    keys = {job.key: [_keyed(job, forcing, cut) for cut in grid.tokens] for job in jobs}
    stored = evaluate.stored_keys(
        store, [(*pair, job.prompt.problem) for job in jobs for pair in keys[job.key]]
    )
    todo = [job for job in jobs if not stored.issuperset(key for key, _ in keys[job.key])]
    count, report = 0, report or progress.in_place()

    def commit(ended: list[tuple[Job, Generation]]) -> None:
        nonlocal count
        store.append(_answers(model, ended, keys, sampling, memory, forcing))
        count += len(ended)
        report(f"{run.name}: {count} of {len(todo)} generations")

    if todo:
        model = quantized(base, run.bits)
        evaluate.generate(model, todo, sampling, batch_size, memory, commit, forcing)
    return store.table({key for each in keys.values() for key, _ in each})


def _keyed(job: Job, forcing: BudgetForcing, cut: int) -> tuple[str, str]:
    """Key and generation key of the record of one job at one budget of tokens."""
    return digest([job.key, forcing.key, cut]), digest([job.generation_key, forcing.key, cut])


def _forcing(model: Model, grid: Grid, thinking: bool) -> BudgetForcing:
    texts = ANSWER_PROMPT, WAIT, END, f"\n{END}\n{ANSWER_PROMPT}"
    answer_prompt, wait, end, closing_prompt = (
        tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )
    forcing = BudgetForcing(grid.tokens, answer_prompt, ANSWER_TOKENS, wait, grid.waits)
    if thinking and len(end) == 1:  # more tokens: a model that does not know thoughts
        return replace(forcing, end_of_thinking=end[0], closing_prompt=closing_prompt)
    return forcing


def _answers(
    model, ended: list[tuple[Job, Generation]], keys, sampling, memory: MemoryConfig, forcing
):
    """Records of generations at every cut."""
    rows = [
        (job, cut, pair, forced or whole)
        for job, whole in ended
        for cut, pair, forced in zip(forcing.budgets, keys[job.key], whole.forced, strict=True)
    ]
    problems = [job.prompt.problem for job, *_ in rows]
    golds, asks = [p.answer for p in problems], [p.asks for p in problems]
    grades = grader.grade_many([generation.text for *_, generation in rows], golds, FORM, asks)
    graded = []
    for (job, cut, (key, tokens), generation), verdict in zip(rows, grades, strict=True):
        record = evaluate.record(model, job, generation, sampling, memory.name, verdict)
        arm = f"{job.prompt.arm} at {cut}"
        graded.append(replace(record, key=key, generation_key=tokens, arm=arm))
    return graded


@lru_cache(maxsize=1)
def quantized(model: Model, bits: int) -> Model:
    """`model` with weights of `bits`, unpacked, since HQQ brings no kernels that read packed ones:
    it would unpack a layer at each use. The last one asked for is kept."""
    return quantization.quantize(model, bits, packed=False)


def scenarios(
    base: Model, run: SweepRun, grid: Grid, records: pd.DataFrame, batch: int = 64, **options
) -> tuple[pd.DataFrame, np.ndarray]:
    """Every scenario of one run as a row, and what it solves: [C] rows and outcomes [C, P].

    `bytes` is the ledger's: weights, the cache of the mean sequence at its end, its forced answer
    included, and what `options` add, see `budget.Configuration`; `shared_bytes` the same where
    `batch` questions share the weights. `reads`, `peak_bytes`, `seconds` and `joules` are means of
    what was measured, times the width.
    """
    rows, outcomes = [], []
    sizes = ledger.architecture(base.weights.config)
    packing = ledger.packing(run.bits, base.weights.config)
    weight_bytes = sum(ledger.weights(sizes, packing).values())
    for cut in grid.tokens:
        frame = at(records, cut)
        configuration = Configuration(
            sizes, packing, tokens=round(_stored_tokens(frame).mean()),
            kept=_kept_fraction(frame, sizes), quantized=ledger.cache(sizes, run.kv_bits),
            **options,
        )  # fmt: skip
        mean = frame[["kv_reads_tokens", "kv_peak_bytes", "seconds", "joules"]].mean()
        for width in grid.widths:
            whole = replace(configuration, width=width)
            row = {"model": base.name} | asdict(run) | {"tokens": cut, "width": width}
            row |= {"bytes": whole.total(), "shared_bytes": whole.total(batch)}
            row |= {"weight_bytes": weight_bytes, "kept": configuration.kept}
            row |= {"kv_bytes": whole.parts()["keys and values"]}
            rows.append(row | dict(zip(("reads", "peak_bytes", "seconds", "joules"), width * mean)))
            outcomes.append(pareto.votes(frame, width))
    return pd.DataFrame(rows), np.array(outcomes)


def at(records: pd.DataFrame, cut: int) -> pd.DataFrame:
    """The records of `generate` at one budget of tokens."""
    return records[records["arm"].str.endswith(f" at {cut}")]


def _stored_tokens(frame: pd.DataFrame) -> pd.Series:
    """Tokens whose keys and values a whole cache holds at the end: all but the last."""
    return frame["prompt_tokens"] + frame["new_tokens"] - 1


def _kept_fraction(frame: pd.DataFrame, a: Architecture) -> float:
    """Share of a sequence that the layers without a sliding window held at their peak, measured."""
    whole = _stored_tokens(frame)
    windows = [window for window in a.windows if window is not None]
    if len(windows) == a.layers:
        return 1.0
    sliding = sum(np.minimum(whole, window) for window in windows)  # `kv_peak_tokens` is a mean
    live = (a.layers * frame["kv_peak_tokens"] - sliding) / (a.layers - len(windows))
    return min(1.0, float((live / whole).mean()))


def refused(
    a: Architecture, grid: Grid, prompt_tokens: int, available_bytes: int | None = None
) -> dict[SweepRun, str]:
    """The runs of `grid` of which not one sequence fits into `available_bytes`, by default what is
    free here, and how much they lack, from the model's config alone. A run of quantized weights
    has them unpacked beside the 16-bit ones; a cache is as long as the largest budget."""
    available_bytes, reasons = available() if available_bytes is None else available_bytes, {}
    for run in grid.runs:
        whole = sum(ledger.weights(a).values()) * (1 if run.bits == 16 else 2)
        limit = policies.held_tokens(run.policy) or math.inf
        tokens = min(limit, prompt_tokens + grid.tokens[-1] + len(ANSWER_PROMPT) + ANSWER_TOKENS)
        cache = ledger.keys_and_values(a, tokens, ledger.cache(a, run.kv_bits))
        need = whole + cache
        if need > available_bytes:
            reasons[run] = (
                f"{OUT}: it needs {ledger.text(need)}, "
                f"{ledger.text(need - available_bytes)} more than there is; lower the tokens "
                f"or the bits"
            )
    return reasons


def available() -> int:
    """Free bytes of the first CUDA device, otherwise of this machine's memory; what torch only
    keeps for later is free."""
    collect()
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else virtual_memory().available


def sweep(
    base: Model,
    grid: Grid,
    prompts: dict[bool, Sequence[Prompt]],
    store: Store,
    samples: int,
    report: Callable[[str], None] | None = None,
    failed: dict[SweepRun, str] | None = None,
    **how,
) -> Swept:
    """All scenarios of `grid` on `base`, in this process. `prompts` are those without and with
    memory; `how` goes to `generate`; what has `failed` before is not tried again."""
    if samples < max(grid.widths):
        raise ValueError(f"{samples} samples do not make a vote of {max(grid.widths)}")
    tables, outcomes, keys, failed = [], [], [], dict(failed or {})
    emit = report or print  # what failed stays to be read
    for run in grid.runs:
        if run in failed:
            emit(f"{run.name}: {failed[run]}")
            continue
        try:
            records = generate(
                base, run, grid, prompts[run.memory], store, samples, report=report, **how
            )
        except OUT_OF_MEMORY as error:
            failed[run] = f"{OUT}: {error}"
            emit(f"{run.name}: {failed[run]}")
            continue
        table, solved = scenarios(base, run, grid, records, how.get("batch_size", 64))
        tables.append(table)
        outcomes.append(solved)
        keys += [at(records, cut)["key"].tolist() for cut in grid.tokens]
    if not tables:
        raise MemoryError(f"none of {len(grid.runs)} runs fits: {next(iter(failed.values()))}")
    return Swept(pd.concat(tables, ignore_index=True), np.concatenate(outcomes), failed, keys)
