"""Which slot of the pooled blocks holds which token: pure bookkeeping, no keys, no values.

A Table serves layers that attend alike. Its *planes* are layers that keep different tokens (one
plane for all where they keep the same); its *units* are what keeps tokens of its own: sequences,
or sequences times KV heads. `eviction` says which token a new one replaces, `kv` keeps the keys
and values in the slots that a Table hands out.

A unit fills its slots in order and a new token takes the slot of the one it replaces, so the
first `filled` slots of a unit are live and no others: there are no holes, hence nothing to scan.
A slot of a unit is called by its *ordinal* (0 .. filled-1) or, flat, by its place in the pool.

Axes: P planes, U units (u of them in this step), n blocks, Z slots per block, M blocks of a unit.
"""

import torch

MASKED = -1e30  # finite, so that a fully masked block gets weight 0 and not nan


def spare(need: int, have: int) -> int:
    """Room to allocate where `need` is needed and `have` is there: a sixteenth more at a time."""
    return max(need, have + have // 16)


class Table:
    """Which slot of each plane's pool holds which token of which unit.

    position: [P, n, Z] logical position of the token in a slot, -1 where the slot is free
    bias:     [P, n, Z] what attention adds to the scores: 0, or MASKED where the slot is free
    score:    [P, n, Z] worth of the token where the policy ranks tokens, else None
    owner:    [P, n] unit that owns the block; rank [P, n] which of the unit's blocks it is
    blocks:   [P, U, M] the blocks of each unit; filled [P, U] its live tokens
    used:     blocks in use, one number per plane
    """

    def __init__(self, planes: int, units: int, block: int, device, score=None):
        def empty(*shape: int, dtype=torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.block, self.device = block, device
        self.position = empty(planes, 0, block)
        self.bias = empty(planes, 0, block, dtype=torch.float32)
        self.score = None if score is None else empty(planes, 0, block, dtype=score)
        self.owner, self.rank = empty(planes, 0), empty(planes, 0)
        self.blocks = empty(planes, units, 0)
        self.filled = torch.zeros(planes, units, dtype=torch.long, device=device)
        self.used = [0] * planes
        self.planes = torch.arange(planes, device=device).unsqueeze(1)  # [P, 1]

    def _reserve(self, blocks: int, per_unit: int) -> None:
        """Make room for so many blocks in a plane and in a unit."""

        def widen(array: torch.Tensor, need: int) -> torch.Tensor:
            wide = array.new_zeros(len(array), spare(need, array.shape[1]), *array.shape[2:])
            wide[:, : array.shape[1]] = array
            return wide

        if blocks > self.owner.shape[1]:
            for name in ("position", "bias", "score", "owner", "rank"):
                if (array := getattr(self, name)) is not None:
                    setattr(self, name, widen(array, blocks))
        if per_unit > self.blocks.shape[2]:
            self.blocks = widen(self.blocks.transpose(1, 2), per_unit).transpose(1, 2).contiguous()

    def _append(self, plane: torch.Tensor, unit: torch.Tensor, rank: torch.Tensor) -> None:
        """Give unit [k] of plane [k], in the order of planes, a fresh block as its rank-th."""
        fresh = torch.bincount(plane, minlength=len(self.used))
        first = torch.tensor(self.used, device=self.device) - (fresh.cumsum(0) - fresh)
        block = first[plane] + torch.arange(len(plane), device=self.device)
        self.used = [used + more for used, more in zip(self.used, fresh.tolist())]
        self._reserve(max(self.used), int(rank.max()) + 1)
        self.owner[plane, block], self.rank[plane, block] = unit.int(), rank.int()
        self.blocks[plane, unit, rank] = block.int()
        self.position[plane, block], self.bias[plane, block] = -1, MASKED

    def extend(self, plane: int, units: torch.Tensor, counts, positions) -> torch.Tensor:
        """Slots for the first tokens of empty units: flat slots [sum of counts].

        units [u]; counts [u] tokens of each, at `positions` [sum of counts], unit after unit.
        """
        need = -(-counts // self.block)
        of_unit, rank = _ragged(need)
        if len(rank):
            self._append(torch.full_like(rank, plane), units[of_unit], rank)
        self.filled[plane, units] = counts
        of_unit, ordinal = _ragged(counts)
        slots = self.slots(plane, units[of_unit], ordinal)
        self._put(plane, slots, positions)
        return slots

    def claim(self, units: torch.Tensor, ordinals: torch.Tensor, positions) -> torch.Tensor:
        """One slot in every plane for the next token of each unit: flat slots [P, u].

        units [u]; ordinals [P, u]: a live one is replaced, `filled` is a new one; positions [u].
        """
        grows = ordinals == self.filled[:, units]
        plane, row = (grows & (ordinals % self.block == 0)).nonzero(as_tuple=True)
        if len(plane):
            self._append(plane, units[row], ordinals[plane, row] // self.block)
        self.filled[:, units] += grows
        slots = self.slots(self.planes, units, ordinals)
        self._put(self.planes, slots, positions)
        return slots

    def slots(self, plane, unit: torch.Tensor, ordinal: torch.Tensor) -> torch.Tensor:
        """Flat slots of live ordinals; the arguments broadcast."""
        block = self.blocks[plane, unit, ordinal // self.block]
        return block.long() * self.block + ordinal % self.block

    def _put(self, plane, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.position.flatten(1)[plane, slots] = positions.int()
        self.bias.flatten(1)[plane, slots] = 0.0

    def held(self, plane: int, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Live tokens of each unit [u], and their flat slots unit after unit."""
        counts = self.filled[plane, units]
        of_unit, ordinal = _ragged(counts)
        return counts, self.slots(plane, units[of_unit], ordinal)

    def release(self, units: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Hand the blocks of these units back: the (to, from) block moves of each plane."""
        gone = torch.zeros(self.filled.shape[1], dtype=torch.bool, device=self.device)
        gone[units] = True
        self.filled[:, units] = 0
        moves = []
        for plane, used in enumerate(self.used):
            keep = ~gone[self.owner[plane, :used]]
            total = int(keep.sum())
            to = (~keep[:total]).nonzero().flatten()
            source = keep[total:].nonzero().flatten() + total
            for array in (self.position, self.bias, self.score, self.owner, self.rank):
                if array is not None:
                    array[plane, to] = array[plane, source]
            self.blocks[plane, self.owner[plane, to], self.rank[plane, to]] = to.int()
            self.used[plane] = total
            moves.append((to, source))
        return moves

    def nbytes(self) -> int:
        """Allocated bytes of the bookkeeping."""
        arrays = (self.position, self.bias, self.score, self.owner, self.rank, self.blocks)
        return sum(x.nbytes for x in arrays if x is not None) + self.filled.nbytes


def _ragged(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows of these lengths, laid end to end: the row of each item, and its place there."""
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    start = counts.cumsum(0) - counts
    return row, torch.arange(len(row), device=counts.device) - start[row]


class Step:
    """What one decode step needs of one table, computed once for all of its layers."""

    def __init__(self, table: Table, units: torch.Tensor, positions, slots: torch.Tensor):
        self.table, self.units, self.positions = table, units, positions  # [u] of the new tokens
        self.slots = slots  # [P, u] flat slots of the new tokens
        row_of = torch.zeros(table.filled.shape[1], dtype=torch.long, device=table.device)
        row_of[units] = torch.arange(len(units), device=table.device)
        self.row = row_of[table.owner]  # [P, n] row of this step that a block answers to
        count = -(-table.filled[:, units] // table.block)  # [P, u] blocks
        self.count, self.longest = count.int(), count.amax(1).tolist()
        # [P, u, M] blocks of each row, padded with `used`: the index of an empty partial result.
        blocks = table.blocks[:, units, : max(self.longest)]
        rank = torch.arange(blocks.shape[2], device=table.device)
        empty = torch.tensor(table.used, dtype=torch.int32, device=table.device)[:, None, None]
        self.blocks = torch.where(rank < count.unsqueeze(2), blocks, empty)
