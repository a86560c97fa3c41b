"""The Triton kernels of a layer against the same in float64 and as transformers computes it, in
Triton's interpreter, and compiled for the GPUs that Triton can build for without having one."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests import rounding
from tests.inference.test_triton_attention import cuda
from tests.simcuda import PLAIN

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")

DTYPES = (torch.float32, torch.bfloat16)


def draw(*shape, seed=0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_norm(x, weight, eps):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def exact_rotation(query, key, cos, sin, norms=None):
    if norms:
        query, key = (exact_norm(x, w, norms[2]) for x, w in ((query, norms[0]), (key, norms[1])))
    return apply_rotary_pos_emb(query, key, cos, sin, 2)


EXACT = {
    "normed": exact_norm,
    "rotated": exact_rotation,
    "gated": lambda gate, up: gate / (1 + (-gate).exp()) * up,
    "scored": lambda x, norm, weight, bias, eps, scale, offset: (
        scale * (exact_norm(x, norm, eps) @ weight.T + bias) + offset
    ),
}
evictor = draw(576), draw(3, 576, seed=1), draw(3, seed=2)
turn = draw(1, 3, 96).sin(), draw(1, 3, 96).cos()
states = draw(1, 3, 6, 96, seed=1), draw(1, 3, 2, 96, seed=2)
CASES = {
    "a norm of 96": ("normed", draw(2, 5, 96), draw(96, seed=1), 1e-6),
    "a norm of 2048": ("normed", draw(3, 2048), draw(2048, seed=1), 1e-6),
    "a norm of next to nothing": ("normed", draw(3, 64) * 1e-4, draw(64, seed=1), 1e-5),
    "a rotation": ("rotated", *states, *turn),
    "a rotation with norms": ("rotated", *states, *turn, (draw(96), draw(96, seed=1), 1e-6)),
    "one head": ("rotated", draw(1, 3, 1, 96), draw(1, 3, 1, 96, seed=1), *turn),
    "a gate": ("gated", draw(7, 300), draw(7, 300, seed=1)),
    "an evictor": ("scored", draw(1, 4, 576, seed=3), *evictor, 1e-6, 100.0, -5.0),
    "a wide gate": ("gated", 30 * draw(2, 1500), draw(2, 1500, seed=1)),
}


def cast(given, *to):
    """Tensors among what is given, at most in tuples, as `to` says."""
    if isinstance(given, tuple):
        return tuple(cast(each, *to) for each in given)
    return given.to(*to) if isinstance(given, torch.Tensor) else given


def worst_error(case: str, dtype, device="cpu") -> float:
    """Largest difference from float64, in what the dtype may miss."""
    from kit.inference import triton_layers

    name, *given = CASES[case]
    given = tuple(cast(x, dtype) if n == 0 or name != "scored" else x for n, x in enumerate(given))
    found = getattr(triton_layers, name)(*cast(given, device))
    right, plain = EXACT[name](*cast(given, torch.float64)), PLAIN[name](*given)
    if isinstance(found, torch.Tensor):
        found, plain, right = [found], [plain], [right]
    assert all(x.dtype == p.dtype for x, p in zip(found, plain))
    return max(
        (x.cpu() - r).abs().nan_to_num(torch.inf).max().item() / rounding.tolerance(p, r)
        for x, p, r in zip(found, plain, right, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_as_transformers(interpreter, case, dtype):
    assert interpreter(worst_error, case, dtype) <= 1


def written(dtype, device="cpu") -> bool:
    """Whether tokens lie in the slots that were named, and all else is as it was."""
    from kit.inference.triton_layers import stored

    pools = draw(2, 4, 3, 8, 48).to(dtype)
    key, value = draw(2, 5, 3, 48, seed=1).to(dtype)
    slots, wanted = torch.tensor([9, 0, 31, 8, 17]), pools.clone()
    PLAIN["stored"](slots, key, value, *wanted)
    found = [x.to(device) for x in pools]
    stored(slots.to(device), key.to(device), value.to(device), *found)
    stored(slots[:0].to(device), key[:0].to(device), value[:0].to(device), *found)
    return torch.equal(torch.stack(found).cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_written_to_their_slots(interpreter, dtype):
    assert interpreter(written, dtype)


HEADS = dict(HEADS=16, ROWS=16, SIZE=128, WIDE=128)
KERNELS = {
    "_normed": dict(SIZE=2048, WIDE=2048),
    "_rotated": HEADS | dict(KEY_HEADS=8, KEY_ROWS=8, NORMS=True),
    "_gated": dict(BLOCK=1024),
    "_scored": dict(HEADS=8, ROWS=8, SIZE=2048, CHUNK=512),
    "_stored": HEADS | dict(BLOCK=32),
}


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spilling(compiled, name, capability):
    from kit.inference import triton_layers

    kernel = getattr(triton_layers, name)
    types = {arg: "*bf16" for arg in kernel.arg_names}
    types |= dict.fromkeys(("eps", "scale", "offset"), "fp32") | dict(count="i32", slots="*i64")
    if name == "_scored":  # whose weights and logits are float32
        types |= dict.fromkeys(("norm", "weight", "bias", "out"), "*fp32")
    types = {arg: kind for arg, kind in types.items() if arg in kernel.arg_names}
    _, ptx, usage = compiled(capability, kernel, types, **KERNELS[name])
    assert " STACK:0 " in usage and "v4" in ptx  # 16 bytes at a time


@cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_on_the_gpu(case, dtype):
    assert worst_error(case, dtype, "cuda") <= 1


@cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_written_to_their_slots_on_the_gpu(dtype):
    assert written(dtype, "cuda")
