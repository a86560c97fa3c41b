"""The steps of a decoder layer between its matrix products, one Triton kernel each.

Each rounds where transformers' own layers round, to the dtype of its input; sums and functions are
float32. A row depends on nothing but itself. `fused_layers` puts them into a model; on the CPU
nothing here runs, except in Triton's interpreter, where the tests check it.
"""

import torch
import triton
import triton.language as tl

_GATED = 1024  # numbers of one program of `gated`
_CHUNK = 512  # numbers of a row that a program of `scored` has at once


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the last axis of `x` [..., S], times `weight` [S]."""
    x, out, size = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device), len(weight)
    wide = triton.next_power_of_2(size)
    rows = x.numel() // size
    _normed[(rows,)](x, weight, out, eps, SIZE=size, WIDE=wide, num_warps=_warps(wide))
    return out


def rotated(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of query [1, T, H*G, D] and key [1, T, H, D] by cos and sin [1, T, D], each of them
    normed before, where `norms` has the weights [D] and eps of their RMSNorms."""
    query, key, cos, sin = (x.contiguous() for x in (query, key, cos, sin))
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    heads, size = (query.shape[2], key.shape[2]), query.shape[3]
    rows = [triton.next_power_of_2(count) for count in heads]
    shape = dict(HEADS=heads[0], ROWS=rows[0], KEY_HEADS=heads[1], KEY_ROWS=rows[1])
    shape |= dict(SIZE=size, WIDE=triton.next_power_of_2(size), NORMS=norms is not None)
    weights = norms or (None, None, 0.0)
    _rotated[(query.shape[1],)](query, key, cos, sin, *weights, *out, **shape, num_warps=4)
    return tuple(out)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), _GATED),)](gate, up, out, gate.numel(), BLOCK=_GATED)
    return out


def stored(
    slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values
) -> None:
    """Copy key and value [k, Hs, D] to flat slots [k] of the pools `keys`, `values` [n, Hs, Z, D].
    Of several for one slot any may stay."""
    heads, size = key.shape[1:]
    rows, wide = triton.next_power_of_2(heads), triton.next_power_of_2(size)
    shape = dict(HEADS=heads, ROWS=rows, BLOCK=keys.shape[2], SIZE=size, WIDE=wide)
    inputs = slots.contiguous(), key.contiguous(), value.contiguous()
    if len(slots):
        _stored[(len(slots),)](*inputs, keys, values, **shape)


def scored(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: float,
    offset: float,
) -> torch.Tensor:
    """scale * (weight @ RMSNorm(hidden) + bias) + offset in float32: [..., H] of hidden [..., S],
    with the weight of the norm [S], and weight [H, S] and bias [H] float32."""
    hidden, (heads, size) = hidden.contiguous(), weight.shape
    out = torch.empty(*hidden.shape[:-1], heads, dtype=torch.float32, device=hidden.device)
    inputs = hidden, norm, weight.contiguous(), bias, out, eps, scale, offset
    shape = dict(HEADS=heads, ROWS=triton.next_power_of_2(heads), SIZE=size, CHUNK=_CHUNK)
    _scored[(hidden.numel() // size,)](*inputs, **shape)
    return out


def _warps(wide: int) -> int:
    return min(max(wide // 512, 1), 8)


@triton.jit
def _normed(x, weight, out, eps, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Program: one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside = column < SIZE
    numbers = tl.load(x + row * SIZE + column, inside, 0.0).to(tl.float32)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers, 0) / SIZE + eps)
    numbers = _rounded(numbers, out) * tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, numbers, inside)


@triton.jit
def _rounded(numbers, like):
    """float32 numbers as the dtype of the pointer `like` holds them."""
    return numbers.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _rotated(
    query, key, cos, sin, query_norm, key_norm, eps, query_out, key_out,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_ROWS: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Program: all heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    _turned(query, cos, sin, query_norm, eps, query_out, row, HEADS, ROWS, SIZE, WIDE, NORMS)
    _turned(key, cos, sin, key_norm, eps, key_out, row, KEY_HEADS, KEY_ROWS, SIZE, WIDE, NORMS)


@triton.jit
def _turned(
    x, cos, sin, norm, eps, out, row,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    ahead = column < SIZE // 2
    other = tl.where(ahead, column + SIZE // 2, column - SIZE // 2)
    within = column < SIZE
    inside = (head < HEADS)[:, None] & within[None, :]
    line = ((row * HEADS + head) * SIZE)[:, None]
    a = tl.load(x + line + column[None, :], inside, 0.0).to(tl.float32)
    b = tl.load(x + line + other[None, :], inside, 0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(a * a, 1) / SIZE + eps)[:, None]
        gain = tl.load(norm + column, within, 0.0).to(tl.float32)[None, :]
        other_gain = tl.load(norm + other, within, 0.0).to(tl.float32)[None, :]
        a = _rounded(_rounded(a * scale, out) * gain, out)
        b = _rounded(_rounded(b * scale, out) * other_gain, out)
    c = tl.load(cos + row * SIZE + column, within, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * SIZE + column, within, 0.0).to(tl.float32)
    s = tl.where(ahead, -s, s)[None, :]
    tl.store(out + line + column[None, :], _rounded(a * c, out) + _rounded(b * s, out), inside)


@triton.jit
def _gated(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, inside, 0.0).to(tl.float32)
    x = _rounded(x / (1.0 + tl.exp(-x)), out) * tl.load(up + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, x, inside)


@triton.jit
def _stored(
    slots, key, value, keys, values,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program: one slot."""
    number = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + number).to(tl.int64)
    head, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (head < HEADS)[:, None] & (column < SIZE)[None, :]
    source = ((number * HEADS + head) * SIZE)[:, None] + column[None, :]
    line = ((slot // BLOCK * HEADS + head) * BLOCK + slot % BLOCK) * SIZE
    to = line[:, None] + column[None, :]
    tl.store(keys + to, tl.load(key + source, inside, 0.0), inside)
    tl.store(values + to, tl.load(value + source, inside, 0.0), inside)


@triton.jit
def _scored(
    hidden, norm, weight, bias, out, eps, scale, offset,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program: one row."""
    row, head, column = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, CHUNK)
    squares = tl.zeros([CHUNK], tl.float32)
    for first in range(0, SIZE, CHUNK):
        x = tl.load(hidden + row * SIZE + first + column, first + column < SIZE, 0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    size = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, SIZE, CHUNK):
        inside = first + column < SIZE
        x = tl.load(hidden + row * SIZE + first + column, inside, 0.0).to(tl.float32) * size
        x *= tl.load(norm + first + column, inside, 0.0)
        at = head[:, None] * SIZE + (first + column)[None, :]
        rows = tl.load(weight + at, (head < HEADS)[:, None] & inside[None, :], 0.0)
        total += tl.sum(rows * x[None, :], 1)
    total = scale * (total + tl.load(bias + head, head < HEADS, 0.0)) + offset
    tl.store(out + row * HEADS + head, total, head < HEADS)
