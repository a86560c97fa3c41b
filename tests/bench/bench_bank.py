"""The strategy bank at 100,000 items on disk: searching, finding what is nearest, adding.

`bank_search_p50_ms`: one search with the guard, the question embedded beforehand; after 50 to warm
up. `bank_recall_at_5`: of the five nearest by plain cosines, how many the index finds.
`bank_add_10k_s`: adding 10,000 items whose vectors are known, with compaction and the index.
`bank_small_writes_search_ms`: one search after 300 writes of one item. Vectors are those of the
laptop suite's questions with noise of the same length added, normalised.
KIT_BENCH_ITEMS=1000000 makes it a million.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from kit.data import problems
from kit.models import embedder
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.strategy import Strategy

ITEMS = int(os.environ.get("KIT_BENCH_ITEMS", 100_000))
PART, QUERIES = 10_000, 200


@dataclass
class Known:
    """An embedder that has every vector already."""

    fingerprint: str
    name: str
    dimension: int
    vectors: dict = field(default_factory=dict)

    def embed(self, texts, query=False):
        return numpy.stack([self.vectors[text] for text in texts])


def run() -> dict:
    """The three figures; seconds of building the index are printed."""
    real, rng = embedder.load(), numpy.random.default_rng(0)
    train, tests = (problems.load("laptop", split).problems for split in ("train", "test"))
    base = real.embed([problem.question for problem in train])
    known = Known(real.fingerprint, real.name, real.dimension)
    queries = [tests[i % len(tests)] for i in range(QUERIES)]
    asked = [problem.question for problem in queries]
    known.vectors |= dict(zip(asked, real.embed(asked, query=True)))
    known.vectors |= {problem.question: v for problem, v in zip(train, base)}
    with tempfile.TemporaryDirectory() as folder:
        bank, seconds, every = ReasoningBank(folder, known), [], []
        for start in range(0, ITEMS, PART):
            noise = rng.normal(size=(PART, real.dimension)) / real.dimension**0.5
            vectors = base[rng.integers(len(base), size=PART)] + noise
            vectors = (vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)).astype("f4")
            items = [_item(i, train[i % len(train)]) for i in range(start, start + PART)]
            known.vectors |= {item.text: v for item, v in zip(items, vectors)}
            every += [item.id for item in items]
            began = time.perf_counter()
            bank.add(items)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        bank.retrieve(queries[0])
        print(f"  first search {time.perf_counter() - began:.1f} s; {_files(folder):,} files")
        for problem in queries[:50]:
            bank.retrieve(problem)
        times, found = [], []
        for problem in queries:
            began = time.perf_counter()
            found.append(bank.retrieve(problem, k=5))
            times.append(1000 * (time.perf_counter() - began))
    small = _small_writes(known, train, queries)
    matrix = numpy.stack([known.vectors[_item(i, train[0]).text] for i in range(ITEMS)])
    scores = matrix @ real.embed(asked, query=True).T
    nearest = numpy.argpartition(-scores, 5, axis=0)[:5].T
    got = [{item.id for item in each.strategies} | set(each.filtered) for each in found]
    hits = [len({every[i] for i in best} & ids) / 5 for best, ids in zip(nearest, got)]
    spread = [float(numpy.percentile(times, q)) for q in (5, 95)]
    said = f"{ITEMS:,} items of 384 dimensions on disk"
    return {
        "bank_search_p50_ms": dict(
            value=statistics.median(times), unit="ms", against=said, n=QUERIES, spread=spread
        ),
        "bank_recall_at_5": dict(
            value=statistics.mean(hits), unit="share", against="plain cosines", n=QUERIES,
            spread=[min(hits), max(hits)],
        ),
        "bank_add_10k_s": dict(
            value=statistics.median(seconds), unit="s", against="10,000 items, vectors known",
            n=len(seconds), spread=[min(seconds), max(seconds)],
        ),
        "bank_small_writes_search_ms": dict(
            value=statistics.median(small), unit="ms", against="300 writes of one item",
            n=len(small), spread=[min(small), max(small)],
        ),
    }  # fmt: skip


def _small_writes(known: Known, train, queries) -> list[float]:
    """Milliseconds of searches in a bank that was written to item by item."""
    with tempfile.TemporaryDirectory() as folder:
        bank, times = ReasoningBank(folder, known), []
        for i in range(300):
            bank.add([_item(i, train[i % len(train)])])
        for problem in queries[:100]:
            began = time.perf_counter()
            bank.retrieve(problem)
            times.append(1000 * (time.perf_counter() - began))
        print(f"  300 writes of one item: {_files(folder):,} files")
    return times


def _files(folder: str) -> int:
    return sum(path.is_file() for path in Path(folder).rglob("*"))


def _item(i: int, problem) -> Strategy:
    return Strategy(
        title=f"Lesson {i}",
        description="When it fits.",
        content=f"Do the step called {i:x} and check what comes of it.",
        kind="success",
        problem_id=f"bench-{i}",
        family=problem.family,
        level=problem.level,
        question=problem.question,
        model="bench",
        extractor="bench",
    )
