"""The one generation loop: requests in, Generations out, with continuous refill.

All sequences of a step stand packed in one row of tokens, without padding; a sequence that
ends gives its place to the next request before the next step. Tokens depend on the weights,
the request, its seed, and on which requests are decoded together (batch shape changes low
bits), so callers cut a job into fixed groups and give one group at a time to `decode`.

A bank of weights is any object with `fetch(path)`, which gives one block per level, [layers, units,
row]; `prefetch(path)`, which starts to read them; and `widened(weights, batch_size)`, which gives
an object with `put(place, blocks)` for the sequence at one place of the batch and a context manager
`attached()`, inside which the model computes with what was put.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy
import torch

from kit.inference import energy, prefix_sharing
from kit.inference.budget_forcing import NEVER, Forcing
from kit.inference.kv_cache import Saved, SlotCache
from kit.inference.kv_quantization import Quantised
from kit.inference.policies import Full
from kit.inference.sampling import draw, uniforms
from kit.models.load import Model
from kit.schema import Generation, Prompt, Sampling

# Part of every record's key. Raise it by one when tokens, or what they cost, may differ from those
# of before for the same weights and request: records stored under another one are decoded anew.
DECODE_VERSION = 1


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and what its randomness derives from."""

    prompt_ids: tuple[int, ...]
    problem_id: str = ""
    sample: int = 0
    path: tuple[int, ...] = ()  # of what it fetches from a bank


def tokenise(model: Model, prompt: Prompt) -> tuple[int, ...]:
    """Chat messages to token ids by the model's own template, ready to be answered."""
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    ids = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, enable_thinking=prompt.thinking
    )
    return tuple(ids)


@dataclass
class _Running:
    """One sequence in flight."""

    index: int  # of its request
    request: Request
    uniform: numpy.ndarray
    started: float
    limit: int  # of new tokens
    waits: int = 0  # stops that are still to be replaced
    cut: int | None = None  # where it was asked for an answer
    said: list[int] = field(default_factory=list)  # to be its next tokens, whatever is drawn
    new_ids: list[int] = field(default_factory=list)
    reads: float = 0.0
    peak: float = 0.0


@dataclass
class _Read:
    """What has been read and will be needed again."""

    prefixes: dict[tuple[int, ...], int]  # prompt -> tokens of it that its neighbours share
    prompt: tuple | None = None  # ids, their keys and values, their logits
    prefix: tuple[int, ...] = ()
    rows: list | None = None  # keys and values of the prefix, per layer


@contextmanager
def slots_attached(model: Model) -> Iterator[None]:
    """The model's attention goes through the slot cache inside this block."""
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
    on_done: Callable[[int, int], None] | None = None,
    policy: Full = Full(),  # noqa: B008 (frozen)
    quantised: Quantised | None = None,
    bank: object | None = None,
    forcing: Forcing = NEVER,
) -> list[Generation]:
    """Continue every request; results in the order of `requests`.

    `batch_size` sequences run at once, on a KV cache that forgets by `policy` and stores as
    `quantised` says, each wider by what its path fetches from `bank`. `on_done(finished,
    new_tokens)` is called as sequences end. What `forcing` asks for stands in `forced` of each
    Generation. Raises ValueError for a request that does not fit the model's context.
    """
    _check(model, requests, sampling, forcing)
    done: dict[tuple[int, int | None], Generation] = {}  # (request, cut)
    prompts = [request.prompt_ids for request in requests]
    waiting = [(i, requests[i]) for i in prefix_sharing.queue(prompts)]
    cache = SlotCache(model.weights, batch_size, policy, quantised=quantised)
    running: dict[int, _Running] = {}  # place in the cache -> sequence
    cut: list[tuple[_Running, Saved]] = []  # to be asked for an answer
    counted = energy.joules()
    read = _Read(prefix_sharing.prefixes(prompts) if cache.shares_prefixes and not bank else {})
    wider = bank.widened(model.weights, batch_size) if bank else None
    memory = wider.attached() if bank else nullcontext()
    with slots_attached(model), policy.attached(model.weights), memory, _unmixed(model):
        while waiting or running or cut:
            free = [place for place in range(batch_size) if place not in running]
            for place, (sequence, saved) in zip(free, cut):
                cache.restore([place], _length(sequence), saved)
                running[place] = sequence
            taken = min(len(free), len(cut))
            cut, places = cut[taken:], free[taken:][: len(waiting)]
            for place in places:
                i, request = waiting.pop()
                running[place] = _begun(i, request, sampling, forcing)
            if bank:
                for place in free[: taken + len(places)]:
                    wider.put(place, bank.fetch(running[place].request.path))
                if places and waiting:
                    bank.prefetch(waiting[-1][1].path)
            if places:
                after = waiting[-1][1].prompt_ids if waiting else None
                logits = _admit(model, cache, running, places, read, after)
            else:
                places = sorted(running)
                logits = _step(model, cache, places, [running[p].new_ids[-1] for p in places])
            cut += _advance(model, cache, running, places, logits, sampling, forcing, done)
            if on_done and len(running) < batch_size:
                finished = [g for (_, at), g in done.items() if at is None]
                on_done(len(finished), sum(g.new_tokens for g in finished))
    done = _charged(done, energy.drawn(counted, energy.joules()))
    return [
        replace(done[i, None], forced=tuple(done.get((i, at)) for at in forcing.cuts))
        for i in range(len(requests))
    ]


def _unmixed(model: Model):
    """No autocast inside this block: the dtype of the weights says what is computed in."""
    return torch.autocast(model.device.type, enabled=False)


def _charged(done: dict, drawn: float | None) -> dict:
    """Each Generation with its tokens' share of the joules that all decoded tokens drew."""
    if not drawn:
        return done
    each = drawn / sum(g.new_tokens - (cut or 0) for (_, cut), g in done.items())
    return {key: replace(g, joules=each * g.new_tokens) for key, g in done.items()}


def _check(model: Model, requests: list[Request], sampling: Sampling, forcing: Forcing) -> None:
    forcing.check(sampling.max_new_tokens)
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}; ask for at least one.")
    limit, paths = model.weights.config.get_text_config().max_position_embeddings, {}
    for request in requests:
        if paths.setdefault(request.prompt_ids, request.path) != request.path:
            raise ValueError(
                f"Problem {request.problem_id!r} has a prompt that stands there with another path; "
                f"decode the two apart."
            )
        need = len(request.prompt_ids) + sampling.max_new_tokens + forcing.more
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


def _admit(model: Model, cache: SlotCache, running, places, read: _Read, after) -> torch.Tensor:
    """Read the prompts of the sequences now in `places`: logits [N, V].

    A prompt equal to the last one of before, which `read` holds, is not read again; `after` the
    ids of the next waiting prompt, for which the last one of now is held.
    """
    groups: list[tuple[tuple[int, ...], list[int]]] = []
    for place in places:
        ids = running[place].request.prompt_ids
        if not groups or groups[-1][0] != ids:
            groups.append((ids, []))
        groups[-1][1].append(place)
    rows = []
    if read.prompt and read.prompt[0] == groups[0][0]:
        cache.restore(groups[0][1], len(groups[0][0]), read.prompt[1])
        rows = [read.prompt[2]]
    for prefix, pack in prefix_sharing.packs(groups[len(rows) :], read.prefixes):
        if prefix and prefix != read.prefix:
            place = pack[0][1][0]
            _forward(model, cache, prefix, cache.prefill([[place]], [len(prefix)]), 1)
            read.prefix, read.rows = prefix, cache.read_prefix(place)
            cache.release([place])
        lengths = [len(ids) for ids, _ in pack]
        known = read.rows if prefix else None
        positions = cache.prefill([group for _, group in pack], lengths, known)
        fresh = [length - len(prefix) for length in lengths]
        last = torch.tensor(fresh, device=model.device).cumsum(0) - 1
        packed = [token for ids, _ in pack for token in ids[len(prefix) :]]
        rows += _forward(model, cache, packed, positions, last).unbind()
    ids, group = groups[-1]
    read.prompt = (ids, cache.read(group[0]), rows[-1]) if ids == after else None
    repeats = torch.tensor([len(group) for _, group in groups], device=model.device)
    return torch.stack(rows).repeat_interleave(repeats, 0)


def _step(model: Model, cache: SlotCache, places: list[int], last_ids: list[int]):
    """Feed the last token of each sequence: logits [N, V]."""
    return _forward(model, cache, last_ids, cache.step(places), 0)


def _begun(index: int, request: Request, sampling: Sampling, forcing: Forcing) -> _Running:
    limit, seed = sampling.max_new_tokens, sampling.seed
    drawn = uniforms(request.problem_id, request.sample, seed, limit + forcing.more)
    return _Running(index, request, drawn, time.perf_counter(), limit, forcing.waits)


def _length(sequence: _Running) -> int:
    """Tokens of it that have been read: all but the last."""
    return len(sequence.request.prompt_ids) + len(sequence.new_ids) - 1


def _advance(model, cache, running, places, logits, sampling: Sampling, forcing: Forcing, done):
    """Draw a token for each of `places`, count its reads, and finish what has ended; what is to be
    asked for an answer, with its copy of the cache."""
    steps = [running[p].uniform[len(running[p].new_ids)] for p in places]
    tokens = draw(logits, sampling, torch.tensor(steps, device=logits.device)).tolist()
    attended, live = cache.attended.tolist(), cache.live_tokens().tolist()
    ended, cut = [], []
    for place, token in zip(places, tokens):
        sequence = running[place]
        stopped = token in model.stop_ids and not sequence.said
        if stopped and sequence.waits and len(sequence.new_ids) < forcing.cuts[-1]:
            stopped, sequence.said, sequence.waits = False, [*forcing.wait], sequence.waits - 1
        sequence.new_ids.append(sequence.said.pop(0) if sequence.said else token)
        sequence.reads += attended[place]
        sequence.peak = max(sequence.peak, live[place])
        count = len(sequence.new_ids)
        if count in forcing.cuts and not stopped and sequence.cut is None:
            ids, ask = [*sequence.new_ids], [*forcing.ask]
            asked = replace(
                sequence, cut=count, said=ask, new_ids=ids, limit=count + forcing.more, waits=0
            )
            cut.append((asked, cache.read(place)))
        if stopped or count == sequence.limit:
            done[sequence.index, sequence.cut] = _finish(model, cache, sequence, stopped)
            ended.append(place)
    for place in ended:
        del running[place]
    if ended:
        cache.release(ended)
    return cut


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
    )
