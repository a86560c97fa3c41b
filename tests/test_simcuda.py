"""What the kit does on a GPU, on a pretended one: everything on it agrees with the CPU, nothing
meets a tensor of the CPU, and neither launches nor waits grow where they should not.

Not carried by it: trainings by TRL, since accelerate asks the CUDA library itself for a device (the
kit's own part of them, rollouts and their log-probabilities, is here), and packed HQQ weights.
"""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from kit.dms import evictor, fidelity, gates, plots
from kit.dms.train import EvictorTraining
from kit.inference import cuda_graphs, decode, paged_attention, policies
from kit.inference.budget_forcing import BudgetForcing
from kit.inference.kv_quantization import Quantized
from kit.models import quantization
from kit.models.embedder import load as load_embedder
from kit.models.load import RANDOM as SHAPES
from kit.models.load import Model, load
from kit.parametric import ffn_memory, qa
from kit.parametric.activation_cache import ActivationCache
from kit.parametric.train import IGNORED, BankTraining, MemoryTrainConfig, Row
from kit.schema import Sampling
from kit.training import rollouts
from tests import simcuda
from tests.toys import drawn, tokens
from tests.training.test_grpo import Plain

RANDOM = {name: load(f"random:{name}", "float32", "cpu") for name in SHAPES}
REQUESTS = [
    decode.Request(tuple(tokens(1, 30 - 9 * i, i)[0].tolist()), f"p{i}", 1) for i in range(3)
]
POLICIES = {
    "full": lambda model: policies.Full(),
    "window": lambda model: policies.Window(8),
    "window 40%": lambda model: policies.Window(kept_fraction=0.4),
    "random": lambda model: policies.Random(8),
    "knorm": lambda model: policies.Knorm(8),
    "snapkv": lambda model: policies.SnapKV(8, window=3),
    "rkv": lambda model: policies.RKV(9, window=3, buffer=8),
    "tova": lambda model: policies.TOVA(8),
    "h2o 40%": lambda model: policies.H2O(kept_fraction=0.4),
    "dms": lambda model: policies.DMS(drawn(model, window=4)),
}
CACHES = {
    "plain": {},
    "quantised": dict(quantized=Quantized(4, 16, 8)),
    "forced": dict(forcing=BudgetForcing((2, 4), (5,), 2, (9,), 1)),
}
CASES = [("plain", name) for name in POLICIES]
CASES += [
    (how, name) for how in ("quantised", "forced") for name in ("full", "h2o 40%", "rkv", "dms")
]


@pytest.fixture
def seen():
    with simcuda.device() as found:
        yield found


@pytest.fixture(scope="module")
def embedder():
    return load_embedder()


def pair(here: Model = RANDOM["llama"]) -> list[Model]:
    """A model on the CPU, and the same one on the device."""
    return [here, simcuda.moved(dataclasses.replace(here, weights=copy.deepcopy(here.weights)))]


def test_the_device_refuses_the_cpu_and_counts(seen):
    there = torch.arange(3, device="cuda:0")
    assert there.is_cuda and there.device.type == "cuda" and not seen.waits
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        there + torch.arange(3)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()
    assert (there + torch.tensor(2)).tolist() == [2, 3, 4], "a single number may lie on the CPU"
    seen.clear()
    assert int(there.sum()) == 3 and there[torch.tensor([1])].cpu().numpy() == [1]
    assert seen.launches == {"sum": 1, "index": 1}
    assert seen.waits == {
        "_local_scalar_dense": 1, "index on the host": 1, "copy from or to the host": 1
    }  # fmt: skip


def test_gradients_stay_on_the_device(seen):
    there = torch.nn.Parameter(torch.ones(2, 4, 3, 8, device="cuda:0"))
    kept = torch.nn.functional.scaled_dot_product_attention(there, there, there, is_causal=True)
    kept.square().sum().backward()
    assert there.grad.is_cuda
    torch.optim.AdamW([there], 0.1, fused=True).step()
    assert there.is_cuda and float(there.detach().max()) < 1


@pytest.mark.parametrize(("how", "name"), CASES)
def test_decoding_says_what_the_cpu_says(seen, how, name):
    found = []
    for model in pair():
        policy = POLICIES[name](model)
        done = decode.decode(model, REQUESTS, Sampling(5), 2, policy=policy, **CACHES[how])
        found.append([
            (g.token_ids, g.kv_reads_tokens, g.kv_peak_bytes, [f and f.token_ids for f in g.forced])
            for g in done
        ])  # fmt: skip
    assert found[0] == found[1]


GRAPHS = [("plain", name) for name in POLICIES]
GRAPHS += [("quantised", name) for name in ("full", "window", "h2o 40%", "dms")]


@pytest.mark.parametrize(("how", "name"), GRAPHS)
def test_steps_are_replayed_as_graphs(seen, monkeypatch, how, name):
    """Sequences come, go and outgrow the graph, whose steps say what the CPU says, and wait for the
    device once: to hear of the tokens."""
    monkeypatch.setattr(cuda_graphs, "SHORTEST", 16)
    asked = [decode.Request(tuple(range(1, 1 + n)), f"p{i}") for i, n in enumerate((24, 3, 9, 11))]
    found = []
    for model in pair():
        policy = POLICIES[name](model)
        done = decode.decode(model, asked, Sampling(12), 3, policy=policy, **CACHES[how])
        found.append([(g.token_ids, g.kv_reads_tokens, g.kv_peak_bytes) for g in done])
    assert found[0] == found[1]
    assert seen.launches["graph"] >= 18  # all but the first steps of three lengths


def test_a_model_that_waits_is_decoded_without_graphs(seen, monkeypatch):
    here, there = pair()
    norm = there.weights.base_model.norm
    norm.register_forward_hook(lambda module, args, out: out * float(out.sum() != 0))
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be captured as a CUDA graph"):
        done = decode.decode(there, REQUESTS, Sampling(5), 2)
    assert not seen.launches["graph"]
    assert [g.token_ids for g in done] == [
        g.token_ids for g in decode.decode(here, REQUESTS, Sampling(5), 2)
    ]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_sampling_on_other_networks_says_what_the_cpu_says(seen, family):
    how = Sampling(6, temperature=0.7, top_p=0.9)
    here, there = (decode.decode(m, REQUESTS, how, 2) for m in pair(RANDOM[family]))
    assert [g.token_ids for g in here] == [g.token_ids for g in there]


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_layers_that_are_known_are_launched_as_few_kernels(tmp_path, family):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=300)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    family(**sizes).to_json_file(tmp_path / "config.json", use_diff=False)
    here = load(f"random:{tmp_path}", "float32", "cpu")
    with simcuda.device() as seen:
        said = [decode.decode(m, REQUESTS, Sampling(5), 2) for m in pair(here)]
    assert [g.token_ids for g in said[0]] == [g.token_ids for g in said[1]]
    passes = seen.launches["normed"] // 5
    assert seen.launches["rotated"] == seen.launches["gated"] == 2 * passes > 0
    assert not {"silu", "rsqrt"} & seen.launches.keys()


@pytest.mark.parametrize("name", POLICIES)
def test_the_quality_of_a_policy_and_what_it_keeps_are_shown(seen, name):
    """As 03_dms does it, whose held-out ids lie on the CPU."""
    ids, found = tokens(2, 16), []
    for model in pair():
        policy = POLICIES[name](model)
        kept = fidelity.kept_positions(model, ids[0], policy, prompt=10)
        assert plots.kept_heatmap(kept, 16).alt
        text = plots.kept_text([f"{i}" for i in range(16)], kept)
        found.append((text, fidelity.teacher_forced_kl(model, ids, policy, prompt=10)))
    (here, measured), (there, on_device) = found
    assert here == there
    assert measured["kl"].to_numpy() == pytest.approx(on_device["kl"].to_numpy(), abs=1e-5)
    assert measured["live_tokens"].equals(on_device["live_tokens"])


def test_gates_are_measured_and_moved(seen):
    ids, found = tokens(2, 20), []
    for model in pair():
        moved = gates.at_fraction(model, drawn(model, window=4), ids, 0.7)
        found.append(gates.measure(model, moved, ids))
    assert found[0]["kl"].to_numpy() == pytest.approx(found[1]["kl"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("recipe", evictor.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_step_of_each_evictor_training(seen, recipe, tmp_path):
    recipe, found = dataclasses.replace(recipe, window=4, batch=2, context=24), []
    for number, model in enumerate(pair()):
        training = EvictorTraining(model, tokens(4, 24), recipe, tmp_path / str(number))
        found.append([training.step() for _ in range(2)])
        training.save()
        again = EvictorTraining(model, tokens(4, 24), recipe, tmp_path / str(number))
        assert len(again.history) == 2, "saved from there and read back"
        found[-1].append(again.step())
    kl = [[step["kl"] for step in steps] for steps in found]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4, abs=1e-6)


def row(number: int) -> Row:
    ids, at = tokens(1, 16, number)[0], torch.arange(16)
    targets = torch.where(at % 8 > 4, ids.roll(-1), IGNORED)
    return Row((number % 2,), ids, targets, at % 8)


@pytest.mark.parametrize("kind", [*ffn_memory.KINDS, "co-trained", "continued", "upper layers"])
def test_a_step_of_each_training_of_banks(seen, kind, tmp_path):
    data = [row(number) for number in range(4)]
    recipe = MemoryTrainConfig(batch=2, context=16)
    recipe = {
        "co-trained": dataclasses.replace(recipe, anchor_rate=1e-4, generic=0.5),
        "continued": dataclasses.replace(recipe, anchor_rate=1e-4),
    }.get(kind, recipe)
    said = [tuple(r.ids[a : a + 8].tolist()) for r in data for a in (0, 8)]
    found = []
    for number, model in enumerate(pair(RANDOM["qwen3"])):
        layers = (2, 3) if kind == "upper layers" else (0, 3)
        shape = ffn_memory.shape(
            model.weights, kind if kind in ffn_memory.KINDS else "ffn", layers, (2,), 2
        )
        prefix = ActivationCache(model, 2, said) if kind == "upper layers" else None
        nodes = [] if kind == "continued" else [0, 1]
        job = BankTraining(model, shape, nodes, data, recipe, tmp_path / str(number), prefix)
        found.append([job.step() for _ in range(2)])
        job.save()
        assert all(value.device == model.device for value in job.parameters.values())
    losses = [[step["loss"] for step in steps] for steps in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class Bank:
    """Blocks by number, as `ParametricBank` hands them out."""

    key = "blocks"

    def __init__(self, model):
        self.shape = ffn_memory.shape(model.weights, "ffn", (0, 1), (4,), 2)
        rng = torch.Generator().manual_seed(0)
        self.blocks = torch.randn(2, *self.shape.block(0), generator=rng).to(model.device)

    def paths(self, questions):
        return [(number % 2,) for number, _ in enumerate(questions)]

    def fetch(self, path):
        return [self.blocks[path[0]]]

    def prefetch(self, path):
        pass

    def widened(self, weights, sequences):
        return ffn_memory.MemoryLayers.empty(weights, self.shape, sequences)


def test_fetched_blocks_in_probes_and_in_decoding(tiny, seen):
    asked, options = ["Lima is in", "Who?"], [["Peru", "Democratic Congo"], ["Nobody", "A"]]
    requests = [dataclasses.replace(r, path=(i % 2,)) for i, r in enumerate(REQUESTS)]
    found = []
    for model in pair(tiny):
        bank = Bank(model)
        with qa.fetched(model, asked, bank):
            likely = qa.likelihoods(model, asked, options)
        said = decode.decode(model, requests, Sampling(5), 2, bank=bank)
        found.append((likely, [g.token_ids for g in said]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == found[1][1]


def test_rollouts_and_their_probabilities(seen):
    chats, found = [[{"role": "user", "content": ids.tolist()}] for ids in tokens(2, 12)], []
    for model in pair(dataclasses.replace(RANDOM["llama"], tokenizer=Plain())):
        evicting = policies.DMS(drawn(model, window=4))
        found.append([
            rollouts.completions(model, chats, Sampling(6, 1.0), policy)
            for policy in (policies.Full(), evicting)
        ])  # fmt: skip
    for here, there in zip(*found, strict=True):
        assert here["completion_ids"] == there["completion_ids"]
    for here, there in zip(found[0][1]["logprobs"], found[1][1]["logprobs"], strict=True):
        assert here == pytest.approx(there, abs=1e-4)


def test_embeddings(embedder, seen, tmp_path):
    here = dataclasses.replace(embedder, cache=tmp_path / "a")
    weights = simcuda.moved(copy.deepcopy(here.weights))
    there = dataclasses.replace(here, weights=weights, cache=tmp_path / "b")
    texts = ["A first text.", "Another"]
    assert here.embed(texts) == pytest.approx(there.embed(texts), abs=1e-5)


@pytest.mark.parametrize("bits", quantization.BITS)
def test_unpacked_weights_of_fewer_bits(seen, bits):
    """HQQ refines in float16 on CUDA, so that 4-bit weights may lie in the next step there."""
    here, there = (quantization.quantize(m, bits, 32, packed=False) for m in pair())
    before = RANDOM["llama"].weights.base_model.layers[0].mlp.down_proj.weight.view(-1, 32)
    step = (before.amax(1) - before.amin(1)) / (2**bits - 1)
    mine, other = (m.weights.base_model.layers[0].mlp.down_proj.weight for m in (here, there))
    gap = (mine - other.cpu()).view(-1, 32).abs().amax(1)
    assert other.is_cuda and (gap <= (step if bits in quantization.REFINED else 1e-3 * step)).all()
    assert decode.decode(there, REQUESTS[:1], Sampling(4))[0].new_tokens == 4


@pytest.mark.parametrize(("policy", "quantized"), [("full", Quantized(4, 16, 8)), ("tova", None)])
def test_a_cache_that_is_converted_is_converted_at_once(seen, monkeypatch, policy, quantized):
    """Each portion costs dozens of launches; those of a CPU, here one block each, are not made."""
    monkeypatch.setitem(paged_attention.PORTION, "cpu", 1)
    model = RANDOM["llama"]
    half = dataclasses.replace(model, weights=copy.deepcopy(model.weights).bfloat16())
    short, long = (asked_of(seen, 2, n, policy, quantized, half) for n in (20, 180))
    assert short == long


def asked_of(
    seen, count: int, length: int, policy="full", quantized=None, here=RANDOM["llama"]
) -> tuple[int, int]:
    """Launches and waits of one decode step of `count` sequences with `length` tokens each."""
    model = pair(here)[1]
    asked = [decode.Request(tuple([1 + i] * length), f"p{i}") for i in range(count)]
    steps = []
    for new in (4, 5):  # what a fifth token adds
        seen.clear()
        how = dict(policy=POLICIES[policy](model), quantized=quantized)
        decode.decode(model, asked, Sampling(new), count, **how)
        steps.append((seen.launches.total(), seen.waits.total()))
    return tuple(after - before for before, after in zip(*steps))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_asks_no_more_of_the_device_for_more_or_longer_sequences(seen, policy):
    few = asked_of(seen, 2, 20, policy)
    assert few == asked_of(seen, 6, 84, policy)
    assert few[0] < 20 and few[1] == 3  # its tokens there, those that it says back, and a look at
