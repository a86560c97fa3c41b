"""Quantising keys and values on a GPU: what `kv_quantization.pack` does, in one Triton kernel that
writes codes, scales and zeros to the slots of a pool."""

import torch
import triton
import triton.language as tl

from kit.inference.kv_quantization import BETA, ITERATIONS, LARGEST, LP

_BETA, _LARGEST, _LP = tl.constexpr(BETA), tl.constexpr(LARGEST), tl.constexpr(LP)
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: a smaller number beside it loses its fraction


def packed(
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arrays: list[torch.Tensor],
    bits: int,
    group: int,
) -> None:
    """Store key and value [k, Hs, D] in flat slots [k] of a pool of codes: its codes, scale and
    zero of keys, and of values, [n, Hs, Z, .]. `group` is a power of two. Of several for one slot
    any may stay, mixed."""
    heads, size = key.shape[1:]
    shape = dict(HEADS=heads, BLOCK=arrays[0].shape[2], SIZE=size, SPREAD=group, BITS=bits)
    shape |= dict(GROUPS=triton.next_power_of_2(size // group), ITERATIONS=ITERATIONS[bits])
    inputs = slots.contiguous(), key.contiguous(), value.contiguous()
    if len(slots):
        _packed[(len(slots) * heads, 2)](*inputs, *arrays, **shape, num_warps=1)


@triton.jit
def _packed(
    slots, key, value,
    key_codes, key_scale, key_zero, value_codes, value_scale, value_zero,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, SPREAD: tl.constexpr,
    BITS: tl.constexpr, GROUPS: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Program: one head of one token, its key or its value."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + pair // HEADS).to(tl.int64)
    line = (slot // BLOCK * HEADS + pair % HEADS) * BLOCK + slot % BLOCK
    source = pair * SIZE
    if tl.program_id(1) == 0:
        _row(key + source, key_codes, key_scale, key_zero, line,
             SIZE, SPREAD, BITS, GROUPS, ITERATIONS)  # fmt: skip
    else:
        _row(value + source, value_codes, value_scale, value_zero, line,
             SIZE, SPREAD, BITS, GROUPS, ITERATIONS)  # fmt: skip


@triton.jit
def _row(
    x, codes, scale, zero, line,
    SIZE: tl.constexpr, SPREAD: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    ITERATIONS: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**BITS - 1
    PER: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = GROUPS * SPREAD // PER
    group, byte = tl.arange(0, GROUPS), tl.arange(0, BYTES)
    inside = group < SIZE // SPREAD
    at = group[:, None] * SPREAD + tl.arange(0, SPREAD)[None, :]
    rows = tl.load(x + at, inside[:, None], 0.0).to(tl.float32)
    has_nan = tl.sum((rows != rows).to(tl.int32), 1) > 0
    low = tl.minimum(tl.maximum(tl.min(rows, 1), -_LARGEST), _LARGEST)
    high = tl.minimum(tl.maximum(tl.max(rows, 1), -_LARGEST), _LARGEST)
    first = _half_below(low)
    step = -_half_below(-(high - first) / TOP)
    inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
    if ITERATIONS:
        first = _refined(rows, step, inverse, first, TOP, SPREAD, ITERATIONS)
    whole = _nearest((rows - first[:, None]) * inverse[:, None], TOP).to(tl.int32)
    place = tl.arange(0, PER) * BITS
    whole = tl.sum(tl.reshape(whole, [BYTES, PER]) << place[None, :], 1)
    tl.store(codes + line * (SIZE // PER) + byte, whole.to(tl.uint8), byte < SIZE // PER)
    first = tl.where(has_nan, float("nan"), first)
    tl.store(scale + line * (SIZE // SPREAD) + group, step.to(tl.float16), inside)
    tl.store(zero + line * (SIZE // SPREAD) + group, first.to(tl.float16), inside)


@triton.jit
def _half_below(x):
    """The float16 at or just below each float32, as float32."""
    near = x.to(tl.float16).to(tl.float32)
    below = (x - tl.abs(x) * 0.00048828125 - 3.1e-8).to(tl.float16).to(tl.float32)
    return tl.where(near > x, below, near)


@triton.jit
def _nearest(steps, TOP: tl.constexpr):
    """The nearest code of each number of steps, as float32."""
    steps = tl.minimum(tl.maximum(steps, 0.0), TOP)
    return (steps + _WHOLE) - _WHOLE


@triton.jit
def _refined(
    rows, step, inverse, first,
    TOP: tl.constexpr, SPREAD: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """The zero of each group by HQQ, see `kv_quantization._refined`."""
    best, least = first, tl.full(first.shape, float("inf"), tl.float32)
    for remaining in tl.static_range(ITERATIONS, -1, -1):
        error = (rows - first[:, None]) * inverse[:, None]
        error -= _nearest(error, TOP)
        size = tl.maximum(tl.abs(error), 1e-6)
        slope = tl.exp2(tl.log2(size) * (_LP - 1))
        norm = tl.sum(size * slope, 1)
        best = tl.where(norm < least, first, best)
        least = tl.minimum(norm, least)
        if remaining > 0:
            move = tl.minimum(size, slope / _BETA)
            move = tl.sum(tl.where(error < 0, -move, move), 1) / SPREAD
            first = tl.minimum(tl.maximum(first + move * step, -_LARGEST), _LARGEST)
            first = first.to(tl.float16).to(tl.float32)
    return best
