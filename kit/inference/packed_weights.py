"""Weights as a CPU's matrix product reads them, copied once instead of at every step.

A CPU multiplies by a matrix in blocks of an order of its own, and `torch.nn.functional.linear` has
the whole matrix reordered at every call: a quarter to a third of the time of a decode step of few
sequences (see LOG.md). `pack` keeps the reordered copies, beside the weights; inside `multiplying`
a model's linear layers use them. In 16 bits the kernel is the same, and so are the bits: where a
layer's are not, on another CPU, `pack` leaves it as it is. In float32 the packed product sums in
another order than the plain one, so whether it is taken follows from the model and the machine
alone, and record keys say so (`changes_bits`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial

import psutil
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from kit.inference.kv_cache import free_bytes
from kit.inference.prefix_sharing import ROWS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARE = 12  # float32 weights have copies where memory, all of it, is so many times as large
COUNTS = (2 * ROWS, 8 * ROWS, 32 * ROWS)  # of rows, of which each has the bits that it has in ROWS
# By shape and dtype, which decide in what order a product sums: whether it keeps these bits.
_ALIKE: dict[tuple[torch.Size, torch.dtype], bool] = {}
_COPIES = WeakTensorKeyDictionary()  # weight -> what it held, and its packed copy if it has one


def pack(weights: PreTrainedModel) -> dict[nn.Linear, torch.Tensor]:
    """Packed copies of the weights of a model's linear layers on a CPU, as `multiplying` takes
    them. They are made again only for weights that have changed, are freed with the model, and are
    not made where they would take half of the free memory (in float32: see `changes_bits`)."""
    layers, copies = _layers(weights), {}
    size = sum(layer.weight.nbytes for layer in layers)
    room = changes_bits(weights) or free_bytes(torch.device("cpu")) > 2 * size
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


def changes_bits(weights: PreTrainedModel) -> bool:
    """Whether a model decodes by packed products whose bits differ from those of plain ones: in
    float32 on a CPU that has them, with memory for SHARE times its weights."""
    layers = (layer.weight for layer in _layers(weights))
    size = sum(weight.nbytes for weight in layers if weight.dtype == torch.float32)
    return 0 < SHARE * size <= psutil.virtual_memory().total and _has_product(torch.float32)


@contextmanager
def multiplying(copies: dict[nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Inside this block layers multiply by their packed copies, except where gradients are kept."""
    with ExitStack() as stack:
        for layer, copy in copies.items():
            if "forward" not in vars(layer):  # not in a block around this one
                layer.forward = partial(_linear, layer, copy)
                stack.callback(vars(layer).pop, "forward")
        yield


def _layers(weights: nn.Module) -> list[nn.Linear]:
    linear = (layer for layer in weights.modules() if type(layer) is nn.Linear)
    return [x for x in linear if x.weight.device.type == "cpu" and x.weight.dtype in DTYPES]


@lru_cache
def _has_product(dtype: torch.dtype) -> bool:
    return _packed(torch.randn(64, 64, dtype=dtype)) is not None


def _linear(layer: nn.Linear, copy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() or x.dtype != copy.dtype:
        return nn.functional.linear(x, layer.weight, layer.bias)
    return _product(x, copy, layer.bias)


def _product(x: torch.Tensor, copy: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


@torch.inference_mode()
def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The copy, if a row's product by it has the same bits whatever the number of rows, and, but
    for float32, those of the product by the matrix itself; None else."""
    generator, kind = torch.Generator().manual_seed(0), (weight.shape, weight.dtype)
    count = ROWS if kind in _ALIKE else COUNTS[-1]
    x = torch.randn(count, weight.shape[1], generator=generator).to(weight.dtype)
    try:
        copy = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        rows = _product(x[:ROWS], copy, None)
        if kind not in _ALIKE:
            others = (_product(x[:each], copy, None)[:ROWS] for each in COUNTS)
            _ALIKE[kind] = all(torch.equal(rows, other) for other in others)
    except RuntimeError:  # torch has no such product for this CPU or dtype
        return None
    plain = nn.functional.linear(x[:ROWS], weight)
    same = torch.equal if weight.dtype != torch.float32 else partial(torch.allclose, atol=1e-3)
    return copy if _ALIKE[kind] and same(rows, plain) else None


def _state(weight: torch.Tensor) -> tuple:
    """What changes when the numbers of a matrix do, whichever way they are written."""
    version = None if weight.is_inference() else weight._version
    flat = weight.detach().reshape(-1)
    flat = flat.clone() if flat.storage_offset() % 4 else flat
    whole, rest = flat[: len(flat) // 4 * 4], flat[len(flat) // 4 * 4 :]  # four to an int64
    return weight.data_ptr(), version, int(whole.view(torch.int64).sum()), rest.tolist()
