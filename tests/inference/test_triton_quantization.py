"""The Triton kernel that quantises against `kv_quantization.pack`, in Triton's interpreter, and
compiled for the GPUs that Triton can build for without having one."""

import pytest
import torch

from kit.inference.kv_quantization import ITERATIONS, pack
from tests.inference.test_triton_attention import cuda

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")

CASES = [(bits, *shape) for bits in (8, 4, 2) for shape in ((128, 32), (96, 32), (48, 16))]
HEADS, BLOCKS, BLOCK = 2, 3, 8
EDGE = 0.02  # share of what lies on the edge of two codes: a GPU divides less exactly


def differing(bits: int, size: int, group: int, dtype, device="cpu") -> float:
    """Share of the codes, scales and zeros in the slots that were named which are not those of
    `pack`; infinite if another slot was written."""
    from kit.inference.triton_quantization import packed

    draw, slots = torch.Generator().manual_seed(bits), torch.tensor([9, 0, 23])
    key, value = 3 * torch.randn(2, 3, HEADS, size, generator=draw)
    key[0, 0, :group], value[1, 1, 3] = 5.0, 1e6  # a group of one number; one that saturates
    key, value = key.to(dtype), value.to(dtype)
    widths = ((size * bits // 8, torch.uint8), *[(size // group, torch.half)] * 2) * 2
    pools = [torch.zeros(BLOCKS, HEADS, BLOCK, n, dtype=kind) for n, kind in widths]
    found = [x.to(device) for x in pools]
    packed(slots.to(device), key.to(device), value.to(device), found, bits, group)
    for pool, rows in zip(pools, (*pack(key, bits, group), *pack(value, bits, group))):
        pool[slots // BLOCK, :, slots % BLOCK] = rows
    unlike = [(x.cpu() != y) for x, y in zip(found, pools)]
    named = torch.zeros(BLOCKS * BLOCK, dtype=torch.bool)
    named[slots] = True
    if any(x.transpose(1, 2).flatten(0, 1)[~named].any() for x in unlike):
        return float("inf")
    count = sum(x.numel() for x in pools) * len(slots) / len(named)
    return float(sum(x.sum() for x in unlike)) / count


@pytest.mark.parametrize("case", range(len(CASES)))
def test_says_what_pack_says(interpreter, case):
    dtype = torch.float32 if case % 2 else torch.bfloat16  # each with all bits and all shapes
    assert interpreter(differing, *CASES[case], dtype) == 0


@pytest.mark.parametrize(("bits", "capability"), [(8, 80), (4, 90), (2, 120)])
def test_compiles_without_spilling(compiled, bits, capability):
    from kit.inference.triton_quantization import _packed

    types = dict(slots="*i64", key="*bf16", value="*bf16")
    for name in ("key", "value"):
        types |= {f"{name}_codes": "*u8", f"{name}_scale": "*fp16", f"{name}_zero": "*fp16"}
    shape = dict(HEADS=8, BLOCK=32, SIZE=128, SPREAD=32, GROUPS=4)
    how = dict(BITS=bits, ITERATIONS=ITERATIONS[bits])
    _, _, usage = compiled(capability, _packed, types, **shape, **how)
    assert " STACK:0 " in usage


@cuda
@pytest.mark.parametrize(("bits", "size", "group"), CASES)
def test_says_what_pack_says_on_the_gpu(bits, size, group):
    assert differing(bits, size, group, torch.bfloat16, "cuda") <= EDGE
