"""A model made wider by fetched blocks: each sequence of a batch by its own.

The units of a feed-forward block ("ffn") stand beside those of the layer's SwiGLU; what they say
is added to what it says: down(act(gate x) * up x). The other kinds, for comparison at equal sizes,
add low-rank changes to linear layers (LoRA, scale 2), or learned pairs of key and value ("kv") that
every token may read: without positions, with a softmax of their own, so that values of zero have no
effect. `Wider` holds the blocks of a batch, a matrix product for all its sequences together, and is
told which token belongs to which of them.

Source: arXiv 2510.02375, sections 3.1 and 4.
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
    """How large a bank is. A unit is a row of `row` numbers in each layer: for feed-forward units
    those of gate, up and down, 3 times the model's width."""

    row: int
    layers: tuple[int, ...]  # that have memory
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
        """Of the whole bank."""
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


def spread(count: int, of: int, where: str) -> tuple[int, ...]:
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
    """Blocks of one subtree without effect, by level [nodes, layers, units, row], float32: what
    reads is drawn, what writes is zero."""
    rng, made = torch.Generator().manual_seed(seed), []
    for level in range(len(shape.sizes)):
        blocks = torch.zeros(shape.branching**level, *shape.block(level))
        for part in _parts(blocks, _widths(weights, shape.layers[0], shape.kind)):
            for reads in part[:-1]:
                reads.normal_(0, reads.shape[-1] ** -0.5, generator=rng)
        made.append(blocks)
    return made


class Wider:
    """Blocks for the sequences of a batch: `blocks` is [sequences, layers, units, row].

    While attached it expects a batch with one row of each sequence, or several after each other,
    or packed tokens that a slot cache, passed to the model as `slots`, has announced.
    """

    def __init__(self, weights: PreTrainedModel, shape: Shape, blocks: torch.Tensor):
        self.shape, self.blocks, self._weights = shape, blocks, weights
        self._widths = _widths(weights, shape.layers[0], shape.kind)
        self._rows = None  # [n, m] of packed tokens, padded with one behind the last
        self._places = None  # whose they are: [n]
        self._single = False  # one token of each of several

    @classmethod
    def empty(cls, weights: PreTrainedModel, shape: Shape, sequences: int) -> "Wider":
        """Room for so many sequences, without effect until `put`."""
        sizes = sequences, len(shape.layers), sum(shape.sizes), shape.row
        return cls(weights, shape, torch.zeros(sizes, dtype=weights.dtype, device=weights.device))

    def put(self, place: int, fetched: Sequence[torch.Tensor]) -> None:
        """What one path fetches, by level [layers, units, row], for the sequence at `place`."""
        torch.cat(list(fetched), dim=1, out=self.blocks[place])

    def _hear(self, module, args, kwargs) -> None:
        """Whose the tokens of this forward pass are."""
        announced = getattr(kwargs.get("slots"), "announced", None)
        if announced is None:
            self._rows = None
            return
        self._places, count = announced
        most = int(count.max())
        steps, starts = torch.arange(most, device=count.device), count.cumsum(0) - count
        inside = steps < count[:, None]
        self._rows = torch.where(inside, starts[:, None] + steps, count.sum())
        self._single = most == 1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model is wider inside this block."""
        hooks = [self._weights.base_model.register_forward_pre_hook(self._hear, with_kwargs=True)]
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
        say = partial(_low_rank if len(part) == 2 else _units, module)
        return out + self._said(say, args[0], part)

    def _pairs(self, attention, part) -> list:
        """Hooks that add what learned pairs say to what the heads of `attention` have read."""
        heard: list[torch.Tensor] = []

        def hear(module, args, query: torch.Tensor) -> None:
            heard[:] = [query]

        def add(module, args) -> torch.Tensor:
            return args[0] + self._said(partial(_attend, attention), heard[0], part)

        asks, writes = attention.q_proj, attention.o_proj
        return [asks.register_forward_hook(hear), writes.register_forward_pre_hook(add)]

    def _said(self, say, x: torch.Tensor, part) -> torch.Tensor:
        """What each sequence's matrices in `part` say of its own tokens x [batch, T, width]."""
        if self._rows is None:
            rows = x.reshape(len(self.blocks), -1, x.shape[-1])
            return say(rows, *part).view(*x.shape[:2], -1)
        x = x[0]
        if self._single:  # all places, the idle ones on zeros: no weights are copied
            wide = x.new_zeros(len(self.blocks), 1, x.shape[-1])
            wide[self._places, 0] = x
            return say(wide, *part)[self._places, 0]
        padded = torch.cat([x, x.new_zeros(1, x.shape[-1])])[self._rows]  # [n, m, width]
        said = say(padded, *(matrix[self._places] for matrix in part))
        flat = said.new_zeros(len(x) + 1, said.shape[-1])
        flat[self._rows.flatten()] = said.flatten(0, 1)
        return flat[:-1]


def _widths(weights: PreTrainedModel, layer: int, kind: str) -> list[tuple[int, ...]]:
    """Of the parts of a row: for each module what reads, then what writes."""
    found = []
    for name in KINDS[kind]:
        module = weights.base_model.layers[layer].get_submodule(name)
        if isinstance(module, nn.Linear):
            found.append((module.in_features, module.out_features))
        elif name == "self_attn":
            found.append((module.k_proj.out_features, module.v_proj.out_features))
        else:
            found.append((module.gate_proj.in_features,) * 3)
    return found


def _parts(blocks: torch.Tensor, widths: list[tuple[int, ...]]) -> list[tuple[torch.Tensor, ...]]:
    """Views of the parts of rows [..., row], by module."""
    pieces = iter(blocks.split([width for each in widths for width in each], dim=-1))
    return [tuple(next(pieces) for _ in each) for each in widths]


def _units(module, x, gate, up, down) -> torch.Tensor:
    """What SwiGLU units [n, units, width] say of x [n, m, width]: [n, m, width]."""
    inner = module.act_fn(torch.bmm(x, gate.transpose(1, 2))) * torch.bmm(x, up.transpose(1, 2))
    return torch.bmm(inner, down)


def _low_rank(module, x, reads, writes) -> torch.Tensor:
    """LoRA: reads [n, rank, in], writes [n, rank, out] on x [n, m, in]: [n, m, out]."""
    return LORA_SCALE * torch.bmm(torch.bmm(x, reads.transpose(1, 2)), writes)


def _attend(module, query, keys, values) -> torch.Tensor:
    """What queries [n, m, heads * head_dim], positions left out, read of learned keys and values
    [n, pairs, kv_heads * head_dim]; heads share them in groups, as those of the text."""
    heads = (-1, module.head_dim)
    query, keys, values = (x.unflatten(-1, heads).transpose(1, 2) for x in (query, keys, values))
    query = getattr(module, "q_norm", nn.Identity())(query)
    how = dict(scale=module.scaling, enable_gqa=True)
    read = nn.functional.scaled_dot_product_attention(query, keys, values, **how)
    return read.transpose(1, 2).flatten(2)
