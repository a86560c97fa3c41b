"""The pooled blocks that store keys and values, one Pool per layer, and attention over them.

A Pool has a fixed number of blocks, of which a CPU backs with memory those that have been written;
`block_table` allocates the slots. Attention reads the blocks in place, converts them in bounded
portions if they are stored in fewer bits than it computes in, and combines the partial results of a
unit's blocks by their softmax weights, as PagedAttention (https://arxiv.org/abs/2309.06180) and
FlashAttention (https://arxiv.org/abs/2205.14135) do.

Precision, here, in `prefill_attention`, in `triton_attention` and wherever else the kit attends:
queries, keys and values have the model's dtype; scores, softmax, sums and joins are at least
float32; the output of a layer is rounded once, to the model's dtype. So a text that is read in two
ways differs by rounding alone, and as little as with fused kernels.

Axes: u units in this step, n blocks in use, Z slots per block, Hs KV heads in a block,
      G query heads per KV head, D head size.
"""

import math
from collections.abc import Iterator

import numpy
import torch

from kit.inference.block_table import MASKED, StepIndex
from kit.inference.kv_quantization import Quantized, pack, unpack

# Numbers converted to a wider dtype at once. On a CPU a portion stays in its cache; on a GPU, where
# each portion costs dozens of launches, it is a gigabyte of float32.
PORTION = {"cpu": 1 << 20, "cuda": 1 << 28}


class Pool:
    """Keys and values of one layer: [capacity, Hs, Z, D] each."""

    def __init__(self, heads: int, block: int, size: int, dtype: torch.dtype, device):
        self.block, self.state, self.peak_blocks = block, [], 0
        self.kinds = [(heads, block, size, dtype, device)] * 2
        self.arrays: list[torch.Tensor] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of the keys and values of one block."""
        return sum(math.prod(shape) * dtype.itemsize for *shape, dtype, _ in self.kinds)

    def allocate(self, blocks: int) -> None:
        """Allocate so many blocks, once."""
        try:
            self.arrays = [_zeros(blocks, *kind) for kind in self.kinds]
        except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is the former
            raise MemoryError(
                f"No memory for {blocks * self.block} slots of keys and values in a layer; "
                f"lower the batch size, or keep fewer tokens."
            ) from error

    def reserve(self, blocks: int) -> None:
        """The first `blocks` are used from now on; MemoryError where there are not so many."""
        self.peak_blocks = max(self.peak_blocks, blocks)
        if blocks > len(self.arrays[0]):
            raise MemoryError(
                f"One sequence needs {blocks * self.block} slots of keys and values in a layer, "
                f"there is memory for {len(self.arrays[0]) * self.block}; keep fewer tokens."
            )

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store keys and values [k, Hs, D] in flat slots [k]; ValueError for another dtype."""
        if unlike := {key.dtype, value.dtype} - {self.arrays[0].dtype}:
            raise ValueError(
                f"A layer hands over {unlike.pop()}, the weights and the KV cache are "
                f"{self.arrays[0].dtype}; decode without autocast, and a model in one dtype."
            )
        if not slots.is_cuda:
            return self.put(slots, [key, value])
        from kit.inference.triton_layers import stored  # imports Triton, for CUDA only

        stored(slots, key, value, *self.arrays)

    def put(self, slots: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Store what `rows` returned in flat slots [k]."""
        for array, row in zip(self.arrays, rows):
            array[slots // self.block, :, slots % self.block] = row

    def rows(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Copies of the arrays at flat slots [k]: [k, Hs, ...] each."""
        return [array[slots // self.block, :, slots % self.block] for array in self.arrays]

    def keys(self, slots: torch.Tensor, units, positions, end: int, dtype) -> torch.Tensor:
        """Keys [k, Hs, D] at flat slots [k], as attention reads them: of tokens of `units` [k] at
        `positions` [k], in sequences of `end` tokens."""
        return self.rows(slots)[0].to(dtype)

    def move(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy whole blocks."""
        for array in self.arrays:
            array[to] = array[source]

    def portions(self, step: StepIndex, plane: int, dtype: torch.dtype) -> Iterator[tuple]:
        """Blocks in use as (slice, keys, values) in `dtype`, a bounded number at a time if they
        need converting."""
        used, keys = step.table.used[plane], self.arrays[0]
        most = PORTION[keys.device.type] // keys[0].numel()
        for part in _parts(used, used if keys.dtype == dtype else most):
            yield part, *(array[part].to(dtype) for array in self.arrays)

    def read(self, step: StepIndex, plane: int) -> tuple:
        """Keys, values and how to read them, for `triton_attention.paged_attention`."""
        return *self.arrays, None

    def nbytes(self) -> int:
        """Bytes of all blocks that were ever used, and of exact copies."""
        return self.peak_blocks * self.block_bytes + sum(array.nbytes for array in self.state)


class QuantizedPool(Pool):
    """Keys and values as codes with scales and zeros; each unit's newest ones also exact.

    `state`, keys and values [U, residual, Hs, D]: the token at position p is at p % residual, and
    is read from there while its position is among the newest, whether or not others were evicted.
    """

    def __init__(self, heads, block, size, dtype, device, quantized: Quantized, units: int):
        super().__init__(heads, block, size, dtype, device)
        self.quantized, bits, groups = quantized, quantized.bits, size // quantized.group
        quantized.bytes_per_token(size, heads, 1)  # raises if the group does not divide the head
        kinds = [(size * bits // 8, torch.uint8), (groups, torch.half), (groups, torch.half)] * 2
        self.kinds = [(heads, block, *kind, device) for kind in kinds]
        shape = (units, quantized.residual, heads, size)
        self.state = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]

    def write(self, slots, key, value):
        bits, group = self.quantized.bits, self.quantized.group
        if slots.is_cuda and group & (group - 1) == 0:
            from kit.inference.triton_quantization import packed  # imports Triton, for CUDA only

            return packed(slots, key, value, self.arrays, bits, group)
        both = pack(torch.stack([key, value]), bits, group)
        self.put(slots, [x[i] for i in (0, 1) for x in both])

    def remember(self, units: torch.Tensor, end, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the newest of these tokens exactly: units [u], keys and values [rows, t, Hs, D] of
        the t tokens before position `end` (one number, or [u]); rows repeat to match the units."""
        residual, ago = self.quantized.residual, min(key.shape[1], self.quantized.residual)
        if not ago:
            return
        if units.is_cuda and key.shape[1] == 1 and len(key) == len(units):  # a step
            from kit.inference.triton_layers import stored

            at = units * residual + (end - 1) % residual
            pools = (exact.flatten(0, 1).unsqueeze(2) for exact in self.state)
            return stored(at, key[:, 0], value[:, 0], *pools)
        at = torch.as_tensor(end, device=units.device).expand(len(units)).unsqueeze(1)
        at = at - torch.arange(ago, 0, -1, device=units.device)  # [u, ago]
        for exact, rows in zip(self.state, (key, value)):
            newest = rows[:, -ago:].repeat(len(units) // len(rows), 1, 1, 1)
            exact[units.unsqueeze(1), at % residual] = newest

    def keys(self, slots, units, positions, end, dtype):
        residual = self.quantized.residual
        key = unpack(*self.rows(slots)[:3], self.quantized.bits, dtype)
        newest = (positions >= end - residual).nonzero().flatten()
        key[newest] = self.state[0][units[newest], positions[newest] % max(1, residual)].to(dtype)
        return key

    def portions(self, step, plane, dtype):
        used, residual, table = step.table.used[plane], self.quantized.residual, step.table
        numbers = self.arrays[0][0].numel() * 8 // self.quantized.bits
        newest = (step.positions - residual)[step.row[plane]]  # [n]
        for part in _parts(used, PORTION[table.position.device.type] // numbers):
            arrays = [array[part] for array in self.arrays]
            both = [unpack(*arrays[i : i + 3], self.quantized.bits, dtype) for i in (0, 3)]
            position = table.position[plane, part]
            block, offset = (position > newest[part].unsqueeze(1)).nonzero(as_tuple=True)
            unit, at = table.owner[plane, part][block], position[block, offset]
            for rows, exact in zip(both, self.state):
                rows[block, :, offset] = exact[unit, at % max(1, residual)].to(dtype)
            yield part, *both

    def read(self, step, plane):
        from kit.inference.triton_attention import Codes

        keys, key_scale, key_zero, values, value_scale, value_zero = self.arrays
        newest = (step.positions - self.quantized.residual).int()
        kind = (key_scale, value_scale), (key_zero, value_zero), tuple(self.state)
        return keys, values, Codes(self.quantized.bits, *kind, step.table.position[plane], newest)


def _zeros(blocks: int, heads: int, block: int, wide: int, dtype, device) -> torch.Tensor:
    """Zeros, since a free slot has weight 0, and 0 x nan is nan."""
    shape = blocks, heads, block, wide
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages that the system hands out when they are first written, as torch's own zeros are not.
    size = math.prod(shape) * dtype.itemsize
    flat = numpy.zeros(size + 64, numpy.uint8)
    start = -flat.ctypes.data % 64  # a line of the CPU's cache, as torch aligns its own
    return torch.from_numpy(flat[start : start + size]).view(dtype).view(shape)


def _parts(count: int, most: int) -> Iterator[slice]:
    """0 .. count cut into slices of at most `most`, and at least 1."""
    for first in range(0, count, max(1, most)):
        yield slice(first, min(first + max(1, most), count))


def attend(
    query: torch.Tensor,
    pool: Pool,
    step: StepIndex,
    plane: int,
    watch: bool = False,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one new token per unit over its live slots.

    query [u, Hs, G, D], to be multiplied by `scale`; returns `out` [u, Hs, G, D], a new one of at
    least float32 if none is given, and the probabilities [n, Hs, G, Z] of the slots of all blocks
    when `watch` is set, else None.
    """
    used, table = step.table.used[plane], step.table
    precise = torch.promote_types(query.dtype, torch.float32)
    plain = type(pool) is Pool and precise == torch.float32 and not watch
    if step.whole or query.is_cuda and plain:
        return _attend_paged(query, pool, step, plane, watch, scale, out)
    query = query.to(precise) * scale
    row = step.row[plane, :used]
    bias = table.bias[plane, :used, None, None]  # [n, 1, 1, Z]
    # Partial results per block, the last one empty; joined per unit by their softmax weights.
    part = query.new_zeros(used + 1, *query.shape[1:-1], query.shape[-1] + 1)
    top = query.new_full((used + 1, *query.shape[1:-1], 1), MASKED)
    weights = []
    for which, keys, values in pool.portions(step, plane, query.dtype):
        scores = (query[row[which]] @ keys.transpose(-1, -2)).add_(bias[which])  # [., Hs, G, Z]
        torch.amax(scores, -1, keepdim=True, out=top[which])
        weight = scores.sub_(top[which]).exp_()
        part[which, ..., :-1], part[which, ..., -1:] = weight @ values, weight.sum(-1, keepdim=True)
        if watch:
            weights.append(weight)
    of_unit = step.blocks[plane, :, : step.longest[plane]]  # [u, M]
    tops = top[of_unit]  # [u, M, Hs, G, 1]
    highest = tops.amax(1, keepdim=True)
    joined = (part[of_unit] * (tops - highest).exp_()).sum(1)  # [u, Hs, G, D+1]
    total = joined[..., -1:]
    probability = None
    if watch:
        share = (top[:-1] - highest.squeeze(1)[row]).exp_() / total[row]
        probability = torch.cat(weights).mul_(share)
    result = joined[..., :-1] / total
    return result if out is None else out.copy_(result), probability


def _attend_paged(query, pool: Pool, step: StepIndex, plane: int, watch=False, scale=1.0, out=None):
    """`attend` by one Triton kernel that reads the blocks in place. A pool of codes and `watch`
    take a `step` of the whole table."""
    from kit.inference.triton_attention import paged_attention  # imports Triton, for CUDA only

    table = step.table
    keys, values, codes = pool.read(step, plane)
    most = min(len(keys), table.bias.shape[1])
    bias, blocks, count = table.bias[plane, :most], step.blocks[plane], step.count[plane]
    inputs = keys[:most], values[:most], bias, blocks, count, codes
    if not watch:
        return paged_attention(query, *inputs, scale=scale, out=out), None
    out, scores, (top, total) = paged_attention(query, *inputs, watch=True, scale=scale, out=out)
    unit = table.owner[plane, :most]
    probability = (scores - top[unit].unsqueeze(3)).exp_() / total[unit].unsqueeze(3)
    return out, probability.masked_fill_(bias[:, None, None] < 0, 0.0)  # also in free slots
