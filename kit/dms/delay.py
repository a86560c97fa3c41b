"""How long a token should stay before its eviction takes effect: one training per window and seed,
compared at equal memory.

The paper (https://arxiv.org/abs/2506.05345) has windows of 16 to 256 tokens.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas
import torch

from kit.dms import evictor, gates
from kit.dms.evictor import EvictorRecipe
from kit.dms.train import EvictorTraining
from kit.models.load import Model

WINDOWS = (16, 32, 64, 128, 256)


def compare_windows(
    model: Model,
    data: torch.Tensor,
    held_out: torch.Tensor,
    recipe: EvictorRecipe,
    folder: Path,
    kept_fraction: float,
    windows: Iterable[int] = WINDOWS,
    seeds: Iterable[int] = (0, 1, 2),
) -> pandas.DataFrame:
    """One row per window, seed and sequence of `held_out` [S, T], with the columns of
    `gates.measure`: evictors trained on `data` by `recipe`, their thresholds moved until they keep
    `kept_fraction` of the cache, the window included.

    A window that fills more than `kept_fraction` of a sequence cannot keep less; its
    `kept_fraction` says so. ValueError for a recipe that trains the model itself.
    """
    if recipe.trains == "all":
        raise ValueError(f"recipe {recipe.name} changes the model; take one that trains evictors")
    frames = []
    for window in windows:
        for seed in seeds:
            changed = replace(recipe, window=window)
            training = EvictorTraining(model, data, changed, folder, seed)
            trained = evictor.load(training.run()[recipe.compression_x], model)
            moved = gates.at_fraction(model, trained, held_out, kept_fraction)
            frame = gates.measure(model, moved, held_out)
            frames.append(frame.assign(window=window, seed=seed, sequence=frame.index))
    return pandas.concat(frames, ignore_index=True)
