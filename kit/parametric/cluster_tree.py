"""Balanced hierarchical k-means: which block of each level a context fetches.

The first level has `branching` clusters, each split into as many on the next level, and so on. A
context descends to the nearest centroid of each level, by the embedding of its question alone.

Source: https://arxiv.org/abs/2510.02375, section 3.2: k-means++ initialization, minibatch EM, no
cluster above 1.5 / branching of the mass, greedy descent by L2.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

CAP = 1.5  # a cluster holds at most this many times its fair share
CHUNK = 65_536  # vectors assigned at once


@dataclass(frozen=True)
class Tree:
    """Centroids of all levels.

    `levels[l]` is [branching**l, branching, dimensions]: the children of each node of level l.
    """

    levels: tuple[np.ndarray, ...]

    @property
    def branching(self) -> int:
        return self.levels[0].shape[1]

    @property
    def dimensions(self) -> int:
        return self.levels[0].shape[2]

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """The node of each level that each vector [N, dimensions] falls into: [N, levels].

        Node n of one level has the children n * branching + 0, 1, ... of the next.
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(
                f"The vectors are {list(vectors.shape)}, the tree has {self.dimensions} "
                f"dimensions; embed with the embedder that the tree was made with."
            )
        paths = np.zeros((len(vectors), len(self.levels)), dtype=np.int64)
        for first in range(0, len(vectors), CHUNK):
            rows = slice(first, first + CHUNK)
            node = np.zeros(len(vectors[rows]), dtype=np.int64)
            for level, centroids in enumerate(self.levels):
                node = node * self.branching + _nearest(vectors[rows], centroids, node)
                paths[rows, level] = node
        return paths

    def save(self, file: Path) -> None:
        """One .npz file."""
        arrays = {f"level{number}": level for number, level in enumerate(self.levels)}
        np.savez(file, **arrays)


def load(file: Path) -> Tree:
    """The tree of `save`; ValueError where the file is none."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Tree(tuple(arrays[f"level{number}"] for number in range(len(arrays.files))))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no tree of clusters ({error}); fit it anew.") from error


def fit(
    vectors: np.ndarray,
    branching: int,
    levels: int,
    steps: int = 20,
    batch: int = 6400,
    seed: int = 0,
) -> Tree:
    """A tree over `vectors` [N, dimensions], each node split by `steps` steps of minibatch EM on
    `batch` of its vectors. Equal seeds give equal trees."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if branching < 1 or levels < 1 or len(vectors) < branching:
        raise ValueError(
            f"branching is {branching}, levels {levels}, and there are {len(vectors)} vectors: "
            f"branching is at least 1, levels at least 1, vectors at least as many as branching."
        )
    fitted, members = [], [np.arange(len(vectors))]
    for level in range(levels):
        centroids, parts = [], []
        for node, rows in enumerate(members):
            rng = np.random.default_rng([seed, level, node])
            children = _part(vectors[rows], branching, steps, batch, rng, fitted, node)
            labels = _scores(vectors[rows], children).argmax(1)
            centroids.append(children)
            parts += [rows[labels == child] for child in range(branching)]
        fitted.append(np.stack(centroids))
        members = parts
    return Tree(tuple(fitted))


def _part(x: np.ndarray, count: int, steps: int, batch: int, rng, above, node: int) -> np.ndarray:
    """Centroids [count, dimensions] of balanced k-means; of few vectors some are repeated."""
    if len(x) == 0:  # an empty node is not split: later vectors stay together
        parent = above[-1].reshape(-1, above[-1].shape[2])[node]
        return np.repeat(parent[None], count, 0)
    if len(x) <= count:
        return x[np.arange(count) % len(x)]
    sample = x[rng.permutation(len(x))[: max(batch, count)]]
    centroids = _far_apart(sample, count, rng)
    for step in range(steps):
        sample = x[rng.permutation(len(x))[:batch]]
        labels = _balanced(_scores(sample, centroids), int(np.ceil(CAP * len(sample) / count)))
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, sample)
        sizes = np.bincount(labels, minlength=count)
        means = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centroids)
        rate = 1.0 if len(sample) == len(x) else 1 / (1 + step / 4)
        centroids = (1 - rate) * centroids + rate * means
    return centroids.astype(np.float32)


def _far_apart(x: np.ndarray, count: int, rng) -> np.ndarray:
    """k-means++: each next centroid drawn by its squared distance to those there are."""
    centers = [x[rng.integers(len(x))]]
    gaps = np.full(len(x), np.inf)
    while len(centers) < count:
        gaps = np.minimum(gaps, ((x - centers[-1]) ** 2).sum(1))
        weights = gaps.astype(float) if gaps.any() else np.ones(len(x))
        centers.append(x[rng.choice(len(x), p=weights / weights.sum())])
    return np.stack(centers)


def _scores(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Minus half the squared distance, up to a constant per vector: larger is nearer."""
    return x @ centroids.T - 0.5 * (centroids**2).sum(1)


def _balanced(scores: np.ndarray, most: int) -> np.ndarray:
    """The best cluster of each row such that none has more than `most`: of an overfull cluster the
    nearest rows stay and the others move to their next best."""
    scores = scores.copy()
    while True:
        labels = scores.argmax(1)
        sizes = np.bincount(labels, minlength=scores.shape[1])
        if sizes.max() <= most:
            return labels
        full = int(sizes.argmax())
        rows = np.flatnonzero(labels == full)
        away = rows[np.argsort(-scores[rows, full], kind="stable")[most:]]
        scores[away, full] = -np.inf


def _nearest(x: np.ndarray, centroids: np.ndarray, node: np.ndarray) -> np.ndarray:
    """The nearest child of each vector's node: [N]."""
    nearest = np.empty(len(x), dtype=np.int64)
    order = np.argsort(node, kind="stable")
    nodes, starts = np.unique(node[order], return_index=True)
    for one, rows in zip(nodes, np.split(order, starts[1:]), strict=True):
        nearest[rows] = _scores(x[rows], centroids[one]).argmax(1)
    return nearest
