"""Linear weights in 8 or 4 bit by HQQ: half-quadratic quantization, no calibration data.

Embeddings, head and norms are not quantized. HQQ dequantizes a layer's weights at each use.
`packed=False` stores the dequantized weights in an ordinary model instead: the same numbers at the
speed of float, for studies of quality. A bfloat16 model is then dequantized in float16, since
bfloat16 cannot represent code - zero: at 8 bit that would add a third to the error.

Source: Badri and Shaji 2023, https://github.com/mobiusml/hqq. LOG.md, 2026-11-22, says why HQQ, and
why its solver is not used at 8 bit.
"""

import math
from dataclasses import replace
from importlib.metadata import version

import torch

from kit.models.load import Model, twin
from kit.schema import digest

BITS = (8, 4)
REFINED = (4,)  # bits at which HQQ's solver reduces the error enough for its time
GROUP = 64  # weights of one output that share a scale and a zero


def rename(model: Model, bits: int, group: int = GROUP) -> Model:
    """The model under the name and hash that `quantize` gives it, for record keys; the weights are
    not quantized."""
    if bits == 16:
        return model
    if bits not in BITS:
        raise ValueError(f"weights of {bits} bit cannot be made; use 16, 8 or 4")
    if getattr(model.weights.config, "quantization_config", None):
        raise ValueError(f"{model.name} is a quantized checkpoint; use 16 bits: as it is")
    if fused := fused_experts(model):
        every = model.weights.base_model.layers.parameters()
        share = sum(fused.values()) / sum(p.numel() for p in every)
        raise ValueError(
            f"{model.name} holds {share:.0%} of its layers in fused experts ({min(fused)}), which "
            f"HQQ would leave as they are; use 16 bits, or a checkpoint that is quantized already"
        )
    parts = [
        model.weights_hash,
        "hqq",
        version("hqq"),
        bits,
        group,
        str(model.dtype),
        bits in REFINED,
    ]
    if (precise := _precise(model)) != model.dtype:
        parts.append(str(precise))
    name = f"{model.name} {bits}-bit g{group}"
    return replace(model, name=name, weights_hash=digest(parts, 12), base_hash=model.weights_hash)


def fused_experts(model: Model) -> dict[str, int]:
    """Name -> numbers of each parameter that holds matrices of several experts: transformers fuses
    the linear layers of a mixture into such, which are no `torch.nn.Linear`."""
    layers = model.weights.base_model.layers
    return {name: p.numel() for name, p in layers.named_parameters() if p.ndim > 2}


def _precise(model: Model) -> torch.dtype:
    """The dtype in which weights are dequantized for `packed=False`."""
    return torch.float16 if model.dtype == torch.bfloat16 else model.dtype


def quantize(model: Model, bits: int, group: int = GROUP, packed: bool = True) -> Model:
    """`model` with linear weights of `bits`, in groups of `group` or, if that does not divide the
    inputs of a layer, of the greatest common divisor. 16 returns the model itself; ValueError for
    other bits and for a mixture of fused experts."""
    result = rename(model, bits, group)
    if result is model:
        return model
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # takes a second

    weights = twin(model.weights)
    for name, linear in [*weights.base_model.layers.named_modules()]:
        if type(linear) is not torch.nn.Linear:
            continue
        size = math.gcd(group, linear.in_features)
        if size % 8:
            raise ValueError(
                f"{model.name}: {name} reads {linear.in_features} numbers, which no group of a "
                f"multiple of 8 divides, as HQQ needs; use 16 bits"
            )
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1)
        config["weight_quant_params"]["optimize"] = bits in REFINED
        kind = model.dtype if packed else _precise(model)
        quantized = HQQLinear(linear, config, False, kind, str(model.device))
        if packed:
            quantized.linear_layer = None
            parent, _, child = name.rpartition(".")
            setattr(weights.base_model.layers.get_submodule(parent), child, quantized)
        else:
            linear.weight.data = quantized.dequantize().to(model.dtype).contiguous()
    return replace(result, weights=weights.requires_grad_(False).eval())
