"""Question answering: multiple choice by likelihood, short free answers, and perplexity of text.

A prompt is plain text: retrieved passages, then the question, a statement without its end. In
multiple choice the option with the largest log-probability is chosen; a short answer is the rest of
the line. Both become records like all others, graded by the one grader.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
import transformers

from kit.data.prompts import FORM
from kit.evaluation import evaluate, grader
from kit.evaluation.store import Store
from kit.inference import decode
from kit.inference.kv_cache import layer_windows
from kit.models.load import Model, check_head
from kit.parametric.bank import ParametricBank
from kit.schema import Problem, Record, Sampling, digest

PROBE_VERSION = 3  # of prompts and scores; raise it by one when an answer may change
BATCH = 16  # questions in a forward pass
COSTS = ("prompt_tokens", "new_tokens", "seconds", "finish")
COSTS += ("kv_reads_tokens", "kv_peak_tokens", "kv_peak_bytes", "joules")


def text(problem: Problem, passages: Sequence[str] = ()) -> str:
    """The prompt of a question."""
    return "\n".join([*passages, problem.question])


def multiple_choice(
    model: Model,
    problems: Sequence[Problem],
    options: Sequence[Sequence[str]],
    store: Store,
    arm: str,
    bank: ParametricBank | None = None,
    passages: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Records of `arm`: the most likely of each problem's options; stored ones are not computed
    again. `seed` is that of the training, recorded in place of a sampling seed."""
    prompts, keys, todo = _prepare(model, problems, store, arm, bank, passages, seed, options)
    todo.sort(key=lambda i: max(map(len, options[i])))  # less padding
    batch = 1 if _slides(model) else BATCH
    for first in range(0, len(todo), batch):
        part, started = todo[first : first + batch], time.perf_counter()
        with fetched(model, [problems[i].question for i in part], bank):
            scores = likelihoods(model, [prompts[i] for i in part], [options[i] for i in part])
        answers = [options[i][int(np.argmax(row))] for i, row in zip(part, scores)]
        cost = dict(new_tokens=0, seconds=(time.perf_counter() - started) / len(part))
        cost |= dict(finish="stop", kv_reads_tokens=0.0, kv_peak_bytes=0, joules=0.0)
        lengths = [len(_ids(model, prompts[i])) for i in part]
        costs = [cost | dict(prompt_tokens=n, kv_peak_tokens=float(n)) for n in lengths]
        items = [(problems[i], *keys[i]) for i in part]
        store.append(_records(model, items, arm, seed, answers, costs))
    return store.table({key for key, *_ in keys})


def short_answer(
    model: Model,
    problems: Sequence[Problem],
    store: Store,
    arm: str,
    bank: ParametricBank | None = None,
    passages: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
    max_new_tokens: int = 12,
) -> pd.DataFrame:
    """Records of `arm`: the first line of a greedy answer; all else as in `multiple_choice`."""
    free = [["free", max_new_tokens]] * len(problems)
    prompts, keys, todo = _prepare(model, problems, store, arm, bank, passages, seed, free)
    if todo:
        paths = bank.paths([problems[i].question for i in todo]) if bank else [()] * len(todo)
        requests = [
            decode.Request(tuple(_ids(model, prompts[i])), problems[i].id, 0, path)
            for i, path in zip(todo, paths)
        ]
        generations = decode.decode(model, requests, Sampling(max_new_tokens), bank=bank)
        answers = [(g.text.strip().splitlines() or [""])[0] for g in generations]
        costs = [{name: getattr(g, name) for name in COSTS} for g in generations]
        items = [(problems[i], *keys[i]) for i in todo]
        store.append(_records(model, items, arm, seed, answers, costs))
    return store.table({key for key, *_ in keys})


@torch.inference_mode()
def likelihoods(
    model: Model, prompts: Sequence[str], options: Sequence[Sequence[str]]
) -> np.ndarray:
    """Log-probability of each option, a space before it, after its prompt: [prompts, options]."""
    each = len(options[0])
    if len(prompts) > 1 and _slides(model):
        rows = [likelihoods(model, [p], [o]) for p, o in zip(prompts, options, strict=True)]
        return np.concatenate(rows)
    ids, mask = _padded([_ids(model, prompt) for prompt in prompts], model)
    out = model.weights.base_model(input_ids=ids, attention_mask=mask, use_cache=True)
    last = mask.sum(1) - 1
    state = out.last_hidden_state[torch.arange(len(ids)), last]  # [n, width]
    answers, spoken = _padded([_ids(model, f" {o}") for row in options for o in row], model)
    cache = out.past_key_values
    cache.batch_repeat_interleave(each)
    read = answers[:, : max(1, answers.shape[1] - 1)]  # nothing is asked of an option's last token
    whole = torch.cat([mask.repeat_interleave(each, 0), spoken[:, : read.shape[1]]], 1)
    start = (last + 1).repeat_interleave(each)[:, None]
    after = model.weights.base_model(
        input_ids=read,
        attention_mask=whole,
        position_ids=start + torch.arange(read.shape[1], device=start.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    states = torch.cat([state.repeat_interleave(each, 0)[:, None], after], 1)
    states = states[:, : answers.shape[1]]
    logits = _logits(model, states[spoken.bool()]).log_softmax(-1)
    scores = logits.new_zeros(answers.shape)
    scores[spoken.bool()] = logits.gather(1, answers[spoken.bool()][:, None])[:, 0]
    return scores.sum(1).view(len(prompts), each).cpu().numpy()


def _slides(model: Model) -> bool:
    """Whether a layer has a sliding window, out of which padding would push tokens of the text."""
    return any(layer_windows(model.weights.config.get_text_config()))


@torch.inference_mode()
def nll_per_token(
    model: Model,
    texts: Sequence[str],
    bank: ParametricBank | None = None,
    begins: Sequence[str] | None = None,
) -> np.ndarray:
    """Mean negative log-likelihood of each text in nats per token, its first token given. With
    `bank` each text fetches the blocks of its own path. With `begins`, the beginnings of the texts,
    it fetches those of its beginning, and only the tokens after that count."""
    nats, begins = [], begins or [""] * len(texts)
    for first in range(0, len(texts), BATCH):
        rows = slice(first, first + BATCH)
        part, given = texts[rows], begins[rows]
        ids, mask = _padded([_ids(model, one) for one in part], model)
        with fetched(model, [start or text for start, text in zip(given, part)], bank):
            states = model.weights.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        for row, spoken, state, start in zip(ids, mask.bool(), states, given):
            row, state, read = row[spoken], state[spoken], max(1, len(_ids(model, start)))
            logits = _logits(model, state[read - 1 : -1])
            nats.append(float(torch.nn.functional.cross_entropy(logits, row[read:])))
    return np.array(nats)


def _logits(model: Model, states: torch.Tensor) -> torch.Tensor:
    """[n, V] in at least float32: bfloat16 would round logits by up to a sixteenth, more than two
    options may differ by."""
    check_head(model.weights)
    precise = torch.promote_types(model.dtype, torch.float32)
    return states.to(precise) @ model.weights.lm_head.weight.to(precise).T


@contextmanager
def fetched(model: Model, questions: Sequence[str], bank: ParametricBank | None) -> Iterator[None]:
    """Within this context the model has the memory that a batch of these questions fetches."""
    if bank is None:
        yield
        return
    wider = bank.widened(model.weights, len(questions))
    for place, path in enumerate(bank.paths(questions)):
        wider.put(place, bank.fetch(path))
    with wider.attached():
        yield


def _ids(model: Model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def _padded(rows: Sequence[list[int]], model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded on the right: [n, T] each."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(model.device), mask.to(model.device)


def _prepare(model: Model, problems, store: Store, arm: str, bank, passages, seed: int, how):
    """Prompts, (key, generation key, prompt id) of each record, and which are not in the store."""
    passages = passages or [()] * len(problems)
    prompts = [text(p, read) for p, read in zip(problems, passages, strict=True)]
    keys = [
        _keyed(model, p, prompt, [bank.key if bank else "", seed, arm, *each])
        for p, prompt, each in zip(problems, prompts, how, strict=True)
    ]
    stored = evaluate.stored_keys(
        store, [(*of[:2], p) for of, p in zip(keys, problems, strict=True)]
    )
    return prompts, keys, [i for i, (key, *_) in enumerate(keys) if key not in stored]


def _keyed(model: Model, problem: Problem, prompt: str, how: list):
    """(key, generation key, prompt id) of one record."""
    runs = [model.weights_hash, str(model.dtype), model.device.type, torch.__version__]
    runs += [transformers.__version__, *decode.versions(model), PROBE_VERSION]
    tokens = digest([*runs, prompt, how])
    graded = [tokens, grader.GRADE_VERSION, problem.answer, problem.asks, FORM, problem.id]
    return digest(graded), tokens, digest(prompt)


def _records(
    model: Model, items, arm: str, seed: int, answers: list[str], costs: list[dict]
) -> list[Record]:
    answers = [f"Answer: {answer}" for answer in answers]
    golds, asks = zip(*((problem.answer, problem.asks) for problem, *_ in items))
    grades = grader.grade_many(answers, [*golds], FORM, asks)
    return [
        Record(
            key=key, generation_key=tokens, model=model.name, weights_hash=model.weights_hash,
            arm=arm, policy="full", source=problem.source, problem_id=problem.id,
            family=problem.family, level=problem.level, sample=0, seed=seed, temperature=0.0,
            question=problem.question, answer=problem.answer, prompt_id=prompt, text=answer,
            correct=verdict.correct, extracted=verdict.extracted, reason=verdict.reason,
            method=verdict.method, compliant=verdict.compliant, asks=problem.asks,
            dtype=model.dtype_name, grade_version=verdict.grade_version, **cost,
        )
        for (problem, key, tokens, prompt), answer, verdict, cost in zip(
            items, answers, grades, costs
        )
    ]  # fmt: skip
