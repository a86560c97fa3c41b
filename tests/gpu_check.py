"""`make gpu-check`: what a CUDA GPU says of the kit, in one process and at most eight minutes.

    python -m tests.gpu_check            on a GPU; the time is that of one H100 or less
    python -m tests.gpu_check --dry      the same checks at tiny sizes on a CPU, as the tests run it

Each check has a budget of seconds and prints one line; whatever becomes of it, the others follow,
and gpu.json is written again after each. Its word is "ok"; "poor" where a speed or a size misses
what it should be; "wrong", "crash" or "late", which are failures; or "skipped". Most models are
random weights in the shape of Qwen3-1.7B: speed, memory, devices and dtypes do not depend on
values. Real weights are a part of their own, `real_weights`, where they lie here already.

Needs torch, triton, transformers and what `make gpu-pack` packs; the kit is imported inside the
checks, so that what cannot be imported is the crash of one. Exit status: 0 without a failure, 1
with one, 2 without a GPU.
"""

import argparse
import contextlib
import copy
import dataclasses
import faulthandler
import gc
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

if importlib.util.find_spec("lancedb") is None:  # too large to carry; nothing here stores anything
    sys.modules["lancedb"] = types.ModuleType("lancedb")

from kit import paths
from kit.pipeline import provenance  # noqa: E402

LIMIT = 450  # seconds of all checks together; what hangs in the driver is ended 20 later
PACK = paths.ROOT / ".gpu"  # what tests.gpu_pack puts there
FAILED = ("wrong", "crash", "late")
QWEN3_1_7B = dict(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, vocab_size=151_936,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
    max_position_embeddings=40_960, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1,
)  # fmt: skip
TINY = QWEN3_1_7B | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=49_152)
CHECKS: dict[str, tuple[float, Callable]] = {}  # name -> seconds it may take, what it does


class Late(BaseException):
    """A check has used up its seconds; no `except Exception` of a library may swallow it."""


@dataclasses.dataclass(frozen=True)
class Here:
    """Where the checks run, and at which of their two sizes."""

    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def shape(self) -> dict:
        return TINY if self.dry else QWEN3_1_7B

    @property
    def layers(self) -> int:
        """Of a model that is trained as a whole, with two moments of each weight in float32."""
        if self.dry:
            return 2
        return 28 if torch.cuda.get_device_properties(0).total_memory > 70e9 else 6

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Give back what nothing holds any more, and begin to count the peak anew."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def held_gb(self) -> float:
        return 0.0 if self.dry else round(torch.cuda.memory_allocated() / 1e9, 2)

    def peak_gb(self) -> float:
        return 0.0 if self.dry else round(torch.cuda.max_memory_allocated() / 1e9, 2)

    def seconds(self, call: Callable, times: int = 5) -> float:
        """Median of `times` calls after a first one, each up to its end on the device."""
        clock = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            clock.append(time.perf_counter() - began)
        return statistics.median(clock[1:])


def check(budget: float) -> Callable:
    """Adds a function of (Here, dict) to CHECKS: it puts figures into the dict and returns what to
    print of them. A failed assertion is "wrong"; a sentence under "poor" in the dict is that."""

    def add(function: Callable) -> Callable:
        CHECKS[function.__name__] = budget, function
        return function

    return add


def run(checks: dict, here: Here, limit: float = LIMIT, keep=lambda found: None) -> dict:
    """Every check, one after the other: name -> its figures, with verdict, seconds and what it
    said. `keep` gets all of them after each."""
    began, found = time.monotonic(), {}
    before = signal.signal(signal.SIGALRM, _late)
    for name, (budget, function) in checks.items():
        left = limit - (time.monotonic() - began)
        with contextlib.redirect_stdout(sys.stderr):  # what a training says is not a check's line
            found[name] = row = _one(function, here, min(budget, left))
        print(f"{name:20} {row['verdict']:8} {row['seconds']:5.1f} s  {row['said']}", flush=True)
        keep(found)
    signal.signal(signal.SIGALRM, before)
    return found


def _late(*_) -> None:
    raise Late


def _one(function: Callable, here: Here, seconds: float) -> dict:
    row, began, word = {}, time.monotonic(), "ok"
    if seconds < 3:
        return dict(verdict="skipped", seconds=0.0, said="no time left")
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        here.clear()
        said = function(here, row)
        word = "poor" if "poor" in row else word
    except Skipped as why:
        word, said = "skipped", str(why)
    except Late:
        word, said = "late", f"not done after {seconds:.0f} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # pytest's own are no Exceptions
        word = "wrong" if isinstance(error, AssertionError) else "crash"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = [f for f in traceback.extract_tb(error.__traceback__) if _ours(f.filename)][-1:]
        at = "".join(f" ({Path(f.filename).name}:{f.lineno})" for f in where)
        row["error"] = traceback.format_exc()
        said = f"{type(error).__name__}: {' '.join(lines)[:200]}{at}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    said = f"{row['poor']}; {said}" if word == "poor" else said
    return row | dict(verdict=word, seconds=round(time.monotonic() - began, 1), said=said)


class Skipped(Exception):
    """A check that cannot be made here, and why."""


def _ours(file: str) -> bool:
    return Path(file).is_relative_to(paths.ROOT / "kit") or file == __file__


# What the checks share


def random_model(here: Here, **changes):
    """Random bfloat16 weights in the shape of Qwen3-1.7B, with `changes`."""
    from transformers import Qwen3Config

    from kit.models.load import load

    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(**here.shape | changes)
        config.to_json_file(Path(folder, "config.json"), use_diff=False)
        return load(f"random:{folder}", "bfloat16", here.device)


def saved_model(here: Here, folder: Path) -> str:
    """A folder that TRL can load: random weights, and the tokenizer of the bundled model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    from kit.models.load import bundled

    packed = PACK / "tokenizer"
    config = Qwen3Config(**here.shape | dict(num_hidden_layers=here.layers))
    with torch.device(here.device):
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(packed if packed.is_dir() else bundled())
    tokenizer.save_pretrained(folder)
    return str(folder)


def pair_of(here: Here, family: str) -> list:
    """The same tiny model in float32 on the CPU and on this device."""
    from kit.models.load import load

    pair = [load(f"random:{family}", "float32", where) for where in ("cpu", here.device)]
    pair[1].weights.load_state_dict(pair[0].weights.state_dict())  # each device draws its own
    return pair


def small_policies(model) -> dict:
    """Every policy, with budgets that evict from a few dozen tokens; an evictor of the CPU."""
    from kit.inference import policies as p
    from tests.toys import drawn

    made = {"full": p.Full(), "dms": p.DMS(drawn(model, window=6)), "rkv": p.RKV(20, buffer=16)}
    for kind in (p.Window, p.TOVA, p.H2O, p.Random, p.Knorm):
        for policy in (kind(20), kind(kept_fraction=0.4)):
            made[policy.name] = policy
    return made


def moved(policy, device: str):
    """The policy for a model on another device: an evictor is a module."""
    if not hasattr(policy, "evictor"):
        return policy
    return dataclasses.replace(policy, evictor=copy.deepcopy(policy.evictor).to(device))


# The checks


@check(30)
def environment(here: Here, found: dict) -> str:
    """Versions, the card, what a copy moves and what a launch costs."""
    import transformers
    import triton

    from tests.bench.bench_kernels import copy_bandwidth

    versions = dict(torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda)
    found |= versions | dict(transformers=transformers.__version__)
    said = f"torch {torch.__version__}, triton {triton.__version__}"
    x = torch.zeros(64, device=here.device)
    count = 100 if here.dry else 20_000
    found["us_per_launch"] = 1e6 / count * here.seconds(lambda: [x.add_(1) for _ in range(count)])
    if here.dry:
        return said
    card = torch.cuda.get_device_properties(0)
    found |= dict(card=card.name, memory_gb=round(card.total_memory / 1e9, 1))
    found |= dict(capability=f"{card.major}.{card.minor}", copy_gbs=copy_bandwidth() / 1e9)
    return (
        f"{card.name}, {found['memory_gb']} GB, {said}; copies {found['copy_gbs']:.0f} GB/s, "
        f"a launch takes {found['us_per_launch']:.1f} us"
    )


@check(90)
def kernel_cases(here: Here, found: dict) -> str:
    """The Triton kernels against float64, all shapes and dtypes of their tests."""
    from tests.inference import test_triton_attention as cases
    from tests.inference import test_triton_layers as layers
    from tests.inference import test_triton_quantization as codes

    for name, dtype in [("ragged", torch.bfloat16)] if here.dry else cases.CHECKS:
        error = cases.worst_error(cases.CASES[name], dtype, here.device)
        found[f"{name}, {dtype}"] = error  # in what the dtype may miss
    for bits in (8,) if here.dry else (8, 4, 2):
        error, gap = cases.read_codes(cases.RAGGED, torch.bfloat16, bits, 33, here.device)
        found[f"{bits} bits"] = max(error, gap / 0.02)
    for name, dtype in [(n, d) for n in layers.CASES for d in layers.DTYPES][
        :: 9 if here.dry else 1
    ]:
        found[f"{name}, {dtype}"] = layers.worst_error(name, dtype, here.device)
    for case in codes.CASES[:: 9 if here.dry else 1]:
        unlike = codes.differing(*case, torch.bfloat16, here.device)
        found["codes of {} bits, {} by {}".format(*case)] = unlike / codes.EDGE
    wrong = [name for name, error in found.items() if not error <= 1]
    assert not wrong, f"{', '.join(wrong)}: off by more than rounding explains"
    return f"{len(found)} cases as near to float64 as rounding allows"


@check(40)
def kernel_and_plain(here: Here, found: dict) -> str:
    """The Triton kernel against the plain path on the same cache, while decoding in float32."""
    from kit.inference import decode, paged_attention
    from kit.inference.kv_cache import SlotCache
    from kit.inference.policies import Full, Knorm
    from kit.models.load import RANDOM, load
    from kit.schema import Sampling

    plain, errors = paged_attention.attend, []

    def both(query, pool, step, plane, watch, scale, out):
        found = plain(query, pool, step, plane, True, scale, out)  # watching is plain
        kernel, _ = paged_attention._attend_paged(query, pool, step, plane, scale=scale)
        errors.append((kernel - out).abs().max().item())
        return found

    requests = [decode.Request(tuple(range(1, 1 + n)), str(n)) for n in (40, 11, 2)]
    sampling = Sampling(2 if here.dry else 16)
    for family in ("gemma3",) if here.dry else RANDOM:
        model = load(f"random:{family}", "float32", here.device)
        alone = mock.patch.object(
            SlotCache, "steps_without_sync", False
        )  # what is compared needs more
        with mock.patch.object(paged_attention, "attend", both), alone:
            for policy in (Full(), Knorm(9)):
                decode.decode(model, requests, sampling, 2, policy=policy)
    found |= dict(attentions=len(errors), worst=max(errors))
    assert found["worst"] < 1e-5, f"they differ by {found['worst']:.1e}"
    return f"{len(errors)} attentions differ by at most {found['worst']:.0e}"


@check(60)
def as_transformers(here: Here, found: dict) -> str:
    """Greedy tokens in float32, and logits in bfloat16 as near to float64, as transformers'."""
    from kit.inference import decode
    from kit.models.load import RANDOM, load
    from kit.schema import Sampling
    from tests import rounding

    new, lengths = (4, (9, 30)) if here.dry else (24, (3, 61, 24, 10))
    prompts = [tuple(torch.randint(1, 250, (n,)).tolist()) for n in lengths]
    for family in RANDOM:
        model = load(f"random:{family}", "float32", here.device)
        requests = [decode.Request(ids, str(i)) for i, ids in enumerate(prompts)]
        for done, ids in zip(decode.decode(model, requests, Sampling(new), 4), prompts):
            given = torch.tensor([ids], device=here.device)
            said = model.weights.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False,
                max_new_tokens=new, min_new_tokens=new,
            )  # fmt: skip
            theirs = said[0, len(ids) :].tolist()
            assert list(done.token_ids) == theirs, f"{family}: other tokens in float32"
    halves = {name: load(f"random:{name}", "bfloat16", here.device) for name in RANDOM}
    halves["Qwen3-1.7B, 4 layers"] = random_model(here, num_hidden_layers=2 if here.dry else 4)
    for name, model in halves.items():
        ids = torch.tensor([prompts[1]], device=here.device)
        ours = slot_logits(model, prompts[1], 9)
        with torch.inference_mode():
            plain, right = (m.weights(ids).logits[0, 8:] for m in (model, rounding.exact(model)))
        errors = [float((x.double() - right).abs().max()) for x in (ours, plain)]
        found[name] = dict(zip(("kit", "transformers"), errors), largest=float(right.abs().max()))
        allowed = rounding.tolerance(plain, right)
        assert errors[0] <= allowed, f"{name}: bf16 logits off by {errors[0]:.2g} > {allowed:.2g}"
    return "same greedy tokens; bf16 logits off by " + ", ".join(
        f"{row['kit']:.2g} ({row['transformers']:.2g})" for row in found.values()
    )


@torch.inference_mode()
def slot_logits(model, ids: tuple[int, ...], prompt: int) -> torch.Tensor:
    """Logits after the first `prompt` tokens of `ids` and after each later one: [tokens, V]."""
    from kit.inference import decode
    from kit.inference.kv_cache import SlotCache

    cache = SlotCache(model.weights, 1)
    with decode.slots_attached(model):
        positions = cache.prefill([[0]], [prompt])
        last = torch.tensor([prompt - 1], device=model.device)
        rows = [decode._forward(model, cache, list(ids[:prompt]), positions, 1, last)]
        rows += [decode._step(model, cache, [0], [token]) for token in ids[prompt:]]
    return torch.cat(rows)


@check(60)
def as_on_the_cpu(here: Here, found: dict) -> str:
    """Every policy and forcing in float32: tokens, reads and peaks as on the CPU. Two things are
    left to rounding: which of equal keys Knorm keeps (tokens that repeat, heads that normalise
    their keys), so its tokens are not compared; and the codes of quantised caches, of which the
    device may change a tenth at most of what quantising does."""
    from kit.dms import fidelity
    from kit.inference import decode
    from kit.inference.budget_forcing import NO_FORCING, BudgetForcing
    from kit.inference.kv_quantization import Quantized
    from kit.inference.policies import Full, Knorm
    from kit.models.load import RANDOM
    from kit.schema import Sampling

    wrong, sampling = [], Sampling(4 if here.dry else 12)
    forcing = BudgetForcing((2, 4) if here.dry else (3, 8, 12), (5, 6), 3, (9,), 1)
    for family in ("gemma3",) if here.dry else RANDOM:
        pair = pair_of(here, family)
        requests = [
            decode.Request(tuple(range(1, 60 - 9 * i)), f"p{i // 2}", i % 2)
            for i in range(3 if here.dry else 6)
        ]
        cases = {name: (policy, NO_FORCING) for name, policy in small_policies(pair[0]).items()}
        for name, (policy, asks) in (cases | {"forced": (Full(), forcing)}).items():
            said = []
            for model in pair:
                how = dict(policy=moved(policy, model.device), forcing=asks)
                done = decode.decode(model, requests, sampling, 4, **how)
                ids = [() if isinstance(policy, Knorm) else g.token_ids for g in done]
                said.append((ids, [(g.kv_reads_tokens, g.kv_peak_tokens) for g in done]))
            found[f"{family}, {name}"] = same = said[0] == said[1]
            wrong += [] if same else [f"{family} {name}"]
        ids = torch.randint(1, 250, (2, 24 if here.dry else 80))
        for bits in (8, 4):
            how = dict(prompt=16, quantized=Quantized(bits, 16, 8))
            cpu, other = (fidelity.teacher_forced_kl(model, ids, **how) for model in pair)
            moves, costs = float((cpu["kl"] - other["kl"]).abs().max()), float(cpu["kl"].max())
            found[f"{family}, kv {bits}-bit"] = [moves, costs]
            wrong += [f"{family} kv {bits}-bit"] if not moves <= costs / 10 else []
    assert not wrong, f"other than on the CPU: {', '.join(wrong)}"
    return f"{len(found)} cases of policies, forcing and quantised caches agree"


@check(60)
def batch_invariance(here: Here, found: dict) -> str:
    """Sampled tokens of sequences one by one, and of as many as there are places at once."""
    from kit.inference import decode
    from kit.models.load import load
    from kit.schema import Sampling

    wrong, lengths = [], (9, 3) if here.dry else (40, 3, 61, 24, 10)
    sampling = Sampling(4 if here.dry else 16, temperature=1.0, top_p=0.95)
    requests = [
        decode.Request(tuple(torch.randint(1, 250, (n,)).tolist()), f"p{i}")
        for i, n in enumerate(lengths)
    ]
    models = {"llama, float32": load("random:llama", "float32", here.device)}
    models["Qwen3-1.7B, 4 layers"] = random_model(here, num_hidden_layers=2 if here.dry else 4)
    for name, model in models.items():
        for kind, policy in small_policies(model).items():
            how = dict(policy=moved(policy, here.device))
            alone, together = (
                [g.token_ids for g in decode.decode(model, requests, sampling, size, **how)]
                for size in (1, 64)
            )
            found[f"{name}, {kind}"] = same = alone == together
            wrong += [] if same else [f"{name} {kind}"]
    assert not wrong, f"tokens depend on what stands beside them: {', '.join(wrong)}"
    return f"{len(found)} cases say the same one by one and together"


@check(60)
def kernel_bandwidth(here: Here, found: dict) -> str:
    """Bytes of keys and values per second over what a copy moves; torch's SDPA, densely, beside."""
    from tests.bench import bench_kernels as bench

    clock = here.seconds if here.dry else lambda call: statistics.median(bench.clock(call))
    copy = 1e9 if here.dry else bench.copy_bandwidth()
    contexts, batches = ((32,), (1, 2)) if here.dry else (bench.CONTEXTS, bench.BATCHES)
    for tokens, batch in [(t, b) for t in contexts for b in batches]:
        read = 2 * batch * tokens * bench.HEADS * bench.SIZE * 2
        if not here.dry and 2.5 * read > bench.free_memory():
            continue
        with torch.inference_mode():
            ours, dense = map(clock, bench.attention(batch, tokens, 2, here.device))
        row = dict(us=1e6 * ours, sdpa_us=1e6 * dense, gbs=read / ours / 1e9)
        row["share"] = read / ours / copy
        found[f"{batch} x {tokens}"] = row
    best = max(row["share"] for row in found.values())
    if not here.dry and best < 0.7:
        found["poor"] = "less than 70% of the copy's bandwidth"
    shares = [f"{name} {row['share']:.0%}" for name, row in found.items() if name != "poor"]
    return "share of the copy's bandwidth: " + ", ".join(shares)


@check(110)
def decode_steps(here: Here, found: dict) -> str:
    """A decode step of every policy and precision; and of few sequences of 32,768 tokens, where
    what is read decides."""
    from kit.dms import evictor
    from kit.inference import policies as p
    from kit.inference.kv_quantization import Quantized

    model, budget = random_model(here), 16 if here.dry else 2048
    made = evictor.Evictor(model.weights, evictor.OFFICIAL, model.weights_hash)
    chosen = [p.Full(), p.Window(budget), p.Window(kept_fraction=0.25), p.Random(budget)]
    chosen += [p.TOVA(budget), p.H2O(budget), p.DMS(made.requires_grad_(False))]
    for batch, length in ((2, 48),) if here.dry else ((64, 512), (sequences(48, 8192), 8192)):
        live = {"full": length, "window 25%": length // 4, chosen[-1].name: length // 8}
        for policy in chosen:
            kept = live.get(policy.name, min(length, budget))
            row = step_costs(here, model, policy, batch, length, kept)
            found[f"{policy.name}, {batch} x {length}"] = row
        for bits in (8, 4):  # shorter: they take long
            row = step_costs(here, model, chosen[0], batch, length // 4, None, Quantized(bits))
            found[f"kv {bits}-bit, {batch} x {length // 4}"] = row
    batch, length = (2, 48) if here.dry else (sequences(16, 32_768), 32_768)
    for policy, live in ((chosen[0], length), (chosen[-1], length // 8)):
        for extra in ("", ", layers of transformers"):
            with layers_of_transformers() if extra else contextlib.nullcontext():
                row = step_costs(here, model, policy, batch, length, live)
            found[f"{policy.name}, {live} of {batch} x {length}{extra}"] = row
    rows = list(found.items())
    short = rows[: len(chosen) + 2]
    slow = [name for name, row in short if row["ms"] > 2 * short[0][1]["ms"]]
    if slow and not here.dry:
        found["poor"] = f"more than twice the time of the full cache: {', '.join(slow)}"
    return "ms a step: " + ", ".join(f"{name} {row['ms']:.3g}" for name, row in rows)


def layers_of_transformers():
    """Inside this block no layer is fused, to compare."""
    from kit.inference import decode

    return mock.patch.object(decode, "fused", lambda weights: contextlib.nullcontext())


def sequences(wanted: int, length: int) -> int:
    """As many of `wanted` sequences as half of what is free holds."""
    from tests.bench.bench_kernels import free_memory

    return max(1, min(wanted, int(0.5 * free_memory() / (length * 28 * 2 * 8 * 128 * 2))))


def step_costs(here: Here, model, policy, batch, length, live=None, quantized=None) -> dict:
    """What one step of `decode.decode` costs with `batch` sequences of `length` tokens, of which
    `live` are kept: ms, tokens_s, cache_gb and peak_gb (allocated), live_gb; and whether it was
    `captured`."""
    with stepping(here, model, policy, batch, length, live, quantized) as (step, cache, graphs):
        seconds = here.seconds(step, 2 if quantized or here.dry else 5)
        row = dict(ms=1e3 * seconds, captured=bool(graphs.graphs), tokens_s=batch / seconds)
    stored = float(cache.live_tokens().sum()) * cache.token_bytes
    return row | dict(cache_gb=cache.nbytes() / 1e9, live_gb=stored / 1e9, peak_gb=here.peak_gb())


@contextlib.contextmanager
def stepping(here: Here, model, policy, batch, length, live=None, quantized=None):
    """(what makes one step of `decode.decode` and returns its logits, its cache, its graphs), for
    `step_costs`."""
    from kit.inference import decode
    from kit.inference.cuda_graphs import StepGraphs
    from kit.inference.sampling import sample_tokens
    from kit.schema import Sampling

    here.clear()
    torch.manual_seed(0)
    sampling = Sampling(8, 0.6, 0.95, top_k=20)  # as Qwen3's authors advise
    places, last = [*range(batch)], [1] * batch
    uniform = torch.full((batch,), 0.3, dtype=torch.float64, device=model.device)
    cache = filled(model, policy, batch, length, live, quantized)
    graphs = StepGraphs(model, cache, decode.STEP_ROWS[here.device])

    def step() -> torch.Tensor:
        if cache.steps_without_sync:
            logits = graphs.step(places, last)
        else:
            logits = decode._step(model, cache, places, last)
        last[:], counters = sample_tokens(logits, sampling, uniform, cache.counters())
        cache.load_counters(counters)
        return logits

    with torch.inference_mode(), decode.slots_attached(model), policy.attached(model.weights):
        yield step, cache, graphs


def filled(model, policy, batch: int, length: int, live: int | None, quantized=None):
    """A cache of `batch` sequences of `length` random tokens, with room for 64 more of each."""
    from kit.inference.kv_cache import SlotCache

    cache = SlotCache(model.weights, batch, policy, quantized=quantized, tokens=length + 64)
    cache.fill(batch, length, live)
    cache.length = [length] * batch
    return cache


@check(90)
def tokens_per_second(here: Here, found: dict) -> str:
    """Whole generations at Qwen3-1.7B's shape: the kit, with and without eviction, and
    transformers."""
    from kit.inference import decode
    from kit.inference import policies as p
    from kit.schema import Sampling

    batch, prompt, new = (2, 24, 4) if here.dry else (32, 512, 128)
    model = random_model(here)
    model.weights.generation_config.eos_token_id = None
    ids = torch.randint(3, 40_000, (batch, prompt))
    requests = [decode.Request(tuple(row), str(i)) for i, row in enumerate(ids.tolist())]
    on_device = ids.to(here.device)
    given = dict(attention_mask=torch.ones_like(on_device), do_sample=False)

    def ours(policy) -> Callable:
        return lambda: decode.decode(model, requests, Sampling(new), batch, policy=policy)

    ways = {
        "kit": ours(p.Full()),
        "kit, window 25%": ours(p.Window(kept_fraction=0.25)),
        "transformers": lambda: model.weights.generate(
            on_device, **given, max_new_tokens=new, min_new_tokens=new
        ),
    }
    none = contextlib.nullcontext()
    changed = {
        "kit, layers of transformers": layers_of_transformers(),
        "kit, packs of 4096": mock.patch.dict(decode.PACK_ROWS, cuda=4096),
        "kit, steps of 64 rows": mock.patch.dict(decode.STEP_ROWS, cuda=64),
    }
    ways |= dict.fromkeys(changed, ways["kit"])
    for name, way in ways.items():
        here.clear()
        with changed.get(name, none):
            seconds = here.seconds(way, 1)
        found[name] = dict(tokens_s=batch * new / seconds, peak_gb=here.peak_gb())
    rates = ", ".join(f"{name} {row['tokens_s']:.0f}" for name, row in found.items())
    return f"tokens/s, {batch} x ({prompt} + {new}): {rates}"


@check(15)
def forcing_memory(here: Here, found: dict) -> str:
    """Bytes kept to take answers back, over those of the cache, while all are asked for one."""
    from kit.inference import decode, kv_cache
    from kit.inference.budget_forcing import BudgetForcing
    from kit.schema import Sampling
    from tests.toys import held_bytes

    model, shares, rewind = random_model(here, num_hidden_layers=2), [], kv_cache.SlotCache.rewind

    def watched(cache, place):
        shares.append(sum(map(held_bytes, cache._undo_logs.values())) / cache.nbytes())
        rewind(cache, place)

    cuts = (4, 8, 12) if here.dry else (10, 30, 50, 70, 90, 110, 130, 150)
    requests = [decode.Request((1, 2, 3), f"p{i}") for i in range(8)]
    forcing, sampling = BudgetForcing(cuts, (5,), 4), Sampling(cuts[-1] + 4, 1.0)
    with mock.patch.object(kv_cache.SlotCache, "rewind", watched):
        decode.decode(model, requests, sampling, 8, forcing=forcing)
    found["copies_over_cache"] = max(shares)
    if max(shares) > 0.5 and not here.dry:
        found["poor"] = "copies of the cache wait for a place"
    return f"at most {max(shares):.2g} times the cache"


@check(5)
def free_memory(here: Here, found: dict) -> str:
    """What `sweep.available` says once a cache has been dropped, against what is free."""
    if here.dry:
        raise Skipped("memory of a CPU is everybody's")
    from kit.budget import sweep

    before = sweep.available()
    block = torch.empty(before // 4, dtype=torch.uint8, device="cuda")
    del block
    found["lost_gb"] = (before - sweep.available()) / 1e9
    assert found["lost_gb"] < 1, f"{found['lost_gb']:.1f} GB that torch keeps count as used"
    return "what torch keeps for later counts as free"


@check(15)
def kept_text(here: Here, found: dict) -> str:
    """What 03 shows of held-out ids that lie on the CPU."""
    from kit.dms import fidelity, plots
    from kit.inference import policies
    from tests.toys import drawn

    model = pair_of(here, "llama")[1]
    made = moved(policies.DMS(drawn(pair_of(here, "llama")[0], window=6)), here.device)
    ids = torch.randint(1, 250, (48,))
    found["kl"] = float(fidelity.teacher_forced_kl(model, ids[None], made, 16)["kl"].iloc[0])
    kept = fidelity.kept_positions(model, ids, made, 16)
    plots.kept_text([str(i) for i in ids.tolist()], kept)
    plots.kept_heatmap(kept, len(ids))
    found["kept"] = sum(len(head) for layer in kept for head in layer) / 48 / sum(map(len, kept))
    assert 0 < found["kept"] < 1, f"{found['kept']:.0%} of the tokens were kept"
    return f"both figures drawn, {found['kept']:.0%} of the tokens kept"


@check(40)
def evictor_training(here: Here, found: dict) -> str:
    """Steps of `EvictorTraining` as 03 does them: one sequence of 4,096 tokens."""
    from kit.dms import evictor
    from kit.dms.train import EvictorTraining

    model, tokens = random_model(here), 48 if here.dry else 4096
    recipe = dataclasses.replace(evictor.LAPTOP, batch=1, context=tokens, ramp_steps=100)
    here.clear()
    with tempfile.TemporaryDirectory() as folder:
        data = torch.randint(3, 40_000, (4, tokens))
        training = EvictorTraining(model, data, recipe, Path(folder))
        steps = [training.step() for _ in range(2 if here.dry else 4)]
        training.save()
    return trained(here, found, steps, f"{tokens} tokens a step")


@check(30)
def bank_training(here: Here, found: dict) -> str:
    """Steps of `BankTraining` as 05 does them: 8 rows of 1,024 tokens, Qwen2.5-0.5B."""
    from transformers import Qwen2Config

    from kit.models.load import load
    from kit.parametric import ffn_memory
    from kit.parametric.train import IGNORED, BankTraining, MemoryTrainConfig, Row

    sizes = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
    sizes |= dict(num_attention_heads=14, num_key_value_heads=2, vocab_size=151_936)
    if here.dry:
        sizes |= dict(hidden_size=56, intermediate_size=64, num_hidden_layers=2, vocab_size=4096)
    context, batch = (32, 2) if here.dry else (1024, 8)
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2Config(**sizes, tie_word_embeddings=True, max_position_embeddings=32_768)
        config.to_json_file(Path(folder, "config.json"), use_diff=False)
        model = load(f"random:{folder}", "bfloat16", here.device)
        layers = [*range(sizes["num_hidden_layers"])]
        shape = ffn_memory.shape(model.weights, "ffn", layers, (256, 128), 8)
        place, rows = torch.arange(context) % 20, []
        for i in range(4 * batch):
            ids = torch.randint(3, 4000, (context,))
            rows.append(Row((0, i % 8), ids, torch.where(place > 14, ids.roll(-1), IGNORED), place))
        here.clear()
        recipe = MemoryTrainConfig(batch=batch, context=context)
        training = BankTraining(model, shape, [0], rows, recipe, Path(folder))
        steps = [training.step() for _ in range(2 if here.dry else 4)]
    return trained(here, found, steps, f"{batch} x {context} tokens a step")


def trained(here: Here, found: dict, steps: list[dict], size: str) -> str:
    """What is told of a training by the log of its steps: seconds of the last, peak memory."""
    found |= dict(steps=steps, s_per_step=steps[-1]["seconds"], peak_gb=here.peak_gb())
    return f"{size}: {found['s_per_step']:.2f} s, peak {found['peak_gb']:.1f} GB"


@check(30)
def weights_in_4_bit(here: Here, found: dict) -> str:
    """A decode step with weights in 4 bit as 06 takes them, against one with the plain weights."""
    from kit.budget import sweep
    from kit.inference.policies import Full

    model = random_model(here, num_hidden_layers=2 if here.dry else 4)
    for name, weights in (("16 bit", model), ("4 bit", sweep.quantized(model, 4))):
        found[name] = step_costs(here, weights, Full(), 2 if here.dry else 16, 64)
    sweep.quantized.cache_clear()
    times = found["4 bit"]["ms"] / found["16 bit"]["ms"]
    if times > 1.3 and not here.dry:
        found["poor"] = "4-bit weights slow the step down"
    return f"a step takes {times:.2f} times as long as with 16 bit"


@check(70)
def sft_training(here: Here, found: dict) -> str:
    """Two trainings of all weights after each other; the second holds no more than the first."""
    from kit.training import sft

    length = 24 if here.dry else 512
    example = {"input_ids": [*range(5, 5 + length)]}
    example["completion_mask"] = [0] * 8 + [1] * (length - 8)
    steps, held = [], []

    def report(row: dict) -> None:
        steps.append(row)
        held.append(here.held_gb())

    with tempfile.TemporaryDirectory() as folder:
        base = saved_model(here, Path(folder, "base"))
        here.clear()
        for seed in range(2):
            recipe = sft.SFTConfig(steps=2, batch=2, micro_batch=1, save_every=100, seed=seed)
            sft.sft(base, [example] * 4, recipe, Path(folder), report, here.device)
    found |= dict(layers=here.layers, held_gb=held)
    said = trained(here, found, steps, f"{here.layers} layers, 2 x {length} tokens a step")
    assert held[2] <= 1.2 * held[0], f"the first is still there in the second: {held} GB; {said}"
    return said


@check(80)
def grpo_training(here: Here, found: dict) -> str:
    """Steps of GRPO with the kit's rollouts, in the dtypes that this device gives."""
    from kit.data import prompts
    from kit.schema import Problem
    from kit.training import grpo

    new, steps = 4 if here.dry else 256, []
    asked = [Problem(f"p{i}", f"What is {i} + 2?", str(i + 2), "sums", 1, "t") for i in range(4)]
    recipe = grpo.GRPOConfig(
        steps=2, groups=2, size=4, micro_batch=4, max_new_tokens=new, keep_every=0
    )
    with tempfile.TemporaryDirectory() as folder:
        base = saved_model(here, Path(folder, "base"))
        here.clear()
        built = prompts.build(prompts.plain, asked)
        grpo.grpo(base, built, recipe, Path(folder), steps.append, device=here.device)
    found["layers"] = here.layers
    return trained(here, found, steps, f"{here.layers} layers, 8 completions of {new} a step")


@check(10)
def energy_counts(here: Here, found: dict) -> str:
    """Joules drawn while the device multiplies for two seconds."""
    from kit.inference import energy

    before, began, count = energy.joules(), time.perf_counter(), 64 if here.dry else 8192
    x = torch.randn(count, count, device=here.device, dtype=torch.bfloat16)
    while time.perf_counter() - began < (0.1 if here.dry else 2):
        x @ x
        here.wait()
    found["joules"] = drawn = energy.consumed(before, energy.joules())
    return "no device counts" if drawn is None else f"{drawn:.0f} J in two seconds"


@check(120)  # where they come as a GGUF file they are dequantised first
def real_weights(here: Here, found: dict) -> str:
    """The bundled model, where it lies here already: greedy answers in float32, and what a shipped
    evictor costs, against the CPU."""
    from kit.data import problems, prompts
    from kit.dms import evictor, fidelity
    from kit.inference import decode, policies
    from kit.models.bundled import SMOLLM2
    from kit.models.load import BUNDLED, load
    from kit.schema import Sampling

    here_as = SMOLLM2.folder / "weights.sha256", paths.MODELS / SMOLLM2.files[0].name
    if not any(file.is_file() for file in here_as):
        raise Skipped("the bundled weights are not here; see make gpu-pack WEIGHTS=1")
    cpu, model = (load(BUNDLED, "float32", device) for device in ("cpu", here.device))
    asked = map(prompts.plain, problems.load("laptop", "test", n=2 if here.dry else 24).problems)
    requests = [decode.Request(decode.tokenize(model, prompt)) for prompt in asked]
    sampling = Sampling(6 if here.dry else 128)
    theirs, ours = ([each.text for each in decode.decode(one, requests, sampling)]
                    for one in (cpu, model))  # fmt: skip
    same = [a == b for a, b in zip(theirs, ours, strict=True)]
    file = paths.DATA / "evictors" / "smollm2-135m-seed0-4x.safetensors"
    count, length = (1, 40) if here.dry else (4, 96)
    text = model.tokenizer("\n\n".join(theirs) * 40)["input_ids"][: count * length]
    ids = torch.tensor(text).view(count, length)
    kl = [fidelity.teacher_forced_kl(one, ids, policies.DMS(evictor.load(file, one)), 32)["kl"]
          for one in (cpu, model)]  # fmt: skip
    found |= dict(answers=len(same), as_on_the_cpu=sum(same), kl_cpu=[*kl[0]], kl=[*kl[1]])
    assert sum(same) >= 0.9 * len(same), f"{sum(same)} of {len(same)} answers as on the CPU"
    gap = float((kl[0] - kl[1]).abs().max())
    assert gap <= 0.01 * float(kl[0].max()), f"the evictor's KL moves by {gap:.2g} from the CPU's"
    return f"{sum(same)} of {len(same)} answers as on the CPU; the evictor's KL is the CPU's"


@check(90)
def cuda_graphs(here: Here, found: dict) -> str:
    """Decode steps as graphs against the same steps launched one kernel after the other: logits to
    the bit, and time; with transformers' own layers beside; and where the time goes, by kernel.
    Late, since a capture that fails may spoil the device for this process, and a graph runs slower
    once a profiler has been there."""
    from kit.dms import evictor
    from kit.inference import policies
    from kit.inference.kv_quantization import Quantized

    model, size = random_model(here), (2, 48) if here.dry else (32, 4096)
    made = evictor.Evictor(model.weights, evictor.OFFICIAL, model.weights_hash)
    full, live = policies.Full(), size[1] // 4
    cases = {"full": (full, live), "dms": (policies.DMS(made.requires_grad_(False)), live)}
    cases |= {"random": (policies.Random(live), live)}
    cases |= {f"kv {bits}-bit": (full, live, Quantized(bits)) for bits in (8, 4)}
    for name, case in cases.items():
        row, logits = found.setdefault(name, {}), {}
        for way in ("launched", "graph", "layers of transformers"):
            if way == "launched" and len(case) == 3:
                continue  # takes long
            with layers_of_transformers() if " " in way else contextlib.nullcontext():
                with stepping(here, model, case[0], *size, *case[1:]) as (step, cache, graphs):
                    graphs.graphs = None if way == "launched" else graphs.graphs
                    logits[way] = torch.stack([step() for _ in range(4)])
                    row[f"{way}, ms"] = 1e3 * here.seconds(step)
        if "launched" in logits:
            row["same"] = torch.equal(logits["launched"], logits["graph"])
    for name, case in cases.items():
        with stepping(here, model, case[0], *size, *case[1:]) as (step, cache, graphs):
            step(), step()
            found[name] |= kernels(here, step)
    wrong = [name for name, row in found.items() if not row.get("same", True)]
    assert not wrong, f"a graph says other logits: {', '.join(wrong)}"
    return "ms of {} x {} tokens, a quarter kept: ".format(*size) + "; ".join(
        f"{name} {row['graph, ms']:.2f} as a graph ({row['layers of transformers, ms']:.2f} with "
        f"layers of transformers, {row['kernels']} kernels)"
        for name, row in found.items()
    )


KINDS = {
    "products": r"nvjet|gemm|cutlass|splitK|gemv",
    "attention": r"_attend|_join",
    "layers": r"_normed|_rotated|_gated|_stored",
    "other": "",
}


def kernels(here: Here, call: Callable, most: int = 20) -> dict:
    """What a call asks of the device: launches, waits, number of kernels and their ms, by kind,
    and of those that take longest."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not here.dry)
    with profile(activities=kinds) as seen:
        call()
        here.wait()
    events = seen.key_averages()
    on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    on_device.sort(key=lambda e: -e.self_device_time_total)
    by_kind = {kind: [0, 0.0] for kind in KINDS}
    for e in on_device:
        row = by_kind[next(kind for kind, names in KINDS.items() if re.search(names, e.key))]
        row[0], row[1] = row[0] + e.count, row[1] + e.self_device_time_total / 1e3
    return dict(
        launches=sum(e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunch"))),
        waits=sum(e.count for e in events if "Synchronize" in e.key),
        kernels=sum(count for count, _ in by_kind.values()),
        kernel_ms=sum(ms for _, ms in by_kind.values()),
        by_kind=by_kind,
        longest={e.key[:90]: [e.count, e.self_device_time_total / 1e3] for e in on_device[:most]},
    )


@check(150)
def vllm(here: Here, found: dict) -> str:
    """tokens_per_second of vLLM, in a process of its own, where vLLM is installed."""
    if here.dry or importlib.util.find_spec("vllm") is None:
        raise Skipped("no GPU" if here.dry else "vLLM is not installed")
    from transformers import Qwen3Config

    with tempfile.TemporaryDirectory() as folder:
        Qwen3Config(**here.shape, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
        script = paths.ROOT / "tests" / "peers" / "vllm_rate.py"
        done = subprocess.run(
            [sys.executable, str(script), folder, "32", "512", "128"],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr.strip()[-300:]
    found |= json.loads(done.stdout.splitlines()[-1])
    return f"tokens/s, 32 x (512 + 128): vLLM {found['version']} {found['tokens_s']:.0f}"


# The command


def joined(runs: list[dict]) -> dict:
    """Several runs on one card as one, each check with the hash of its code: of two, the later that
    was not skipped."""
    cards = {gpu["name"] for run in runs for gpu in run["provenance"]["hardware"]["gpus"]}
    if len(cards) > 1:
        raise ValueError(f"these runs are of several cards: {' and '.join(sorted(cards))}")
    checks = {}
    for run in runs:
        code = run["provenance"]["kit_sha256"][:12]
        for name, row in run["checks"].items():
            if name not in checks or row["verdict"] != "skipped":
                checks[name] = dict(kit_sha256=code) | row
    return runs[-1] | dict(checks=checks)


def publish(found: dict, folder: Path) -> Path:
    """Keep what a real GPU said under its name in `folder`; ValueError for less than all of it."""
    if found["dry"] or CHECKS.keys() - found["checks"].keys():
        raise ValueError("only what every check said on a GPU is published")
    card = found["checks"]["environment"]["card"]
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    scrub = provenance.scrubber()
    text = json.dumps(provenance.scrub_tree(found, scrub), indent=1, default=str)
    provenance.write_text(file, text + "\n")
    return file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check")
    parser.add_argument("only", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of all checks")
    parser.add_argument("--out", type=Path, default=paths.OUTPUTS, help="folder for gpu.json")
    parser.add_argument(
        "--publish", nargs="*", metavar="GPU.JSON", type=Path,
        help="keep what this run, or those of files, said under outputs/published/gpu",
    )  # fmt: skip
    args = parser.parse_args(argv)
    shelf = paths.PUBLISHED_RUNS / "gpu"
    if args.publish:
        print(publish(joined([json.loads(file.read_text()) for file in args.publish]), shelf))
        return 0
    if unknown := set(args.only) - set(CHECKS):
        print(f"There is no check {min(unknown)!r}; known: {', '.join(CHECKS)}.", file=sys.stderr)
        return 2
    if not args.dry and not torch.cuda.is_available():
        none = f"gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none"
        small = "`make gpu-check DRY=1` runs its small form on a CPU."
        print(provenance.unusable_gpu() or f"{none}; {small}", file=sys.stderr)
        return 2
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "KINETO_LOG_LEVEL": "5"}
    if args.dry:  # before anything imports triton: the kernel is interpreted
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.inference.conftest import start_interpreter

        start_interpreter()
    faulthandler.dump_traceback_later(args.limit + 20, exit=True)
    chosen = {name: CHECKS[name] for name in args.only or CHECKS}
    result = {"dry": args.dry, "provenance": provenance.collect(), "checks": {}}

    def keep(found: dict) -> None:
        result["checks"] = found
        text = json.dumps(result, indent=1, default=str)
        provenance.write_text(args.out / "gpu.json", text + "\n")

    found = run(chosen, Here(args.dry), args.limit, keep)
    faulthandler.cancel_dump_traceback_later()
    words = [row["verdict"] for row in found.values()]
    seconds = sum(row["seconds"] for row in found.values())
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    print(f"{seconds:.0f} s: {counts}; {args.out / 'gpu.json'}")
    if args.publish is not None:
        print(publish(result, shelf))
    return int(any(word in FAILED for word in words))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
