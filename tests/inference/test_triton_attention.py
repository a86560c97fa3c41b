"""The Triton decode kernel against softmax written out slot by slot in float64.

Without a GPU the kernel runs in Triton's interpreter. Compiled code is checked too, for the GPUs
that Triton can build for without having one: it must not spill registers. With a GPU the same
cases run on it.
"""

import re

import pytest
import torch

from kit.inference import kv_quantization
from tests import rounding

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FREE = -1e30
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Per case: KV heads per block, query heads per KV head, head size, slots per block, blocks in use
# of each unit, width of the table.
RAGGED = (1, 2, 128, 16, (40, 0, 1, 17, 9), 44)
CASES = {
    "ragged": RAGGED,
    "uniform heads": (3, 3, 64, 32, (5, 11, 0), 11),
    "one chunk": (2, 4, 96, 64, (1, 2), 2),
    "wide blocks": (1, 8, 256, 128, (3, 1), 3),
    "odd head size": (2, 1, 80, 16, (13, 30), 30),
    "many chunks": (1, 1, 32, 128, (21,), 24),
    "tiny head": (1, 16, 16, 32, (9, 2), 9),
}

HALVES = ("ragged", "odd head size", "tiny head")  # cases also run in 16 bits
CHECKS = [(name, torch.float32) for name in CASES]
CHECKS += [(name, dtype) for name in HALVES for dtype in (torch.float16, torch.bfloat16)]


def build(case, dtype, device="cpu") -> dict:
    """Arguments of paged_attention: a third of the slots free, blocks scattered over the pool.

    What must not be read is poison: blocks in nobody's table are nan, table entries past the
    count name no block, and free slots hold large numbers.
    """
    heads, group, size, block, counts, width = case
    draw = torch.Generator().manual_seed(sum(counts) + size)
    n = sum(counts) + 3
    keys, values = torch.randn(2, n, heads, block, size, generator=draw).to(dtype)
    free = torch.rand(n, block, generator=draw) < 1 / 3
    order = torch.randperm(n, generator=draw)
    table = torch.full((len(counts), width), n + 10**6, dtype=torch.int32)
    for unit, (first, count) in enumerate(zip(torch.tensor((0, *counts)).cumsum(0), counts)):
        table[unit, :count] = order[first : first + count]
        keys[table[unit, :count][-1:]] *= 2  # the largest score often comes last
    free[table[0, : counts[0]][1::3]] = True  # whole blocks without a live token
    unused = order[sum(counts) :]
    for pool in keys, values:
        pool.transpose(1, 2)[free] = 300.0
        pool[unused] = torch.nan
    query = torch.randn(len(counts), heads, group, size, generator=draw) / size**0.5 * 3
    arguments = dict(
        query=query.to(dtype),
        keys=keys,
        values=values,
        bias=torch.zeros(n, block).masked_fill_(free, FREE),
        table=table,
        count=torch.tensor(counts, dtype=torch.int32),
    )
    return {name: tensor.to(device) for name, tensor in arguments.items()}


def dot(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """rows @ vector; in float32 one product after the other, as a kernel without tensor cores may
    sum them: a matrix product of the CPU rounds less."""
    if rows.dtype != torch.float32:
        return rows @ vector
    return sum((rows * vector).unbind(-1), torch.zeros(len(rows)))


def oracle(query, keys, values, bias, table, count, kind=torch.float64) -> torch.Tensor:
    """Softmax attention computed in `kind`, one query head at a time over a list of live slots."""
    out = torch.zeros(query.shape, dtype=kind)
    for unit, blocks in enumerate(count.tolist()):
        for head in range(query.shape[1]):
            live = [
                (keys[number, head, slot].to(kind), values[number, head, slot].to(kind))
                for number in table[unit, :blocks].tolist()
                for slot in range(keys.shape[2])
                if bias[number, slot] == 0
            ]
            for row in range(query.shape[2] if live else 0):
                q = query[unit, head, row].to(kind)
                weight = dot(torch.stack([key for key, _ in live]), q).softmax(0)
                out[unit, head, row] = dot(torch.stack([v for _, v in live]).T, weight)
    return out


def worst_error(case, dtype, device="cpu", **changes) -> float:
    """Largest difference between kernel and oracle, in what the dtype may miss; nan counts as
    infinite."""
    from kit.inference.triton_attention import paged_attention

    arguments = {**build(case, dtype), **changes}
    out = paged_attention(**{name: x.to(device) for name, x in arguments.items()})
    assert out.dtype == torch.float32
    return missed(out.cpu(), oracle(**arguments, kind=dtype), oracle(**arguments))


def missed(out, plain, right) -> float:
    error = (out - right).abs().nan_to_num(torch.inf).max().item()
    return error / rounding.tolerance(plain, right)


@pytest.mark.parametrize(("name", "dtype"), CHECKS, ids=str)
def test_equals_softmax_over_live_slots(interpreter, name, dtype):
    assert interpreter(worst_error, CASES[name], dtype) <= 1


@pytest.mark.parametrize("name", ["ragged", "one chunk"])
def test_units_without_live_slots_get_zeros(interpreter, name):
    arguments = build(CASES[name], torch.float32)
    arguments["bias"][:] = FREE
    assert interpreter(largest_output, arguments) == 0.0
    arguments["count"] = torch.zeros_like(arguments["count"])
    assert interpreter(largest_output, arguments) == 0.0
    arguments["table"] = arguments["table"][:, :0]
    assert interpreter(largest_output, arguments) == 0.0


def largest_output(arguments) -> float:
    """Absolute; nan counts as infinite."""
    from kit.inference.triton_attention import paged_attention

    return paged_attention(**arguments).abs().nan_to_num(torch.inf).max().item()


def read_codes(case, dtype, bits, residual, device="cpu") -> tuple[float, float]:
    """What the kernel misses where it reads codes, as `worst_error`, and the largest difference of
    the probabilities that follow from what it tells."""
    from kit.inference.triton_attention import Codes, paged_attention

    given, draw = build(case, dtype), torch.Generator().manual_seed(1)
    free, count, table = given["bias"] < 0, given["count"].tolist(), given["table"].long()
    pools = [given[name].float().nan_to_num() for name in ("keys", "values")]
    arrays = [kv_quantization.pack(pool, bits, 16) for pool in pools]
    plain = [kv_quantization.unpack(*array, bits) for array in arrays]
    exact = torch.randn(2, len(count), residual, case[0], case[2], generator=draw).to(dtype)
    position = torch.full(free.shape, -1, dtype=torch.int32)
    newest = torch.zeros(len(count), dtype=torch.int32)
    for unit, blocks in enumerate(count):
        live = [(n, slot) for n in table[unit, :blocks].tolist() for slot in range(case[3])]
        live = [(n, slot) for n, slot in live if not free[n, slot]]
        newest[unit] = len(live) - 1 - residual
        for at, k in enumerate(torch.randperm(len(live), generator=draw).tolist()):
            position[live[k]] = at
            if at > newest[unit]:
                for pool, rows in zip(plain, exact):
                    pool[live[k][0], :, live[k][1]] = rows[unit, at % residual].float()
    decoded = given | dict(zip(("keys", "values"), (pool.to(dtype) for pool in plain)))
    asked = given | {name: array[0] for name, array in zip(("keys", "values"), arrays)}
    scales, zeros, exact = ([x.to(device) for x in pair] for pair in (*[*zip(*arrays)][1:], exact))
    codes = Codes(bits, scales, zeros, exact, position.to(device), newest.to(device))
    asked = {name: x.to(device) for name, x in asked.items()}
    out, *told = paged_attention(**asked, codes=codes, watch=True)
    error = missed(out.cpu(), oracle(**decoded, kind=dtype), oracle(**decoded))
    scores, (top, total) = (x.cpu().double() for x in told)
    gap = 0.0
    for unit, blocks in enumerate(count):
        if blocks:
            mine = table[unit, :blocks]
            weight = (scores[mine] - top[unit].unsqueeze(-1)).exp() / total[unit].unsqueeze(-1)
            keys = decoded["keys"][mine].transpose(0, 1).flatten(1, 2).double()
            right = given["query"][unit].double() @ keys.transpose(1, 2)
            right = (right + given["bias"][mine].flatten()).softmax(-1)
            gap = max(gap, float((weight.movedim(0, -2).flatten(-2) - right).abs().max()))
    return error, gap


CODED = {
    "ragged": (torch.float32, 5),
    "uniform heads": (torch.float32, 0),
    "one chunk": (torch.bfloat16, 33),
}


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", CODED)
def test_reads_codes_and_tells_what_it_saw(interpreter, name, bits):
    dtype, residual = CODED[name]
    error, gap = interpreter(read_codes, CASES[name], dtype, bits, residual)
    assert error <= 1 and gap < (1e-5 if dtype == torch.float32 else 0.02)


def test_takes_a_sliced_table_long_indices_and_a_mixed_query(interpreter):
    arguments = build(RAGGED, torch.float16)
    room = torch.full((9, 50), -(10**6))
    room[:5, :44] = arguments["table"]
    changes = dict(
        table=room[:5, :44],  # the rows stay 50 apart
        count=arguments["count"].long(),
        query=arguments["query"].float().transpose(2, 3).contiguous().transpose(2, 3),
    )
    assert interpreter(worst_error, RAGGED, torch.float16, **changes) <= 1


@pytest.mark.parametrize(("model", "kept"), [("llama", None), ("gemma3", 9)])
def test_reads_the_slot_cache_as_the_cpu_path_does(interpreter, model, kept, dtype):
    assert interpreter(cache_error, model, kept, dtype) <= 1


def cache_error(model: str, kept: int | None, dtype: str) -> float:
    """Largest difference from the CPU path in float64, in what that path misses with its query and
    result in the dtype: in a decoding with prompts of different lengths, with refill, and with
    ragged eviction where `kept` is given."""
    from kit.inference import decode
    from kit.inference.paged_attention import attend
    from kit.inference.policies import Full, Knorm
    from kit.inference.triton_attention import paged_attention
    from kit.models.load import load
    from kit.schema import Sampling

    results, plain, right = [], [], []

    def both(query, pool, step, plane, watch, scale, out):
        found = attend(query, pool, step, plane, watch, scale, out)
        used, table = step.table.used[plane], step.table
        keys, values = (array[:used] for array in pool.arrays)
        rest = [table.bias[plane, :used], step.blocks[plane], step.count[plane]]
        result = torch.full_like(query, torch.nan)
        paged_attention(query, keys, values, *rest, scale=scale, out=result)
        results.append(result.flatten())
        scaled = query.float() * scale
        rounded = scaled.to(keys.dtype).float()
        plain.append(attend(rounded, pool, step, plane)[0].to(keys.dtype).flatten())
        right.append(attend(scaled.double(), pool, step, plane)[0].flatten())
        return found

    requests = [decode.Request(tuple(range(1, 1 + n)), str(n)) for n in (40, 11, 2)]
    policy = Full() if kept is None else Knorm(kept_tokens=kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kit.inference.paged_attention.attend", both)
        tiny = load(f"random:{model}", dtype=dtype, device="cpu")
        decode.decode(tiny, requests, Sampling(max_new_tokens=4), 2, policy=policy)
    assert len(results) >= 2 * 3 * 4  # rounds of requests, steps after the first token, layers
    return missed(*map(torch.cat, (results, plain, right)))


WRONG = {
    "values has shape": dict(values=lambda x: x[:-1]),
    "bias has shape": dict(bias=lambda x: x[:, :8]),
    "table has shape": dict(table=lambda x: x[:-1]),
    "count has shape": dict(count=lambda x: x[:-1]),
    "keys has shape": dict(keys=lambda x: x[..., :64].contiguous()),
    "query \\[U, Hs, G, D\\]": dict(query=lambda x: x[0]),
    "keys is torch.float64": dict(keys=lambda x: x.double()),
    "values is torch.float32": dict(keys=lambda x: x.half()),
    "bias is torch.float16": dict(bias=lambda x: x.half()),
    "count is torch.float32": dict(count=lambda x: x.float()),
    "bias is not contiguous": dict(bias=lambda x: x.T.contiguous().T),
    "table is not contiguous": dict(table=lambda x: x.T.contiguous().T),
    "Blocks have 12 slots": dict(
        keys=lambda x: x[:, :, :12].contiguous(),
        values=lambda x: x[:, :, :12].contiguous(),
        bias=lambda x: x[:, :12].contiguous(),
    ),
    "needs CUDA tensors; query is on cpu": {},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    from kit.inference.triton_attention import paged_attention

    arguments = build(RAGGED, torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in WRONG[message].items()}
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


SHAPE = dict(HEADS=1, GROUP=8, BLOCK=16)
OPTIONAL = [f"{x}_{y}" for x in ("key", "value") for y in ("scale", "zero", "exact")]
OPTIONAL += ["position", "newest", "scores"]


@pytest.mark.parametrize(("size", "dtype", "capability"), [(128, "bf16", 90), (256, "fp32", 80)])
def test_compiles_without_spilling(compiled, size, dtype, capability):
    from kit.inference import triton_attention

    tile = triton_attention.tiling(8, size, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    types = dict(keys=f"*{dtype}", values=f"*{dtype}", table="*i32", count="*i32")
    types |= dict(query=f"*{dtype}", scale="fp32", table_stride="i32", span="i32")
    unused = dict.fromkeys(OPTIONAL) | dict(BITS=0, SPREAD=1, RESIDUAL=0)
    shared, ptx, usage = compiled(
        capability, triton_attention._attend, types, **SHAPE, SIZE=size, **tile, **unused
    )
    assert shared <= 48 * 1024
    assert re.search(r"cp\.async\S+ \[.*, 0x10,", ptx)  # keys and values, 16 bytes at a time
    assert ("mma.sync" in ptx) == (dtype == "bf16")  # tensor cores, but exact products in float32
    assert " STACK:0 " in usage
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 128


@pytest.mark.parametrize(("bits", "capability"), [(8, 80), (4, 90), (2, 120)])
def test_compiles_for_codes_without_spilling(compiled, bits, capability):
    from kit.inference import triton_attention

    tile = triton_attention.tiling(2, 128, torch.bfloat16, True)
    types = dict(keys="*u8", values="*u8", table="*i32", count="*i32", query="*fp32")
    types |= dict(scale="fp32", table_stride="i32", span="i32", position="*i32", newest="*i32")
    types |= {name: "*bf16" if "exact" in name else "*fp16" for name in OPTIONAL[:6]}
    how = SHAPE | dict(GROUP=2, SIZE=128, BITS=bits, SPREAD=32, RESIDUAL=32)
    _, ptx, usage = compiled(capability, triton_attention._attend, types, **how, **tile)
    assert "mma.sync" in ptx and " STACK:0 " in usage
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 255


def test_the_joining_kernel_compiles_without_spilling(compiled):
    from kit.inference import triton_attention

    types = dict(count="*i32", chunks="i32", span="i32")
    _, _, usage = compiled(90, triton_attention._join, types, **SHAPE, SIZE=128, WIDE=128)
    assert " STACK:0 " in usage


@cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_softmax_on_the_gpu(name, dtype):
    assert worst_error(CASES[name], dtype, "cuda") <= 1


@cuda
def test_a_cuda_graph_sees_new_counts():
    from kit.inference.triton_attention import paged_attention

    arguments = build(RAGGED, torch.bfloat16, "cuda")
    paged_attention(**arguments)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(**arguments)
    arguments["count"] -= torch.tensor((7, 0, 1, 3, 0), dtype=torch.int32, device="cuda")
    graph.replay()
    arguments = {name: x.cpu() for name, x in arguments.items()}
    assert missed(out.cpu(), oracle(**arguments, kind=torch.bfloat16), oracle(**arguments)) <= 1
