"""Evaluation: decodes the prompts that the store lacks, grades the answers, appends the records.

A job is one queue. What ends is graded and stored in a commit of its own every COMMIT_S seconds; a
killed run loses what ended since, and a failed one nothing. Since tokens depend on nothing that is
decoded beside them, a resumed run produces the same ones as an uninterrupted one; and since they do
not depend on the limit either, an answer that ended under another limit is taken as it is.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import pandas
import torch
import transformers

from kit.data.prompts import FORM
from kit.evaluation import grader
from kit.evaluation.store import Store
from kit.inference import decode
from kit.inference.budget_forcing import NO_FORCING, BudgetForcing
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import DMS, Full
from kit.models.load import Model
from kit.pipeline import progress
from kit.schema import Generation, Problem, Prompt, Record, Sampling, digest

COMMIT_S = 20.0  # each commit is a file, and many files make each later commit slower


@dataclass(frozen=True)
class Job:
    """One sample to generate: its prompt and the keys that it is stored under."""

    key: str
    generation_key: str  # the part of the key that determines the tokens
    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class MemoryConfig:
    """Memory configuration: KV-cache eviction policy and quantization, and a parametric bank.

    Besides the methods that `decode` calls, the bank has `paths(questions)`, one node per level for
    each question, and `key`, a text that identifies it in record keys.
    """

    policy: Full = Full()
    quantized: Quantized | None = None
    bank: object | None = None  # of feed-forward blocks, fetched by question

    @property
    def name(self) -> str:
        """For the column `policy` of the records."""
        names = [self.policy.name, *([self.quantized.name] if self.quantized else [])]
        return " + ".join(names)

    @property
    def key(self) -> list:
        """For record keys."""
        parts = [self.policy.key, asdict(self.quantized) if self.quantized else None]
        return [*parts, self.bank.key] if self.bank else parts


def plan(
    model: Model,
    prompts: list[Prompt],
    sampling: Sampling,
    samples: int,
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
) -> list[Job]:
    """Every sample of every prompt with its key, sorted by the part that determines the tokens."""
    if isinstance(memory.policy, DMS) and memory.policy.evictor.base_hash not in model.hashes:
        raise ValueError(
            f"{memory.name} was trained for weights {memory.policy.evictor.base_hash}, "
            f"{model.name} has {model.weights_hash}; load an evictor of this model."
        )
    config = {k: v for k, v in model.weights.config.to_diff_dict().items() if k[0] != "_"}
    reads = [model.weights_hash, json.dumps(config, sort_keys=True, default=str)]
    reads += [model.tokenizer.chat_template, sorted(model.stop_ids)]
    runs = [str(model.dtype), model.device.type, torch.__version__, transformers.__version__]
    runs += decode.versions(model)
    base = [*reads, *runs, asdict(sampling), memory.key]
    jobs = []
    for prompt in sorted(prompts, key=lambda prompt: digest([base, prompt.id, prompt.arm])):
        for sample in range(samples):
            tokens = digest([base, prompt.id, prompt.arm, sample])
            graded = [
                tokens,
                grader.GRADE_VERSION,
                prompt.problem.answer,
                prompt.problem.asks,
                FORM,
            ]
            jobs.append(Job(digest(graded), tokens, prompt, sample))
    if len({job.generation_key for job in jobs}) < len(jobs):
        raise ValueError("The same prompt occurs twice in one job; give each problem once per arm.")
    return jobs


def evaluate(
    model: Model,
    prompts: list[Prompt],
    sampling: Sampling,
    store: Store,
    samples: int = 1,
    batch_size: int = 64,
    report: Callable[[str], None] | None = None,
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
) -> pandas.DataFrame:
    """Records of all samples of all prompts; computes only those that `store` lacks. Text that is
    stored under another version of the grader, or ended under another limit of tokens, is only
    graded. `report` takes lines of progress, `progress.in_place` where it is None."""
    report = report or progress.in_place()
    jobs = plan(model, prompts, sampling, samples, memory)
    stored = stored_keys(store, [(job.key, job.generation_key, job.prompt.problem) for job in jobs])
    todo = [job for job in jobs if job.key not in stored]
    taken = _ended_under_another_limit(model, todo, sampling, store, memory)
    note = f", {len(taken)} of them under another limit of tokens" if taken else ""
    todo = [job for job in todo if job.key not in taken]
    report(f"{len(jobs)} samples, {len(jobs) - len(todo)} already stored{note}")
    started, finished = time.perf_counter(), 0

    def commit(ended: list[tuple[Job, Generation]]) -> None:
        nonlocal finished
        problems = [job.prompt.problem for job, _ in ended]
        golds, asks = [p.answer for p in problems], [p.asks for p in problems]
        grades = grader.grade_many([g.text for _, g in ended], golds, FORM, asks)
        rows = zip(ended, grades, strict=True)
        store.append([record(model, *each, sampling, memory.name, v) for each, v in rows])
        finished += len(ended)
        elapsed = time.perf_counter() - started
        remaining = elapsed / finished * (len(todo) - finished)
        report(f"{finished}/{len(todo)} samples, {elapsed:.0f} s, {remaining:.0f} s left")

    if todo:
        generate(model, todo, sampling, batch_size, memory, commit)
    return store.table({job.key for job in jobs})


def stored_keys(store: Store, requests: Iterable[tuple[str, str, Problem]]) -> set[str]:
    """The keys of `requests` (key, generation key, problem) that `store` has.

    A text that was stored under another version of the grader, or with another gold answer, is
    graded again, and the new record stored beside the old one.
    """
    requests = [*requests]
    stored = store.keys(key for key, *_ in requests)
    missing = [each for each in requests if each[0] not in stored]
    if not missing:
        return stored
    old = store.generated({tokens for _, tokens, _ in missing}).to_dict("records")
    rows = {row["generation_key"]: row for row in old}
    again = [(rows[tokens] | {"key": key}, p) for key, tokens, p in missing if tokens in rows]
    return stored | _grade_again(store, again)


def _grade_again(store: Store, rows: list[tuple[dict, Problem]]) -> set[str]:
    """Store each row of a record, whose key is new, with the grade of its text; the keys."""
    golds, asks = [p.answer for _, p in rows], [p.asks for _, p in rows]
    grades = grader.grade_many([row["text"] for row, _ in rows], golds, FORM, asks)
    regraded = []
    for (row, p), verdict in zip(rows, grades, strict=True):
        of_problem = {"problem_id": p.id, "answer": p.answer, "asks": p.asks}
        regraded.append(Record(**row | of_problem | asdict(verdict)))
    store.append(regraded)
    return {record.key for record in regraded}


def _ended_under_another_limit(
    model: Model, jobs: list[Job], sampling: Sampling, store: Store, memory: MemoryConfig
) -> set[str]:
    """The keys of those of `jobs` whose answer is stored under another limit of tokens and ended
    within this one: it is the same answer at the same cost, and is stored under their keys too."""
    limits = store.limits(model.weights_hash) - {sampling.max_new_tokens} if jobs else set()
    wanted = {(job.prompt.id, job.prompt.arm, job.sample): job for job in jobs}
    asked = {(job.prompt.id, job.prompt.arm): job.prompt for job in jobs}.values()
    samples, sources = max((job.sample + 1 for job in jobs), default=0), {}
    for limit in limits:
        other = replace(sampling, max_new_tokens=limit)
        for job in plan(model, [*asked], other, samples, memory):
            if same := wanted.get((job.prompt.id, job.prompt.arm, job.sample)):
                sources[job.generation_key] = same
    rows = []
    for row in store.generated(set(sources)).to_dict("records") if sources else ():
        if row["finish"] == "stop" and row["new_tokens"] <= sampling.max_new_tokens:
            job = sources[row["generation_key"]]
            keys = {"key": job.key, "generation_key": job.generation_key}
            rows.append((row | keys, job.prompt.problem))
    return _grade_again(store, rows)


def derive(records: pandas.DataFrame, texts: list[str], arm: str, store: Store) -> pandas.DataFrame:
    """Records of `arm` derived from others without decoding: same costs, new texts, graded again.

    `texts`, in the order of `records`, are what a tool or a choice between samples made of each
    answer; the other columns are copied.
    """
    grades = grader.grade_many(texts, [*records["answer"]], FORM, [*records["asks"]])
    derived = []
    for row, text, verdict in zip(records.to_dict("records"), texts, grades, strict=True):
        tokens = digest([row["generation_key"], arm, text])
        graded = digest([tokens, grader.GRADE_VERSION, row["answer"], row["asks"], FORM])
        row |= {"key": graded, "generation_key": tokens, "arm": arm, "text": text}
        derived.append(Record(**row | asdict(verdict)))
    store.append(derived)
    return store.table({record.key for record in derived})


def generate(
    model: Model,
    jobs: list[Job],
    sampling: Sampling,
    batch_size: int,
    memory: MemoryConfig,
    commit: Callable[[list[tuple[Job, Generation]]], None],
    forcing: BudgetForcing = NO_FORCING,
) -> None:
    """Generations of `model` with `memory`, one for each of `jobs`: `commit` gets them as they end,
    COMMIT_S seconds of them at a time, and what is left where decoding fails or is interrupted."""
    questions = [job.prompt.problem.question for job in jobs]
    paths = memory.bank.paths(questions) if memory.bank else [()] * len(jobs)
    requests = [
        decode.Request(decode.tokenize(model, job.prompt), job.prompt.problem.id, job.sample, path)
        for job, path in zip(jobs, paths)
    ]
    fresh, began = [], time.perf_counter()

    def ended(index: int, generation: Generation) -> None:
        nonlocal fresh, began
        fresh.append((jobs[index], generation))
        if time.perf_counter() - began >= COMMIT_S:
            whole, fresh = fresh, []
            commit(whole)
            began = time.perf_counter()

    how = dict(policy=memory.policy, quantized=memory.quantized, bank=memory.bank)
    try:
        decode.decode(model, requests, sampling, batch_size, forcing=forcing, ended=ended, **how)
    finally:
        if fresh:
            commit(fresh)


def record(model: Model, job: Job, generation: Generation, sampling, policy: str, verdict):
    """The record of one graded generation, as it is stored."""
    problem = job.prompt.problem
    return Record(
        key=job.key,
        generation_key=job.generation_key,
        model=model.name,
        weights_hash=model.weights_hash,
        arm=job.prompt.arm,
        policy=policy,
        source=problem.source,
        problem_id=problem.id,
        family=problem.family,
        level=problem.level,
        sample=job.sample,
        seed=sampling.seed,
        temperature=sampling.temperature,
        question=problem.question,
        answer=problem.answer,
        prompt_id=job.prompt.id,
        retrieved=" ".join(job.prompt.retrieved),
        refused=job.prompt.refused,
        text=generation.text,
        finish=generation.finish,
        prompt_tokens=generation.prompt_tokens,
        new_tokens=generation.new_tokens,
        seconds=generation.seconds,
        kv_reads_tokens=generation.kv_reads_tokens,
        kv_peak_tokens=generation.kv_peak_tokens,
        kv_peak_bytes=generation.kv_peak_bytes,
        joules=generation.joules,
        correct=verdict.correct,
        extracted=verdict.extracted,
        reason=verdict.reason,
        method=verdict.method,
        compliant=verdict.compliant,
        grade_version=verdict.grade_version,
        asks=problem.asks,
        dtype=model.dtype_name,
    )
