"""Decode attention on a GPU that reads the blocks in use and nothing else, in Triton.

One query token per unit against the pooled blocks of `kit.inference.block_table`, as
`kit.inference.kv_cache` lays them out. PagedAttention (Kwon et al., arXiv 2309.06180): keys and
values are found through a block table. Flash-decoding (Dao et al., 2023): a unit's blocks are cut
into chunks that programs of their own reduce, and a second kernel joins the partial softmaxes, so
that few units still fill the card. Only `kit.inference.kv_cache`'s CUDA branch imports this; on
the CPU nothing here runs, except in Triton's interpreter, where the tests check it. Free slots
inside a block in use are read and masked.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # fixed when the kernels below are decorated
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPAN = 512  # tokens of one chunk, always: sums must not depend on who else is decoded
_SMALL = ["table", "count", "tops", "totals"]
_DEAD = tl.constexpr(-1e29)  # scores below belong to masked slots, which carry -1e30


class Codes(NamedTuple):
    """How to read keys and values that are codes, see `kit.inference.kv_quantization`.

    Slots whose position [n, Z] int32 is above `newest` [U] are read from `exact`, keys and values
    [U, residual, Hs, D] in the dtype of the model, at position % residual; the others are scale and
    zero, [n, Hs, Z, D / group] float16 of keys and of values, and uint8 codes of so many bits.
    """

    bits: int
    scales: tuple[torch.Tensor, torch.Tensor]
    zeros: tuple[torch.Tensor, torch.Tensor]
    exact: tuple[torch.Tensor, torch.Tensor]
    position: torch.Tensor
    newest: torch.Tensor


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    count: torch.Tensor,
    codes: Codes | None = None,
    watch: bool = False,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Attention of one new token of each of U units to its live slots: [U, Hs, G, D] float32, or
    what is given as `out`, contiguous and of any of DTYPES.

    query [U, Hs, G, D], multiplied by `scale` and then rounded to the dtype of the keys where
    tensor cores multiply; keys, values [n, Hs, Z, D]; bias [n, Z] float32, 0 for a live slot and
    -1e30 for a free one, whose keys and values must be finite; table [U, M] the blocks of each
    unit, of which the first `count` [U] are in use (at most M, block numbers below n: not checked,
    they stay on the device). A unit without live slots gets zeros. Scores and sums are float32.
    Nothing waits for the device, so a CUDA graph can capture it; M may exceed what is in use. With
    `codes` keys and values are uint8 [n, Hs, Z, D * bits / 8]. With `watch` there come, too, the
    scores of slots [n, Hs, G, Z], anything outside of blocks in use, and of each query the largest
    score and the sum of exp(score - largest): [2, U, Hs, G].
    """
    _check(query, keys, values, bias, table, count, codes)
    units, heads, group, size = query.shape
    block, width = keys.shape[2], table.shape[1]
    single = dict(dtype=torch.float32, device=query.device)
    out = torch.empty(query.shape, **single) if out is None else out
    scores = torch.empty(len(keys), heads, group, block, **single) if watch else None
    whole = torch.empty(2, units, heads, group, **single)
    if width == 0 or units == 0:
        return (out.zero_(), scores, whole) if watch else out.zero_()
    chunks = triton.cdiv(width * block, SPAN)
    # A lone chunk is the result; otherwise partial results wait in a workspace to be joined.
    part = out if chunks == 1 else torch.empty(units, heads, chunks, group, size, **single)
    # largest score, sum of weights
    stats = whole if chunks == 1 else torch.empty(2, units * heads * chunks * group, **single)
    shape = dict(HEADS=heads, GROUP=group, SIZE=size, BLOCK=block)
    inputs = (query.contiguous(), keys, values, bias, table, count, part, stats[0], stats[1])
    read = (*[None] * 8, scores, scale, table.stride(0), SPAN)
    how = dict(BITS=0, SPREAD=1, RESIDUAL=0)
    if codes:
        arrays = zip(codes.scales, codes.zeros, codes.exact)
        read = (*next(arrays), *next(arrays), codes.position, codes.newest, *read[8:])
        spread, residual = size // codes.scales[0].shape[3], codes.exact[0].shape[1]
        how = dict(BITS=codes.bits, SPREAD=spread, RESIDUAL=residual)
    tile = tiling(group, size, codes.exact[0].dtype if codes else keys.dtype, bool(codes))
    _attend[(units * heads, chunks)](*inputs, *read, **shape, **tile, **how)
    if chunks > 1:
        partial = (part, stats[0], stats[1], count, out, *whole)
        _join[(units * heads * group,)](*partial, chunks, SPAN, **shape, WIDE=tile["WIDE"])
    return (out, scores, whole) if watch else out


def tiling(group: int, size: int, dtype: torch.dtype, codes: bool = False) -> dict:
    """How a program walks its chunk: padded shapes, tokens per tile and stages.

    16 KiB of keys and as much of values are in flight per tile; five such programs fit one
    multiprocessor of an H100, which hides the latency of its memory. Products are tl.dot at any
    group size: Triton pads the query heads to the 16 rows of a tensor core, and compiled for
    sm_90 a group of 2 then takes 88 registers where element-wise sums take 238.
    """
    rows, wide = triton.next_power_of_2(group), triton.next_power_of_2(size)
    wide = max(wide, 16)  # the depth of one tensor core product
    tile = min(max(16, 16384 // (wide * dtype.itemsize)), 128)
    if codes:
        tile = 32 if wide == size and dtype.itemsize == 2 else 16  # decoding takes registers
    elif dtype == torch.float32 and rows > 8:
        tile = 16  # exact products without tensor cores would spill
    return dict(ROWS=rows, WIDE=wide, TILE=tile, STAGES=3)


def _check(query, keys, values, bias, table, count, codes) -> None:
    if query.dim() != 4 or keys.dim() != 4 or table.dim() != 2:
        raise ValueError(
            "paged_attention takes query [U, Hs, G, D], keys [n, Hs, Z, D] and table [U, M]; got "
            f"{list(query.shape)}, {list(keys.shape)} and {list(table.shape)}."
        )
    units, heads, _, size = query.shape
    blocks, _, block, _ = keys.shape
    wide, kinds = (size * codes.bits // 8, (torch.uint8,)) if codes else (size, DTYPES)
    expected = {
        "keys": (keys, (blocks, heads, block, wide), kinds),
        "values": (values, (blocks, heads, block, wide), (keys.dtype,)),
        "bias": (bias, (blocks, block), (torch.float32,)),
        "table": (table, (units, table.shape[1]), (torch.int32, torch.int64)),
        "count": (count, (units,), (torch.int32, torch.int64)),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; query {list(query.shape)} and keys "
                f"{list(keys.shape)} ask for {list(shape)}."
            )
        if tensor.dtype not in dtypes or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; give it as one of "
                f"{', '.join(map(str, dtypes))} on {query.device}."
            )
        # Rows of the table may be strided: a table with spare capacity is passed as a slice.
        if not (tensor.is_contiguous() or name == "table" and tensor.stride(1) == 1):
            raise ValueError(f"{name} is not contiguous; pass {name}.contiguous().")
    if block & (block - 1):
        raise ValueError(f"Blocks have {block} slots; choose a power of two such as 16 or 32.")
    if not (query.is_cuda or INTERPRETED):
        raise ValueError(f"paged_attention needs CUDA tensors; query is on {query.device}.")


# What changes from step to step is not specialised on, or each new table width would compile anew.
@triton.jit(do_not_specialize=["table_stride", "span"], do_not_specialize_on_alignment=_SMALL)
def _attend(
    query, keys, values, bias, table, count,
    part, tops, totals,  # [U*Hs, chunks, G, D], [U*Hs, chunks, G] and as many
    key_scale, key_zero, key_exact, value_scale, value_zero, value_exact, position, newest,  # Codes
    scores,  # None where nobody watches
    scale, table_stride, span,  # of the query; of the table; tokens of a chunk
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,  # GROUP and SIZE, padded
    TILE: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr, SPREAD: tl.constexpr, RESIDUAL: tl.constexpr,  # of Codes; 0 bits: none
):  # fmt: skip
    """Program (unit and head, chunk): its softmax over one chunk, for all query heads at once."""
    pair, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.num_programs(1)
    unit, head = pair // HEADS, pair % HEADS
    first = chunk * span
    end = tl.minimum(first + span, tl.load(count + unit).to(tl.int32) * BLOCK)
    if first >= end and chunks > 1:
        return  # _join does not look here
    row, column, step = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    within = (column < SIZE)[None, :]
    line = ((pair * chunks + chunk) * GROUP + row)[:, None]
    own = (row < GROUP)[:, None] & within
    q = tl.load(query + (pair * GROUP + row)[:, None] * SIZE + column[None, :], own, 0.0)
    q = (q.to(tl.float32) * scale).to(key_exact.dtype.element_ty if BITS else keys.dtype.element_ty)
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDE], tl.float32)
    for start in tl.range(first, end, TILE, num_stages=STAGES):
        token, inside = start + step, start + step < end
        number = tl.load(table + unit * table_stride + token // BLOCK, inside, 0).to(tl.int64)
        shift = tl.load(bias + number * BLOCK + token % BLOCK, inside, -1e30)
        slot = (number * HEADS + head) * BLOCK + token % BLOCK
        mask = inside[:, None] & within
        if BITS:
            place = tl.load(position + number * BLOCK + token % BLOCK, inside, -1)
            recent = (place > tl.load(newest + unit))[:, None] & mask
            exact = ((unit * RESIDUAL + place % max(1, RESIDUAL)) * HEADS + head)[:, None] * SIZE
            exact += column[None, :]
            k = _decoded(keys, key_scale, key_zero, slot, inside, BITS, SPREAD, SIZE, WIDE)
            v = _decoded(values, value_scale, value_zero, slot, inside, BITS, SPREAD, SIZE, WIDE)
            k = _newest(k, key_exact, exact, recent, RESIDUAL)
            v = _newest(v, value_exact, exact, recent, RESIDUAL)
        else:
            at = slot[:, None] * SIZE + column[None, :]
            k, v = tl.load(keys + at, mask, 0.0), tl.load(values + at, mask, 0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") + shift[None, :]
        if scores is not None:
            at = (((number * HEADS + head) * GROUP)[None, :] + row[:, None]) * BLOCK
            at += (token % BLOCK)[None, :]
            tl.store(scores + at, score, (row < GROUP)[:, None] & inside[None, :])
        higher = tl.maximum(top, tl.max(score, 1))
        fade, weight = tl.exp(top - higher), tl.exp(score - higher[:, None])
        total = total * fade + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        top = higher
    if chunks == 1:  # the largest weight is 1, so a sum below 1 is that of no slots at all
        out = tl.where(top[:, None] > _DEAD, out / tl.maximum(total, 1.0)[:, None], 0.0)
    at = (pair * chunks + chunk) * GROUP + row
    tl.store(tops + at, top, row < GROUP), tl.store(totals + at, total, row < GROUP)
    tl.store(part + line * SIZE + column[None, :], out, own)


@triton.jit
def _decoded(
    codes, scale, zero, slot, inside,
    BITS: tl.constexpr, SPREAD: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Numbers of the slots that are `inside`, in float32: zero + scale * code."""
    if SIZE == WIDE and SPREAD & (SPREAD - 1) == 0:
        return _decoded_whole(codes, scale, zero, slot, inside[:, None], BITS, SPREAD, SIZE)
    column = tl.arange(0, WIDE)
    mask = inside[:, None] & (column < SIZE)[None, :]
    at = slot[:, None] * (SIZE * BITS // 8) + (column * BITS // 8)[None, :]
    code = tl.load(codes + at, mask, 0).to(tl.int32) >> (column * BITS % 8)[None, :]
    group = slot[:, None] * (SIZE // SPREAD) + (column // SPREAD)[None, :]
    step = tl.load(scale + group, mask, 0.0).to(tl.float32)
    first = tl.load(zero + group, mask, 0.0).to(tl.float32)
    return (code & (2**BITS - 1)).to(tl.float32) * step + first


@triton.jit
def _decoded_whole(
    codes, scale, zero, slot, inside,
    BITS: tl.constexpr, SPREAD: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`_decoded` where all sizes are powers of two: each byte, scale and zero is read once."""
    TILE: tl.constexpr = slot.shape[0]
    BYTES: tl.constexpr = SIZE * BITS // 8
    GROUPS: tl.constexpr = SIZE // SPREAD
    code = tl.load(codes + slot[:, None] * BYTES + tl.arange(0, BYTES)[None, :], inside, 0)
    if BITS == 4:
        code = tl.join(code & 15, code >> 4)
    elif BITS == 2:
        even, odd = tl.join(code & 3, code >> 4 & 3), tl.join(code >> 2 & 3, code >> 6)
        code = tl.join(even, odd)
    at = slot[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    step = tl.load(scale + at, inside, 0.0).to(tl.float32)[:, :, None]
    first = tl.load(zero + at, inside, 0.0).to(tl.float32)[:, :, None]
    numbers = tl.reshape(code, [TILE, GROUPS, SPREAD]).to(tl.float32) * step + first
    return tl.reshape(numbers, [TILE, SIZE])


@triton.jit
def _newest(numbers, exact, at, recent, RESIDUAL: tl.constexpr):
    """The numbers in the dtype of the model, those of recent tokens as they were."""
    if RESIDUAL:
        numbers = tl.where(recent, tl.load(exact + at, recent, 0.0).to(tl.float32), numbers)
    return numbers.to(exact.dtype.element_ty)


@triton.jit(do_not_specialize=["chunks", "span"], do_not_specialize_on_alignment=_SMALL)
def _join(
    part,
    tops,
    totals,
    count,
    out,
    top_of,  # of each query, over all chunks
    total_of,
    chunks,
    span,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (unit, head, query head): joins the partial softmaxes of its chunks."""
    line = tl.program_id(0).to(tl.int64)
    pair, row = line // GROUP, line % GROUP
    used = tl.cdiv(tl.load(count + pair // HEADS).to(tl.int32) * BLOCK, span)
    column = tl.arange(0, WIDE)
    top, total = -1e30, 0.0
    joined = tl.zeros([WIDE], tl.float32)
    for start in range(0, used, 16):
        chunk = start + tl.arange(0, 16)
        inside = chunk < used
        at = (pair * chunks + chunk) * GROUP + row
        maxima = tl.load(tops + at, inside, -1e30)
        piece = inside[:, None] & (column < SIZE)[None, :]
        piece = tl.load(part + at[:, None] * SIZE + column[None, :], piece, 0.0)
        higher = tl.maximum(top, tl.max(maxima, 0))
        fade, weight = tl.exp(top - higher), tl.exp(maxima - higher)
        total = total * fade + tl.sum(weight * tl.load(totals + at, inside, 0.0), 0)
        joined = joined * fade + tl.sum(weight[:, None] * piece, 0)
        top = higher
    tl.store(top_of + line, top)
    tl.store(total_of + line, total)
    joined = tl.where(top > _DEAD, joined / tl.maximum(total, 1.0), 0.0)
    tl.store(out + line * SIZE + column, joined, column < SIZE)
