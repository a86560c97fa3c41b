"""Packed weights change the time of a step alone: bits, gradients and memory are as without."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kit.inference import packed_weights
from kit.inference.decode import DECODE_VERSION, Request, decode, versions
from kit.inference.packed_weights import multiplying, pack
from kit.models.load import load
from kit.schema import Sampling


@pytest.fixture
def model(tiny_folder):
    """The tiny model in bfloat16, which not every CPU has a packed product for."""
    model = load(str(tiny_folder), dtype="bfloat16")
    if not pack(model.weights):
        pytest.skip("torch has no packed product with the bits of the plain one on this CPU")
    return model


def layers(model) -> list[nn.Linear]:
    return [module for module in model.weights.modules() if type(module) is nn.Linear]


@torch.inference_mode()
def outputs(layer: nn.Linear) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, n, layer.in_features, generator=generator) for n in (1, 3, 8, 40, 200)]
    return [layer(x.bfloat16()) for x in inputs]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_packed_layer_gives_the_bits_of_the_plain_one(model):
    plain = [outputs(layer) for layer in layers(model)]
    copies = pack(model.weights)
    assert {*copies} == {*layers(model)}
    with multiplying(copies):
        assert all("forward" in vars(layer) for layer in layers(model))
        assert all(same(outputs(layer), before) for layer, before in zip(layers(model), plain))
    assert not any("forward" in vars(layer) for layer in layers(model))


def test_decoding_gives_the_tokens_it_gave(model, monkeypatch):
    requests = [Request(tuple(range(5 + i, 30 + 2 * i)), str(i)) for i in range(5)]
    ours = decode(model, requests, Sampling(12, temperature=0.7))
    monkeypatch.setattr(packed_weights, "DTYPES", ())
    plain = decode(model, requests, Sampling(12, temperature=0.7))
    assert [one.token_ids for one in ours] == [one.token_ids for one in plain]


@torch.no_grad()
def in_place(weight):
    weight[0, 0] += 1


def by_data(weight):
    weight.data[-1, -1] -= 1  # which PyTorch's own counter of versions does not see


def anew(weight):
    weight.data = torch.flip(weight.data, [0])


@pytest.mark.parametrize("change", [in_place, by_data, anew])
def test_weights_that_changed_are_packed_again(model, change):
    layer = layers(model)[0]
    old = pack(model.weights)[layer]
    change(layer.weight)
    plain, copies = outputs(layer), pack(model.weights)
    assert copies[layer] is not old
    assert all(copies[other] is pack(model.weights)[other] for other in layers(model)[1:])
    with multiplying(copies):
        assert same(outputs(layer), plain)


def test_a_layer_with_a_bias(model):
    bias = nn.Linear(32, 64).bfloat16()
    with multiplying(pack(nn.ModuleList([bias]))):
        ours = outputs(bias)
    assert same(ours, outputs(bias))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_are_as_near_to_float64_as_those_of_plain_products(tiny_folder, dtype):
    model, exact = (load(str(tiny_folder), dtype=each) for each in (dtype, "float64"))
    exact.weights.load_state_dict(model.weights.state_dict())
    ids = torch.arange(5, 101).view(1, -1)
    with torch.inference_mode():
        plain, right = model.weights(ids).logits, exact.weights(ids).logits
        with multiplying(pack(model.weights)):
            packed = model.weights(ids).logits
    errors = [float((logits.double() - right).abs().max()) for logits in (packed, plain)]
    assert errors[0] <= 4 * errors[1], errors


def test_in_float32_memory_decides_and_record_keys_know(tiny_folder, monkeypatch):
    """Whatever is free: products of other bits are those of the model and the machine."""
    model = load(str(tiny_folder), dtype="float32")
    if not packed_weights.changes_bits(model.weights):
        pytest.skip("torch has no packed product in float32 on this CPU")
    monkeypatch.setattr(packed_weights, "free_bytes", lambda device: 1000)
    assert {*pack(model.weights)} == {*layers(model)}
    assert versions(model) == [DECODE_VERSION, "packed"]
    size = sum(layer.weight.nbytes for layer in layers(model))
    small = SimpleNamespace(total=packed_weights.SHARE * size - 1)
    monkeypatch.setattr(packed_weights.psutil, "virtual_memory", lambda: small)
    assert pack(copy.deepcopy(model.weights)) == {}
    assert versions(model) == [DECODE_VERSION]
    assert versions(load(str(tiny_folder), dtype="bfloat16")) == [DECODE_VERSION]


def test_a_product_whose_rows_depend_on_their_number_is_not_taken(tiny_folder, monkeypatch):
    model, product = load(str(tiny_folder), dtype="float32"), packed_weights._product
    monkeypatch.setattr(
        packed_weights,
        "_product",
        lambda x, copy, bias: product(x, copy, bias) + 1e-6 * (len(x) > packed_weights.ROWS),
    )
    monkeypatch.setattr(packed_weights, "_ALIKE", {})
    packed_weights._has_product.cache_clear()
    try:
        assert pack(model.weights) == {} and versions(model) == [DECODE_VERSION]
    finally:
        packed_weights._has_product.cache_clear()


def test_gradients_flow_through_the_weights_themselves(model):
    layer, x = layers(model)[0], torch.randn(4, layers(model)[0].in_features).bfloat16()
    with multiplying(pack(model.weights)):
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_copies_end_with_the_model_and_are_none_where_memory_is_short(model, monkeypatch):
    gc.collect()
    kept, other = len(packed_weights._COPIES), copy.deepcopy(model.weights)
    monkeypatch.setattr(packed_weights, "free_bytes", lambda device: 1000)
    assert pack(other) == {} and len(packed_weights._COPIES) == kept
    monkeypatch.undo()
    pack(other)
    assert len(packed_weights._COPIES) > kept
    del other
    gc.collect()
    assert len(packed_weights._COPIES) == kept
