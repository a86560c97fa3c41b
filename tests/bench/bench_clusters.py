"""`assign_1m_s`: a million vectors of 384 dimensions down a tree of three levels of sixteen."""

import time

import numpy as np

from kit.parametric import cluster_tree

COUNT, DIMENSIONS, BRANCHING, LEVELS = 1_000_000, 384, 16, 3


def run() -> dict:
    """Three passes; vectors are drawn at random around the leaves."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(BRANCHING**LEVELS, DIMENSIONS)).astype(np.float32)
    started = time.perf_counter()
    tree = cluster_tree.fit(np.repeat(centres, 10, axis=0), BRANCHING, LEVELS)
    fitted = time.perf_counter() - started
    vectors = centres[rng.integers(len(centres), size=COUNT)]
    for first in range(0, COUNT, cluster_tree.CHUNK):  # noise in parts: a million at once take 3 GB
        part = vectors[first : first + cluster_tree.CHUNK]
        part += rng.normal(scale=0.5, size=part.shape).astype(np.float32)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        tree.assign(vectors)
        times.append(time.perf_counter() - started)
    against = f"fitting the tree on {len(centres) * 10:,}: {fitted:.1f} s"
    spread = [min(times), max(times)]
    value = sorted(times)[1]
    return {"assign_1m_s": dict(value=value, unit="s", against=against, n=3, spread=spread)}
