"""Caches the activations of the frozen layers below the memory layers, once for all trainings.

With memory in the last third of the layers, two thirds of each forward pass never change. Their
output is cached per sentence, since the sentences of a packed row do not attend to each other. All
sentences are computed beforehand in one order, so that killed trainings resume on equal numbers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from kit.inference.kv_cache import layer_windows
from kit.models.load import Model

MOST_BYTES = 2**30  # of cached hidden states
BATCH = 32  # sentences in a forward pass


class ActivationCache:
    """Inputs of layer `first` of a frozen model, for `sentences` of token ids."""

    def __init__(self, model: Model, first: int, sentences: Iterable[tuple[int, ...]]):
        self.first, self._states = first, {}
        self._none = torch.zeros(1, model.weights.config.get_text_config().hidden_size)
        self._none = self._none.to(model.device, model.dtype)
        ordered = sorted(set(sentences), key=lambda ids: (len(ids), ids))
        for start in range(0, len(ordered), BATCH):
            part = ordered[start : start + BATCH]
            rows = [torch.tensor(ids, device=model.device) for ids in part]
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            with torch.no_grad(), restrict_layers(model.weights, 0, first):
                out = model.weights.base_model(input_ids=padded, use_cache=False)
            for ids, state in zip(part, out.last_hidden_state):
                self._states[ids] = state[: len(ids)].clone()

    @staticmethod
    def fits(model: Model, first: int, tokens: int) -> bool:
        """Whether there are layers below `first`, the states of so many tokens take at most
        MOST_BYTES, and all layers have one kind of attention: where there are two, transformers
        picks a layer's mask by its number."""
        config = model.weights.config.get_text_config()
        small = tokens * config.hidden_size * model.dtype.itemsize <= MOST_BYTES
        return first > 0 and small and len(set(layer_windows(config))) == 1

    def states(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[rows, T, hidden size] for packed rows [rows, T]. A sentence begins where its position is
        0; padding, one repeated token, has zeros. KeyError for an unknown sentence."""
        rows = []
        for tokens, places in zip(ids.tolist(), positions):
            starts = [*(places == 0).nonzero()[:, 0].tolist(), len(tokens)]
            keys = [tuple(tokens[a:b]) for a, b in zip(starts, starts[1:])]
            if keys[-1] not in self._states and len(set(keys[-1])) == 1:
                rest = self._none.expand(len(keys.pop()), -1)
            else:
                rest = self._none[:0]
            rows.append(torch.cat([*(self._states[key] for key in keys), rest]))
        return torch.stack(rows)


@contextmanager
def restrict_layers(
    weights: PreTrainedModel, first: int, last: int | None = None
) -> Iterator[None]:
    """Within this context the model consists of layers `first` to `last` - 1, with its final norm
    only if its last layer is among them."""
    base = weights.base_model
    layers, norm = base.layers, base.norm
    base.layers = layers[first:last]
    if last is not None and last < len(layers):
        base.norm = nn.Identity()
    try:
        yield
    finally:
        base.layers, base.norm = layers, norm
