"""The ledger: bytes of weights, KV cache, strategies, bank and evictor, by formula and measured.

Bytes are bytes. GiB is 2**30 of them, GB is 10**9; `text` says both.

Source: https://arxiv.org/abs/2510.10964, memory model and table 1: linear layers quantized in
groups with a 16-bit scale and a packed zero each, embeddings, head and norms at 16 bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kit.inference.kv_cache import SlotCache, layer_windows
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import Full
from kit.models import quantization

GIB, GB = 2**30, 10**9
UNITS = ((3, ("GiB", "GB")), (2, ("MiB", "MB")), (1, ("KiB", "kB")))  # by power of 1024 and 1000
PARTS = (
    "linear weights", "scales and zeros", "embeddings", "norms", "keys and values", "strategies",
    "bank", "evictor",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The sizes that determine the bytes of a Llama, Qwen or Gemma decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # one table for embeddings and head
    norms: int  # numbers in all norms
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; () for none
    context: int = 0  # tokens that it reads at most; 0 where that is not known

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the linear layers of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (self.hidden, queries), (self.hidden, keys), (self.hidden, keys)
        wide = (self.hidden, self.intermediate)
        return (*attention, (queries, self.hidden), wide, wide, wide[::-1])

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear layers, which are quantized."""
        return self.layers * sum(inside * outside for inside, outside in self.linear)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings and of the head, unless it is tied to them."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.linear_parameters + self.embedding_parameters + self.norms

    def kv_numbers(self, tokens: float, kept: float = 1.0) -> float:
        """Numbers in the keys and values of one sequence of `tokens` tokens; the layers without a
        sliding window keep the share `kept` of them, as policies leave the others alone."""
        windows = self.windows or (None,) * self.layers
        live = sum(kept * tokens if window is None else min(window, tokens) for window in windows)
        return 2 * self.kv_heads * self.head_dim * live


def architecture(config: PretrainedConfig) -> Architecture:
    """The sizes in a model's config.json."""
    config = config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    family = config.model_type
    each = {"llama": 2 * hidden, "qwen2": 2 * hidden, "qwen3": 2 * hidden + 2 * head}
    each["gemma3_text"] = 4 * hidden + 2 * head
    if family not in each:
        raise ValueError(f"no ledger for models of type {family!r}; there is one for {[*each]}")
    bias = config.num_attention_heads * head + 2 * config.num_key_value_heads * head
    return Architecture(
        layers, hidden, config.num_attention_heads, config.num_key_value_heads, head,
        config.intermediate_size, config.vocab_size, bool(config.tie_word_embeddings),
        layers * (each[family] + bias * (family == "qwen2")) + hidden,
        tuple(layer_windows(config)), _longest(config),
    )  # fmt: skip


def _longest(config: PretrainedConfig) -> int:
    """Tokens that a config allows, with the factor by which its rotary embeddings are scaled."""
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or 0
    scaled = round(original * (rope.get("factor") or 1))
    return max(scaled, getattr(config, "max_position_embeddings", None) or 0)


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, tied: bool) -> Architecture:
    norms = layers * (2 * hidden + 2 * 128) + hidden
    sizes = layers, hidden, heads, 8, 128, intermediate, 151_936, tied, norms
    return Architecture(*sizes, context=40_960)


QWEN3 = {  # from the config.json of each
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12288, False),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17408, False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25600, False),
}


@dataclass(frozen=True)
class Packing:
    """How linear weights are stored. The defaults at 4 and 8 bit are GPTQ's, those of the paper."""

    bits: int = 16
    group: int = 128  # weights that share a scale and a zero
    scale_bits: int = 16
    zero_bits: int | None = None  # None: packed as wide as the weights
    index_bits: int = 32  # GPTQ's group number of each input
    native_bits: int = 16  # of what is not quantised

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8, 16, 32) or self.group < 1:
            raise ValueError(
                f"weights of {self.bits} bit in groups of {self.group}; use 2, 3, 4, 8, 16 or 32 "
                f"bit, and groups of at least one"
            )

    @property
    def quantized(self) -> bool:
        return self.bits < self.native_bits


def packing(bits: int, config: PretrainedConfig | None = None) -> Packing:
    """How the kit stores weights of so many bits: HQQ, scale and zero at 16 bit. 16 leaves them as
    they are: in a GPTQ or AWQ checkpoint, by its `config`, quantised already."""
    stored = getattr(config, "quantization_config", None)
    if stored and bits == 16:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        return Packing(stored["bits"], stored["group_size"])
    return Packing(bits, quantization.GROUP, zero_bits=16, index_bits=0)


def cache(a: Architecture, bits: int) -> Quantized | None:
    """How the kit stores keys and values: in groups of 32, or as many as divide a head."""
    return None if bits == 16 else Quantized(bits, math.gcd(32, a.head_dim))


def weights(a: Architecture, packing: Packing = Packing()) -> dict[str, int]:  # noqa: B008 (frozen)
    """Bytes of the weights, by part."""
    count, p, more = a.linear_parameters, packing, 0.0
    if p.quantized:
        zero = p.bits if p.zero_bits is None else p.zero_bits
        inputs = a.layers * sum(inside for inside, _ in a.linear)
        more = count / p.group * (p.scale_bits + zero) / 8 + inputs * p.index_bits / 8
    native = p.native_bits / 8
    return {
        "linear weights": round(count * min(p.bits, p.native_bits) / 8),
        "scales and zeros": round(more),
        "embeddings": round(a.embedding_parameters * native),
        "norms": round(a.norms * native),
    }


def keys_and_values(
    a: Architecture,
    tokens: float,
    quantized: Quantized | None = None,
    native_bits: int = 16,
    kept: float = 1.0,
) -> float:
    """Bytes of the keys and values of one sequence of `tokens` tokens, `kept` of them live, see
    `Architecture.kv_numbers`; what a quantised cache keeps exact as well is counted twice, as it is
    stored."""
    if quantized is None:
        return a.kv_numbers(tokens, kept) * native_bits / 8
    exact = a.kv_numbers(quantized.residual) * native_bits / 8
    return a.kv_numbers(tokens, kept) * quantized.bits_per_value / 8 + exact


@dataclass(frozen=True)
class Configuration:
    """One allocation of memory: weights, cache, strategies, bank and evictor."""

    architecture: Architecture
    packing: Packing = field(default_factory=Packing)
    tokens: int = 0  # of one sequence, its question and its answer, without strategies
    width: int = 1  # sequences per question
    kept: float = 1.0  # share of its tokens that a sequence's cache holds at most
    quantized: Quantized | None = None  # of keys and values
    strategies: int = 0  # tokens of retrieved strategies in the prompt
    strategies_bytes: int = 0  # of their bank, if it is held in memory
    fetched: int = 0  # bytes of parametric memory that one sequence fetches
    resident: int = 0  # bytes of the bank that are cached
    evictor: int = 0  # bytes of the policy's weights

    @property
    def kv_bits(self) -> int:
        """Bits of the codes of keys and values."""
        return self.quantized.bits if self.quantized else self.packing.native_bits

    def parts(self, batch: int = 1) -> dict[str, float]:
        """Bytes by part, of weights a `batch`-th: `batch` questions are answered together."""
        native = self.packing.native_bits
        length = self.tokens + self.strategies

        def live_bytes(tokens: float) -> float:
            return keys_and_values(self.architecture, tokens, self.quantized, native, self.kept)

        live = self.width * live_bytes(length)
        without = self.width * live_bytes(self.tokens)
        shared = {**weights(self.architecture, self.packing), "evictor": self.evictor}
        sizes = {name: count / batch for name, count in shared.items()}
        sizes["keys and values"] = without
        sizes["strategies"] = live - without + self.strategies_bytes / batch
        sizes["bank"] = self.width * self.fetched + self.resident / batch
        return {name: sizes[name] for name in PARTS}

    def total(self, batch: int = 1) -> float:
        """Bytes in all, per question where `batch` questions share the weights."""
        return sum(self.parts(batch).values())


def crossover(a: Architecture, packing: Packing = Packing()) -> float:  # noqa: B008 (frozen)
    """Tokens at which keys and values take as many bytes as the weights, with full attention in all
    layers."""
    per_token = 2 * a.kv_heads * a.head_dim * a.layers * packing.native_bits / 8
    return sum(weights(a, packing).values()) / per_token


def affordable_tokens(a: Architecture, memory: float, packing: Packing = Packing()) -> int:  # noqa: B008
    """Tokens of one sequence whose keys and values fill what the weights leave of `memory` bytes; 0
    where the weights do not fit."""
    left = memory - sum(weights(a, packing).values())
    return max(0, int(left / keys_and_values(a, 1, native_bits=packing.native_bits)))


def reported_bytes(contrast: Mapping) -> tuple[float, str] | None:
    """The ledger's number for what a claim about bytes says, and its unit; None for other claims.

    `value` is weights_gib (of `model` at `bits`), kv_gib or kv_gb (of `model`, `tokens`, `width`),
    all as in table 1.
    """
    kind = contrast.get("value")
    if kind == "weights_gib":
        sizes = weights(QWEN3[contrast["model"]], Packing(contrast["bits"]))
        return sum(sizes.values()) / GIB, "GiB"
    if kind in ("kv_gib", "kv_gb"):
        each = keys_and_values(QWEN3[contrast["model"]], contrast["tokens"])
        unit = GIB if kind == "kv_gib" else GB
        return contrast["width"] * each / unit, "GiB" if kind == "kv_gib" else "GB"
    return None


def stored(tensor: torch.Tensor) -> dict[tuple, int]:
    """Bytes of the storages behind a tensor, by where they lie; all parts of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = [stored(getattr(tensor, name)) for name in names]
        return {key: count for part in parts for key, count in part.items()}
    storage = tensor.untyped_storage()
    return {(str(tensor.device), storage.data_ptr()): storage.nbytes()}


def measured_weights(model: PreTrainedModel) -> dict[str, int]:
    """Allocated bytes of a model's weights; scales and zeros count with the weights they scale."""
    sizes = dict.fromkeys(("linear weights", "embeddings", "norms"), 0)
    counted: set[tuple] = set()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():  # HQQ's scales and zeros
        meta = getattr(module, "meta", None) or {}
        tensors += [(name, value) for value in meta.values() if torch.is_tensor(value)]
    for name, tensor in tensors:
        if "rotary" in name:
            continue
        kind = "norms" if "norm" in name or name.endswith("bias") else "linear weights"
        kind = "embeddings" if "embed_tokens" in name or name.startswith("lm_head") else kind
        for key, count in stored(tensor).items():
            sizes[kind] += count if key not in counted else 0
            counted.add(key)
    return sizes


def measured_cache(
    model: PreTrainedModel,
    sequences: int,
    tokens: int,
    policy: Full = Full(),  # noqa: B008 (frozen)
    quantized: Quantized | None = None,
    kept: float = 1.0,
) -> int:
    """Allocated bytes of the keys and values of `sequences` of `tokens` each, at random; `kept` of
    them live in layers that the policy thins."""
    slots = SlotCache(model, sequences, policy, quantized=quantized)
    slots.fill(sequences, tokens, max(1, round(kept * tokens)))
    return sum(pool.nbytes() for pool in slots.pools)


def text(count: float) -> str:
    """Bytes in both units, for display; small ones in MiB and MB, or KiB and kB."""
    power, (binary, decimal) = next(
        (power, names) for power, names in UNITS if count >= 0.1 * 1024**power or power == 1
    )
    return f"{count / 1024**power:.3g} {binary} ({count / 1000**power:.3g} {decimal})"
