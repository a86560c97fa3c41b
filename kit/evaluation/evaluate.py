"""Evaluation: decodes the prompts that the store lacks, grades the answers, appends the records.

A job is split beforehand into groups of sorted keys, on a CPU of about half a minute of decoding. A
group is decoded together, graded, and stored in one commit; a killed run loses at most one group.
Since the split depends on the whole job only, a resumed run produces the same tokens as an
uninterrupted one.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pandas
import torch
import transformers

from kit.data.prompts import FORM
from kit.evaluation import grader
from kit.evaluation.store import Store
from kit.inference import decode
from kit.inference.budget_forcing import NO_FORCING
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import DMS, Full
from kit.models.load import Model
from kit.schema import Generation, Prompt, Record, Sampling, digest

# Half a minute on two older cores, as parameters x allowed new tokens (about 0.6 of them are
# generated); and the cost of a prompt token relative to a new one. Measured, see LOG.md.
WORK, READ = 6e11, 0.7
FEWEST = 16  # samples of a group at least, even if slower: a batch shares each read of the weights


@dataclass(frozen=True)
class Job:
    """One sample to generate: its prompt and the keys that it is stored under."""

    key: str
    generation_key: str  # the part of the key that determines the tokens
    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Memory:
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
        kept = [self.policy.key, asdict(self.quantized) if self.quantized else None]
        return [*kept, self.bank.key] if self.bank else kept


def plan(
    model: Model,
    prompts: list[Prompt],
    sampling: Sampling,
    samples: int,
    batch_size: int,
    memory: Memory = Memory(),  # noqa: B008 (frozen)
) -> list[Job]:
    """Every sample of every prompt with its key, sorted by the part that determines the tokens.

    The samples of a prompt are adjacent, since they share its prefill. A new version of the grader
    leaves the groups, and so the tokens, unchanged.
    """
    if isinstance(memory.policy, DMS) and memory.policy.evictor.base_hash not in model.hashes:
        raise ValueError(
            f"{memory.name} was trained for weights {memory.policy.evictor.base_hash}, "
            f"{model.name} has {model.weights_hash}; load an evictor of this model."
        )
    config = {k: v for k, v in model.weights.config.to_diff_dict().items() if k[0] != "_"}
    reads = [model.weights_hash, json.dumps(config, sort_keys=True, default=str)]
    reads += [model.tokenizer.chat_template, sorted(model.stop_ids)]
    runs = [str(model.dtype), model.device.type, torch.__version__, transformers.__version__]
    runs.append(decode.DECODE_VERSION)
    base = [*reads, *runs, asdict(sampling), memory.key, batch_size]
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


def groups(model: Model, jobs: list[Job], tokens: int, most: int) -> list[list[Job]]:
    """Split jobs into the groups that are decoded and stored together.

    A group has `most` jobs, or on a CPU as many, with `tokens` new tokens each, as take about half
    a minute, but at least FEWEST. The split never depends on the content of the store.
    """
    room = WORK / model.weights.num_parameters() if model.device.type == "cpu" else math.inf
    split, cost = [], 0.0
    for i, job in enumerate(jobs):
        again = i and job.prompt is jobs[i - 1].prompt  # one prefill for all of its samples
        added = tokens if again else tokens + READ * len(decode.tokenize(model, job.prompt))
        size = len(split[-1]) if split else most
        if size == most or (size >= FEWEST and cost + added > room):
            split.append([])
            cost = 0.0
        split[-1].append(job)
        cost += added
    return split


def evaluate(
    model: Model,
    prompts: list[Prompt],
    sampling: Sampling,
    store: Store,
    samples: int = 1,
    batch_size: int = 64,
    group_size: int = 256,
    report: Callable[[str], None] = print,
    memory: Memory = Memory(),  # noqa: B008 (frozen)
) -> pandas.DataFrame:
    """Records of all samples of all prompts; computes only those that `store` lacks, in groups of
    at most `group_size`."""
    jobs = plan(model, prompts, sampling, samples, batch_size, memory)
    stored = store.keys(job.key for job in jobs)
    todo = sum(job.key not in stored for job in jobs)
    report(f"{len(jobs)} samples, {len(jobs) - todo} already stored")
    started, finished = time.perf_counter(), 0
    for whole in groups(model, jobs, sampling.max_new_tokens, group_size) if todo else ():
        group = [job for job in whole if job.key not in stored]
        if not group:
            continue
        store.append(_complete(model, group, sampling, batch_size, store, memory))
        finished += len(group)
        took = time.perf_counter() - started
        left = took / finished * (todo - finished)
        report(f"{finished}/{todo} samples, {took:.0f} s, {left:.0f} s left")
    return store.table({job.key for job in jobs})


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


def _complete(
    model: Model, group: list[Job], sampling, batch_size, store: Store, memory: Memory
) -> list[Record]:
    """Decode and grade one group; text stored under another grader version is only graded."""
    old = store.generated({job.generation_key for job in group})
    generations = {row.generation_key: row for row in old.itertuples()}
    fresh = [job for job in group if job.generation_key not in generations]
    new = generate(model, fresh, sampling, batch_size, memory) if fresh else []
    generations.update((job.generation_key, g) for job, g in zip(fresh, new))
    ordered = [generations[job.generation_key] for job in group]
    problems = [job.prompt.problem for job in group]
    golds, asks = [p.answer for p in problems], [p.asks for p in problems]
    grades = grader.grade_many([g.text for g in ordered], golds, FORM, asks)
    rows = zip(group, ordered, grades)
    return [record(model, job, sampling, memory.name, g, v) for job, g, v in rows]


def generate(
    model: Model, jobs: list[Job], sampling, batch_size: int, memory: Memory, forcing=NO_FORCING
) -> list[Generation]:
    """Generations of `model` with `memory`, one for each of `jobs`."""
    questions = [job.prompt.problem.question for job in jobs]
    paths = memory.bank.paths(questions) if memory.bank else [()] * len(jobs)
    requests = [
        decode.Request(decode.tokenize(model, job.prompt), job.prompt.problem.id, job.sample, path)
        for job, path in zip(jobs, paths)
    ]
    how = dict(policy=memory.policy, quantized=memory.quantized, bank=memory.bank)
    return decode.decode(model, requests, sampling, batch_size, forcing=forcing, **how)


def record(model: Model, job: Job, sampling, policy: str, generation: Generation, verdict):
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
