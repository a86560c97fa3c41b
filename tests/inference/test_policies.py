"""Every policy against a slow twin: one dense forward per text whose masks are simulated.

The Twin stands where the slot cache stands. It gets a whole text at once and walks through it
with sets and dictionaries, in float64; the cache gets the same texts packed, refilled, copied
and released. Logits and kept sets must be the same at every step.
"""

import copy
import dataclasses
import functools
import json
import math
import random
import sys
import types
from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kit.inference import decode as decode_module
from kit.inference import kv_cache
from kit.inference.block_table import BlockTable
from kit.inference.budget_forcing import BudgetForcing
from kit.inference.decode import Request, decode, slots_attached
from kit.inference.eviction import Rounds
from kit.inference.kv_cache import SlotCache, layer_windows
from kit.inference.kv_quantization import Quantized, pack, unpack
from kit.inference.paged_attention import _attend_paged, attend
from kit.inference.policies import (
    DMS,
    FLOOR,
    H2O,
    RKV,
    TOVA,
    Full,
    Knorm,
    Random,
    SnapKV,
    Window,
    held_tokens,
)
from kit.models.load import RANDOM, Model, load
from kit.schema import Sampling
from tests import rounding
from tests.toys import held_bytes

SHAPES = sorted(RANDOM)  # query heads per KV head: gemma3 1, llama 3, qwen3 8


@pytest.fixture(scope="module")
def families():
    return {shape: load(f"random:{shape}", dtype="float64") for shape in SHAPES}


class Evictor:
    """A random evictor that obeys the contract of kit.dms.evictor: about half of all logits > 0."""

    def __init__(self, weights, window: int, seed: int = 0):
        config, noise = weights.config, torch.Generator().manual_seed(seed)
        self.window, self.fingerprint, self.name = window, f"{seed:012}", f"dms stub w{window}"
        self.layers = tuple(i for i, w in enumerate(layer_windows(config)) if w is None)
        shape = config.hidden_size, config.num_key_value_heads
        self.linear = {
            layer: torch.randn(shape, dtype=torch.float64, generator=noise) for layer in self.layers
        }

    @contextmanager
    def attached(self, weights):
        def hook(layer):
            def decide(block, args, kwargs):
                hidden = args[0] if args else kwargs["hidden_states"]
                kwargs["slots"].set_eviction_logits(layer, hidden.double() @ self.linear[layer])

            return decide

        with ExitStack() as hooks:
            for layer in self.layers:
                block = weights.base_model.layers[layer]
                handle = block.register_forward_pre_hook(hook(layer), with_kwargs=True)
                hooks.callback(handle.remove)
            yield


class Twin:
    """Attention of one whole text of which `prompt` tokens are read at once: no cache at all.

    seen[layer][head][t] is the set of positions that the token at t attends to.
    """

    def __init__(self, policy, windows, prompt: int, quantized: Quantized | None = None):
        self.policy, self.windows, self.prompt = policy, windows, prompt
        self.quantized = quantized
        self.seen: dict[int, list[list[set]]] = {}
        self.plain: dict[int, torch.Tensor] = {}  # what attention gives without a wider dtype
        self.evicted: dict[int, list[list[bool]]] = {}

    def set_eviction_logits(self, layer: int, logits: torch.Tensor) -> None:
        """logits [1, T, H]: that of token t+1 decides for token t."""
        evicts = (logits[0] > 0).T.tolist()
        self.evicted[layer] = [head[1:] + [False] for head in evicts]

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        given = query[0], key[0], value[0]
        self.group, self.layer, self.key = len(query[0]) // len(key[0]), layer, key[0].double()
        self.query, self.rough = query[0].double() * scale, self.key
        if self.quantized:
            bits, group = self.quantized.bits, self.quantized.group
            self.rough = unpack(*pack(self.key, bits, group), bits, torch.float64)
        self.scores, *read = self._read(*(x.double() for x in given), scale)
        self.seen[layer] = seen = self._walk(layer, len(query[0]), len(key[0]), key.shape[2])
        hidden = torch.ones(len(key[0]), *self.scores.shape[1:], dtype=torch.bool)
        for head, rows in enumerate(seen):
            for t, tokens in enumerate(rows):
                hidden[head, t, list(tokens)] = False
        hidden = hidden.repeat_interleave(self.group, 0)
        self.plain[layer] = self._join(*self._read(*given, scale), hidden)
        return self._join(self.scores, *read, hidden)

    def _read(self, q, k, v, scale: float):
        """Scores [H*G, T, T], values, and of quantized caches which are coarse, and coarse values;
        all in the dtype of what is given."""
        k, v = (x.repeat_interleave(self.group, 0) for x in (k, v))
        scores = q * scale @ k.transpose(1, 2)
        if self.quantized is None:
            return scores, v, None, None
        # In decoding, only the newest keys and values are exact, the token itself included.
        at = torch.arange(k.shape[1])
        coarse = at[:, None] - at >= self.quantized.residual
        coarse[: self.prompt] = False
        bits, group = self.quantized.bits, self.quantized.group
        rough_k, rough_v = (unpack(*pack(x, bits, group), bits, x.dtype) for x in (k, v))
        return torch.where(coarse, q * scale @ rough_k.transpose(1, 2), scores), v, coarse, rough_v

    @staticmethod
    def _join(scores, v, coarse, rough_v, hidden) -> torch.Tensor:
        weight = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if coarse is None:
            return (weight @ v).transpose(0, 1)[None]
        out = weight.masked_fill(coarse, 0) @ v + weight.masked_fill(~coarse, 0) @ rough_v
        return out.transpose(0, 1)[None]

    def _walk(self, layer: int, wide: int, heads: int, length: int) -> list[list[set]]:
        policy, window = self.policy, self.windows[layer]
        causal = [set(range(t + 1)) for t in range(length)]
        if window is not None:
            return [[{k for k in s if t - k < window} for t, s in enumerate(causal)]] * heads
        if isinstance(policy, DMS):
            w, gone = policy.evictor.window, self.evicted[layer]
            return [
                [{k for k in s if t - k <= w or not gone[h][k]} for t, s in enumerate(causal)]
                for h in range(heads)
            ]
        if type(policy) is Full:
            return [causal] * heads
        if isinstance(policy, Window | TOVA):  # all heads keep the same
            return [self._drop(list(range(wide)), 0, causal)] * heads
        group = range(self.group)
        return [self._drop([h * self.group + g for g in group], h, causal) for h in range(heads)]

    def _drop(self, query_heads, unit: int, causal: list[set]) -> list[set]:
        """What each token sees where the query heads of one unit share the tokens they keep."""
        score: dict[int, float] = {}
        seen, kept = [], set()
        for t, everything in enumerate(causal):
            tokens = sorted(everything if t < self.prompt else kept | {t})
            seen.append(set(tokens))
            self._rank(score, query_heads, unit, t, tokens)
            kept = set(tokens)
            if t >= self.prompt - 1:
                budget = self.budget(t + 1)
                while len(kept) > budget:
                    safe = self.safe(t, budget)
                    kept.remove(min(kept - safe, key=lambda p: score[p]))
        return seen

    def budget(self, seen: int) -> int:
        if isinstance(self.policy, SnapKV) and seen > self.prompt:
            return seen
        if isinstance(self.policy, RKV) and seen > self.prompt and seen % self.policy.buffer:
            return seen
        if self.policy.kept_tokens is not None:
            return self.policy.kept_tokens
        return max(FLOOR, int(seen * self.policy.kept_fraction))

    def safe(self, t: int, budget: int) -> set[int]:
        window = min(budget, getattr(self.policy, "window", 0))
        newest = {H2O: budget // 2, Random: 1, SnapKV: window, RKV: window}.get(
            type(self.policy), 0
        )
        return set(range(t + 1 - newest, t + 1))

    def _rank(self, score: dict, query_heads, unit: int, t: int, tokens: list[int]) -> None:
        policy = self.policy
        if isinstance(policy, Window):
            score[t] = 1e9 if t < policy.sinks else t
        elif isinstance(policy, Knorm):
            score[t] = -float((self.key[unit, t] ** 2).sum() ** 0.5)
        elif isinstance(policy, Random):
            x = t * 0x9E3779B1 + unit * 0x85EBCA77 + self.layer * 0xC2B2AE3D + policy.seed
            for multiplier in (0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9):
                x %= 2**32
                x = (x ^ (x >> 16)) * multiplier
            score[t] = x % 2**32
        elif isinstance(policy, SnapKV):
            if t == self.prompt - 1:
                score.update(self.neighbourhoods(query_heads))
        elif isinstance(policy, RKV):
            if t >= self.prompt - 1:
                score.update(self.gains(query_heads, unit, t, tokens))
        else:
            mass = self.scores[query_heads, t][:, tokens].softmax(-1).sum(0).tolist()
            for p, m in zip(tokens, mass):
                score[p] = score.get(p, 0.0) + m if isinstance(policy, H2O) else m

    def neighbourhoods(self, query_heads) -> dict[int, float]:
        """Of each token of the prompt, what the window's queries attend to around it."""
        older, half = max(0, self.prompt - self.policy.window), self.policy.kernel // 2
        mass = [0.0] * self.prompt
        for t in range(older, self.prompt):
            row = self.scores[query_heads, t][:, : t + 1].softmax(-1).sum(0).tolist()
            mass = [m + r for m, r in zip(mass, row + [0.0] * self.prompt)]
        around = [sum(mass[max(0, p - half) : min(older, p + half + 1)]) for p in range(older)]
        return dict(enumerate(around + mass[older:]))

    def gains(self, query_heads, unit: int, t: int, tokens: list[int]) -> dict[int, float]:
        """R-KV's scores of the tokens that a unit holds after the one at t; 0 in the window."""
        policy, residual = self.policy, self.quantized.residual if self.quantized else 0
        coarse = [self.quantized and t >= self.prompt and t - p >= residual for p in tokens]
        keys = [(self.rough if c else self.key)[unit, p] for c, p in zip(coarse, tokens)]
        older = [i for i, p in enumerate(tokens) if p <= t - policy.window]
        mass = [0.0] * len(older)
        for at in range(t - policy.window + 1, t + 1) if older else ():
            queries = [self.query[head, at] for head in query_heads]
            best = [max(float(q @ keys[i]) for q in queries) for i in older]
            for i, share in enumerate(torch.tensor(best).double().softmax(0).tolist()):
                mass[i] += share / policy.window
        length, alike = len(tokens), [[0.0] * len(tokens) for _ in tokens]
        for i, one in enumerate(keys):
            spared = policy.spared
            for j in reversed(range(length)):
                cosine = float(one @ keys[j]) / ((float(one.norm()) * float(keys[j].norm())) or 1)
                near = i != j and cosine > policy.threshold
                alike[i][j] = 0.0 if i == j or near and spared > 0 else cosine
                spared -= near
        mean = [sum(row[j] for row in alike) / length for j in range(length)]
        total, half = sum(math.exp(x) for x in mean), policy.kernel // 2
        return dict.fromkeys(tokens, 0.0) | {
            tokens[i]: policy.weight * max(mass[max(0, i - half) : i + half + 1])
            - (1 - policy.weight) * math.exp(mean[i]) / total
            for i in older
        }


class Given:
    """Stands where a model stands whose layers do not hear each other: queries, keys, values and
    evicting logits follow from token and position alone, so that in any dtype the cache and the
    Twin get the same ones, and what is kept must be the same."""

    TEXT = 64  # positions

    def __init__(self, shape: str, dtype: str):
        self.weights, make = load(f"random:{shape}", dtype=dtype).weights, torch.Generator()
        config, make = self.weights.config, make.manual_seed(0)
        kv, layers = config.num_key_value_heads, config.num_hidden_layers
        heads = (config.num_attention_heads, kv, kv)
        size = 256 * self.TEXT, config.head_dim
        self.drawn = [
            [torch.randn(n, *size, generator=make).to(self.weights.dtype) for n in heads]
            for _ in range(layers)
        ]
        self.evicts = torch.randn(layers, size[0], kv, generator=make)

    def read(self, policy, slots, ids, positions) -> torch.Tensor:
        """What the layers read, [tokens, layers, H*G * D], instead of logits."""
        at = torch.tensor(ids) * self.TEXT + positions[0]
        out = []
        for layer, drawn in enumerate(self.drawn):
            if isinstance(policy, DMS) and layer in policy.evictor.layers:
                slots.set_eviction_logits(layer, self.evicts[layer, at][None])
            query, key, value = (x[None, :, at] for x in drawn)
            out.append(slots.attend(layer, query, key, value, 0.3)[0].flatten(1))
        return torch.stack(out, 1)


given = functools.lru_cache(3)(Given)  # one of each shape, in the dtype of the tests that run


def read(model, policy, slots, ids, positions) -> torch.Tensor:
    """Logits of packed tokens whose attention is that of `slots`."""
    if isinstance(model, Given):
        return model.read(policy, slots, ids, positions)
    with slots_attached(model), policy.attached(model.weights):
        given = dict(input_ids=torch.tensor([ids]), position_ids=positions)
        return model.weights(**given, use_cache=False, slots=slots).logits[0]


class Stream:
    """One text with what the Twin says of it."""

    def __init__(self, model, policy, ids: list[int], prompt: int, quantized):
        self.ids, self.prompt, self.at = ids, prompt, prompt  # tokens fed so far
        self.twin = Twin(policy, layer_windows(model.weights.config), prompt, quantized)
        self.logits = read(model, policy, self.twin, ids, torch.arange(len(ids))[None])
        self.rounded = isinstance(model, Given)
        self.plain = torch.stack([x[0].flatten(1) for _, x in sorted(self.twin.plain.items())], 1)

    def check(self, cache, place: int, logits: torch.Tensor) -> None:
        right, plain = self.logits[self.at - 1], self.plain[self.at - 1]
        if self.rounded:
            rounding.assert_close(logits, plain, right)
        else:
            torch.testing.assert_close(logits, right, rtol=1e-7, atol=1e-7)
        layers = [[head[self.at - 1] for head in self.twin.seen[i]] for i in sorted(self.twin.seen)]
        attended = [len(tokens) for heads in layers for tokens in heads]
        mean = sum(attended) / len(attended)
        assert cache.attended[place].item() == pytest.approx(mean, abs=1e-9)
        kept = [[set(x.tolist()) for x in heads] for heads in cache.live_positions(place)]
        live = [len(x) for heads in kept for x in heads]
        assert cache.live_tokens()[place].item() == pytest.approx(sum(live) / len(live), abs=1e-9)
        if self.at > self.prompt:
            assert kept == layers, "what is kept is what the last token attended to"


class Crowd:
    """Streams of one policy that come, are copied, step and go in one cache."""

    PLACES = 5

    def __init__(self, model, policy, seed: int, quantized: Quantized | None = None):
        self.model, self.policy, self.rng = model, policy, random.Random(seed)
        self.cache = SlotCache(model.weights, self.PLACES, policy, 4, quantized)
        self.running: dict[int, Stream] = {}
        self.texts = 0

    def text(self, length: int) -> list[int]:
        return [self.rng.randrange(3, 256) for _ in range(length)]

    def forward(self, ids, positions) -> torch.Tensor:
        return read(self.model, self.policy, self.cache, ids, positions)

    def start(self, prompts: list[list[int]], groups: list[list[int]]) -> None:
        """Read prompts for groups of places; each place goes on with a text of its own."""
        for ids, group in zip(prompts, groups):
            for place in group:
                text = ids + self.text(self.rng.randint(6, 18))
                stream = Stream(self.model, self.policy, text, len(ids), self.cache.quantized)
                self.running[place] = stream
                self.texts += 1

    def prefill(self, lengths: list[int]) -> None:
        places = [p for p in range(self.PLACES) if p not in self.running]
        self.rng.shuffle(places)
        prompts = [self.text(n) for n in lengths]
        groups = [places[i :: len(prompts)] for i in range(len(prompts))]
        prompts = [x for x, group in zip(prompts, groups) if group]
        groups = [group for group in groups if group]
        spared = groups[0].pop() if len(groups[0]) > 1 else None
        positions = self.cache.prefill(groups, [len(x) for x in prompts])
        logits = self.forward([token for ids in prompts for token in ids], positions)
        self.start(prompts, groups)
        for ids, group in zip(prompts, groups):
            last = logits[: len(ids)][-1]
            logits = logits[len(ids) :]
            for place in group:
                self.running[place].check(self.cache, place, last)
        if spared is not None:  # this one is copied from its neighbour
            self.cache.restore([spared], len(prompts[0]), self.cache.read(groups[0][0]))
            self.start(prompts[:1], [[spared]])

    def step(self) -> None:
        places = self.rng.sample(sorted(self.running), len(self.running))
        streams = [self.running[p] for p in places]
        positions = self.cache.step(places)
        assert positions[0].tolist() == [s.at for s in streams]
        logits = self.forward([s.ids[s.at] for s in streams], positions)
        for place, stream, row in zip(places, streams, logits):
            stream.at += 1
            stream.check(self.cache, place, row)
        ended = [p for p in places if self.running[p].at == len(self.running[p].ids)]
        if ended:
            self.cache.release(ended)
            for place in ended:
                del self.running[place]
                assert self.cache.live_tokens()[place] == 0

    def run(self) -> None:
        """Rounds of prompts of all lengths, each admitted while older texts still run."""
        self.prefill([34, 1, 9])
        for lengths in ([2, 27], [13, 40, 3]):
            while len(self.running) > 2:
                self.step()
            self.prefill(lengths)
        while self.running:
            self.step()
        assert self.texts > 6


POLICIES = {
    "full": lambda w: Full(),
    "window": lambda w: Window(kept_tokens=10, sinks=3),
    "window fraction": lambda w: Window(kept_fraction=0.5),
    "tova": lambda w: TOVA(kept_tokens=9),
    "h2o": lambda w: H2O(kept_tokens=11),
    "random": lambda w: Random(kept_tokens=12, seed=3),
    "knorm": lambda w: Knorm(kept_fraction=0.5),
    "snapkv": lambda w: SnapKV(kept_tokens=9, window=3, kernel=3),
    "rkv": lambda w: RKV(kept_tokens=9, buffer=4, window=3, kernel=3),
    "dms": lambda w: DMS(Evictor(w, 6)),
    "dms at once": lambda w: DMS(Evictor(w, 1, seed=1)),
}
EDGES = {
    "window without sinks": lambda w: Window(kept_tokens=7, sinks=0),
    "window of one": lambda w: Window(kept_tokens=1, sinks=0),
    "one token": lambda w: TOVA(kept_tokens=1),
    "all": lambda w: H2O(kept_fraction=1.0),
    "h2o of one": lambda w: H2O(kept_tokens=1),
    "tova fraction": lambda w: TOVA(kept_fraction=0.4),
    "h2o fraction": lambda w: H2O(kept_fraction=0.6),
    "random of one": lambda w: Random(kept_tokens=1),
    "snapkv fraction": lambda w: SnapKV(kept_fraction=0.4, window=4),
    "snapkv of its window": lambda w: SnapKV(kept_fraction=0.4, window=64, kernel=1),
    "rkv fraction": lambda w: RKV(kept_fraction=0.5, buffer=3, window=4, threshold=0.2),
    "rkv of its window": lambda w: RKV(kept_fraction=0.2, buffer=5, window=40),
    "rkv of attention": lambda w: RKV(9, buffer=1, window=2, kernel=5, weight=0.9),
    "rkv of keys alone": lambda w: RKV(6, buffer=2, window=1, weight=0.0, threshold=0.1, spared=2),
    "rkv that spares none": lambda w: RKV(12, buffer=7, window=3, kernel=1, spared=0),
    "rkv of a long buffer": lambda w: RKV(5, buffer=16, window=4, weight=0.5, threshold=-1.0),
    "dms that waits long": lambda w: DMS(Evictor(w, 30)),
}
# The third shape of each policy is NARROW's.
CASES = [(SHAPES[(i + k) % 3], name) for i, name in enumerate(POLICIES) for k in (1, 2)]
CASES += [(SHAPES[i % 3], name) for i, name in enumerate(EDGES)]


@torch.inference_mode()
@pytest.mark.parametrize("shape, name", CASES)
def test_the_cache_says_and_keeps_what_the_slow_twin_does(families, shape, name):
    model = families[shape]
    policy = (POLICIES | EDGES)[name](model.weights)
    Crowd(model, policy, seed=len(shape) + len(name)).run()


@torch.inference_mode()
@pytest.mark.parametrize(
    "shape, name, quantized",
    [
        ("llama", "full", Quantized(8, group=16, residual=5)),
        ("gemma3", "full", Quantized(2, group=8, residual=0)),
        ("qwen3", "tova", Quantized(4, group=8, residual=6)),
        ("llama", "h2o", Quantized(4, group=16, residual=3)),
        ("gemma3", "dms", Quantized(8, group=16, residual=4)),
        ("qwen3", "rkv", Quantized(4, group=8, residual=6)),
        ("gemma3", "rkv", Quantized(4, group=8, residual=0)),
    ],
)
def test_quantized_tokens_are_read_from_codes_except_for_the_newest(
    families, shape, name, quantized
):
    model = families[shape]
    Crowd(model, POLICIES[name](model.weights), 5, quantized).run()


NARROW = [(SHAPES[i % 3], name, None) for i, name in enumerate(POLICIES)]
NARROW += [
    ("qwen3", "full", Quantized(8, group=16, residual=5)),
    ("llama", "tova", Quantized(4, group=8, residual=6)),
]


@torch.inference_mode()
@pytest.mark.parametrize("shape, name, quantized", NARROW)
def test_in_fewer_bits_the_same_tokens_are_kept_of_the_same_keys(shape, name, quantized, dtype):
    model = given(shape, dtype)
    Crowd(model, POLICIES[name](model.weights), 3, quantized).run()


def requests(lengths, samples: int = 1) -> list[Request]:
    made = []
    for i, length in enumerate(lengths):
        rng = random.Random(f"{length} {i}")
        ids = tuple(rng.randrange(3, 256) for _ in range(length))
        made += [Request(ids, f"p{i}", sample) for sample in range(samples)]
    return made


def untimed(generations):
    return [
        g and dataclasses.replace(g, seconds=0.0, forced=tuple(untimed(g.forced)))
        for g in generations
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_a_generation_depends_on_neither_batch_nor_order(families, name):
    """Prompts are read once for all samples, which then differ; state is copied with them."""
    model = families["llama"]
    policy = POLICIES[name](model.weights)
    sampling = Sampling(max_new_tokens=9, temperature=1.0)
    asked = requests([3, 41, 18, 1], samples=2)
    out = untimed(decode(model, asked, sampling, 4, policy=policy))
    assert len({g.token_ids for g in out}) == len(out)
    for batch_size in (1, 7):
        order = random.Random(batch_size).sample(range(len(asked)), len(asked))
        again = decode(model, [asked[i] for i in order], sampling, batch_size, policy=policy)
        for i, one in zip(order, untimed(again)):
            assert one.token_ids == out[i].token_ids
            assert one.kv_reads_tokens == pytest.approx(out[i].kv_reads_tokens)
            assert one.kv_peak_tokens == pytest.approx(out[i].kv_peak_tokens)


def test_what_switches_eviction_off_is_the_identity(families):
    sampling, asked = Sampling(max_new_tokens=6), requests([3, 41, 18])
    for model in families.values():
        plain = untimed(decode(model, asked, sampling, 2))
        assert untimed(decode(model, asked, sampling, 2, policy=Full())) == plain
        whole = [Window(kept_tokens=1000), TOVA(kept_fraction=1.0), Random(kept_fraction=1.0)]
        for policy in whole:
            assert untimed(decode(model, asked, sampling, 2, policy=policy)) == plain
        exact = Quantized(2, group=16, residual=100)
        tokens = [g.token_ids for g in decode(model, asked, sampling, 2, quantized=exact)]
        assert tokens == [g.token_ids for g in plain]


class Marks:
    """An evictor that evicts the tokens at the positions it is told, the same in all heads."""

    fingerprint = "0" * 12

    def __init__(self, model, window: int, gone: set[int]):
        self.window, self.gone = window, gone
        self.layers = tuple(range(model.weights.config.num_hidden_layers))

    @contextmanager
    def attached(self, weights):
        def decide(block, args, kwargs):
            at = kwargs["position_ids"][0].tolist()
            marks = torch.tensor([1.0 if p - 1 in self.gone else -1.0 for p in at])
            kwargs["slots"].set_eviction_logits(
                block.self_attn.layer_idx, marks[None, :, None].expand(1, -1, 2)
            )

        with ExitStack() as hooks:
            for block in weights.base_model.layers:
                hook = block.register_forward_pre_hook(decide, with_kwargs=True)
                hooks.callback(hook.remove)
            yield


def test_reads_and_peaks_of_cases_counted_by_hand(families):
    model, sampling, asked = families["llama"], Sampling(max_new_tokens=5), requests([6])

    def cost(policy):
        (one,) = decode(model, asked, sampling, policy=policy)
        token = 2 * 4 * 2 * 16 * 8  # bytes: K and V, layers, heads, size, float64
        assert one.kv_peak_bytes == one.kv_peak_tokens * token
        return one.kv_reads_tokens, one.kv_peak_tokens

    # Five tokens are drawn: one after the prompt of 6 and four after a step each.
    assert cost(Full()) == (6 + 7 + 8 + 9 + 10, 10)
    # The prompt is read densely and cut to 4; each step attends to those and itself.
    assert cost(Window(kept_tokens=4, sinks=1)) == (6 + 5 + 5 + 5 + 5, 5)
    assert cost(TOVA(kept_tokens=4)) == (6 + 5 + 5 + 5 + 5, 5)
    # Budgets after 6, 7, 8, 9 tokens: 8, 8, 8, 8 at least.
    assert cost(H2O(kept_fraction=0.5)) == (6 + 7 + 8 + 9 + 9, 9)
    # After 9 tokens 4 of 7 are kept; after 6 there is nothing beyond the budget.
    assert cost(RKV(kept_tokens=4, buffer=3, window=2)) == (6 + 5 + 6 + 7 + 5, 7)
    # Window 2; tokens 1, 4, 5 and 7 are marked. The query at 5 sees 0-5 less 1; at 6 the same
    # and 6, for 4 is 2 ago; at 7 4 is gone; at 8 5 is gone; at 9 nothing goes, 7 is 2 ago.
    assert cost(DMS(Marks(model, 2, {1, 4, 5, 7}))) == (5 + 6 + 6 + 6 + 7, 7)


@pytest.fixture(scope="module")
def roomy() -> Model:
    """Heads of a usual size: bookkeeping and half-filled blocks weigh what they weigh in use."""
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
    config = LlamaConfig(vocab_size=256, **shape, **heads, eos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Model("roomy", weights.eval(), None, "roomy", "seed 0")


@torch.inference_mode()
def test_allocated_memory_follows_what_is_live(roomy):
    policies = [
        Full(),
        Window(kept_tokens=300),
        H2O(kept_tokens=300),
        TOVA(kept_fraction=0.5),
        H2O(kept_fraction=0.25),
        DMS(Evictor(roomy.weights, 16)),
    ]
    sizes = {}
    for policy in policies:
        crowd = Crowd(roomy, policy, seed=0)
        crowd.cache = cache = SlotCache(roomy.weights, 4, policy)
        held = lambda cache=cache: cache.live_tokens().sum().item() * cache.token_bytes  # noqa: E731
        for generation in range(3):
            places = [0, 1, 2, 3] if generation == 0 else [1, 3]
            lengths = [crowd.rng.randint(500, 700) for _ in places]
            positions = cache.prefill([[place] for place in places], lengths)
            crowd.forward(crowd.text(sum(lengths)), positions)
            for _ in range(25):
                crowd.forward(crowd.text(4), cache.step([0, 1, 2, 3]))
            if generation < 2:
                cache.release([1, 3])
        assert held() <= cache.nbytes() <= 1.15 * held(), policy.name
        sizes[policy.name] = cache.nbytes()
    full = sizes["full"]
    assert sizes["h2o 25%"] < 0.3 * full and sizes["tova 50%"] < 0.56 * full
    assert sizes["window 300"] < 0.5 * full


@torch.inference_mode()
def test_eight_bits_are_nearly_exact_and_two_are_not(roomy):
    texts = torch.randint(3, 256, (3, 90), generator=torch.Generator().manual_seed(0))
    logits = []
    for quantized in (None, Quantized(8, residual=4), Quantized(2, residual=4)):
        crowd = Crowd(roomy, Full(), 0)
        crowd.cache = SlotCache(roomy.weights, 3, quantized=quantized)
        positions = crowd.cache.prefill([[0], [1], [2]], [80] * 3)
        crowd.forward(texts[:, :80].flatten().tolist(), positions)
        for ids in texts[:, 80:].T:
            last = crowd.forward(ids.tolist(), crowd.cache.step([0, 1, 2]))
        logits.append(last)
    eight, two = ((x - logits[0]).norm() / logits[0].norm() for x in logits[1:])
    assert 0 < eight < 3e-3 < 10 * eight < two


def test_bytes_of_a_quantized_cache_are_those_of_the_formula(roomy):
    quantized = Quantized(4, group=32, residual=8)
    cache = SlotCache(roomy.weights, 3, quantized=quantized)
    cache.fill(3, 640)
    codes = 2 * 2 * 2 * (64 // 2 + 2 * 2 * 2)  # K and V, layers, heads: codes, scales, zeros
    assert cache.token_bytes == codes
    exact = 3 * 8 * 2 * 2 * 2 * 64 * 4
    tracked = sum(group.nbytes() for group in cache.layer_groups)
    assert cache.nbytes() == 3 * 640 * codes + exact + tracked
    assert tracked < 0.05 * cache.nbytes()


@torch.inference_mode()
def test_synthetic_tokens_stand_for_a_read_prompt(families):
    for shape, model in families.items():
        for policy in (Full(), H2O(kept_tokens=20), DMS(Evictor(model.weights, 3))):
            cache = SlotCache(model.weights, 3, policy)
            cache.fill(3, 50, None if type(policy) is Full else 20)
            kept = 50 if type(policy) is Full else 20
            expected = (kept + 24) / 2 if shape == "gemma3" else kept
            assert cache.live_tokens().tolist() == [expected] * 3
            with slots_attached(model), policy.attached(model.weights):
                out = model.weights(
                    input_ids=torch.tensor([[5, 6, 7]]),
                    position_ids=cache.step([2, 0, 1]),
                    use_cache=False,
                    slots=cache,
                )
            assert out.logits.isfinite().all()


@torch.inference_mode()
def test_the_kernel_is_handed_what_attention_reads(families, monkeypatch):
    """The branch for CUDA devices, with a plain kernel that honours the same contract."""

    def paged_attention(query, keys, values, bias, table, count, codes, scale, out):
        assert codes is None and out is None
        query = query * scale
        assert (table.dtype, count.dtype, bias.dtype) == (torch.int32, torch.int32, torch.float32)
        assert all(x.is_contiguous() for x in (query, keys, values, bias, table))
        out = torch.zeros_like(query)
        for unit, (blocks_of, n) in enumerate(zip(table, count)):
            mine = blocks_of[:n].long()
            k, v = (x[mine].transpose(0, 1).flatten(1, 2) for x in (keys, values))
            weight = (query[unit] @ k.transpose(1, 2) + bias[mine].flatten()).softmax(-1)
            out[unit] = weight @ v
        return out

    module = types.SimpleNamespace(paged_attention=paged_attention)
    monkeypatch.setitem(sys.modules, "kit.inference.triton_attention", module)
    for model in families.values():
        policy = DMS(Evictor(model.weights, 3))
        cache = SlotCache(model.weights, 4, policy, block=4)
        crowd = Crowd(model, policy, 0)
        crowd.cache = cache
        crowd.forward(crowd.text(60), cache.prefill([[2], [0], [3]], [13, 40, 7]))
        crowd.forward(crowd.text(3), cache.step([0, 3, 2]))
        for layer, group in enumerate(cache.group_of):
            units, plane = len(group.step.units), group.plane(layer)
            heads = cache.heads // group.split
            query = torch.randn(units, heads, 2, 16, dtype=torch.float64)
            ours, _ = _attend_paged(query, cache.pools[layer], group.step, plane)
            expected, _ = attend(query, cache.pools[layer], group.step, plane)
            torch.testing.assert_close(ours, expected)


def test_names_and_keys_tell_policies_apart(families):
    evictor = Evictor(families["llama"].weights, 4, seed=7)
    made = [Full(), Window(64), Window(64, sinks=0), TOVA(64), H2O(kept_fraction=0.25), Random(64)]
    made += [Random(64, seed=1), Knorm(kept_fraction=0.125), SnapKV(64), SnapKV(64, kernel=7)]
    made += [RKV(64), RKV(64, buffer=16), DMS(evictor)]
    names = ["full", "window 64", "window 64", "tova 64", "h2o 25%", "random 64", "random 64"]
    assert [p.name for p in made] == [
        *names,
        "knorm 12.5%",
        "snapkv 64",
        "snapkv 64",
        "rkv 64",
        "rkv 64",
        "dms stub w4",
    ]
    held = [held_tokens(p.name) for p in made]
    assert held == [None, 64, 64, 64, None, 64, 64, None, None, None, 192, 192, None]
    keys = [json.dumps(p.key, sort_keys=True) for p in made]
    assert len(set(keys)) == len(made)
    assert made[1] == Window(kept_tokens=64) and made[1].key["sinks"] == 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TOVA(), "TOVA got kept_tokens=None and kept_fraction=None; give exactly one"),
        (lambda: H2O(8, 0.5), "H2O got kept_tokens=8 and kept_fraction=0.5; give exactly one"),
        (lambda: Random(kept_tokens=0), "kept_tokens=0; give a whole number from 1 on"),
        (lambda: Random(kept_tokens=0.5), "kept_tokens=0.5; give a whole number from 1 on"),
        (lambda: Knorm(kept_fraction=1.5), "kept_fraction=1.5; give more than 0, at most 1"),
        (lambda: Knorm(kept_fraction=0.0), "kept_fraction=0.0; give more than 0, at most 1"),
        (lambda: Window(4), "sinks=4 and keeps 4 tokens at least; give sinks from 0 to 3"),
        (lambda: Window(kept_fraction=0.1, sinks=8), "give sinks from 0 to 7"),
        (lambda: SnapKV(32), "window=32 and kept_tokens=32; give a window from 1 to 31"),
        (lambda: SnapKV(kept_fraction=0.5, window=0), "window=0 and kept_tokens=None"),
        (lambda: SnapKV(64, kernel=4), "kernel=4; give an odd number from 1 on"),
        (lambda: RKV(8), "RKV got window=8 and kept_tokens=8; give a window from 1 to 7"),
        (lambda: RKV(64, kernel=0), "RKV got kernel=0; give an odd number from 1 on"),
        (lambda: RKV(64, buffer=0), "RKV got buffer=0, spared=1 and weight=0.1; give a buffer"),
        (lambda: RKV(64, weight=1.5), "weight=1.5; give a buffer from 1 on, spare 0 or more, and"),
    ],
)
def test_a_policy_that_makes_no_sense_is_one_sentence(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_policy_that_does_not_fit_the_model_is_one_sentence(families):
    llama, gemma = families["llama"], families["gemma3"]

    def refused(model, policy, message):
        with pytest.raises(ValueError, match=message):
            decode(model, requests([4]), Sampling(max_new_tokens=2), policy=policy)

    refused(llama, Window(kept_tokens=2000), "keeps 2000 tokens, the model reads 1024; keep fewer")
    refused(
        llama,
        DMS(Evictor(gemma.weights, 4)),
        r"decides for layers \[1, 3\], this model has full attention in",
    )
    for window in (0, 1025):
        message = f"window is {window}; give one from 1 to the 1024 tokens"
        refused(llama, DMS(Evictor(llama.weights, window)), message)


def test_a_model_of_sliding_layers_only_has_nothing_to_evict(families):
    config = copy.deepcopy(families["gemma3"].weights.config)
    config.layer_types = ["sliding_attention"] * 4
    weights = types.SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))
    SlotCache(weights, 1, Full())
    for policy in (TOVA(8), DMS(Marks(families["llama"], 2, set()))):
        with pytest.raises(ValueError, match="full attention and this model has none"):
            SlotCache(weights, 1, policy)


def test_too_little_memory_is_one_sentence(families):
    cache = SlotCache(families["llama"].weights, 1)
    with pytest.raises(MemoryError, match="lower the batch size, or keep fewer tokens"):
        cache.pools[0].allocate(1 << 45)
    assert cache.pools[0].nbytes() == 0


def test_of_keys_that_are_alike_the_newest_stay():
    """One-hot keys: the first of a unit is at 0, 2, 4 and 6, the others once each."""
    one = torch.eye(8)[[0, 1, 0, 2, 0, 3, 0, 4]].double()
    key, query = torch.stack([one, one.flip(1)]), torch.ones(4, 8, 8).double()

    def evicted(kept: int, **how) -> list[int]:
        rule = Rounds(BlockTable(1, 2, 4, "cpu"), RKV(kept, window=1, **how), 2, 8, torch.float64)
        which, score = rule.prompt(0, query, key, None)
        assert which.sum(1).tolist() == [min(kept, 8)] * 2 and score.isfinite().all()
        assert torch.equal(*which) and which[:, -1].all()
        return (~which[0]).nonzero().flatten().tolist()

    # Each spares the newest of its kind but itself: three spare 6, and 6 spares 4.
    assert evicted(6) == evicted(6, weight=0.0) == [0, 2] and evicted(5) == [0, 2, 4]
    assert set(evicted(4)) > {0, 2, 4} and 6 not in evicted(4)
    assert evicted(6, spared=2) == [0, 2] and evicted(8) == evicted(30) == []
    for same in (torch.zeros_like(key), torch.ones_like(key)):
        key = same
        assert len(evicted(3)) == 5


@pytest.mark.parametrize("quantized", [None, Quantized(4, 8, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_asked_for_across_a_round_takes_the_round_back(
    families, shape, quantized, monkeypatch
):
    model, restored, restore = families[shape], [], SlotCache.restore
    how = dict(policy=RKV(9, buffer=4, window=3), quantized=quantized)
    asked, sampling = requests([3, 41, 18]), Sampling(max_new_tokens=16, temperature=1.0)
    plain = decode(model, asked, sampling, 2, **how)
    monkeypatch.setattr(SlotCache, "restore", lambda *a: restored.append(a) or restore(*a))
    forcing = BudgetForcing((2, 5, 11), (7, 8), 3)
    for one, forced in zip(plain, decode(model, asked, sampling, 2, forcing=forcing, **how)):
        assert one.token_ids == forced.token_ids
        assert one.kv_reads_tokens == forced.kv_reads_tokens
        assert one.kv_peak_tokens == forced.kv_peak_tokens
    assert len(restored) > 3


DTYPES = ("float32", "bfloat16")  # both of full, H2O, R-KV and DMS; the other policies take turns
BITS = [
    (SHAPES[i % 3], name, None, dtype)
    for i, name in enumerate(POLICIES)
    for dtype in (DTYPES if name in ("full", "h2o", "rkv", "dms") else DTYPES[i % 2 :][:1])
]
BITS += [(shape, "full", None, dtype) for shape in ("llama", "qwen3") for dtype in DTYPES]
BITS += [("qwen3", "full", Quantized(8, 16, 5), "bfloat16")]
BITS += [("llama", "tova", Quantized(4, 8, 6), "float32")]
BITS += [("gemma3", "rkv", Quantized(4, 8, 6), "float32")]


@pytest.mark.parametrize("shape, name, quantized, dtype", BITS)
def test_what_is_said_is_the_same_bit_by_bit_whatever_stands_beside_it(
    shape, name, quantized, dtype, monkeypatch
):
    """Logits too. Prompts that begin alike, several samples of one, a forced answer, few and many
    places, in any order."""
    model, seen = load(f"random:{shape}", dtype=dtype), {}
    policy, rows = POLICIES[name](model.weights), []
    sample, advance = decode_module.sample_tokens, decode_module._advance

    def sampled(logits, *rest):
        rows[:] = logits.clone()
        return sample(logits, *rest)

    def watched(model, cache, running, places, *rest):
        for place, row in zip(places, rows, strict=True):
            one = running[place]
            key = one.request, one.budget, len(one.new_ids)
            assert torch.equal(seen.setdefault(key, row), row), key
        return advance(model, cache, running, places, *rest)

    monkeypatch.setattr(decode_module, "sample_tokens", sampled)
    monkeypatch.setattr(decode_module, "_advance", watched)
    asked = requests([3, 41, 1, 130])
    asked.append(Request(asked[1].prompt_ids[:37] + asked[0].prompt_ids, "begins alike"))
    asked.append(dataclasses.replace(asked[1], sample=1))
    how = dict(policy=policy, quantized=quantized, forcing=BudgetForcing((4, 9), (7, 8), 3))
    sampling = Sampling(max_new_tokens=10, temperature=1.0)
    alone = [untimed(decode(model, [one], sampling, 1, **how))[0] for one in asked]
    for batch_size in (3, 64):
        order = random.Random(batch_size).sample(range(len(asked)), len(asked) - batch_size // 64)
        found = decode(model, [asked[i] for i in order], sampling, batch_size, **how)
        assert untimed(found) == [alone[i] for i in order]
    assert len({g.token_ids for g in alone}) == len(asked)


@pytest.mark.parametrize("name", ["full", "window fraction", "h2o", "dms"])
def test_what_memory_has_no_room_for_waits_or_begins_anew(families, name, monkeypatch):
    """And says what it says where there is room: for three of six, and for less than one."""
    model, begun = families["llama"], []
    policy, sampling = POLICIES[name](model.weights), Sampling(max_new_tokens=70, temperature=1.0)
    asked = requests([3, 41, 18, 1, 30, 22])
    whole = untimed(decode(model, asked, sampling, 6, policy=policy))
    start = decode_module._start
    monkeypatch.setattr(
        decode_module, "_start", lambda i, *rest: begun.append(i) or start(i, *rest)
    )
    three = 3 * (41 + 70) * SlotCache(model.weights, 1).token_bytes
    for room in (three / kv_cache.FREE, 1)[: 2 if name == "full" else 1]:
        monkeypatch.setattr(kv_cache, "free_bytes", lambda device, room=room: room)
        begun.clear()
        assert untimed(decode(model, asked, sampling, 6, policy=policy)) == whole
        assert set(begun) == set(range(6))
        assert room == 1 or name != "full" or len(begun) > 6, "the youngest were put back"


@pytest.mark.parametrize("kept", [Full(), Window(128), H2O(128), Knorm(kept_fraction=0.5), "dms"])
def test_an_answer_asked_for_in_place_copies_no_cache(families, kept, monkeypatch):
    model, shares, rewind = families["llama"], [], SlotCache.rewind
    policy = DMS(Evictor(model.weights, 6)) if kept == "dms" else kept

    def watched(cache, place):
        live = cache.live_tokens()[place].item() * cache.token_bytes
        shares.append(held_bytes(cache._undo_logs[place]) / live)
        rewind(cache, place)

    monkeypatch.setattr(SlotCache, "rewind", watched)
    monkeypatch.setattr(SlotCache, "read", lambda *_: pytest.fail("a copy"))
    forcing = BudgetForcing((8, 20, 40), (7, 8), 3)
    decode(model, requests([400]), Sampling(max_new_tokens=40), policy=policy, forcing=forcing)
    assert len(shares) == 2, "the last answer is asked for when the sequence has ended"
    assert max(shares) < 0.25
