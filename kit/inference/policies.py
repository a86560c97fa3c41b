"""Eviction policies, which tokens the KV cache keeps: frozen dataclasses, one paper each.

All but Full and DMS share one budget: a unit (layer, or layer and KV head) that has seen t
tokens keeps `kept_tokens` of them, or `kept_fraction` of t (rounded down, at least FLOOR). A
prompt is read with dense attention and then reduced to the budget; in decoding a new token attends
to the kept tokens and itself, then the lowest-ranked token is evicted if the unit exceeds its
budget. SnapKV's budget is that of the prompt, and what is decoded is kept. RKV evicts in rounds: a
unit exceeds its budget by up to `buffer` tokens, which are evicted together.

A policy ranks tokens; `eviction` finds the lowest, and `kv_cache` reuses their slots.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

FLOOR = 8  # tokens that a `kept_fraction` keeps at least
CHUNK = 512  # query rows whose attention is in memory at once


@dataclass(frozen=True)
class Full:
    """No token is evicted."""

    spread: ClassVar[str] = "model"  # which units keep their own tokens: "model", "layer" or "head"
    watches: ClassVar[bool] = False  # whether it needs to see attention probabilities
    decoding: ClassVar[bool] = True  # whether the budget holds in decoding, not of prompts alone

    @property
    def name(self) -> str:
        """For tables and figures."""
        return "full"

    @property
    def key(self) -> dict:
        """For record keys: everything that determines which tokens are kept."""
        return {"policy": "full"}

    def check(self, context: int, full_layers: tuple[int, ...]) -> None:
        """Raise ValueError for a model of this context and these full-attention layers."""

    def attached(self, weights: PreTrainedModel) -> AbstractContextManager:
        """Context manager inside which the policy receives the model's activations."""
        return nullcontext()


@dataclass(frozen=True)
class Budgeted(Full):
    """Base of the policies with a budget of tokens."""

    kept_tokens: int | None = None
    kept_fraction: float | None = None
    buffer: ClassVar[int] = 0  # tokens beyond the budget that are evicted together

    def __post_init__(self):
        tokens, fraction = self.kept_tokens, self.kept_fraction
        who = type(self).__name__
        if (tokens is None) == (fraction is None):
            raise ValueError(
                f"{who} got kept_tokens={tokens} and kept_fraction={fraction}; give exactly one."
            )
        if tokens is not None and (tokens < 1 or tokens != int(tokens)):
            raise ValueError(f"{who} got kept_tokens={tokens}; give a whole number from 1 on.")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"{who} got kept_fraction={fraction}; give more than 0, at most 1.")

    @property
    def name(self):
        tokens, fraction = self.kept_tokens, self.kept_fraction
        return f"{type(self).__name__.lower()} {tokens or f'{100 * fraction:.3g}%'}"

    @property
    def key(self):
        return {"policy": type(self).__name__.lower(), **asdict(self)}

    def check(self, context, full_layers):
        who = type(self).__name__
        if not full_layers:
            raise ValueError(
                f"{who} evicts in layers with full attention and this model has none; use Full."
            )
        if self.kept_tokens is not None and self.kept_tokens > context:
            raise ValueError(
                f"{who} keeps {self.kept_tokens} tokens, the model reads {context}; keep fewer."
            )

    def budget(self, length: torch.Tensor) -> torch.Tensor:
        """Tokens kept of `length` tokens, elementwise."""
        if self.kept_tokens is not None:
            return torch.full_like(length, self.kept_tokens)
        return (length.double() * self.kept_fraction).long().clamp(min=FLOOR)

    def recent(self, budget: torch.Tensor) -> torch.Tensor:
        """Number of newest tokens that are kept whatever their score."""
        return torch.zeros_like(budget)

    def arrival(self, layer: int, unit, position, key) -> torch.Tensor:
        """Score of new tokens [...] from their unit and position [...] and key [..., Hs, D]."""
        return torch.zeros(key.shape[:-2], dtype=key.dtype, device=key.device)

    def prompt_scores(self, layer: int, query, key) -> torch.Tensor:
        """Scores [units of a sequence, T] of a prompt: query [H*G, T, D], scaled; key [H, T, D]."""
        if self.spread == "head":
            key = key.unsqueeze(2)  # [H, T, 1, D]
        else:
            key = key.transpose(0, 1).unsqueeze(0)  # [1, T, H, D]
        unit = torch.arange(len(key), device=key.device).unsqueeze(1)
        position = torch.arange(key.shape[1], device=key.device).unsqueeze(0)
        return self.arrival(layer, unit, position, key).expand(key.shape[:2])


@dataclass(frozen=True)
class Window(Budgeted):
    """The first `sinks` tokens and the newest ones, the same in all layers and heads.

    Efficient Streaming Language Models with Attention Sinks (StreamingLLM), arXiv 2309.17453;
    positions stay those of the text, where the paper counts them inside the cache.
    """

    sinks: int = 4

    def __post_init__(self):
        super().__post_init__()
        least = FLOOR if self.kept_tokens is None else self.kept_tokens
        if not 0 <= self.sinks < least:
            raise ValueError(
                f"Window got sinks={self.sinks} and keeps {least} tokens at least; "
                f"give sinks from 0 to {least - 1}."
            )

    def arrival(self, layer, unit, position, key):
        return position.to(key.dtype).masked_fill(position < self.sinks, torch.inf)


@dataclass(frozen=True)
class Random(Budgeted):
    """A random sample of all tokens seen, per layer and head; the newest is always in it.

    The control of every ranking. The rank of a token is a hash of seed, layer, head and
    position: it does not depend on what else is decoded, and each past token is as likely to
    be kept as any other, near or far.
    """

    spread: ClassVar[str] = "head"
    seed: int = 0

    def recent(self, budget):
        return torch.ones_like(budget)

    def arrival(self, layer, unit, position, key):
        mixed = position * 0x9E3779B1 + unit * 0x85EBCA77 + layer * 0xC2B2AE3D + self.seed
        for multiplier in (0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9):  # a hash of 32 bits
            mixed = mixed & 0xFFFFFFFF
            mixed = (mixed ^ (mixed >> 16)) * multiplier
        return ((mixed & 0xFFFFFFFF) / 2**32).to(key.dtype)


@dataclass(frozen=True)
class Knorm(Budgeted):
    """Keeps the keys of small norm, per layer and head.

    A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    spread: ClassVar[str] = "head"

    def arrival(self, layer, unit, position, key):
        return -torch.linalg.vector_norm(key, dim=(-2, -1))


@dataclass(frozen=True)
class TOVA(Budgeted):
    """Evicts the token that the newest query attends to least, averaged over heads, per layer.

    Transformers are Multi-State RNNs, arXiv 2401.06104. The newest token is not exempt.
    """

    spread: ClassVar[str] = "layer"
    watches: ClassVar[bool] = True

    def update(self, score: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        """New scores [n, Z] after a step that attended with `probability` [n, Hs, G, Z]."""
        return probability.mean((1, 2))

    def prompt_scores(self, layer, query, key):
        return causal_attention(query[:, -1:], key).mean((0, 1))


@dataclass(frozen=True)
class H2O(Budgeted):
    """Keeps the newest tokens in half of the budget, those with most accumulated attention in half.

    H2O: Heavy-Hitter Oracle, arXiv 2306.14048. Attention is summed over queries and over the
    query heads of a KV head; each layer and KV head keeps its own.
    """

    spread: ClassVar[str] = "head"
    watches: ClassVar[bool] = True

    def recent(self, budget):
        return budget // 2

    def update(self, score, probability):
        return score + probability.sum((1, 2))

    def prompt_scores(self, layer, query, key):
        total = torch.zeros(key.shape[:2], dtype=query.dtype, device=key.device)
        for first in range(0, query.shape[1], CHUNK):
            rows = query[:, first : first + CHUNK]
            past = key[:, : first + rows.shape[1]]
            total[:, : past.shape[1]] += causal_attention(rows, past).sum((1, 2))
        return total


@dataclass(frozen=True)
class SnapKV(Budgeted):
    """Keeps of a prompt the newest `window` tokens and those that they attend to most.

    SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469. Attention is
    averaged over the window's queries and the query heads of a KV head, then over `kernel`
    neighbouring tokens (the default of its code, which can take their maximum too). Each layer
    and KV head keeps its own.
    """

    spread: ClassVar[str] = "head"
    decoding: ClassVar[bool] = False
    window: int = 32
    kernel: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_window(self)

    def recent(self, budget):
        return budget.clamp(max=self.window)

    def prompt_scores(self, layer, query, key):
        attention = causal_attention(query[:, -self.window :], key).mean((1, 2))  # [H, T]
        older = max(0, key.shape[1] - self.window)
        if older:
            pooled = F.avg_pool1d(attention[:, :older], self.kernel, 1, self.kernel // 2)
            attention = torch.cat([pooled, attention[:, older:]], 1)
        return attention


@dataclass(frozen=True)
class RKV(Budgeted):
    """Keeps the newest `window` tokens, and those that they attend to and that no other resembles.

    R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, arXiv 2505.24133. A prompt is
    reduced to the budget, then the cache of each layer and KV head whenever the tokens read are a
    multiple of `buffer`. Scores are weight * importance - (1 - weight) * redundancy:

    - importance: the window's queries attend to the older tokens; the largest score of the query
      heads of a KV head, softmax, mean over the queries, maximum over `kernel` neighbours;
    - redundancy: a softmax of each token's mean cosine similarity to all tokens, where each token
      is not counted against the `spared` newest of those that are closer to it than `threshold`.

    As the authors' code (github.com/Zefan-Cai/R-KV), but: tokens stay in the order of the text,
    which decides who are neighbours and who is newest, where that code goes on with them in the
    order of their scores; a token that none resembles spares none, where it spares the first one;
    a round comes one token earlier; and the weight is the paper's 0.1, where it has 0.07.
    """

    spread: ClassVar[str] = "head"
    buffer: int = 128
    window: int = 8
    kernel: int = 7
    weight: float = 0.1
    threshold: float = 0.5
    spared: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_window(self)
        if self.buffer < 1 or self.spared < 0 or not 0 <= self.weight <= 1:
            raise ValueError(
                f"RKV got buffer={self.buffer}, spared={self.spared} and weight={self.weight}; "
                f"give a buffer from 1 on, spare 0 or more, and weigh from 0 to 1."
            )

    def recent(self, budget):
        return budget.clamp(max=self.window)

    def prompt_scores(self, layer, query, key):
        """As for all policies; of what is decoded it gets the window's queries, and the cache."""
        score = torch.zeros(key.shape[:2], dtype=query.dtype, device=key.device)
        older = key.shape[1] - self.window
        if older > 0:
            seen = query[:, -self.window :].unflatten(0, (len(key), -1))  # [H, G, window, D]
            scores = (seen @ key[:, None, :older].transpose(2, 3)).amax(1)
            attention = scores.softmax(-1).mean(1)
            importance = F.max_pool1d(attention, self.kernel, 1, self.kernel // 2)
            score[:, :older] = self.weight * importance
            score[:, :older] -= (1 - self.weight) * self.redundancy(key)[:, :older]
        return score

    def redundancy(self, key: torch.Tensor) -> torch.Tensor:
        """Redundancy [H, T] of tokens with keys [H, T, D]; sums to 1."""
        direction = key / (torch.linalg.vector_norm(key, dim=-1, keepdim=True) + 1e-8)
        total = torch.zeros_like(key[..., 0])
        for first in range(0, key.shape[1], CHUNK):
            rows = direction[:, first : first + CHUNK]
            similarity = rows @ direction.transpose(1, 2)  # [H, t, T]
            similarity.diagonal(first, 1, 2).zero_()
            close = similarity > self.threshold
            later = close.sum(-1, True) - close.cumsum(-1, dtype=torch.int32)  # of the close ones
            total += similarity.masked_fill_(close & (later < self.spared), 0.0).sum(1)
        return (total / key.shape[1]).softmax(-1)


@dataclass(frozen=True)
class DMS(Full):
    """A trained evictor decides per layer and KV head; tokens go `evictor.window` tokens later.

    Dynamic Memory Sparsification (Inference-Time Hyper-Scaling with KV Cache Compression),
    arXiv 2506.05345. The evictor's logit at token t+1 decides about token t.
    """

    evictor: object  # has name, fingerprint, window, layers, attached(): kit.dms.evictor.Evictor

    spread: ClassVar[str] = "head"

    @property
    def name(self):
        return self.evictor.name

    @property
    def key(self):
        return {"policy": "dms", "evictor": self.evictor.fingerprint}

    def check(self, context, full_layers):
        if not full_layers:
            raise ValueError("DMS evicts in layers with full attention and this model has none.")
        if tuple(self.evictor.layers) != full_layers:
            raise ValueError(
                f"The evictor decides for layers {list(self.evictor.layers)}, this model has full "
                f"attention in layers {list(full_layers)}; train an evictor for this model."
            )
        if not 1 <= self.evictor.window <= context:
            raise ValueError(
                f"The evictor's window is {self.evictor.window}; give one from 1 to the "
                f"{context} tokens that the model reads."
            )

    def attached(self, weights):
        return self.evictor.attached(weights)


def held_tokens(name: str) -> int | None:
    """Tokens that a unit keeps at most in decoding under the policy of this `name`; None where
    they grow with the text."""
    kind, _, size = name.partition(" ")
    classes = {each.__name__.lower(): each for each in Budgeted.__subclasses__()}
    policy = classes.get(kind)
    return int(size) + policy.buffer if policy and policy.decoding and size.isdigit() else None


def check_window(policy: Budgeted) -> None:
    """Raise ValueError for a `window` of observing queries or a `kernel` that make no sense."""
    who, most = type(policy).__name__, policy.kept_tokens and policy.kept_tokens - 1
    if policy.window < 1 or (most is not None and policy.window > most):
        raise ValueError(
            f"{who} got window={policy.window} and kept_tokens={policy.kept_tokens}; "
            f"give a window from 1 to {most or 'any length'}, and keep more tokens than it has."
        )
    if policy.kernel < 1 or policy.kernel % 2 == 0:
        raise ValueError(f"{who} got kernel={policy.kernel}; give an odd number from 1 on.")


def causal_attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Probabilities [H, G, t, T] of the last t queries [H*G, t, D], scaled, over keys [H, T, D]."""
    heads, length, rows = key.shape[0], key.shape[1], query.shape[1]
    grouped = query.unflatten(0, (heads, -1)).flatten(1, 2)  # [H, G*t, D]
    scores = (grouped @ key.to(query.dtype).transpose(1, 2)).unflatten(1, (-1, rows))
    at = torch.arange(length, device=key.device)
    future = at > at[length - rows :, None]
    return scores.masked_fill_(future, -torch.inf).softmax(-1)
