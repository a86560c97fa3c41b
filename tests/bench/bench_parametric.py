"""Serving a bank of 4 GB: fetch times, memory held, and what fetched blocks cost in decoding.

A synthetic bank on disk (24 subtrees, three levels, 0.97M parameters fetched), opened with a cache
of 64 MiB. Cold: the pages of the path are dropped from the page cache before each fetch; warm: they
are there, the bank's own cache does not hold them. After it is opened the process may have no more
data than cache and 256 MiB more (RLIMIT_DATA, as `ulimit -d` sets it), so that a bank that crept
into memory would end the bench. Decoding: 16 sequences with 16 different paths against none, in
pairs. Serving: 48 questions to 48 leaves through a batch of 16, with a cache of four paths, so that
blocks are evicted while they are asked for: milliseconds between tokens of a sequence, admissions
included, over those with a cache of all and those without memory, and reads per block; two
processes that fetch from one map, and the memory of both as its pages are shared (PSS).
KIT_BENCH_PATHS makes it other than 1,000 paths, KIT_BENCH_BANK keeps the bank in a folder.
"""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from kit.data import problems, prompts
from kit.inference import decode
from kit.models.load import BUNDLED, load
from kit.parametric import cluster_tree, ffn_memory, shards
from kit.parametric.bank import ParametricBank, assemble_bank
from kit.schema import Sampling

PATHS = int(os.environ.get("KIT_BENCH_PATHS", 1000))
PAIRS = 5
BRANCHING, SIZES, LAYERS = 24, (32, 16, 8), 10
CACHE, SLACK = 2**26, 2**28  # bytes
SEQUENCES, SERVED = 16, 48  # at once, in all


def run() -> dict:
    """`bank_fetch_p99_ms_cold`, `_warm`, `bank_resident_mib`, `parametric_decode_overhead`."""
    model = load(BUNDLED)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _bank(model, Path(os.environ.get("KIT_BENCH_BANK", scratch)))
        bank = ParametricBank(folder, model, cache_bytes=CACHE)
        sizes = {name: f"{count / 2**20:,.1f} MiB" for name, count in bank.nbytes().items()}
        print(f"  {sizes}", flush=True)
        before = resource.getrlimit(resource.RLIMIT_DATA)
        held = psutil.Process().memory_info()
        limit = _data_bytes() + CACHE + SLACK
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        try:
            cold, warm = _fetches(bank, True), _fetches(bank, False)
            more = (psutil.Process().memory_info().rss - held.rss) / 2**20
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
        ratios = _decoding(model, bank)
        served = _serving(model, folder)
        shared = _two_processes(folder)
    resident = {"value": more, "unit": "MiB", "against": f"a cache of {CACHE / 2**20:.0f} MiB"}
    return {
        "bank_fetch_p99_ms_cold": _fetch(cold),
        "bank_fetch_p99_ms_warm": _fetch(warm),
        "bank_resident_mib": resident | {"n": 2 * PATHS, "spread": [more, more]},
        "parametric_decode_overhead": {
            "value": statistics.median(ratios),
            "unit": "x seconds",
            "against": "the same decoding without memory",
            "n": len(ratios),
            "spread": [min(ratios), max(ratios)],
        },
        "parametric_token_p99_ms": served,
        "bank_two_processes_mib": shared,
    }


def _bank(model, folder: Path) -> Path:
    layers = ffn_memory.choose_layers(LAYERS, model.weights.config.num_hidden_layers, "late")
    shape = ffn_memory.shape(model.weights, "ffn", layers, SIZES, BRANCHING)
    if (folder / "bank.json").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    rng, files = torch.Generator().manual_seed(0), []
    for node in range(BRANCHING):
        sizes = [(BRANCHING**level, *shape.block(level)) for level in range(len(SIZES))]
        blocks = [torch.randn(size, generator=rng).mul_(0.01).half() for size in sizes]
        files.append(shards.write(folder / shards.name(node), blocks))
    vectors = np.random.default_rng(0).normal(size=(BRANCHING**2, 8)).astype(np.float32)
    tree = cluster_tree.fit(vectors, BRANCHING, len(SIZES), steps=1)
    return assemble_bank(folder, model, tree, shape, files)


def _paths(count: int, seed: int) -> list[tuple[int, ...]]:
    leaves = np.random.default_rng(seed).choice(BRANCHING ** len(SIZES), count, replace=False)
    return [
        tuple(int(leaf) // BRANCHING**up for up in reversed(range(len(SIZES)))) for leaf in leaves
    ]


def _fetches(bank: ParametricBank, cold: bool) -> list[float]:
    """Milliseconds of each fetch."""
    found = []
    for path in _paths(PATHS, seed=int(cold)):
        file = os.open(bank.folder / shards.name(path[0]), os.O_RDONLY)
        if cold:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            bank.fetch(path)
        os.close(file)
        bank._cache.clear()
        started = time.perf_counter()
        bank.fetch(path)
        found.append(1000 * (time.perf_counter() - started))
    return found


def _fetch(times: list[float]) -> dict:
    middle, last = np.percentile(times, [50, 99])
    print(f"  fetch: p50 {middle:.2f} ms, p99 {last:.2f} ms", flush=True)
    against = f"p50 {middle:.2f} ms"
    spread = [float(min(times)), float(max(times))]
    return {
        "value": float(last),
        "unit": "ms",
        "against": against,
        "n": len(times),
        "spread": spread,
    }


def _decoding(model, bank: ParametricBank) -> list[float]:
    """Seconds with sixteen paths over seconds without memory."""
    suite = problems.load("laptop", "test", n=16).problems
    ids = [decode.tokenize(model, prompts.plain(p)) for p in suite]
    plain = [decode.Request(i, p.id) for i, p in zip(ids, suite)]
    paths = [(node, node * BRANCHING, node * BRANCHING**2) for node in range(16)]
    wide = [decode.Request(r.prompt_ids, r.problem_id, 0, path) for r, path in zip(plain, paths)]
    stop, model.weights.generation_config.eos_token_id = model.stop_ids, None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    try:
        for _ in range(PAIRS):
            for memory in (False, True):
                started = time.perf_counter()
                how = dict(bank=bank) if memory else {}
                decode.decode(model, wide if memory else plain, Sampling(64), 16, **how)
                seconds[memory].append(time.perf_counter() - started)
    finally:
        model.weights.generation_config.eos_token_id = [*stop]
    return [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]


def _serving(model, folder: Path) -> dict:
    """Milliseconds between the forward passes of a batch whose questions go to other leaves, with
    a cache of four paths, and over those with a cache of all, and without memory."""
    shape = ParametricBank(folder, model).shape
    one = model.dtype.itemsize * shape.fetched
    few, all_ = (ParametricBank(folder, model, cache_bytes=n * one) for n in (4, 2 * SERVED))
    reads, read = [], few._read
    few._read = lambda *key: reads.append(key) or read(*key)
    suite = problems.load("laptop", "test", n=SERVED).problems
    ids = [decode.tokenize(model, prompts.plain(p)) for p in suite]
    asked = [
        decode.Request(i, p.id, 0, path)
        for i, p, path in zip(ids, suite, _paths(SERVED, seed=2), strict=True)
    ]
    plain = _gaps(model, [decode.Request(r.prompt_ids, r.problem_id) for r in asked])
    _gaps(model, asked, bank=all_)  # reads them
    roomy, gaps = _gaps(model, asked, bank=all_), _gaps(model, asked, bank=few)
    middle, last = np.percentile(gaps, [50, 99])
    over = [[float(np.percentile(gaps, q) / np.percentile(other, q)) for q in (50, 99)]
            for other in (roomy, plain)]  # fmt: skip
    against = f"p50 {middle:.0f} ms, {len(reads) / len(set(reads)):.2f} reads of a block; "
    against += "p50 and p99 over those of a cache of all paths {:.2f}, {:.2f}".format(*over[0])
    against += ", without memory {:.2f}, {:.2f}".format(*over[1])
    print(f"  serving: p99 {last:.0f} ms, {against}", flush=True)
    spread = [float(gaps.min()), float(gaps.max())]
    return {
        "value": float(last),
        "unit": "ms",
        "against": against,
        "n": len(gaps),
        "spread": spread,
    }


def _gaps(model, asked: list, **memory) -> np.ndarray:
    """Milliseconds between two forward passes of a batch that answers `asked`."""
    passes: list[float] = []
    hook = model.weights.base_model.register_forward_hook(
        lambda *_: passes.append(time.perf_counter())
    )
    try:
        decode.decode(model, asked, Sampling(32), SEQUENCES, **memory)
    finally:
        hook.remove()
    return 1000 * np.diff(passes)


def _two_processes(folder: Path) -> dict:
    """MiB that fetching equal paths adds to two processes together, shared pages counted once."""
    spawn = multiprocessing.get_context("spawn")
    ready, found = spawn.Barrier(2), spawn.Queue()
    readers = [spawn.Process(target=_reader, args=(folder, ready, found)) for _ in range(2)]
    for reader in readers:
        reader.start()
    each = [found.get(timeout=600) for _ in readers]
    for reader in readers:
        reader.join()
    more, sums = [added for added, _ in each], {digest for _, digest in each}
    assert len(sums) == 1, "both read the same blocks"
    against = (
        f"two caches of {CACHE / 2**20:.0f} MiB; each {', '.join(f'{one:.0f}' for one in more)}"
    )
    spread = [min(more), max(more)]
    return {"value": sum(more), "unit": "MiB", "against": against, "n": 2 * PATHS, "spread": spread}


def _reader(folder: Path, ready, found) -> None:
    """A process that fetches all paths while another does, and says what memory that added."""
    bank = ParametricBank(folder, load(BUNDLED), cache_bytes=CACHE)
    before, sums = psutil.Process().memory_full_info().pss, 0.0
    ready.wait()
    for path in _paths(PATHS, seed=3):
        sums += sum(float(block.float().sum()) for block in bank.fetch(path))
    ready.wait()
    found.put(((psutil.Process().memory_full_info().pss - before) / 2**20, sums))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
