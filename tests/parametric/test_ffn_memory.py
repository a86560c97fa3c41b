"""Models made wider by fetched blocks, against models whose layers are wider by construction."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kit.dms import evictor, fidelity
from kit.inference import decode, policies
from kit.inference.decode import Request
from kit.models.load import load
from kit.parametric import cluster_tree, ffn_memory, shards
from kit.parametric.bank import ParametricBank, assemble_bank
from kit.schema import Sampling

FAMILIES = ("llama", "qwen3", "gemma3")
IDS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))


def drawn(weights, kind: str, sequences: int, layers=(1, 3)) -> ffn_memory.MemoryLayers:
    """Random blocks, small enough to change the text and not to break it."""
    shape = ffn_memory.shape(weights, kind, layers, (3, 2), 2)
    wider = ffn_memory.MemoryLayers.empty(weights, shape, sequences)
    wider.blocks.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
    return wider


def built(weights, wider: ffn_memory.MemoryLayers, sequence: int):
    """The same model with the units of one sequence in its layers."""
    whole = copy.deepcopy(weights)
    for number, layer in enumerate(wider.shape.layers):
        block, mlp = wider.blocks[sequence, number], whole.base_model.layers[layer].mlp
        parts = block.chunk(3, dim=-1)
        for name, part in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
            linear = getattr(mlp, name)
            more = part.T if name == "down_proj" else part
            joined = torch.cat([linear.weight, more], dim=int(name == "down_proj"))
            linear.weight = nn.Parameter(joined)
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_units_beside_the_layer_are_a_wider_layer(family):
    model = load(f"random:{family}", dtype="float64")
    wider = drawn(model.weights, "ffn", len(IDS))
    with torch.no_grad(), wider.attached():
        found = model.weights(IDS).logits
    for sequence in range(len(IDS)):
        expected = built(model.weights, wider, sequence)(IDS[sequence : sequence + 1]).logits
        torch.testing.assert_close(found[sequence : sequence + 1], expected.detach())


@pytest.mark.parametrize("kind", [kind for kind in ffn_memory.KINDS if kind.startswith("lora")])
def test_low_rank_blocks_are_changes_of_the_weights(kind):
    model = load("random:qwen3", dtype="float64")
    wider = drawn(model.weights, kind, len(IDS))
    with torch.no_grad(), wider.attached():
        found = model.weights(IDS).logits
    for sequence in range(len(IDS)):
        whole = copy.deepcopy(model.weights)
        for number, layer in enumerate(wider.shape.layers):
            block = wider.blocks[sequence, number]
            for name in ffn_memory.KINDS[kind]:
                linear = whole.base_model.layers[layer].get_submodule(name)
                reads, writes, block = block.split(
                    [linear.in_features, linear.out_features,
                     block.shape[1] - linear.in_features - linear.out_features], dim=1,
                )  # fmt: skip
                linear.weight.data += ffn_memory.LORA_SCALE * writes.T @ reads
        expected = whole(IDS[sequence : sequence + 1]).logits
        torch.testing.assert_close(found[sequence : sequence + 1], expected.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_pairs_are_an_attention_of_their_own(family):
    """Against a softmax over the pairs written out, added to what the heads read."""
    model = load(f"random:{family}", dtype="float64")
    wider = drawn(model.weights, "kv", len(IDS), layers=(2,))
    attention, heard = model.weights.base_model.layers[2].self_attn, {}
    asks = attention.q_proj
    hooks = [
        asks.register_forward_hook(lambda m, args, out: heard.update(query=out)),
        attention.o_proj.register_forward_pre_hook(lambda m, args: heard.update(read=args[0])),
    ]
    with torch.no_grad():
        model.weights(IDS)
        plain = heard["read"]
        for hook in hooks[1:]:
            hook.remove()
        with wider.attached():
            hook = attention.o_proj.register_forward_pre_hook(
                lambda m, args: heard.update(read=args[0])
            )
            model.weights(IDS)
            hook.remove()
    hooks[0].remove()
    keys, values = wider.blocks[:, 0].chunk(2, dim=-1)
    keys, values = (x.view(3, 5, -1, attention.head_dim) for x in (keys, values))
    query = heard["query"].view(3, 12, keys.shape[2], -1, attention.head_dim)
    query = getattr(attention, "q_norm", nn.Identity())(query)
    scores = torch.einsum("nmhgd,nphd->nmhgp", query, keys) * attention.scaling
    said = torch.einsum("nmhgp,nphd->nmhgd", scores.softmax(-1), values)
    assert not torch.allclose(heard["read"], plain)
    torch.testing.assert_close(heard["read"] - plain, said.flatten(2))


@pytest.mark.parametrize("kind", ("lora-qk", "kv"))
def test_other_kinds_decode_in_a_batch_as_alone(kind, tmp_path):
    model = load("random:qwen3", dtype="float64")
    memory, sampling = bank(model, tmp_path / "b", kind=kind), Sampling(max_new_tokens=10)
    together = decode.decode(model, asked(), sampling, 16, bank=memory)
    for request, generation in zip(asked(), together, strict=True):
        with torch.no_grad():
            wider = ffn_memory.MemoryLayers.empty(model.weights, memory.shape, 1)
            wider.put(0, memory.fetch(request.path))
            ids = [*request.prompt_ids]
            for _ in range(10):
                with wider.attached():
                    ids.append(int(model.weights(torch.tensor([ids])).logits[0, -1].argmax()))
        assert generation.token_ids == tuple(ids[len(request.prompt_ids) :])


@pytest.mark.parametrize("kind", ffn_memory.KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_new_blocks_and_detached_ones_change_no_bit(family, kind):
    model = load(f"random:{family}")
    shape = ffn_memory.shape(model.weights, kind, (0, 2), (3, 2), 2)
    before = model.weights(IDS).logits
    fetched = [blocks[-1] for blocks in ffn_memory.initial(model.weights, shape, seed=1)]
    assert any(block.any() for block in fetched)
    wider = ffn_memory.MemoryLayers.empty(model.weights, shape, len(IDS))
    for place in range(len(IDS)):
        wider.put(place, fetched)
    with wider.attached():
        assert torch.equal(model.weights(IDS).logits, before)
    wider.blocks.normal_()
    with wider.attached():
        assert not torch.equal(model.weights(IDS).logits, before)
    assert torch.equal(model.weights(IDS).logits, before), "detached"


def bank(model, folder, branching: int = 3, kind: str = "ffn") -> ParametricBank:
    """A bank of `branching` subtrees of two levels, full of small random numbers."""
    shape = ffn_memory.shape(model.weights, kind, (1, 2), (3, 2), branching)
    rng, files = torch.Generator().manual_seed(3), []
    folder.mkdir(exist_ok=True)
    for node in range(branching):
        sizes = [(branching**level, *shape.block(level)) for level in range(2)]
        blocks = [torch.randn(size, generator=rng) * 0.6 for size in sizes]
        files.append(shards.write(folder / shards.name(node), blocks))
    tree = cluster_tree.fit(torch.randn(60, 8, generator=rng).numpy(), branching, 2)
    assemble_bank(folder, model, tree, shape, files)
    return ParametricBank(folder, model)


def asked(branching: int = 3) -> list[Request]:
    """Prompts of different lengths, each with a path of its own, and a second sample of one."""
    rng, made = torch.Generator().manual_seed(4), []
    for number, length in enumerate((5, 9, 3, 12, 7, 4, 8)):
        top = number % branching
        ids = torch.randint(0, 256, (length,), generator=rng).tolist()
        made.append(Request(tuple(ids), f"p{number}", 0, (top, branching * top + number % 2)))
    return [*made, replace(made[3], sample=1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_bank_is_that_of_the_wider_models(family, tmp_path):
    """Each request against a loop that reads the whole text anew for each token."""
    model = load(f"random:{family}", dtype="float64")
    memory, sampling, expected = bank(model, tmp_path / "b"), Sampling(max_new_tokens=10), []
    for request in asked():
        wider = ffn_memory.MemoryLayers.empty(model.weights, memory.shape, 1)
        wider.put(0, memory.fetch(request.path))
        whole, ids = built(model.weights, wider, 0), [*request.prompt_ids]
        for _ in range(10):
            ids.append(int(whole(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tuple(ids[len(request.prompt_ids) :]))
    for size in (1, 3, 16):
        found = decode.decode(model, asked(), sampling, size, bank=memory)
        assert [g.token_ids for g in found] == expected, size
    plain = decode.decode(model, asked(), sampling)
    assert [g.token_ids for g in plain] != expected


def test_a_bank_goes_with_every_policy(tmp_path):
    """Under each policy, requests together give what each gives alone."""
    model = load("random:qwen3")
    memory, sampling = bank(model, tmp_path / "b"), Sampling(max_new_tokens=12)
    dms = evictor.Evictor(model.weights, replace(evictor.LAPTOP, window=4), model.weights_hash)
    for parameter in dms.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    rules = [policies.Window(6), policies.TOVA(6), policies.H2O(6), policies.DMS(dms)]
    for policy in rules:
        how = dict(policy=policy, bank=memory)
        together = decode.decode(model, asked(), sampling, 4, **how)
        for request, generation in zip(asked(), together, strict=True):
            alone = decode.decode(model, [request], sampling, 1, **how)[0]
            assert generation.token_ids == alone.token_ids, policy.name
            assert generation.kv_peak_bytes == alone.kv_peak_bytes


def test_teacher_forcing_hears_the_same_blocks(tmp_path):
    """`teacher_forced_kl` feeds through the cache what `attached` batches see whole."""
    model = load("random:llama", dtype="float64")
    wider = drawn(model.weights, "ffn", len(IDS))
    with wider.attached():
        frame = fidelity.teacher_forced_kl(model, IDS, prompt=4)
    logits = model.weights(IDS).logits.log_softmax(-1)
    with wider.attached(), torch.no_grad():
        wide = model.weights(IDS).logits.log_softmax(-1)
    targets = IDS[:, 5:, None]
    expected = -wide[:, 4:-1].gather(2, targets).mean((1, 2))
    assert frame["nats"].to_numpy() == pytest.approx(expected.numpy())
    assert not torch.allclose(expected, -logits[:, 4:-1].gather(2, targets).mean((1, 2)))


def test_one_prompt_under_two_paths_is_refused(tmp_path):
    model = load("random:llama")
    one = Request((1, 2, 3), "p", 0, (0, 0))
    with pytest.raises(ValueError, match="'p' repeats a prompt with another path"):
        decode.decode(
            model, [one, replace(one, path=(1, 3))], Sampling(2), bank=bank(model, tmp_path)
        )


def test_which_layers():
    assert ffn_memory.choose_layers(10, 30, "late") == tuple(range(20, 30))
    assert ffn_memory.choose_layers(10, 30, "early") == tuple(range(10))
    assert ffn_memory.choose_layers(10, 30, "middle") == tuple(range(10, 20))
    assert ffn_memory.choose_layers(10, 30, "uniform") == tuple(range(1, 30, 3))
    assert ffn_memory.choose_layers(1, 3, "all") == (0, 1, 2)
    with pytest.raises(ValueError, match="layers are 'top'; use uniform, all"):
        ffn_memory.choose_layers(1, 3, "top")
