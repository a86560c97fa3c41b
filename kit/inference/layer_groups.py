"""Layers that are booked together: a Table, the rule that frees its slots, and who owns what.

A model has one Part for its full-attention layers, which a policy may thin, and one for each
size of sliding window, which nothing else touches. `kv` asks a Part where tokens go and keeps
the keys and values there.
"""

from dataclasses import dataclass, field

import torch

from kit.inference.block_table import Step, Table
from kit.inference.eviction import Delayed, Keep, Lowest, Ring
from kit.inference.policies import DMS, Budgeted, Full, Window


@dataclass
class Part:
    """Layers whose tokens are booked in one Table: one plane for all of them, or one each."""

    layers: list[int]
    table: Table
    rule: Keep
    split: int = 1  # units per sequence: 1, or one per KV head
    window: int | None = None  # of sliding attention
    step: Step | None = None  # of the tokens announced last
    stored: list = field(default_factory=list)  # per prompt being read: what is stored, and where

    def plane(self, layer: int) -> int:
        """The plane of the table that books `layer`."""
        return self.layers.index(layer) if len(self.table.used) > 1 else 0

    def layers_of(self, plane: int) -> list[int]:
        """The layers that a plane books."""
        return [self.layers[plane]] if len(self.table.used) > 1 else self.layers

    def units(self, sequences: torch.Tensor) -> torch.Tensor:
        """Units of these sequences, sequence by sequence: [N * split]."""
        heads = torch.arange(self.split, device=sequences.device)
        return (sequences.unsqueeze(1) * self.split + heads).flatten()

    def announce(self, sequences: torch.Tensor, positions: torch.Tensor) -> None:
        """Find slots for one token of each sequence [N] at `positions` [N]: sets `step`."""
        units, each = self.units(sequences), positions.repeat_interleave(self.split)
        slots = self.table.claim(units, self.rule.place(units, each), each)
        self.step = Step(self.table, units, each, slots)

    def keep(self, layer: int, group: torch.Tensor, query, key, evicted) -> None:
        """Book what one layer stores of a prompt for the sequences in `group`, into `stored`:
        which tokens [units of a sequence, T] and their flat slots. Arguments as in eviction."""
        units, plane, copies = self.units(group), self.plane(layer), len(group)
        which, worth = self.rule.prompt(layer, query, key, evicted)
        counts, positions = which.sum(1).repeat(copies), which.nonzero()[:, 1].repeat(copies)
        slots = self.table.extend(plane, units, counts, positions)
        self.rule.admit(plane, units, slots, which, worth, evicted)
        self.stored.append((which, slots))

    def read(self, sequence: torch.Tensor) -> tuple[list, list]:
        """What is booked of one sequence [1]: per plane (slots, counts, positions, scores), and
        the state of the rule."""
        table, units, planes = self.table, self.units(sequence), []
        for plane in range(len(table.used)):
            counts, slots = table.held(plane, units)
            arrays = [x for x in (table.position, table.score) if x is not None]
            planes.append((slots, counts, *(x.flatten(1)[plane, slots] for x in arrays)))
        return planes, [x[:, units] for x in self.rule.state]

    def restore(self, group: torch.Tensor, booked: tuple[list, list]) -> list[torch.Tensor]:
        """Book what was read for every sequence of `group`: flat slots of each plane."""
        units, copies, found = self.units(group), len(group), []
        for plane, (_, counts, positions, *score) in enumerate(booked[0]):
            slots = self.table.extend(plane, units, counts.repeat(copies), positions.repeat(copies))
            if score:
                self.table.score.flatten(1)[plane, slots] = score[0].repeat(copies)
            found.append(slots)
        for mine, theirs in zip(self.rule.state, booked[1]):
            mine[:, units] = theirs.repeat(1, copies, *[1] * (theirs.dim() - 2))
        return found

    def kept(self, plane: int, sequence: torch.Tensor) -> list[torch.Tensor]:
        """Positions of the live tokens of each unit of one sequence [1], ascending, on the CPU."""
        counts, slots = self.table.held(plane, self.units(sequence))
        positions = self.table.position.flatten(1)[plane, slots].long().cpu()
        return [x.sort().values for x in positions.split(counts.tolist())]

    def nbytes(self) -> int:
        """Allocated bytes of the bookkeeping."""
        return self.table.nbytes() + sum(x.nbytes for x in self.rule.state)


def sliding(layers: list[int], window: int, capacity: int, block: int | None, device) -> Part:
    """Layers of sliding attention, whose last token sees `window` tokens, itself included."""
    table = Table(1, capacity, block or 32, device)
    return Part(layers, table, Ring(table, 0, window, window), window=window)


def full(
    layers: list[int], policy: Full, heads: int, capacity: int, block: int | None, device, precise
) -> Part:
    """Layers of full attention, thinned by `policy`; scores have the dtype `precise`."""
    split = heads if policy.spread == "head" else 1
    planes = 1 if policy.spread == "model" else len(layers)
    ring = isinstance(policy, Window) and policy.kept_tokens is not None
    ranks = isinstance(policy, Budgeted) and not ring
    size = block or (32 if split == 1 else 16)  # a head's share of a block is what is wasted
    table = Table(planes, capacity * split, size, device, score=precise if ranks else None)
    if ring:
        rule = Ring(table, policy.sinks, policy.kept_tokens, policy.kept_tokens + 1)
    elif ranks:
        rule = Lowest(table, policy)
    elif isinstance(policy, DMS):
        rule = Delayed(table, policy.evictor.window)
    else:
        rule = Keep(table)
    return Part(layers, table, rule, split)
