"""Feed-forward memory: the layers of a model, extended by the blocks that each sequence fetched.

The units of a feed-forward block ("ffn") extend the layer's SwiGLU: their output
down(act(gate x) * up x) is added to the layer's own. The other kinds, for comparison at equal
sizes, add low-rank updates to linear layers (LoRA, scale 2) or learned key-value pairs ("kv") to
which every token attends without positions, by a softmax of their own, so that values of zero have
no effect. `MemoryLayers` holds the blocks of a batch, in one batched matrix product for all its
sequences, and maps packed tokens to them.

Source: https://arxiv.org/abs/2510.02375, sections 3.1 and 4.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

KINDS = {
    "ffn": ("mlp",),
    "lora-ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "lora-qk": ("self_attn.q_proj", "self_attn.k_proj"),
    "lora-vo": ("self_attn.v_proj", "self_attn.o_proj"),
    "kv": ("self_attn",),
}
LORA_SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """The size of a bank. A unit has `row` parameters per layer: those of gate, up and down for a
    feed-forward unit, 3 times the hidden size."""

    row: int
    layers: tuple[int, ...]  # with memory
    sizes: tuple[int, ...]  # units per layer of a node, by level; 0 for none
    branching: int
    kind: str = "ffn"

    @property
    def nodes(self) -> tuple[int, ...]:
        """Per level."""
        return tuple(self.branching ** (level + 1) for level in range(len(self.sizes)))

    @property
    def fetched(self) -> int:
        """Parameters that one context fetches."""
        return self.row * len(self.layers) * sum(self.sizes)

    @property
    def parameters(self) -> int:
        """Parameters of the whole bank."""
        units = sum(nodes * size for nodes, size in zip(self.nodes, self.sizes, strict=True))
        return self.row * len(self.layers) * units

    def block(self, level: int) -> tuple[int, int, int]:
        """Shape of a block: layers, units, row."""
        return len(self.layers), self.sizes[level], self.row


def shape(weights: PreTrainedModel, kind: str, layers, sizes, branching: int) -> Shape:
    """The Shape of a bank of `kind` for this model; ValueError where it has no such layers."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; use {', '.join(KINDS)}.")
    count = len(weights.base_model.layers)
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ValueError(
            f"layers are {list(layers)}; {type(weights).__name__} has 0 to {count - 1}."
        )
    row = sum(sum(widths) for widths in _widths(weights, layers[0], kind))
    return Shape(row, tuple(layers), tuple(sizes), branching, kind)


def choose_layers(count: int, of: int, where: str) -> tuple[int, ...]:
    """`count` of `of` layers: "all", "early", "middle", "late", or "uniform" over the depth."""
    first = {"all": 0, "early": 0, "middle": (of - count) // 2, "late": of - count}
    if where == "all":
        return tuple(range(of))
    if where == "uniform":
        return tuple((2 * i + 1) * of // (2 * count) for i in range(count))
    if where not in first:
        raise ValueError(f"layers are {where!r}; use uniform, {', '.join(first)}.")
    return tuple(range(first[where], first[where] + count))


def initial(weights: PreTrainedModel, shape: Shape, seed: int) -> list[torch.Tensor]:
    """Initial blocks of one subtree by level, [nodes, layers, units, row] float32: random input
    weights and zero output weights, so that they have no effect."""
    rng, initialized = torch.Generator().manual_seed(seed), []
    for level in range(len(shape.sizes)):
        blocks = torch.zeros(shape.branching**level, *shape.block(level))
        for part in _parts(blocks, _widths(weights, shape.layers[0], shape.kind)):
            for reads in part[:-1]:
                reads.normal_(0, reads.shape[-1] ** -0.5, generator=rng)
        initialized.append(blocks)
    return initialized


class MemoryLayers:
    """Memory for the sequences of a batch: `blocks` is [sequences, layers, units, row].

    While attached, a forward pass has one row per sequence, or several consecutive ones, or packed
    tokens whose sequences a slot cache, passed to the model as `slots`, has announced.
    """

    def __init__(self, weights: PreTrainedModel, shape: Shape, blocks: torch.Tensor):
        self.shape, self.blocks, self._weights = shape, blocks, weights
        self._widths = _widths(weights, shape.layers[0], shape.kind)
        self._rows = None  # [n, m]: packed tokens of each sequence, padded with one past the end
        self._places = None  # [n]: places of these sequences in `blocks`
        self._single = False  # each sequence has one token

    @classmethod
    def empty(cls, weights: PreTrainedModel, shape: Shape, sequences: int) -> "MemoryLayers":
        """Memory for so many sequences, without effect until `put`."""
        sizes = sequences, len(shape.layers), sum(shape.sizes), shape.row
        return cls(weights, shape, torch.zeros(sizes, dtype=weights.dtype, device=weights.device))

    def put(self, place: int, fetched: Sequence[torch.Tensor]) -> None:
        """Set the blocks that one path fetched, by level [layers, units, row], at `place`."""
        torch.cat(list(fetched), dim=1, out=self.blocks[place])

    def _set_token_map(self, module, args, kwargs) -> None:
        """Map the tokens of this forward pass to sequences."""
        step_tokens = getattr(kwargs.get("slots"), "announced", None)
        if step_tokens is None:
            self._rows = None
            return
        self._places, count = step_tokens
        most = int(count.max())
        steps, starts = torch.arange(most, device=count.device), count.cumsum(0) - count
        inside = steps < count[:, None]
        self._rows = torch.where(inside, starts[:, None] + steps, count.sum())
        self._single = most == 1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context the model has this memory."""
        hooks = [
            self._weights.base_model.register_forward_pre_hook(
                self._set_token_map, with_kwargs=True
            )
        ]
        for number, layer in enumerate(self.shape.layers):
            parts = _parts(self.blocks[:, number], self._widths)
            for name, part in zip(KINDS[self.shape.kind], parts, strict=True):
                module = self._weights.base_model.layers[layer].get_submodule(name)
                if name == "self_attn":
                    hooks += self._pairs(module, part)
                else:
                    hooks.append(module.register_forward_hook(partial(self._add, part=part)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, module, args, out: torch.Tensor, part) -> torch.Tensor:
        memory = partial(_low_rank if len(part) == 2 else _units, module)
        return out + self._apply(memory, args[0], part)

    def _pairs(self, attention, part) -> list:
        """Hooks that add attention over learned pairs to the output of the heads of `attention`."""
        queries: list[torch.Tensor] = []

        def remember(module, args, query: torch.Tensor) -> None:
            queries[:] = [query]

        def add(module, args) -> torch.Tensor:
            return args[0] + self._apply(partial(_attend, attention), queries[0], part)

        return [
            attention.q_proj.register_forward_hook(remember),
            attention.o_proj.register_forward_pre_hook(add),
        ]

    def _apply(self, memory, x: torch.Tensor, part) -> torch.Tensor:
        """`memory` of x [batch, T, width] and the matrices in `part`, each sequence by its own."""
        if self._rows is None:
            rows = x.reshape(len(self.blocks), -1, x.shape[-1])
            return memory(rows, *part).view(*x.shape[:2], -1)
        x = x[0]
        if self._single:  # all places, the idle ones on zeros: no weights are copied
            wide = x.new_zeros(len(self.blocks), 1, x.shape[-1])
            wide[self._places, 0] = x[: len(self._places)]
            out = memory(wide, *part)[self._places, 0]
            return nn.functional.pad(out, (0, 0, 0, len(x) - len(out)))
        padded = torch.cat([x, x.new_zeros(1, x.shape[-1])])[self._rows]  # [n, m, width]
        out = memory(padded, *(matrix[self._places] for matrix in part))
        flat = out.new_zeros(len(x) + 1, out.shape[-1])
        flat[self._rows.flatten()] = out.flatten(0, 1)
        return flat[:-1]


def _widths(weights: PreTrainedModel, layer: int, kind: str) -> list[tuple[int, ...]]:
    """Widths of the parts of a row: for each module those of its inputs, then of its output."""
    widths = []
    for name in KINDS[kind]:
        module = weights.base_model.layers[layer].get_submodule(name)
        if isinstance(module, nn.Linear):
            widths.append((module.in_features, module.out_features))
        elif name == "self_attn":
            widths.append((module.k_proj.out_features, module.v_proj.out_features))
        else:
            widths.append((module.gate_proj.in_features,) * 3)
    return widths


def _parts(blocks: torch.Tensor, widths: list[tuple[int, ...]]) -> list[tuple[torch.Tensor, ...]]:
    """Views of the parts of rows [..., row], by module."""
    pieces = iter(blocks.split([width for each in widths for width in each], dim=-1))
    return [tuple(next(pieces) for _ in each) for each in widths]


def _units(module, x, gate, up, down) -> torch.Tensor:
    """SwiGLU of units [n, units, width] on x [n, m, width]: [n, m, width]."""
    inner = module.act_fn(torch.bmm(x, gate.transpose(1, 2))) * torch.bmm(x, up.transpose(1, 2))
    return torch.bmm(inner, down)


def _low_rank(module, x, reads, writes) -> torch.Tensor:
    """LoRA: reads [n, rank, in], writes [n, rank, out] on x [n, m, in]: [n, m, out]."""
    return LORA_SCALE * torch.bmm(torch.bmm(x, reads.transpose(1, 2)), writes)


def _attend(module, query, keys, values) -> torch.Tensor:
    """Grouped-query attention of queries [n, m, heads * head_dim], without positions, over learned
    keys and values [n, pairs, kv_heads * head_dim]."""
    heads = (-1, module.head_dim)
    query, keys, values = (x.unflatten(-1, heads).transpose(1, 2) for x in (query, keys, values))
    query = getattr(module, "q_norm", nn.Identity())(query)
    how = dict(scale=module.scaling, enable_gqa=True)
    output = nn.functional.scaled_dot_product_attention(query, keys, values, **how)
    return output.transpose(1, 2).flatten(2)
