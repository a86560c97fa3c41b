"""The Triton decode kernel on a GPU: its share of the card's bandwidth, and a whole decode step.

`gpu_attention_bandwidth_share`: keys and values that the kernel reads per second over what a copy
moves per second, Qwen3-1.7B, 32 sequences of 32,768 tokens; a table has other sizes, Qwen3-8B,
and torch's SDPA over as many tokens stored densely. `gpu_dms8_decode_vs_sdpa_32k`: tokens/s of
Qwen3-1.7B with random weights, our cache with 1/8 of the tokens live, its steps as CUDA graphs,
against transformers' SDPA on a dense cache.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config
from transformers.cache_utils import Cache, DynamicLayer

from kit.dms import evictor
from kit.inference import decode
from kit.inference.cuda_graphs import StepGraphs
from kit.inference.kv_cache import SlotCache
from kit.inference.policies import DMS
from kit.models.load import Model, load

HEADS, SIZE, BLOCK = 8, 128, 16  # KV heads and head size of Qwen3-1.7B and 8B; slots per block
GROUPS = {"Qwen3-1.7B": 2, "Qwen3-8B": 4}  # query heads per KV head
CONTEXTS, BATCHES = (2048, 8192, 32_768), (1, 8, 32, 64)
CONTEXT, BATCH, KEPT = 32_768, 32, 1 / 8
PAIRS, STEPS = 7, 5  # pairs of measurements, steps in each
QWEN3_1_7B = dict(
    **dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, vocab_size=151_936),
    **dict(num_attention_heads=16, num_key_value_heads=HEADS, head_dim=SIZE, rope_theta=1e6),
    **dict(max_position_embeddings=40_960, tie_word_embeddings=True),
)


@torch.inference_mode()
def run() -> dict:
    """Both figures, or why there are none."""
    if not torch.cuda.is_available():
        why = {"skipped": "no CUDA device"}
        return {"gpu_attention_bandwidth_share": why, "gpu_dms8_decode_vs_sdpa_32k": why}
    share = attention_share()
    return {"gpu_attention_bandwidth_share": share, "gpu_dms8_decode_vs_sdpa_32k": step_ratio()}


def figure(values: list[float], unit: str, against: str) -> dict:
    spread = [min(values), max(values)]
    value = statistics.median(values)
    return dict(value=value, unit=unit, against=against, n=len(values), spread=spread)


def clock(call: Callable) -> list[float]:
    """Seconds of each of many calls on the device, with its cache emptied before each."""
    import triton

    return [ms / 1000 for ms in triton.testing.do_bench(call, return_mode="all")]


def copy_bandwidth(size: int = 1 << 31) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / statistics.median(clock(lambda: target.copy_(source)))


def free_memory() -> int:
    """Bytes of the device that nothing uses, what torch keeps for later included."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def attention_share() -> dict:
    """The figure for one size; the table of all sizes is printed."""
    copy = copy_bandwidth()
    print(f"  copy: {copy / 1e9:.0f} GB/s; attention in microseconds, ours and SDPA:")
    sizes = [(name, tokens, batch) for name in GROUPS for tokens in CONTEXTS for batch in BATCHES]
    found = {}
    for name, tokens, batch in sizes:
        read = 2 * batch * tokens * HEADS * SIZE * 2  # bytes of keys and values in bfloat16
        if 2.5 * read > free_memory():  # they lie in blocks and densely
            print(f"  {name} {tokens:6} x {batch:2}: {2 * read / 1e9:.0f} GB do not fit")
            continue
        ours, dense = map(clock, attention(batch, tokens, GROUPS[name]))
        shares = [read / seconds / copy for seconds in ours]
        found[name, tokens, batch] = shares
        times = f"{1e6 * statistics.median(ours):8.1f} {1e6 * statistics.median(dense):8.1f}"
        share = f"{statistics.median(shares):.0%} of the copy's bandwidth"
        print(f"  {name} {tokens:6} x {batch:2}: {times}, {share}", flush=True)
    if ("Qwen3-1.7B", CONTEXT, BATCH) not in found:
        return {"skipped": "the card's memory does not hold 32 sequences of 32,768 tokens twice"}
    against = f"a copy at {copy / 1e9:.0f} GB/s on {torch.cuda.get_device_name()}"
    return figure(found["Qwen3-1.7B", CONTEXT, BATCH], "x bandwidth", against)


def attention(batch: int, tokens: int, group: int, device: str = "cuda") -> tuple[Callable, ...]:
    """Two calls on caches of random bfloat16: the kernel on scattered blocks, SDPA densely."""
    from kit.inference.triton_attention import paged_attention

    random = dict(device=device, dtype=torch.bfloat16)
    units, width = batch * HEADS, tokens // BLOCK
    pool = [torch.randn(units * width, 1, BLOCK, SIZE, **random) for _ in range(2)]
    bias = torch.zeros(units * width, BLOCK, device=device)
    table = torch.randperm(units * width, device=device, dtype=torch.int32).view(units, width)
    count = torch.full((units,), width, device=device, dtype=torch.int32)
    query = torch.randn(units, 1, group, SIZE, **random) * SIZE**-0.5
    dense = [torch.randn(batch, HEADS, tokens, SIZE, **random) for _ in range(2)]
    one = torch.randn(batch, HEADS * group, 1, SIZE, **random)
    return (
        lambda: paged_attention(query, *pool, bias, table, count),
        lambda: F.scaled_dot_product_attention(one, *dense, enable_gqa=True),
    )


class Roomy(DynamicLayer):
    """transformers' dense layer, written in place: its own copies the whole cache each step."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self.room, self.length = (keys, values), length
        self.lazy_initialization(keys, values)
        self.keys, self.values = (x[:, :, :length] for x in self.room)

    def update(self, key_states, value_states, *args, **kwargs):
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, self.length : self.length + 1] = new
        self.length += 1
        self.keys, self.values = (x[:, :, : self.length] for x in self.room)
        return self.keys, self.values


class Dense:
    """transformers with SDPA: `batch` sequences of `length` random tokens, and room for more."""

    def __init__(self, model: Model, batch: int, length: int, room: int):
        self.model, self.batch = model, batch
        config = model.weights.config
        shape = batch, config.num_key_value_heads, length + room, config.head_dim
        pools = [
            [torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)]
            for _ in range(config.num_hidden_layers)
        ]
        self.cache = Cache(layers=[Roomy(*pool, length) for pool in pools])
        self.last = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def attached(self) -> AbstractContextManager:
        return nullcontext()

    def step(self) -> torch.Tensor:
        """Next tokens [batch, 1]."""
        length = self.cache.get_seq_length()
        positions = torch.full((self.batch, 1), length, device=self.model.device)
        before = dict(position_ids=positions, past_key_values=self.cache)
        return self.model.weights(self.last, **before).logits.argmax(-1)


class Slots:
    """The kit's decode step with DMS: `batch` sequences of `length` tokens, `live` of them kept."""

    def __init__(self, model: Model, batch: int, length: int, live: float, window: int):
        self.model, self.batch = model, batch
        recipe = replace(evictor.OFFICIAL, window=window)  # untrained: asked, and evicts nothing
        self.policy = DMS(evictor.Evictor(model.weights, recipe, model.weights_hash).eval())
        room = STEPS * (PAIRS + 3)
        self.cache = SlotCache(model.weights, batch, self.policy, tokens=length + room)
        self.cache.prefill([list(range(batch))], [length])
        config, device = model.weights.config, model.device
        heads, size = config.num_key_value_heads, config.head_dim
        kept = torch.tensor((live - window) / (length - window))  # of the tokens past the window
        for layer in range(config.num_hidden_layers):
            logits = torch.randn(1, length, heads, device=device)
            self.cache.set_eviction_logits(layer, logits - torch.special.ndtri(kept).item())
            prompt = torch.randn(3, 1, heads, length, size, device=device, dtype=model.dtype)
            self.cache.attend(layer, *prompt, size**-0.5)
        self.graphs = StepGraphs(model, self.cache, decode.STEP_ROWS[device.type])
        self.last = [0] * batch

    @contextmanager
    def attached(self) -> Iterator[None]:
        with decode.slots_attached(self.model), self.policy.attached(self.model.weights):
            yield

    def step(self) -> torch.Tensor:
        """Next tokens [batch]."""
        return self.graphs.step([*range(self.batch)], self.last).argmax(-1)


def step_seconds(engine: Dense | Slots) -> float:
    """Median of STEPS steps, each up to the arrival of its tokens on the host."""
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        said = engine.step()
        said.tolist()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def step_ratio(
    shape: dict = QWEN3_1_7B,
    batch: int = BATCH,
    length: int = CONTEXT,
    window: int = evictor.OFFICIAL.window,
) -> dict:
    """Tokens/s of Slots over those of Dense, pair by pair. The dense batch is what fits."""
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(**shape)
        config.to_json_file(Path(folder, "config.json"), use_diff=False)
        model = load(f"random:{folder}")
    torch.manual_seed(0)
    ours = Slots(model, batch, length, length * KEPT, window)
    room, most = STEPS * (PAIRS + 3), batch
    if model.device.type == "cuda":
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        each = numbers * (length + room) * model.dtype.itemsize  # bytes of one sequence
        most = min(batch, int(0.9 * free_memory() / each))
    engines = {ours: batch, Dense(model, most, length, room): most}
    rates = {engine: [] for engine in engines}
    for _ in range(PAIRS + 1):
        for engine, sequences in engines.items():
            with engine.attached():
                rates[engine].append(sequences / step_seconds(engine))
    ratios = [mine / theirs for mine, theirs in zip(*rates.values())][1:]  # the first warms up
    live = ours.cache.live_tokens().mean().item()
    for engine, sequences in engines.items():
        rate = statistics.median(rates[engine])
        print(f"  {type(engine).__name__:6} batch {sequences}: {rate:.0f} tokens/s", flush=True)
    print(f"  {live:.0f} live tokens of {length}, {ours.cache.nbytes() / 1e9:.1f} GB allocated")
    return figure(ratios, "x tokens/s", f"transformers sdpa, dense in-place cache, batch {most}")


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
