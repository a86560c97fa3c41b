"""Weights in fewer bits: packed against unpacked, against plain rounding, and their bytes."""

import copy
import dataclasses

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig

from kit.budget import ledger
from kit.budget.ledger import Packing
from kit.inference import decode, kv_quantization
from kit.inference.decode import Request
from kit.models import quantization
from kit.models.load import RANDOM, load, twin
from kit.schema import Sampling

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TEXTS = (
    "Lagos is the largest city of Nigeria, and its port is one of the busiest in Africa.",
    "To add two fractions, bring them to a common denominator and add the numerators.",
    "The atomic number of an element is the number of protons in the nucleus of its atom.",
)


@pytest.mark.parametrize("bits", quantization.BITS)
@pytest.mark.parametrize("family", RANDOM)
def test_packed_weights_say_what_they_unpack_to(family, bits):
    model = load(f"random:{family}", "float32")
    packed = quantization.quantize(model, bits, group=32)
    plain = quantization.quantize(model, bits, group=32, packed=False)
    assert torch.equal(packed.weights(IDS).logits, plain.weights(IDS).logits)
    assert packed.weights_hash == plain.weights_hash != model.weights_hash
    asked, how = [Request((1, 2, 3)), Request((4, 5))], Sampling(max_new_tokens=8)
    assert not torch.equal(model.weights(IDS).logits, plain.weights(IDS).logits)
    said = [[g.token_ids for g in decode.decode(m, asked, how)] for m in (packed, plain)]
    assert said[0] == said[1]


@pytest.mark.parametrize("bits", quantization.BITS)
def test_each_weight_is_near_what_it_was(bits, dtype):
    """No further than a step of plain rounding, whose zero HQQ moves, and one of the dtype."""
    model = load("random:llama", dtype)
    found = quantization.quantize(model, bits, group=32, packed=False)
    for before, after in zip(model.weights.base_model.layers, found.weights.base_model.layers):
        old, new = (layer.mlp.down_proj.weight.detach().float() for layer in (before, after))
        groups = old.view(-1, 32)
        step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
        error = (old - new).view(-1, 32).abs().amax(1)
        once = torch.finfo(model.dtype).eps / 2 * groups.abs().amax(1)
        assert 0 < error.max() and (error <= 1.6 * step + once).all()
    assert torch.equal(found.weights.lm_head.weight, model.weights.lm_head.weight)


def nearest(model, bits: int, group: int):
    """Plain rounding between the least and the largest of each group, by the cache's packing."""
    weights = copy.deepcopy(model.weights)
    for linear in weights.base_model.layers.modules():
        if type(linear) is torch.nn.Linear:
            packed = kv_quantization.pack(linear.weight.data, bits, group, iterations=0)
            linear.weight.data = kv_quantization.unpack(*packed, bits)
    return weights


@torch.no_grad()
def divergence(model, weights) -> float:
    """KL from the model to `weights` on TEXTS, nats per token."""
    ids = torch.tensor([model.tokenizer("\n".join(TEXTS))["input_ids"]])
    p, q = (m(ids).logits[0].float().log_softmax(-1) for m in (model.weights, weights))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def lower(bundled):
    """Four of the bundled model's 30 layers: quantizing takes as long as there are weights."""
    weights = copy.deepcopy(bundled.weights)
    weights.model.layers = weights.model.layers[:4]
    weights.config.num_hidden_layers = 4
    return dataclasses.replace(bundled, weights=weights)


def test_bundled_weights_at_four_bits_lose_less_than_by_plain_rounding(lower):
    four = quantization.quantize(lower, 4)
    assert "4-bit g64" in four.name
    mine, plain = divergence(lower, four.weights), divergence(lower, nearest(lower, 4, 64))
    assert 0 < mine < plain < 2
    native = 8 * lower.dtype.itemsize
    how = Packing(4, 64, native, native, index_bits=0, native_bits=native)
    formula = ledger.weights(ledger.architecture(lower.weights.config), how)
    measured = ledger.measured_weights(four.weights)
    assert sum(measured.values()) == pytest.approx(sum(formula.values()), rel=0.05)
    assert measured["linear weights"] < 0.2 * 106e6 * 4 / 30 * lower.dtype.itemsize * 2


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
def test_a_mixture_of_fused_experts_is_refused_under_the_name_of_fewer_bits(kind, tmp_path):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=256)
    experts = dict(
        num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    )
    kind(**shape, **experts, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path)
    model = load(f"random:{tmp_path}", "float32")
    layers = model.weights.base_model.layers
    plain = [m.weight.numel() for m in layers.modules() if type(m) is torch.nn.Linear]
    norms = [p.numel() for p in layers.parameters() if p.ndim == 1]
    fused = sum(quantization.fused_experts(model).values())
    whole = sum(p.numel() for p in layers.parameters())
    assert 0.7 * whole < fused == whole - sum(norms) - sum(plain) - routers(layers)
    for made in (quantization.rename, quantization.quantize):
        assert made(model, 16) is model
        with pytest.raises(ValueError, match=r"holds \d\d% of its layers in fused experts"):
            made(model, 4)


def routers(layers) -> int:
    """Numbers of the matrices that choose experts, which are no linear layers either."""
    inside = {id(m.weight) for m in layers.modules() if type(m) is torch.nn.Linear}
    return sum(p.numel() for p in layers.parameters() if p.ndim == 2 and id(p) not in inside)


def test_other_bits_are_refused_and_groups_divide_what_is_read():
    model = load("random:llama")
    assert quantization.quantize(model, 16) is model
    with pytest.raises(ValueError, match="weights of 3 bit cannot be made; use 16, 8 or 4"):
        quantization.quantize(model, 3)
    made = quantization.quantize(model, 4, packed=False).weights.base_model.layers[0].mlp
    groups = made.gate_proj.weight.view(-1, 32)  # 96 numbers are read: 32 is what 64 shares with it
    assert max(len(group.unique()) for group in groups) <= 16


def test_eight_bits_lose_no_more_in_bfloat16_than_its_own_rounding():
    """Unpacked in bfloat16 itself, code - zero would be rounded to eight bits."""
    half = load("random:llama", "bfloat16")
    whole = dataclasses.replace(half, weights=twin(half.weights).float())
    errors = []
    for model in (half, whole):
        found = quantization.quantize(model, 8, packed=False).weights.base_model.layers[0].mlp
        exact = whole.weights.base_model.layers[0].mlp.down_proj.weight
        unpacked = found.down_proj.weight.to(torch.bfloat16)
        errors.append(float((unpacked.float() - exact).square().mean()))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_eight_bits_are_rounded_and_lose_next_to_nothing(lower):
    eight = quantization.quantize(lower, 8, packed=False)
    assert 0 < divergence(lower, eight.weights) < 0.01
