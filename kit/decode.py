"""The one generation loop: requests in, Generations out, with continuous refill.

All sequences of a step stand packed in one row of tokens, without padding; a sequence that
ends gives its place to the next request before the next step. Tokens depend on the weights,
the request, its seed, and on which requests are decoded together (batch shape changes low
bits), so callers cut a job into fixed groups and give one group at a time to `decode`.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import torch

from kit import batching
from kit.kv import SlotCache
from kit.models import Model
from kit.policies import Full
from kit.quantise import Quantised
from kit.schema import Generation, Prompt, Sampling

HEAD = 256  # most likely tokens looked at before the whole vocabulary is sorted


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and what its randomness derives from."""

    prompt_ids: tuple[int, ...]
    problem_id: str = ""
    sample: int = 0


def tokenise(model: Model, prompt: Prompt) -> tuple[int, ...]:
    """Chat messages to token ids by the model's own template, ready to be answered."""
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    ids = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, enable_thinking=prompt.thinking
    )
    return tuple(ids)


def uniforms(request: Request, sampling: Sampling) -> numpy.ndarray:
    """One uniform number per step, from (problem, sample, run seed) alone: [max_new_tokens]."""
    text = f"{request.problem_id}\0{request.sample}\0{sampling.seed}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return numpy.random.Generator(numpy.random.Philox(key=key)).random(sampling.max_new_tokens)


def draw(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Next tokens [N] from logits [N, V]: temperature, then top-k, then top-p, then inverse CDF.

    `uniform` [N] in [0, 1) picks the token, most likely first; greedy ignores it.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    wide = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    top = logits.topk(min(wide, HEAD), sorted=True)
    if sampling.top_k and wide <= HEAD:
        total = top.values.logsumexp(-1, keepdim=True)
    elif sampling.top_k:
        total = logits.topk(wide).values.logsumexp(-1, keepdim=True)
    else:
        total = logits.logsumexp(-1, keepdim=True)
    mass = (top.values - total).double().exp().cumsum(-1)  # [N, <= HEAD]
    # Top-p keeps the shortest head whose mass reaches top_p, at least one token.
    kept = torch.where(mass >= sampling.top_p, mass, torch.inf).amin(-1)
    kept = torch.where(kept.isinf() & (mass.shape[-1] == wide), mass[:, -1], kept)
    short = kept.isinf()  # the head is not enough to know where top-p ends
    if sampling.top_p == 1.0:
        kept, short = torch.ones_like(kept), mass[:, -1] <= uniform
        short &= mass.shape[-1] < wide
    pick = torch.searchsorted(
        mass, (uniform * kept.nan_to_num(posinf=1.0)).unsqueeze(1), right=True
    )
    tokens = top.indices.gather(1, pick.clamp(max=mass.shape[-1] - 1)).squeeze(1)
    if short.any():
        tokens[short] = _draw_sorted(logits[short], wide, sampling.top_p, uniform[short])
    return tokens


def _draw_sorted(logits, wide: int, top_p: float, uniform) -> torch.Tensor:
    """`draw` for the rows whose head of HEAD tokens is too short: sorts the vocabulary."""
    top = logits.topk(wide, sorted=True)
    mass = top.values.double().softmax(-1).cumsum(-1)
    end = (mass < top_p).sum(-1, keepdim=True).clamp(max=wide - 1)
    target = uniform.unsqueeze(1) * mass.gather(1, end)
    pick = torch.searchsorted(mass, target, right=True).clamp(max=wide - 1)
    return top.indices.gather(1, torch.minimum(pick, end)).squeeze(1)


@dataclass
class _Running:
    """One sequence in flight."""

    index: int  # of its request
    request: Request
    uniform: numpy.ndarray
    started: float
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
) -> list[Generation]:
    """Continue every request; results in the order of `requests`.

    `batch_size` sequences run at once, on a KV cache that forgets by `policy` and stores as
    `quantised` says. `on_done(finished, new_tokens)` is called as sequences end. Raises
    ValueError for a request that does not fit the model's context.
    """
    _check(model, requests, sampling)
    done: list[Generation | None] = [None] * len(requests)
    prompts = [request.prompt_ids for request in requests]
    waiting = [(i, requests[i]) for i in batching.queue(prompts)]
    cache = SlotCache(model.weights, batch_size, policy, quantised=quantised)
    running: dict[int, _Running] = {}  # place in the cache -> sequence
    read = _Read(batching.prefixes(prompts) if cache.shares_prefixes else {})
    with slots_attached(model), policy.attached(model.weights):
        while waiting or running:
            free = [place for place in range(batch_size) if place not in running]
            places = free[: len(waiting)]
            if places:
                started = time.perf_counter()
                for place in places:
                    i, request = waiting.pop()
                    running[place] = _Running(i, request, uniforms(request, sampling), started)
                after = waiting[-1][1].prompt_ids if waiting else None
                logits = _admit(model, cache, running, places, read, after)
            else:
                places = sorted(running)
                logits = _step(model, cache, places, [running[p].new_ids[-1] for p in places])
            _advance(model, cache, running, places, logits, sampling, done)
            if on_done and len(running) < batch_size:
                finished = [g for g in done if g is not None]
                on_done(len(finished), sum(g.new_tokens for g in finished))
    return done


def _check(model: Model, requests: list[Request], sampling: Sampling) -> None:
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}; ask for at least one.")
    limit = model.weights.config.get_text_config().max_position_embeddings
    for request in requests:
        need = len(request.prompt_ids) + sampling.max_new_tokens
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
    for prefix, pack in batching.packs(groups[len(rows) :], read.prefixes):
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


def _advance(model, cache, running, places, logits, sampling: Sampling, done) -> None:
    """Draw a token for each of `places`, count its reads, and finish what has ended."""
    steps = [running[p].uniform[len(running[p].new_ids)] for p in places]
    tokens = draw(logits, sampling, torch.tensor(steps, device=logits.device)).tolist()
    attended, live = cache.attended.tolist(), cache.live_tokens().tolist()
    stop_ids, ended = model.stop_ids, []
    for place, token in zip(places, tokens):
        sequence = running[place]
        sequence.new_ids.append(token)
        sequence.reads += attended[place]
        sequence.peak = max(sequence.peak, live[place])
        stopped = token in stop_ids
        if stopped or len(sequence.new_ids) == sampling.max_new_tokens:
            done[sequence.index] = _finish(model, cache, sequence, stopped)
            ended.append(place)
    for place in ended:
        del running[place]
    if ended:
        cache.release(ended)


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
