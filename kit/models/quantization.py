"""Linear weights in 8 or 4 bit by HQQ: half-quadratic quantization, no calibration data.

Embeddings, head and norms stay as they are. HQQ unpacks a layer's weights each time that it is
used, so `packed=False` puts what they unpack to into an ordinary model: the same numbers at the
speed of float, for studies of quality. A model in bfloat16 is unpacked in float16 then, since
bfloat16 does not hold code - zero: at 8 bit that alone would add a third to the error.

Source: Badri and Shaji 2023, mobiusml/hqq. Why HQQ, and why not its solver at 8 bit:
LOG.md, 2026-11-22.
"""

import math
from dataclasses import replace
from importlib.metadata import version

import torch

from kit.models.load import Model, twin
from kit.schema import digest

BITS = (8, 4)
REFINED = (4,)  # bits at which HQQ's solver is worth its time
GROUP = 64  # weights of one output that share a scale and a zero


def named(model: Model, bits: int, group: int = GROUP) -> Model:
    """Name and hash that `quantize` gives around the weights as they are: what a store asks for."""
    if bits == 16:
        return model
    if bits not in BITS:
        raise ValueError(f"weights of {bits} bit cannot be made; use 16, 8 or 4")
    if getattr(model.weights.config, "quantization_config", None):
        raise ValueError(f"{model.name} is a quantized checkpoint; use 16 bits: as it is")
    made_of = [
        model.weights_hash,
        "hqq",
        version("hqq"),
        bits,
        group,
        str(model.dtype),
        bits in REFINED,
    ]
    if (precise := _precise(model)) != model.dtype:
        made_of.append(str(precise))
    name = f"{model.name} {bits}-bit g{group}"
    return replace(model, name=name, weights_hash=digest(made_of, 12), base_hash=model.weights_hash)


def _precise(model: Model) -> torch.dtype:
    """In which weights are unpacked, once and for all."""
    return torch.float16 if model.dtype == torch.bfloat16 else model.dtype


def quantize(model: Model, bits: int, group: int = GROUP, packed: bool = True) -> Model:
    """`model` with linear weights of `bits`, in groups of `group` or the largest part of it that
    divides what a layer reads; 16 returns it as it is. ValueError for other bits."""
    found = named(model, bits, group)
    if found is model:
        return model
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # takes a second

    weights = twin(model.weights)
    for name, linear in [*weights.base_model.layers.named_modules()]:
        if type(linear) is not torch.nn.Linear:
            continue
        size = math.gcd(group, linear.in_features)
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1)
        config["weight_quant_params"]["optimize"] = bits in REFINED
        kind = model.dtype if packed else _precise(model)
        made = HQQLinear(linear, config, False, kind, str(model.device))
        if packed:
            made.linear_layer = None
            parent, _, child = name.rpartition(".")
            setattr(weights.base_model.layers.get_submodule(parent), child, made)
        else:
            linear.weight.data = made.dequantize().to(model.dtype).contiguous()
    return replace(found, weights=weights.requires_grad_(False).eval())
