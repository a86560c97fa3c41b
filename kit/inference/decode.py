"""The generation loop: turns Requests into Generations by continuous batching.

All sequences of a step are packed into one row of tokens. When a sequence ends, the next request
takes its place before the next step, so a job is one queue, and `decode` hands over each Generation
as it ends. Tokens depend on the weights, the request and its seed alone, whatever stands beside
them: the rows of a forward pass are padded to numbers of rows at which each row comes out in the
same bits (ROWS), prompts and shared beginnings are read in whole ROWS too, and sums over the tokens
of a sequence have an order that the other sequences do not change.

A bank of weights is any object with `fetch(path)`, which returns one block per level, [layers,
units, row]; `prefetch(path)`, which starts reading them; and `widened(weights, batch_size)`, which
returns an object with `put(place, blocks)` for the sequence at one place of the batch and a context
manager `attached()`, inside which the model computes with these blocks.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy
import torch
import torch.nn.functional as F

from kit.inference import energy, packed_weights, prefix_sharing
from kit.inference.budget_forcing import NO_FORCING, BudgetForcing
from kit.inference.cuda_graphs import StepGraphs
from kit.inference.fused_layers import fused
from kit.inference.kv_cache import SlotCache, forward
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import Full
from kit.inference.sampling import sample_tokens, seeded_uniforms
from kit.models.load import Model
from kit.schema import Generation, Prompt, Sampling

# Part of every record's key. Raise it by one when tokens, or their cost, may differ from before for
# the same weights and request: records that were stored under another version are decoded again.
DECODE_VERSION = 3
CUDA_VERSION = 2  # the same of what is decoded on a GPU, whose kernels change apart

# Rows of a step, and of a pack of prompts: multiples of these. On a CPU a product of matrices takes
# other kernels for fewer than 4 rows and the same ones for all multiples of 8, see LOG.md; on CUDA
# kernels are chosen by the number of rows, so that there is one number of each.
STEP_ROWS, PACK_ROWS = {"cpu": prefix_sharing.ROWS, "cuda": 256}, {"cpu": 4096, "cuda": 1024}


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
    budget: int | None = None  # new tokens after which its answer was forced
    forced_ids: list[int] = field(default_factory=list)  # its next tokens, whatever is sampled
    new_ids: list[int] = field(default_factory=list)
    reads: float = 0.0
    peak: float = 0.0
    parent: "_Running | None" = None  # the sequence that this one interrupts for an answer
    answers: dict[int, Generation] = field(default_factory=dict)  # by budget
    whole: Generation | None = None  # once it has ended


@dataclass
class _Reuse:
    """The last prompt and the last shared prefix, kept for the requests that follow."""

    prefixes: dict[tuple[int, ...], int]  # prompt -> length of the prefix it shares with others
    prompt: tuple | None = None  # its ids, its copy of the cache, its logits
    prefix: tuple[int, ...] = ()
    rows: list | None = None  # keys and values of the prefix, per layer


def versions(model: Model) -> list[int | str]:
    """The part of record keys that identifies the decoding code: DECODE_VERSION, on a GPU
    CUDA_VERSION too, and whether packed weights give a model's products other bits."""
    if model.device.type == "cuda":
        return [DECODE_VERSION, CUDA_VERSION]
    return [DECODE_VERSION, *["packed"] * packed_weights.changes_bits(model.weights)]


@contextmanager
def slots_attached(model: Model, packed: dict | None = None) -> Iterator[None]:
    """Inside this block the model's attention goes through the slot cache, its linear layers
    multiply by what `packed_weights.pack` returned, and on a GPU its layers are few kernels."""
    before = model.weights.config._attn_implementation
    model.weights.set_attn_implementation("kit_slots")
    if model.weights.config._attn_implementation != "kit_slots":  # transformers only warns
        raise ValueError(
            f"{type(model.weights).__name__} has an attention of its own that the slot cache "
            f"cannot replace; choose another model."
        )
    try:
        with fused(model.weights), packed_weights.multiplying(packed or {}):
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
    ended: Callable[[int, Generation], None] = lambda index, generation: None,
) -> list[Generation]:
    """Continue every request; results in the order of `requests`.

    At most `batch_size` sequences run at once, on a KV cache with eviction `policy` and storage as
    in `quantized`; each sequence is widened by the blocks that its path fetches from `bank`. The
    answers that `forcing` asks for are in `forced` of each Generation. `ended` gets the index of
    each request and its Generation as soon as it is whole. Raises ValueError for a request that
    does not fit the model's context.
    """
    _check(model, requests, sampling, forcing)
    if model.device.type == "cuda":
        batch_size = min(batch_size, STEP_ROWS["cuda"])
    results: dict[int, Generation] = {}
    prompts = [request.prompt_ids for request in requests]
    waiting = [(i, requests[i]) for i in prefix_sharing.queue(prompts)]
    extra = sampling.max_new_tokens + forcing.extra_tokens
    tokens = max(map(len, prompts), default=0) + extra
    packed = packed_weights.pack(model.weights)  # before the cache takes what memory is left
    cache = SlotCache(model.weights, batch_size, policy, quantized=quantized, tokens=tokens)
    running: dict[int, _Running] = {}  # place in the cache -> sequence, the oldest first
    # Other numbers of rows of CUDA's attention have other bits, so that nothing is shared there.
    shares = cache.shares_prefixes and not bank and model.device.type == "cpu"
    reuse = _Reuse(prefix_sharing.prefixes(prompts) if shares else {})
    meter = _EnergyMeter(energy.joules())
    wider = bank.widened(model.weights, batch_size) if bank else None
    memory = wider.attached() if bank else nullcontext()
    graphs = None if bank else StepGraphs(model, cache, STEP_ROWS[model.device.type])
    with slots_attached(model, packed), policy.attached(model.weights), memory, _no_autocast(model):
        while waiting or running:
            fresh = _enter(cache, waiting, running, batch_size, sampling, forcing)
            for place in fresh if bank else ():
                wider.put(place, bank.fetch(running[place].request.path))
            if bank and fresh and waiting:
                bank.prefetch(waiting[-1][1].path)
            places = fresh or sorted(running)
            uniform = _uniform(model, running, places)
            if fresh:
                after = waiting[-1][1].prompt_ids if waiting else None
                logits = _admit(model, cache, running, places, reuse, after)
            else:
                by_graph = graphs and cache.steps_without_sync
                step = graphs.step if by_graph else partial(_step, model, cache)
                logits = step(places, [running[place].new_ids[-1] for place in places])
            meter.tokens += len(places)
            output = sample_tokens(logits, sampling, uniform, cache.counters())
            for one in _advance(model, cache, running, places, *output, forcing, meter):
                forced = tuple(one.answers.get(budget) for budget in forcing.budgets)
                results[one.index] = replace(one.whole, forced=forced)
                ended(one.index, results[one.index])
    return [results[i] for i in range(len(requests))]


def _enter(
    cache: SlotCache,
    waiting: list[tuple[int, Request]],
    running: dict[int, _Running],
    size: int,
    sampling: Sampling,
    forcing: BudgetForcing,
) -> list[int]:
    """Move requests from `waiting` to `running` while their caches fit; their places, of `size`.

    Where blocks run short, the youngest goes back first: it will say the same once more.
    """
    while len(running) > 1 and not cache.fits([], [*running]):
        place, youngest = running.popitem()
        cache.release([place])
        waiting.append((youngest.index, youngest.request))
    older, places, lengths = [*running], [], []
    for place in (place for place in range(size) if place not in running):
        lengths += [len(waiting[-1][1].prompt_ids)] if waiting else []
        if not waiting or running and not cache.fits(lengths, older):
            break
        i, request = waiting.pop()
        running[place] = _start(i, request, sampling, forcing)
        places.append(place)
    return places


def _no_autocast(model: Model):
    """Inside this block the model computes in the dtype of its weights."""
    return torch.autocast(model.device.type, enabled=False)


@dataclass
class _EnergyMeter:
    """Energy that all sequences took since the counters read `before`, and their tokens."""

    before: float | None
    tokens: int = 0

    def share(self, tokens: int) -> float:
        """Joules of so many tokens, each at the mean so far; 0 without counters."""
        joules = energy.consumed(self.before, energy.joules()) if self.before else None
        return (joules or 0.0) / self.tokens * tokens


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


def _forward(model: Model, cache: SlotCache, ids, positions, rows: int, last=None) -> torch.Tensor:
    """Logits of the packed tokens, or of those at `last` [N], in float32: [N, V].

    The tokens are padded to a multiple of `rows`, what is kept of them to one of STEP_ROWS.
    """
    tokens = torch.tensor([[*ids, *[0] * (-len(ids) % rows)]], device=model.device)
    count, keep = len(ids), 0
    if last is not None:
        count = len(last)
        keep = F.pad(last, (0, -count % STEP_ROWS[model.device.type]))
    return forward(model.weights, cache, tokens, positions, keep)[:count].float()


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
    most, start = PACK_ROWS[model.device.type], torch.zeros(1, dtype=int, device=model.device)
    least = prefix_sharing.ROWS if model.device.type == "cpu" else most
    for prefix, pack in prefix_sharing.packs(groups[len(rows) :], reuse.prefixes, most):
        if prefix and prefix != reuse.prefix:
            place = pack[0][1][0]
            _forward(model, cache, prefix, cache.prefill([[place]], [len(prefix)]), least, start)
            reuse.prefix, reuse.rows = prefix, cache.read_prefix(place)
            cache.release([place])
        lengths, packed, last = [len(ids) for ids, _ in pack], [], []
        prefix_rows = reuse.rows if prefix else None
        samples = [group for _, group in pack]
        positions = cache.prefill(samples, lengths, prefix_rows, prefix_sharing.ROWS)
        for ids, _ in pack:
            fresh = ids[len(prefix) :]
            last.append(len(packed) + len(fresh) - 1)
            packed += [*fresh, *[0] * (-len(fresh) % prefix_sharing.ROWS)]
        last = torch.tensor(last, device=model.device)
        rows += _forward(model, cache, packed, positions, least, last).unbind()
    ids, group = groups[-1]
    reuse.prompt = (ids, cache.read(group[0]), rows[-1]) if ids == after else None
    repeats = torch.tensor([len(group) for _, group in groups], device=model.device)
    return torch.stack(rows).repeat_interleave(repeats, 0)


def _step(model: Model, cache: SlotCache, places: list[int], last_ids: list[int]):
    """Feed the last token of each sequence: logits [N, V]."""
    return _forward(model, cache, last_ids, cache.step(places), STEP_ROWS[model.device.type])


def _start(index: int, request: Request, sampling: Sampling, forcing) -> _Running:
    limit, seed = sampling.max_new_tokens, sampling.seed
    steps = limit + forcing.extra_tokens
    uniform = seeded_uniforms(request.problem_id, request.sample, seed, steps)
    return _Running(index, request, uniform, time.perf_counter(), limit, forcing.max_waits)


def _uniform(model: Model, running: dict[int, _Running], places: list[int]) -> torch.Tensor:
    """The numbers [N] of the next tokens. They go to the device before the pass whose logits they
    choose from, since a copy there waits for what the device is at."""
    steps = [running[place].uniform[len(running[place].new_ids)] for place in places]
    return torch.tensor(steps, device=model.device)


def _advance(model, cache, running, places, tokens: list[int], counters: list, forcing, meter):
    """Give each of `places` its token and count its reads by the cache's `counters`; returns the
    sequences that have ended with all of their answers.

    A sequence that reaches a budget answers in its own place, and then goes on as if it had not.
    """
    cache.load_counters(counters)
    attended, live = counters[: cache.capacity], counters[cache.capacity :]
    finished, free = [], []
    for place, token in zip(places, tokens):
        sequence = running[place]
        stopped = token in model.stop_ids and not sequence.forced_ids
        ends = stopped or token == forcing.end_of_thinking and not sequence.forced_ids
        if ends and sequence.waits and len(sequence.new_ids) < forcing.budgets[-1]:
            stopped, sequence.forced_ids = False, [*forcing.wait_tokens]
            sequence.waits -= 1
        sequence.new_ids.append(sequence.forced_ids.pop(0) if sequence.forced_ids else token)
        sequence.reads += attended[place]
        sequence.peak = max(sequence.peak, live[place])
        count, parent = len(sequence.new_ids), sequence.parent
        if stopped or count == sequence.limit:
            sequence.whole = _finish(model, cache, sequence, stopped, meter)
        if count in forcing.budgets and not stopped and not parent:
            if not sequence.whole:
                cache.start_undo_log(place)
            ids, forced_ids = [*sequence.new_ids], [*forcing.prompt(sequence.new_ids)]
            limit = count + len(forced_ids) + forcing.max_answer_tokens
            answer = dict(budget=count, limit=limit, new_ids=ids, waits=0, whole=None)
            running[place] = replace(sequence, parent=sequence, forced_ids=forced_ids, **answer)
        elif sequence.whole and parent:
            parent.answers[sequence.budget] = sequence.whole
            if parent.whole:
                finished.append(parent)
                free.append(place)
            else:
                cache.rewind(place)
                running[place] = parent
        elif sequence.whole:
            finished.append(sequence)
            free.append(place)
    for place in free:
        del running[place]
    if free:
        cache.release(free)
    return finished


def _finish(model: Model, cache: SlotCache, sequence: _Running, stopped: bool, meter: _EnergyMeter):
    ids = sequence.new_ids[:-1] if stopped else sequence.new_ids
    text = model.tokenizer.decode(ids, skip_special_tokens=True) if model.tokenizer else ""
    return Generation(
        joules=meter.share(len(sequence.new_ids)),
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
