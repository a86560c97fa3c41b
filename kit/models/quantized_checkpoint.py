"""GPTQ and AWQ checkpoints, dequantized as they are read: the numbers that their kernels multiply
by, without the packages that hold those kernels.

Layouts: AutoGPTQ's QuantLinear (of format "gptq", which stores zeros less one, and "gptq_v2") and
AutoAWQ's WQLinear_GEMM.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

METHODS = ("gptq", "awq")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # column of each four bits of an integer, from the lowest on


def settings(folder: Path) -> dict | None:
    """The quantization of the checkpoint in `folder` by its config.json, None where that names none
    of METHODS. ValueError for a layout that is not read."""
    try:
        stored = json.loads((folder / "config.json").read_text())["quantization_config"] or {}
    except (ValueError, KeyError, TypeError):  # transformers says what is wrong with it
        return None
    method = stored.get("quant_method")
    if method not in METHODS:
        return None
    bits = stored.get("bits", stored.get("w_bit"))
    if bits not in ((4,) if method == "awq" else (2, 4, 8)):
        raise ValueError(f"{method} weights of {bits} bit are not read; take one of 4 bit")
    if method == "awq" and str(stored.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"awq weights of version {stored['version']} are not read; take gemm")
    return stored


def read(folder: Path, stored: dict, dtype: torch.dtype):
    """The model in `folder` with its weights dequantized, and the names of those it lacks. Its
    config goes on saying how they were stored, so that their bytes can be counted."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    weights = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}
    packed = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    for name in packed:
        parts = {part: tensors.pop(f"{name}.{part}", None)
                 for part in ("qweight", "qzeros", "scales", "g_idx")}  # fmt: skip
        tensors[f"{name}.weight"] = dequantize(stored, **parts).to(dtype)
    missing = set(weights.load_state_dict(tensors, strict=False).missing_keys)
    missing -= set(weights.all_tied_weights_keys)
    if (folder / "generation_config.json").is_file():
        weights.generation_config = GenerationConfig.from_pretrained(folder)
    if packed:
        weights.config.quantization_config = stored
    return weights, sorted(missing)


def dequantize(
    stored: dict,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight [outputs, inputs] of one linear layer, float32: scale * (code - zero) of each group.

    qweight int32, of GPTQ [inputs / n, outputs] with n codes each, of AWQ [inputs, outputs / n];
    qzeros int32 [groups, outputs / n]; scales [groups, outputs]; g_idx, the group of each input.
    """
    if stored["quant_method"] == "awq":
        codes, zeros = (_unpack(x, 4)[..., _inverse(AWQ_ORDER)] for x in (qweight, qzeros))
        codes, zeros = codes.flatten(1), zeros.flatten(1)
    else:
        bits = stored["bits"]
        codes = _unpack(qweight, bits).transpose(1, 2).flatten(0, 1)
        zeros = _unpack(qzeros, bits).flatten(1)
        if stored.get("checkpoint_format", "gptq") == "gptq":
            zeros = zeros + 1
    groups = g_idx
    if groups is None:
        groups = torch.arange(len(codes)) * len(scales) // len(codes)
    groups = groups.long()
    return (scales.float()[groups] * (codes - zeros[groups])).T.contiguous()


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., 32 / bits] of integers [...], those in the lowest bits first."""
    places = torch.arange(0, 32, bits)
    return (packed.long().unsqueeze(-1) >> places) & (2**bits - 1)


def _inverse(order: list[int]) -> list[int]:
    return [order.index(n) for n in range(len(order))]
