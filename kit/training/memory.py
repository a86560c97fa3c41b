"""Peak memory of a training, computed before it starts.

Held throughout: weights in float32; of each trained weight a gradient and AdamW's two moments; the
reference model of GRPO and the copy that samples its rollouts, in the dtype of the device. Beside
them the largest of three: an update (activations, and logits by tiles), rollouts (keys and values),
and saving (a copy in float16). Compared with measured peaks in tests/training/test_memory.py.

Sources: what a layer keeps for its backward pass, Section 4 of https://arxiv.org/abs/2205.05198,
counted for these layers; TRL's trl/kernels/chunked_logprob.py, which has logits by tiles.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import PretrainedConfig

from kit.inference import packed_weights
from kit.inference.kv_cache import free_bytes
from kit.models.load import Model, default_dtype

TILE = 4096, 32768  # tokens and entries of the vocabulary whose logits TRL computes at once
# Bytes per logit of a tile beside its own where there is no Triton: seven numbers in float32, one
# truth value.
FOLDED = 29
LORA_RANK = 16  # of the LoRA that is proposed


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process of a training at its peak."""

    weights: float
    optimizer: float  # gradients and moments
    reference: float
    sampler: float
    update: float  # of one micro-batch
    rollouts: float
    saving: float

    @property
    def total(self) -> float:
        """What is held throughout, and the largest of what is held in turn."""
        held = self.weights + self.optimizer + self.reference + self.sampler
        return held + max(self.update, self.rollouts, self.saving)

    def __str__(self) -> str:
        parts = {name: value / 1e9 for name, value in vars(self).items() if value >= 5e7}
        return ", ".join(f"{name} {value:.1f}" for name, value in parts.items())


def peak(
    config: PretrainedConfig,
    recipe,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    checkpointing: bool,
    processes: int = 1,
    shards: int = 1,
) -> TrainingMemory:
    """Memory of training a model of shape `config` by `recipe`, an `sft.SFTConfig` or a
    `grpo.GRPOConfig`, on sequences of at most `tokens` tokens with their prompts.

    `device` is "cpu" or "cuda", `dtype` the one it computes in; `checkpointing` says whether layers
    are computed again in the backward pass; `processes` share a step, each with all weights (DDP)
    or with one of `shards` (FSDP).
    """
    config = config.get_text_config()
    hidden, size, cpu = config.hidden_size, dtype.itemsize, device == "cpu"
    linear, embedding = _linear(config), config.vocab_size * hidden
    stored = weights = trained = parameters(config)
    if recipe.lora_rank:
        trained = recipe.lora_rank * _widths(config)
        weights += trained
    moments = 8 * trained
    if recipe.optimizer == "adamw-8bit":  # which leaves embeddings in 32 bits
        moments = 2 * trained + (0 if recipe.lora_rank else 6 * embedding)
    gradients = 4 * trained * (2 if processes > shards else 1)  # DDP copies them into buckets

    sequences = recipe.micro_batch
    layers, rows = config.num_hidden_layers, sequences * tokens
    layer = rows * _layer(config, size)
    activations = layers * layer + 16 * rows * hidden
    casts = size * linear if size < 4 else 0
    if checkpointing:  # what goes into each layer, and one layer with its weights
        activations, casts = layers * rows * 4 * hidden + layer, casts / layers
    head_rows, entries = min(rows, TILE[0]), min(TILE[1], config.vocab_size)
    tile = head_rows * (TILE[1] * size + (FOLDED * entries if cpu else 0))
    head = 0 if recipe.lora_rank else 4 * embedding  # the gradient of one use of the table
    second = head if config.tie_word_embeddings else 0  # that of the other, when layers are done
    update = max(activations + casts + tile + head, head + second)

    reference = sampler = rollouts = 0
    if hasattr(recipe, "groups"):
        together = -(-recipe.groups * recipe.size // processes)
        if recipe.beta and not recipe.lora_rank:
            reference = size * stored
        if recipe.rollouts == "kit":
            sampler = decoding(config, device, dtype) - (4 * stored if size == 4 else 0)
        if recipe.rollouts != "vllm-server":
            kv = 2 * _kv(config) * layers * size
            rollouts = together * (tokens * kv + 12 * config.vocab_size)
    held = (part / shards for part in (4 * weights, gradients + moments, reference))
    return TrainingMemory(*held, sampler, update, rollouts, 2 * weights)


def decoding(config: PretrainedConfig, device: str, dtype: torch.dtype) -> float:
    """Bytes of a model that decodes: its weights and, on a CPU, the packed copies beside them,
    which in float32 need memory for several times as much; see `packed_weights.changes_bits`."""
    config, size = config.get_text_config(), dtype.itemsize
    copies = size * (_linear(config) + config.vocab_size * config.hidden_size)
    scarce = size == 4 and packed_weights.SHARE * copies > psutil.virtual_memory().total
    return size * parameters(config) + (copies if device == "cpu" and not scarce else 0)


def parameters(config: PretrainedConfig) -> int:
    """Weights of all matrices of a model."""
    embedding = config.vocab_size * config.hidden_size
    return _linear(config) + embedding * (1 if config.tie_word_embeddings else 2)


def _kv(config: PretrainedConfig) -> int:
    """Width of the keys of one layer, which is that of its values."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads * head


def _query(config: PretrainedConfig) -> int:
    return _kv(config) * config.num_attention_heads // config.num_key_value_heads


def _linear(config: PretrainedConfig) -> int:
    """Weights of the linear layers but the head."""
    attention = 2 * _query(config) + 2 * _kv(config)
    each = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * each


def _widths(config: PretrainedConfig) -> int:
    """Inputs and outputs of these linear layers in all: weights of LoRA of rank 1."""
    attention = 4 * config.hidden_size + 2 * _query(config) + 2 * _kv(config)
    return config.num_hidden_layers * (
        attention + 3 * (config.hidden_size + config.intermediate_size)
    )


def _layer(config: PretrainedConfig, size: int) -> float:
    """Bytes that a layer keeps of one token: of each of its two norms what goes in, what is
    normalized and what comes out, which autocast copies for each linear layer that reads it; of
    the feed-forward layer four numbers of its width; queries, keys, values and what attention
    makes."""
    norms = 24 if size == 4 else 26
    attention = 2 * _query(config) + 2 * _kv(config)
    return norms * config.hidden_size + size * (4 * config.intermediate_size + attention)


def checkpoints_layers(model: Model, recipe, tokens: int) -> bool:
    """Whether a training of `model`, which is loaded in float32, computes its layers again in the
    backward pass: on a GPU, and where memory is too short without. MemoryError where it is too
    short all the same; the message says what would fit."""
    device, config = model.device.type, model.weights.config
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by accelerate, as is the next
    shards = processes if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    free = free_bytes(model.device) / (processes if device == "cpu" else 1)
    for checkpointing in [True] if device == "cuda" else [False, True]:
        how = device, default_dtype(model.device), checkpointing, processes, shards
        need = peak(config, recipe, tokens, *how)
        if need.total - need.weights <= free:
            return checkpointing
    raise MemoryError(f"The training {shortage(config, recipe, tokens, need.weights + free, *how)}")


def shortage(config: PretrainedConfig, recipe, tokens: int, available: float, *how) -> str:
    """What a training takes that does not fit into `available` bytes, part by part, and the first
    changes of its recipe with which it does; "" where it fits. `how` is as for `peak`, from
    `device` on."""
    need = peak(config, recipe, tokens, *how)
    if need.total <= available:
        return ""
    again = " with gradient checkpointing" if how[2] else ""
    takes = f"takes {need.total / 1e9:.1f} GB at its peak{again}, of {available / 1e9:.1f} "
    takes += f"({need}); "
    for changes in _lighter(recipe, how[0]):
        less = peak(config, replace(recipe, **changes), tokens, *how).total
        if less <= available:
            words = " and ".join(f"{name} = {value!r}" for name, value in changes.items())
            return f"{takes}with {words} it takes {less / 1e9:.1f}."
    return f"{takes}LoRA and one sequence at a time are too much as well: take a smaller model."


def _lighter(recipe, device: str) -> Iterator[dict]:
    """Changes of a recipe that save memory, those first that change a training least."""
    micro = {"micro_batch": 1} if recipe.micro_batch > 1 else {}
    if micro:
        yield micro
    if not recipe.lora_rank:
        if recipe.optimizer == "adamw" and device == "cuda":
            yield {"optimizer": "adamw-8bit"} | micro
        yield {"lora_rank": LORA_RANK}
        yield {"lora_rank": LORA_RANK} | micro
