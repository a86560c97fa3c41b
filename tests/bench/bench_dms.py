"""Decoding with a cache that DMS has thinned, and training an evictor, on the bundled model.

`dms8_decode_vs_full_8000`, `dms8_decode_vs_transformers_8000`: tokens/s at 8,000 tokens of context
and batch 8 with an eighth of the tokens live, over our own full policy and over transformers
generate (whose first step, which copies its cache, is left out). `dms8_kv_bytes_vs_full`: allocated
bytes of the two caches, bookkeeping counted. Caches are filled with random keys and values; an
untrained evictor is asked in every step and evicts nothing. Pairs are interleaved in one process.
`dms_train_s_per_step`: seconds of a step of 3 x 384 tokens. KIT_BENCH_PAIRS makes a shorter run.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from kit.dms import evictor
from kit.dms.train import EvictorTraining
from kit.inference import decode
from kit.inference.kv_cache import SlotCache
from kit.inference.policies import DMS, Full
from kit.models.load import BUNDLED, load

PAIRS = int(os.environ.get("KIT_BENCH_PAIRS", 5))
STEPS = 6  # decode steps in one measurement
SIZES = [(512, 1), (512, 8), (512, 16), (2000, 1), (2000, 8), (2000, 16), (8000, 1), (8000, 16)]
LONG = 8000  # with batch 8: the size of the figures


def run() -> dict:
    """The four figures; a table of other sizes is printed."""
    model = load(BUNDLED)
    made = evictor.Evictor(model.weights, evictor.LAPTOP, model.weights_hash).requires_grad_(False)
    print("  context batch  tokens/s: full, 4x, 8x    allocated (accounted) MB: full, 4x, 8x")
    for length, batch in SIZES:
        _line(length, batch, [_ours(model, made, length, batch, x) for x in (1, 4, 8)])
    pairs = []
    for _ in range(PAIRS):
        full, fourth, eighth = (_ours(model, made, LONG, 8, x) for x in (1, 4, 8))
        pairs.append((full, eighth, _transformers(model, LONG, 8)))
        _line(LONG, 8, (full, fourth, eighth))
        print(f"  transformers generate: {pairs[-1][2]:.1f} tokens/s", flush=True)
    rates = "full policy, 8,000 tokens x 8", "transformers generate, 8,000 tokens x 8"
    return {
        "dms8_decode_vs_full_8000": _figure([e[0] / f[0] for f, e, _ in pairs], "x", rates[0]),
        "dms8_decode_vs_transformers_8000": _figure([e[0] / t for _, e, t in pairs], "x", rates[1]),
        "dms8_kv_bytes_vs_full": _figure([e[1] / f[1] for f, e, _ in pairs], "x bytes", rates[0]),
        "dms_train_s_per_step": _figure(_training(model), "s", "3 x 384 tokens in a step"),
    }


def _figure(values: list[float], unit: str, against: str) -> dict:
    spread = [min(values), max(values)]
    value = statistics.median(values)
    return dict(value=value, unit=unit, against=against, n=len(values), spread=spread)


def _line(length: int, batch: int, found) -> None:
    rates = "  ".join(f"{rate:7.1f}" for rate, *_ in found)
    sizes = "  ".join(f"{bytes_ / 1e6:.0f} ({live / 1e6:.0f})" for _, bytes_, live in found)
    print(f"  {length:7} {batch:5}  {rates}    {sizes}", flush=True)


@torch.inference_mode()
def _ours(model, made, length: int, batch: int, compression: int) -> tuple[float, int, float]:
    """Tokens/s, allocated bytes, accounted bytes (live tokens times bytes per token)."""
    policy = DMS(made) if compression > 1 else Full()
    cache = SlotCache(model.weights, batch, policy)
    cache.fill(batch, length, length // compression)
    last, seconds = torch.zeros(1, batch, dtype=torch.long), []
    with decode.slots_attached(model), policy.attached(model.weights):
        for _ in range(STEPS + 1):
            started = time.perf_counter()
            now = dict(position_ids=cache.step(list(range(batch))), slots=cache, use_cache=False)
            last = model.weights(last, **now).logits.argmax(-1)
            seconds.append(time.perf_counter() - started)
    live = float(cache.live_tokens().sum()) * cache.token_bytes
    return batch / statistics.median(seconds[1:]), cache.nbytes(), live


@torch.inference_mode()
def _transformers(model, length: int, batch: int) -> float:
    """Tokens/s of generate after `length` tokens, its cache filled with random keys and values."""
    config = model.weights.config
    shape = batch, config.num_key_value_heads, length, config.head_dim
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype) for _ in range(2)), layer)
    clock = []

    def watch(ids, scores):
        clock.append(time.perf_counter())
        return torch.zeros(batch, dtype=torch.bool)

    ids = torch.ones(batch, length + 1, dtype=torch.long)
    stop = dict(max_new_tokens=STEPS + 2, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.weights.generate(ids, past_key_values=cache, stopping_criteria=[watch], **stop)
    seconds = [b - a for a, b in zip(clock, clock[1:])]
    return batch / statistics.median(seconds[1:])


def _training(model) -> list[float]:
    recipe = dataclasses.replace(evictor.LAPTOP, batch=3, context=384, ramp_steps=PAIRS)
    data = torch.randint(3, 40_000, (3 * PAIRS, 384), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        training = EvictorTraining(model, data, recipe, Path(folder))
        return [training.step()["seconds"] for _ in range(PAIRS + 1)][1:]
