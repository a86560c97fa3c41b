"""Which slot of the pooled blocks holds which token of which sequence.

Pure bookkeeping over integer tensors, no keys and no values: `kv` keeps those in the slots that
a Table hands out. One Table serves all layers that keep the same tokens.

Axes: N sequences in this step, n blocks in use, Z slots per block, M blocks of one sequence.
"""

import torch

MASKED = -1e30  # finite, so that a fully masked block gets weight 0 and not nan


class Table:
    """Which slot of the pool holds which token of which sequence.

    position: [n, Z] logical position of the token in a slot, -1 where the slot is free
    owner:    [n] sequence that owns the block
    """

    def __init__(self, block: int, window: int | None, device):
        self.block, self.window, self.device = block, window, device
        self.position = torch.empty(0, block, dtype=torch.long, device=device)
        self.owner = torch.empty(0, dtype=torch.long, device=device)

    def _append(self, owner: torch.Tensor) -> None:
        fresh = torch.full((len(owner), self.block), -1, device=self.device)
        self.position = torch.cat([self.position, fresh])
        self.owner = torch.cat([self.owner, owner])

    def kept(self, length: int) -> int:
        """How many tokens of a prompt of `length` stay live."""
        return length if self.window is None else min(length, self.window)

    def extend(self, sequence: int, length: int) -> torch.Tensor:
        """Slots for the last tokens of a prompt of `length`: flat slots [kept]."""
        kept = self.kept(length)
        first = len(self.owner) * self.block
        blocks = -(-kept // self.block)
        self._append(torch.full((blocks,), sequence, device=self.device))
        slots = torch.arange(first, first + kept, device=self.device)
        self.position.view(-1)[slots] = torch.arange(length - kept, length, device=self.device)
        return slots

    def claim(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One free slot for the next token of each of the N live sequences: flat slots [N]."""
        room = (self.position < 0).any(1)
        count = int(sequences.max()) + 1
        where = torch.full((count,), len(self.owner), device=self.device)
        candidates = torch.arange(len(self.owner), device=self.device)[room]
        where.scatter_reduce_(0, self.owner[room], candidates, "amin")
        block = where[sequences]
        needy = block == len(self.owner)
        if needy.any():
            fresh = len(self.owner) + torch.arange(int(needy.sum()), device=self.device)
            self._append(sequences[needy])
            block[needy] = fresh
        slots = block * self.block + (self.position[block] < 0).int().argmax(1)
        self.position.view(-1)[slots] = positions
        return slots

    def slide(self, next_position: torch.Tensor) -> None:
        """Free the slots that the window has passed. next_position: [sequences]."""
        if self.window is not None and len(self.owner):
            oldest = next_position[self.owner] - self.window
            self.position[self.position <= oldest.unsqueeze(1)] = -1

    def compact(self, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop the blocks where `keep` [n] is false: returns (to, from) block moves."""
        total = int(keep.sum())
        to = (~keep[:total]).nonzero().flatten()
        source = keep[total:].nonzero().flatten() + total
        self.owner[to], self.position[to] = self.owner[source], self.position[source]
        self.owner, self.position = self.owner[:total], self.position[:total]
        return to, source

    def live_tokens(self, count: int) -> torch.Tensor:
        """Valid slots of each of the sequences 0 .. count-1: [count]."""
        live = torch.zeros(count, dtype=torch.long, device=self.device)
        return live.index_add_(0, self.owner, (self.position >= 0).sum(1))


class Step:
    """What one decode step needs of one table, computed once for all of its layers."""

    def __init__(self, table: Table, sequences: torch.Tensor, slots: torch.Tensor):
        self.slots = slots  # [N] flat slot of each new token
        count, n = len(sequences), len(table.owner)
        row_of = torch.full((int(sequences.max()) + 1,), -1, device=table.device)
        row_of[sequences] = torch.arange(count, device=table.device)
        self.row = row_of[table.owner]  # [n] row of this step that a block answers to
        bias = torch.zeros(n, table.block, device=table.device)
        self.bias = bias.masked_fill_(table.position < 0, MASKED)[:, None, None]  # [n, 1, 1, Z]
        # [N, M] blocks of each row, padded with n: the index of an empty partial result.
        order = torch.argsort(self.row, stable=True)
        per_row = torch.bincount(self.row, minlength=count)
        start = per_row.cumsum(0) - per_row
        rank = torch.arange(n, device=table.device) - start[self.row[order]]
        self.blocks = torch.full((count, int(per_row.max())), n, device=table.device)
        self.blocks[self.row[order], rank] = order
