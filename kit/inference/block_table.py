"""Block table of the paged KV cache: which slot holds which token. No keys or values here.

A BlockTable serves layers with the same kind of attention. It has one *plane* per layer, or a
single plane where all layers keep the same tokens. A *unit* keeps tokens of its own: it is a
sequence, or one KV head of a sequence. `eviction` chooses the token that a new one replaces;
`kv_cache` stores keys and values in the slots that the table allocates.

A unit fills its slots in order, and a new token takes the slot of the one it replaces. So exactly
the first `filled` slots of a unit are live: there are no holes to search for. A slot is addressed
by its *ordinal* in the unit (0 .. filled-1) or by its flat index in the pool.

Axes: P planes, U units (u of them in this step), n blocks, Z slots per block, M blocks of a unit.
"""

import torch

MASKED = -1e30  # finite, so that a fully masked block gets weight 0 and not nan


def new_capacity(need: int, have: int) -> int:
    """New capacity for `need` entries when `have` are allocated: grows by a sixteenth or more."""
    return max(need, have + have // 16)


class BlockTable:
    """Maps the slots of each plane's pool to tokens, and units to blocks.

    position: [P, n, Z] logical position of the token in a slot, -1 where the slot is free
    bias:     [P, n, Z] attention bias added to the scores: 0, or MASKED where the slot is free
    score:    [P, n, Z] importance of the token where the policy ranks tokens, else None
    owner:    [P, n] unit that owns the block; rank [P, n] index of the block in its unit
    blocks:   [P, U, M] the blocks of each unit; filled [P, U] its live tokens
    ends:     [P, 1] blocks in use; `used` the same on the host, one number per plane, which steps
              of `allocate_token` with `active` leave for `set_used`
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
        self.ends = torch.zeros(planes, 1, dtype=torch.long, device=device)
        self.used = [0] * planes
        self.open = torch.zeros((), device=device)  # a number would be copied to the device
        self.planes = torch.arange(planes, device=device).unsqueeze(1)  # [P, 1]

    def reserve(self, blocks: int, per_unit: int) -> None:
        """Grow the arrays to hold `blocks` in a plane and `per_unit` blocks in a unit."""

        def widen(array: torch.Tensor, need: int) -> torch.Tensor:
            wide = array.new_zeros(len(array), new_capacity(need, array.shape[1]), *array.shape[2:])
            wide[:, : array.shape[1]] = array
            return wide

        if blocks > self.owner.shape[1]:
            for name in ("position", "bias", "score", "owner", "rank"):
                if (array := getattr(self, name)) is not None:
                    setattr(self, name, widen(array, blocks))
        if per_unit > self.blocks.shape[2]:
            self.blocks = widen(self.blocks.transpose(1, 2), per_unit).transpose(1, 2).contiguous()

    def _append(self, plane: torch.Tensor, unit: torch.Tensor, rank: torch.Tensor) -> None:
        """Append a new block to unit[k] of plane[k] at rank[k]; planes in ascending order."""
        fresh = torch.bincount(plane, minlength=len(self.used))
        first = self.ends[:, 0] - (fresh.cumsum(0) - fresh)
        self.ends += fresh.unsqueeze(1)
        block = first[plane] + torch.arange(len(plane), device=self.device)
        self.used = [used + more for used, more in zip(self.used, fresh.tolist())]
        self.reserve(max(self.used), int(rank.max()) + 1)
        self.owner[plane, block], self.rank[plane, block] = unit.int(), rank.int()
        self.blocks[plane, unit, rank] = block.int()
        self.position[plane, block], self.bias[plane, block] = -1, MASKED
        if self.score is not None:  # whoever watched may have written anything
            self.score[plane, block] = 0

    def allocate_prompt(self, plane: int, units: torch.Tensor, counts, positions) -> torch.Tensor:
        """Allocate slots for the first tokens of empty units: flat slots [sum of counts].

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

    def allocate_token(
        self, units: torch.Tensor, ordinals: torch.Tensor, positions, active=None
    ) -> torch.Tensor:
        """Allocate one slot in every plane for the next token of each unit: flat slots [P, u].

        units [u]; ordinals [P, u]: below `filled` a token is replaced, at `filled` one is added;
        positions [u]. With `active` [u] nothing waits for the device: blocks must be free, the last
        block must be in nobody's use, and units that are not active get its slots.
        """
        grows, rank = ordinals == self.filled[:, units], ordinals // self.block
        if active is None:
            plane, row = (grows & (ordinals % self.block == 0)).nonzero(as_tuple=True)
            if len(plane):
                self._append(plane, units[row], rank[plane, row])
        else:
            grows &= active
            self._append_active(units, grows & (ordinals % self.block == 0), rank, active)
        self.filled[:, units] += grows
        slots = self.slots(self.planes, units, ordinals)
        self._put(self.planes, slots, positions)
        return slots

    def _append_active(self, units: torch.Tensor, fresh, rank: torch.Tensor, active) -> None:
        """Append a block at rank [P, u] to each unit where `fresh` [P, u] is set, and write to the
        others' what is there; units that are not `active` [u] get the last block."""
        number = fresh.cumsum(1) + self.ends
        last = torch.full_like(number, self.owner.shape[1] - 1)
        old = torch.where(active, self.blocks[self.planes, units, rank].long(), last)
        block = torch.where(fresh, number - 1, old)
        self.ends.copy_(number[:, -1:])
        self.blocks[self.planes, units, rank] = block.int()
        self.owner[self.planes, block] = units.int().expand_as(block)
        self.rank[self.planes, block] = rank.int()
        for array, free in ((self.position, -1), (self.bias, MASKED), (self.score, 0)):
            if array is not None:
                rows = array[self.planes, block]
                array[self.planes, block] = rows.masked_fill_(fresh.unsqueeze(2), free)

    def set_used(self, ends: list[float]) -> None:
        """Set the host's counts `used` from the values of `ends`."""
        self.used = [*map(int, ends)]

    def slots(self, plane, unit: torch.Tensor, ordinal: torch.Tensor) -> torch.Tensor:
        """Flat slots of live ordinals; the arguments broadcast."""
        block = self.blocks[plane, unit, ordinal // self.block]
        return block.long() * self.block + ordinal % self.block

    def _put(self, plane, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.position.flatten(1)[plane, slots] = positions.int()
        self.bias.flatten(1)[plane, slots] = self.open

    def live_slots(self, plane: int, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of live tokens of each unit [u], and their flat slots, unit after unit."""
        counts = self.filled[plane, units]
        of_unit, ordinal = _ragged(counts)
        return counts, self.slots(plane, units[of_unit], ordinal)

    def release(
        self, units: torch.Tensor, filled: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Free the slots of these units, from ordinal `filled` [P, u] on, by default all: the
        (to, from) block moves to make, per plane."""
        self.filled[:, units] = 0 if filled is None else filled
        stay = torch.where(self.filled > 0, -(-self.filled // self.block), 0)
        moves = []
        for plane, used in enumerate(self.used):
            keep = self.rank[plane, :used] < stay[plane, self.owner[plane, :used]]
            total = int(keep.sum())
            to = (~keep[:total]).nonzero().flatten()
            source = keep[total:].nonzero().flatten() + total
            for array in (self.position, self.bias, self.score, self.owner, self.rank):
                if array is not None:
                    array[plane, to] = array[plane, source]
            self.blocks[plane, self.owner[plane, to], self.rank[plane, to]] = to.int()
            self.used[plane] = total
            self.ends[plane] = total
            moves.append((to, source))
            if filled is not None:  # slots that are free again in blocks that stay
                owner, rank = self.owner[plane, :total], self.rank[plane, :total, None]
                ordinal = rank * self.block + torch.arange(self.block, device=self.device)
                free = ordinal >= self.filled[plane, owner, None]
                self.position[plane, :total].masked_fill_(free, -1)
                self.bias[plane, :total].masked_fill_(free, MASKED)
        return moves

    def nbytes(self) -> int:
        """Allocated bytes of the table."""
        arrays = (self.position, self.bias, self.score, self.owner, self.rank, self.blocks)
        return sum(x.nbytes for x in arrays if x is not None) + self.filled.nbytes


def _ragged(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For concatenated rows of these lengths: the row of each item, and its index in the row."""
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    start = counts.cumsum(0) - counts
    return row, torch.arange(len(row), device=counts.device) - start[row]


class StepIndex:
    """Indices that one decode step needs of a table, computed once for all of its layers.

    With `width` the units are all of the table's, which have no more blocks each; nothing waits for
    the device then, and only a kernel that takes as many blocks of a unit as `count` says may read
    `blocks`.
    """

    def __init__(self, table: BlockTable, units: torch.Tensor, positions, slots, width=None):
        self.table, self.units, self.positions = table, units, positions  # [u] of the new tokens
        self.slots = slots  # [P, u] flat slots of the new tokens
        count = -(-table.filled[:, units] // table.block)  # [P, u] blocks
        self.count, self.whole = count.int(), width is not None
        if self.whole:
            self.blocks = table.blocks[:, :, :width]
            return
        row_of = torch.zeros(table.filled.shape[1], dtype=torch.long, device=table.device)
        row_of[units] = torch.arange(len(units), device=table.device)
        self.row = row_of[table.owner]  # [P, n] row of this step that owns the block
        self.longest = count.amax(1).tolist()
        # [P, u, M] blocks of each row, padded with `used`, the index of an empty partial result.
        blocks = table.blocks[:, units, : max(self.longest)]
        rank = torch.arange(blocks.shape[2], device=table.device)
        empty = table.ends.int().unsqueeze(2)
        self.blocks = torch.where(rank < count.unsqueeze(2), blocks, empty)
