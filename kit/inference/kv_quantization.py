"""Quantized keys and values: 8, 4 or 2 bits per number, one scale and one zero per group.

Pure functions on tensors; the cache decides which tokens stay exact and where codes are stored.
Groups run along the head dimension of one token, so that a slot can be written, read and reused on
its own. KIVI (https://arxiv.org/abs/2402.02750) groups keys along tokens instead, per channel,
which suits their outlier channels but ties 32 tokens to one scale, so that none of them could be
evicted. Small groups are used here instead; LOG.md has the measured cost.
"""

from dataclasses import dataclass

import torch

LARGEST = 65504.0  # of float16, in which scale and zero are stored
CHUNK = (
    1 << 17
)  # numbers processed at once on a CPU: an eighth of the time while they stay in its cache
LP = 0.7  # HQQ's norm p, which tolerates the large errors of outliers
ITERATIONS = {8: 0, 4: 5, 2: 5}  # of HQQ; at 8 bits the error is too small to reduce
BETA = 3.0  # HQQ's penalty, for errors in steps: see _refined


@dataclass(frozen=True)
class Quantized:
    """KV cache at `bits` per number, except for the newest `residual` tokens of a sequence."""

    bits: int
    group: int = 32  # numbers that share a scale and a zero; divides the head size
    residual: int = 32  # newest tokens stored exactly; 0 is allowed

    def __post_init__(self):
        _check(self.group, self.bits, self.group)
        if self.residual < 0:
            raise ValueError(f"residual is {self.residual} tokens; give 0 or more")

    @property
    def name(self) -> str:
        return f"kv {self.bits}-bit g{self.group} r{self.residual}"

    @property
    def bits_per_value(self) -> float:
        """Bits per stored number, with its share of the 16-bit scale and zero."""
        return self.bits + 32 / self.group

    def bytes_per_token(self, head_dim: int, heads: int, layers: int) -> int:
        """Bytes of the keys and values of one quantized token, scales and zeros included."""
        _check(head_dim, self.bits, self.group)
        per_head = head_dim * self.bits // 8 + 4 * (head_dim // self.group)
        return 2 * layers * heads * per_head


def _check(size: int, bits: int, group: int) -> None:
    if bits not in ITERATIONS:
        raise ValueError(f"{bits} bits cannot be packed; choose 8, 4 or 2")
    if group < 1 or size % group or group * bits % 8:
        raise ValueError(
            f"groups of {group} numbers do not divide a head of {size} into whole bytes at "
            f"{bits} bits; choose a group that divides {size} and is a multiple of {8 // bits}"
        )


def pack(
    x: torch.Tensor, bits: int, group: int, iterations: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D*bits/8], scale and zero float16 [..., D/group] of `x` [..., D].

    A number is about zero + scale * code; the earliest number lies in a byte's lowest bits.
    Asymmetric between minimum and maximum of the group: no error exceeds half a scale. Then
    `iterations` of HQQ (by default 5 at 4 and 2 bits, none at 8) move the zero where this lowers
    the sum of |error|^0.7 of a group, and may exceed that bound. Numbers beyond +-65504 saturate;
    a NaN invalidates its group.
    """
    size = x.shape[-1]
    _check(size, bits, group)
    iterations = ITERATIONS[bits] if iterations is None else iterations
    rows = x.reshape(-1, group)
    chunk = max(1, CHUNK // group) if x.device.type == "cpu" else max(1, len(rows))
    packed_rows = [_pack_rows(part.float(), bits, iterations) for part in rows.split(chunk)]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*packed_rows))
    shape = (*x.shape[:-1], size // group)
    return codes.view(*x.shape[:-1], size * bits // 8), scale.view(shape), zero.view(shape)


def unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Numbers [..., D] of what `pack` returned, computed in at least float32."""
    precise = torch.promote_types(dtype, torch.float32)
    values = torch.empty(*codes.shape, 8 // bits, dtype=precise, device=codes.device)
    for place in range(8 // bits):  # a third faster than one shift by a vector of places
        values[..., place] = (codes >> (place * bits)) & (2**bits - 1)
    group = codes.shape[-1] * (8 // bits) // scale.shape[-1]
    values = values.view(*scale.shape, group)
    values.mul_(scale.to(precise).unsqueeze(-1)).add_(zero.to(precise).unsqueeze(-1))
    if dtype == torch.float16:  # rounding may push the largest code beyond float16
        values.clamp_(-LARGEST, LARGEST)
    return values.flatten(-2).to(dtype)


def _pack_rows(rows: torch.Tensor, bits: int, iterations: int):
    """`pack` for float32 groups [n, group]: codes [n, bytes], scale [n], zero [n]."""
    top = 2**bits - 1
    low, high = rows.amin(-1).clamp(-LARGEST, LARGEST), rows.amax(-1).clamp(-LARGEST, LARGEST)
    # Zero is rounded down and scale up: the codes span the group whatever float16 loses.
    zero = _half_below(low)
    scale = -_half_below(-(high - zero.float()) / top)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    if iterations:
        zero = _refined(rows, scale, inverse, zero, top, iterations)
    steps = (rows - zero.float().unsqueeze(-1)) * inverse.unsqueeze(-1)
    codes = steps.round_().clamp_(0, top).to(torch.uint8)
    packed = codes[:, :: 8 // bits].clone()
    for place in range(1, 8 // bits):
        packed |= codes[:, place :: 8 // bits] << (place * bits)
    return packed, scale, zero


def _half_below(x: torch.Tensor) -> torch.Tensor:
    """The float16 at or just below each float32 of `x`."""
    near = x.half()
    below = (x - x.abs() * 2**-11 - 3.1e-8).half()  # half a unit in the last place, or more
    return torch.where(near.float() > x, below, near)


def _refined(rows, scale, inverse, zero, top: int, iterations: int) -> torch.Tensor:
    """The zero [n] that half-quadratic quantization finds for groups [n, group].

    Badri and Shaji 2023 (mobiusml/hqq), equations of the half-quadratic solver: an error is cut
    into what the l_p shrinkage keeps and a rest, and the zero moves by the mean of the rest,
    sign(e) min(|e|, |e|^(p-1) / beta). Unlike theirs, errors are counted in steps of the scale,
    so that beta means the same for large and small numbers; each group keeps its best zero; and
    beta stays, as 1% more per iteration changes nothing in five.
    """
    best, least = zero, torch.full_like(inverse, torch.inf)
    for remaining in range(iterations, -1, -1):
        error = (rows - zero.float().unsqueeze(-1)) * inverse.unsqueeze(-1)
        error -= error.round().clamp_(0, top)
        size = error.abs().clamp_min_(1e-6)
        slope = size.log2().mul_(LP - 1).exp2_()  # size ** (p-1), three times as fast as pow
        norm = (size * slope).sum(-1)
        best = torch.where(norm < least, zero, best)
        least = torch.minimum(norm, least)
        if remaining:
            move = torch.minimum(size, slope.div_(BETA)).copysign_(error).mean(-1)
            zero = (zero.float() + move * scale.float()).clamp(-LARGEST, LARGEST).half()
    return best
