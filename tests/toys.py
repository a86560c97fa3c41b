"""Tiny random models, tokens and evictors for the tests of DMS."""

import dataclasses

import torch

from kit.dms import evictor
from kit.models.load import Model, load


def toy(shape: str = "llama", dtype: str = "float32") -> Model:
    return load(f"random:{shape}", dtype=dtype)


def tokens(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def drawn(model, recipe=evictor.LAPTOP, **changed) -> evictor.Evictor:
    """An evictor that evicts about half of the tokens, heads and layers differing."""
    made = evictor.Evictor(
        model.weights, dataclasses.replace(recipe, **changed), model.weights_hash
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for linear in made.linear:
            torch.nn.init.normal_(linear.weight, std=0.02)
            torch.nn.init.constant_(linear.bias, 0.17)
    return made.requires_grad_(False)


def held_bytes(value) -> int:
    """Bytes of all tensors in lists, tuples and fields."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    value = vars(value).values() if dataclasses.is_dataclass(value) else value
    return sum(map(held_bytes, value)) if hasattr(value, "__iter__") else 0
