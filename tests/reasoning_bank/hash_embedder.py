"""An embedder without a model, for processes that only write to a bank."""

import random
from collections.abc import Sequence

import numpy


class HashEmbedder:
    """Unit vectors drawn with the text as seed."""

    name = fingerprint = "hash"
    dimension = 8

    def embed(self, texts: Sequence[str], query: bool = False) -> numpy.ndarray:
        drawn = [[random.Random(f"{i} {text}").gauss() for i in range(8)] for text in texts]
        vectors = numpy.array(drawn, numpy.float32)
        return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
