"""The generation loop: turns Requests into Generations by continuous batching.

All sequences of a step are packed into one row of tokens, without padding. When a sequence ends,
the next request takes its place before the next step. Tokens depend on the weights, the request,
its seed, and on which requests are decoded together (the shape of a batch changes low bits), so
callers split a job into fixed groups and pass one group at a time to `decode`.

A bank of weights is any object with `fetch(path)`, which returns one block per level, [layers,
units, row]; `prefetch(path)`, which starts reading them; and `widened(weights, batch_size)`, which
returns an object with `put(place, blocks)` for the sequence at one place of the batch and a context
manager `attached()`, inside which the model computes with these blocks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy
import torch

from kit.inference import energy, prefix_sharing
from kit.inference.budget_forcing import NO_FORCING, BudgetForcing
from kit.inference.kv_cache import Saved, SlotCache
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import Full
from kit.inference.sampling import sample_tokens, seeded_uniforms
from kit.models.load import Model
from kit.schema import Generation, Prompt, Sampling

# Part of every record's key. Raise it by one when tokens, or their cost, may differ from before for
# the same weights and request: records that were stored under another version are decoded again.
DECODE_VERSION = 2


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and the identity that its random numbers derive from."""

    prompt_ids: tuple[int, ...]
    problem_id: str = ""
    sample: int = 0
    path: tuple[int, ...] = ()  # of the blocks that it fetches from a bank


def tokenize(model: Model, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of chat messages by the model's own template, with the generation prompt."""
    how = dict(add_generation_prompt=True, return_dict=False, enable_thinking=prompt.thinking)
    return tuple(model.tokenizer.apply_chat_template(prompt.chat, **how))


@dataclass
class _Running:
    """One sequence in flight."""

    index: int  # of its request
    request: Request
    uniform: numpy.ndarray
    started: float
    limit: int  # of new tokens
    waits: int = 0  # stops that will still be replaced
    budget: int | None = None  # new tokens after which it was asked for its answer
    forced_ids: list[int] = field(default_factory=list)  # its next tokens, whatever is sampled
    new_ids: list[int] = field(default_factory=list)
    reads: float = 0.0
    peak: float = 0.0


@dataclass
class _Reuse:
    """The last prompt and the last shared prefix, kept for the requests that follow."""

    prefixes: dict[tuple[int, ...], int]  # prompt -> length of the prefix it shares with others
    prompt: tuple | None = None  # its ids, its copy of the cache, its logits
    prefix: tuple[int, ...] = ()
    rows: list | None = None  # keys and values of the prefix, per layer


@contextmanager
def slots_attached(model: Model) -> Iterator[None]:
    """Inside this block the model's attention goes through the slot cache."""
    before = model.weights.config._attn_implementation
    model.weights.set_attn_implementation("kit_slots")
    if model.weights.config._attn_implementation != "kit_slots":  # transformers only warns
        raise ValueError(
            f"{type(model.weights).__name__} has an attention of its own that the slot cache "
            f"cannot replace; choose another model."
        )
    try:
        yield
    finally:
        model.weights.set_attn_implementation(before)


@torch.inference_mode()
def decode(
    model: Model,
    requests: list[Request],
    sampling: Sampling,
    batch_size: int = 64,
    policy: Full = Full(),  # noqa: B008 (frozen)
    quantized: Quantized | None = None,
    bank: object | None = None,
    forcing: BudgetForcing = NO_FORCING,
) -> list[Generation]:
    """Continue every request; results in the order of `requests`.

    `batch_size` sequences run at once, on a KV cache with eviction `policy` and storage as in
    `quantized`; each sequence is widened by the blocks that its path fetches from `bank`. The
    answers that `forcing` asks for are in `forced` of each Generation. Raises ValueError for a
    request that does not fit the model's context.
    """
    _check(model, requests, sampling, forcing)
    done: dict[tuple[int, int | None], Generation] = {}  # (request, budget)
    prompts = [request.prompt_ids for request in requests]
    waiting = [(i, requests[i]) for i in prefix_sharing.queue(prompts)]
    cache = SlotCache(model.weights, batch_size, policy, quantized=quantized)
    running: dict[int, _Running] = {}  # place in the cache -> sequence
    asked: list[tuple[_Running, Saved]] = []  # copies to be continued by their answers
    joules = energy.joules()
    reuse = _Reuse(prefix_sharing.prefixes(prompts) if cache.shares_prefixes and not bank else {})
    wider = bank.widened(model.weights, batch_size) if bank else None
    memory = wider.attached() if bank else nullcontext()
    with slots_attached(model), policy.attached(model.weights), memory, _no_autocast(model):
        while waiting or running or asked:
            free = [place for place in range(batch_size) if place not in running]
            for place, (sequence, saved) in zip(free, asked):
                cache.restore([place], _length(sequence), saved)
                running[place] = sequence
            taken = min(len(free), len(asked))
            asked, places = asked[taken:], free[taken:][: len(waiting)]
            for place in places:
                i, request = waiting.pop()
                running[place] = _start(i, request, sampling, forcing)
            if bank:
                for place in free[: taken + len(places)]:
                    wider.put(place, bank.fetch(running[place].request.path))
                if places and waiting:
                    bank.prefetch(waiting[-1][1].path)
            if places:
                after = waiting[-1][1].prompt_ids if waiting else None
                logits = _admit(model, cache, running, places, reuse, after)
            else:
                places = sorted(running)
                logits = _step(model, cache, places, [running[p].new_ids[-1] for p in places])
            asked += _advance(model, cache, running, places, logits, sampling, forcing, done)
    done = _with_joules(done, energy.consumed(joules, energy.joules()))
    return [
        replace(done[i, None], forced=tuple(done.get((i, budget)) for budget in forcing.budgets))
        for i in range(len(requests))
    ]


def _no_autocast(model: Model):
    """Inside this block the model computes in the dtype of its weights."""
    return torch.autocast(model.device.type, enabled=False)


def _with_joules(done: dict, joules: float | None) -> dict:
    """Each Generation with its tokens' share of the energy that all decoded tokens drew."""
    if not joules:
        return done
    each = joules / sum(g.new_tokens - (budget or 0) for (_, budget), g in done.items())
    return {key: replace(g, joules=each * g.new_tokens) for key, g in done.items()}


def _check(model: Model, requests: list[Request], sampling: Sampling, forcing) -> None:
    forcing.check(sampling.max_new_tokens)
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}; ask for at least one.")
    limit, paths = model.weights.config.get_text_config().max_position_embeddings, {}
    for request in requests:
        if paths.setdefault(request.prompt_ids, request.path) != request.path:
            raise ValueError(
                f"Problem {request.problem_id!r} repeats a prompt with another path; "
                f"decode them apart."
            )
        need = len(request.prompt_ids) + sampling.max_new_tokens + forcing.extra_tokens
        if not request.prompt_ids:
            raise ValueError(f"Problem {request.problem_id!r} has an empty prompt.")
        if need > limit:
            raise ValueError(
                f"Problem {request.problem_id!r} needs {need} tokens (prompt and "
                f"{sampling.max_new_tokens} new), the model reads {limit}; lower max_new_tokens."
            )


def _forward(model: Model, cache: SlotCache, ids, positions, keep) -> torch.Tensor:
    """Logits of the packed tokens that `keep` selects, in float32: [kept, V]."""
    tokens = torch.tensor([ids], device=model.device)
    out = model.weights(
        input_ids=tokens,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        slots=cache,
    )
    return out.logits[0].float()


def _admit(model: Model, cache: SlotCache, running, places, reuse: _Reuse, after) -> torch.Tensor:
    """Read the prompts of the sequences now in `places`: logits [N, V].

    A prompt that equals the previous one, which `reuse` holds, is not read again. `after` are the
    ids of the next waiting prompt, for which `reuse` keeps the last prompt of this call.
    """
    groups: list[tuple[tuple[int, ...], list[int]]] = []
    for place in places:
        ids = running[place].request.prompt_ids
        if not groups or groups[-1][0] != ids:
            groups.append((ids, []))
        groups[-1][1].append(place)
    rows = []
    if reuse.prompt and reuse.prompt[0] == groups[0][0]:
        cache.restore(groups[0][1], len(groups[0][0]), reuse.prompt[1])
        rows = [reuse.prompt[2]]
    for prefix, pack in prefix_sharing.packs(groups[len(rows) :], reuse.prefixes):
        if prefix and prefix != reuse.prefix:
            place = pack[0][1][0]
            _forward(model, cache, prefix, cache.prefill([[place]], [len(prefix)]), 1)
            reuse.prefix, reuse.rows = prefix, cache.read_prefix(place)
            cache.release([place])
        lengths = [len(ids) for ids, _ in pack]
        known = reuse.rows if prefix else None
        positions = cache.prefill([group for _, group in pack], lengths, known)
        fresh = [length - len(prefix) for length in lengths]
        last = torch.tensor(fresh, device=model.device).cumsum(0) - 1
        packed = [token for ids, _ in pack for token in ids[len(prefix) :]]
        rows += _forward(model, cache, packed, positions, last).unbind()
    ids, group = groups[-1]
    reuse.prompt = (ids, cache.read(group[0]), rows[-1]) if ids == after else None
    repeats = torch.tensor([len(group) for _, group in groups], device=model.device)
    return torch.stack(rows).repeat_interleave(repeats, 0)


def _step(model: Model, cache: SlotCache, places: list[int], last_ids: list[int]):
    """Feed the last token of each sequence: logits [N, V]."""
    return _forward(model, cache, last_ids, cache.step(places), 0)


def _start(index: int, request: Request, sampling: Sampling, forcing) -> _Running:
    limit, seed = sampling.max_new_tokens, sampling.seed
    steps = limit + forcing.extra_tokens
    uniform = seeded_uniforms(request.problem_id, request.sample, seed, steps)
    return _Running(index, request, uniform, time.perf_counter(), limit, forcing.max_waits)


def _length(sequence: _Running) -> int:
    """Number of tokens in the cache: all but the last."""
    return len(sequence.request.prompt_ids) + len(sequence.new_ids) - 1


def _advance(model, cache, running, places, logits, sampling: Sampling, forcing, done):
    """Sample a token for each of `places`, count its reads, and finish sequences that have ended;
    returns those that reached a budget, to be asked for their answers, with copies of the cache."""
    steps = [running[p].uniform[len(running[p].new_ids)] for p in places]
    tokens = sample_tokens(logits, sampling, torch.tensor(steps, device=logits.device)).tolist()
    attended, live = cache.attended.tolist(), cache.live_tokens().tolist()
    ended, asked = [], []
    for place, token in zip(places, tokens):
        sequence = running[place]
        stopped = token in model.stop_ids and not sequence.forced_ids
        if stopped and sequence.waits and len(sequence.new_ids) < forcing.budgets[-1]:
            stopped, sequence.forced_ids = False, [*forcing.wait_tokens]
            sequence.waits -= 1
        sequence.new_ids.append(sequence.forced_ids.pop(0) if sequence.forced_ids else token)
        sequence.reads += attended[place]
        sequence.peak = max(sequence.peak, live[place])
        count = len(sequence.new_ids)
        if count in forcing.budgets and not stopped and sequence.budget is None:
            ids, prompt, limit = [*sequence.new_ids], [*forcing.answer_prompt], forcing.extra_tokens
            answering = dict(budget=count, forced_ids=prompt, limit=count + limit, waits=0)
            asked.append((replace(sequence, new_ids=ids, **answering), cache.read(place)))
        if stopped or count == sequence.limit:
            done[sequence.index, sequence.budget] = _finish(model, cache, sequence, stopped)
            ended.append(place)
    for place in ended:
        del running[place]
    if ended:
        cache.release(ended)
    return asked


def _finish(model: Model, cache: SlotCache, sequence: _Running, stopped: bool) -> Generation:
    ids = sequence.new_ids[:-1] if stopped else sequence.new_ids
    text = model.tokenizer.decode(ids, skip_special_tokens=True) if model.tokenizer else ""
    return Generation(
        text=text,
        token_ids=tuple(ids),
        prompt_tokens=len(sequence.request.prompt_ids),
        new_tokens=len(sequence.new_ids),
        finish="stop" if stopped else "length",
        seconds=time.perf_counter() - sequence.started,
        kv_reads_tokens=sequence.reads,
        kv_peak_tokens=sequence.peak,
        kv_peak_bytes=round(sequence.peak * cache.token_bytes),
        stop_id=sequence.new_ids[-1] if stopped else None,
    )
