"""Layers that are built as Llama's, with few kernels on a GPU.

transformers' layers ask for some sixty kernels where five matrix products do the work; at the shape
of Qwen3-1.7B a decode step is 2,000 of them, two microseconds each (see LOG.md). `fused` replaces
the `forward` of norms, gated MLPs and attention by ones that call `triton_layers` for what lies
between the products. Other layers, gradients and other dtypes go on as transformers has them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from kit.inference.kv_cache import slot_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral")  # whose layers differ in what is asked for below


@contextmanager
def fused(weights: PreTrainedModel) -> Iterator[None]:
    """Inside this block the layers of a model on a GPU are launched as few kernels."""
    ways = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention}
    replacements = {f"{family}{part}": way for family in FAMILIES for part, way in ways.items()}
    with ExitStack() as stack:
        for module in weights.modules() if weights.device.type == "cuda" else ():
            way = replacements.get(type(module).__name__)
            if way and "forward" not in vars(module):  # not in a block around this one
                module.forward = partial(_chosen, way, module)
                stack.callback(vars(module).pop, "forward")
        yield


def _chosen(way, module, x=None, *args, **kwargs):
    """The fused forward pass of a module, or its own."""
    x = kwargs.pop("hidden_states") if x is None else x
    plain = torch.is_grad_enabled() or x.dtype not in DTYPES
    return (type(module).forward if plain else way)(module, x, *args, **kwargs)


def _norm(module, x: torch.Tensor) -> torch.Tensor:
    from kit.inference import triton_layers  # imports Triton, for CUDA only

    return triton_layers.normed(x, module.weight, module.variance_epsilon)


def _mlp(module, x: torch.Tensor) -> torch.Tensor:
    from kit.inference import triton_layers

    if module.config.hidden_act != "silu":
        return type(module).forward(module, x)
    return module.down_proj(triton_layers.gated(module.gate_proj(x), module.up_proj(x)))


def _attention(module, x: torch.Tensor, position_embeddings, attention_mask=None, **kwargs):
    from kit.inference import triton_layers

    cos, sin = position_embeddings
    if cos.shape[-1] != module.head_dim or len(x) != 1 or "slots" not in kwargs:
        inputs = dict(position_embeddings=position_embeddings, attention_mask=attention_mask)
        return type(module).forward(module, x, **inputs, **kwargs)
    shape = (*x.shape[:-1], -1, module.head_dim)
    query, key, value = (p(x).view(shape) for p in (module.q_proj, module.k_proj, module.v_proj))
    norms = None
    if hasattr(module, "q_norm"):
        norms = module.q_norm.weight, module.k_norm.weight, module.q_norm.variance_epsilon
    query, key = triton_layers.rotated(query, key, cos, sin, norms)
    states = (each.transpose(1, 2) for each in (query, key, value))
    out, weight = slot_attention(module, *states, attention_mask, scaling=module.scaling, **kwargs)
    return module.o_proj(out.reshape(*x.shape[:-1], -1)), weight
