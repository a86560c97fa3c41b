"""Weights as a CPU's matrix product reads them, copied once instead of at every step.

oneDNN multiplies by a matrix in blocks of its own order, and `torch.nn.functional.linear` has it
reorder the whole matrix at every call: a quarter to a third of the time of a decode step of few
sequences in bfloat16 (see LOG.md). `pack` keeps the reordered copies, beside the weights; inside
`multiplying` a model's linear layers use them. The kernel is the same, and so are the bits: where a
layer's are not, on another CPU or in another dtype, `pack` leaves it as it is.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from kit.inference.kv_cache import free_bytes
from kit.inference.prefix_sharing import ROWS

DTYPES = (torch.bfloat16, torch.float16)  # in float32 the packed product sums in another order
_COPIES = WeakTensorKeyDictionary()  # weight -> what it held, and its packed copy if it has one


def pack(weights: PreTrainedModel) -> dict[nn.Linear, torch.Tensor]:
    """Packed copies of the weights of a model's linear layers on a CPU, as `multiplying` takes
    them. They are made again only for weights that have changed, are freed with the model, and are
    not made where they would take half of the free memory."""
    layers = [layer for layer in weights.modules() if type(layer) is nn.Linear and _fits(layer)]
    copies = {}
    room = free_bytes(torch.device("cpu")) > 2 * sum(layer.weight.nbytes for layer in layers)
    for layer in layers:
        weight, state = layer.weight, _state(layer.weight)
        before, copy = _COPIES.get(weight, (None, None))
        if state != before:
            copy = _packed(weight) if room else None
            if room:
                _COPIES[weight] = state, copy
        if copy is not None:
            copies[layer] = copy
    return copies


@contextmanager
def multiplying(copies: dict[nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Inside this block layers multiply by their packed copies, except where gradients are kept."""
    with ExitStack() as stack:
        for layer, copy in copies.items():
            if "forward" not in vars(layer):  # not in a block around this one
                layer.forward = partial(_linear, layer, copy)
                stack.callback(vars(layer).pop, "forward")
        yield


def _fits(layer: nn.Linear) -> bool:
    return layer.weight.device.type == "cpu" and layer.weight.dtype in DTYPES


def _linear(layer: nn.Linear, copy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() or x.dtype != copy.dtype:
        return nn.functional.linear(x, layer.weight, layer.bias)
    return _product(x, copy, layer.bias)


def _product(x: torch.Tensor, copy: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


@torch.inference_mode()
def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The copy, if the product by it has the bits of the product by the matrix itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    try:
        copy = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        same = torch.equal(_product(x, copy, None), nn.functional.linear(x, weight))
    except RuntimeError:  # torch has no such product for this CPU or dtype
        return None
    return copy if same else None


def _state(weight: torch.Tensor) -> tuple:
    """What changes when the numbers of a matrix do, whichever way they are written."""
    version = None if weight.is_inference() else weight._version
    flat = weight.detach().reshape(-1)
    flat = flat.clone() if flat.storage_offset() % 4 else flat
    whole, rest = flat[: len(flat) // 4 * 4], flat[len(flat) // 4 * 4 :]  # four to an int64
    return weight.data_ptr(), version, int(whole.view(torch.int64).sum()), rest.tolist()
