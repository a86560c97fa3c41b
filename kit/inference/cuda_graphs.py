"""Decode steps as CUDA graphs: one launch for the two thousand kernels of a step.

A step at the shape of Qwen3-1.7B keeps an H200 busy for a third of the time that its launches take
(see LOG.md). A graph repeats kernels with their addresses and shapes, so the step is made for all
places of a SlotCache, whichever sequences are there: `SlotCache.step_active`. What changes from
step to step, the tokens, who is active, the block tables, lies in tensors that stay in place.
"""

import warnings
from collections.abc import Callable

import torch

from kit.inference.kv_cache import SlotCache, forward
from kit.models.load import Model

SHORTEST = 512  # tokens of the sequences of the first graph; each further one takes twice as many


class StepGraphs:
    """Steps of the sequences in `cache`, in passes of `rows` rows, by graphs made when needed.

    One graph for each doubling of the longest sequence, since attention is launched over as many
    chunks as that has. The logits of a step are those of `decode._step` to the bit.
    """

    def __init__(self, model: Model, cache: SlotCache, rows: int):
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(1, rows, dtype=torch.long, device=model.device)
        self.active = torch.zeros(cache.capacity, dtype=torch.bool, device=model.device)
        self.places: list[int] = []
        self.graphs: dict[int, tuple[Callable, torch.Tensor]] | None = {}

    def step(self, places: list[int], last_ids: list[int]) -> torch.Tensor:
        """Feed the last token of each sequence: logits [N, V] in float32."""
        if places != self.places:
            self.places = places
            self.index = torch.tensor(places, device=self.model.device)
            self.active.zero_()[self.index] = True
        self.cache.evict(places)
        self.tokens[0, self.index] = torch.tensor(last_ids, device=self.model.device)
        for place in places:
            self.cache.length[place] += 1
        longest = self.bucket(max(self.cache.length[place] for place in places))
        if self.graphs and longest in self.graphs:
            replay, logits = self.graphs[longest]
            replay()
        else:
            logits = self._pass(longest)
            if self.graphs is not None:
                self._capture(longest)
        return logits[self.index].float()

    def bucket(self, length: int) -> int:
        """The longest sequence of the graph for sequences of at most `length` tokens."""
        longest = SHORTEST
        while longest < length:
            longest *= 2
        return min(longest, self.cache.tokens)

    def _pass(self, longest: int) -> torch.Tensor:
        """Logits [capacity, V] of one more token of each active sequence."""
        positions = self.cache.step_active(self.active, longest)
        logits = forward(self.model.weights, self.cache, self.tokens, positions)
        return logits[: self.cache.capacity]

    def _capture(self, longest: int) -> None:
        try:
            self.graphs[longest] = capture(lambda: self._pass(longest))
        except RuntimeError as error:
            warnings.warn(
                f"{type(self.model.weights).__name__} cannot be captured as a CUDA graph "
                f"({str(error).splitlines()[0]}); its steps are launched one by one.",
                stacklevel=2,
            )
            self.graphs = None


def capture(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """The kernels of `work`, which has run before and does not run now, as a CUDA graph: what
    replays it, and the tensor that each replay fills; RuntimeError where it waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph.replay, out
