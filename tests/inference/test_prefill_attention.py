"""Attention under eviction gates, against plain formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from kit.inference import prefill_attention
from kit.inference.block_table import MASKED
from kit.inference.prefill_attention import evicting_attention
from tests import rounding


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_()


def naive(query, key, value, log_keep, window, scale):
    """Query by query and head by head, as the definition reads."""
    batch, wide, length, _ = query.shape
    group = wide // key.shape[1]
    out = torch.zeros_like(query)
    for b in range(batch):
        for head in range(wide):
            keys, values = key[b, head // group], value[b, head // group]
            for q in range(length):
                scores = []
                for k in range(q + 1):
                    score = query[b, head, q] @ keys[k] * scale
                    gone = q - k > window
                    scores.append(score + log_keep[b, head // group, k] if gone else score)
                out[b, head, q] = torch.stack(scores).softmax(0) @ values[: q + 1]
    return out


@pytest.mark.parametrize("chunk", [512, 5])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_it_equals_its_definition_with_gradients(window, chunk, monkeypatch):
    monkeypatch.setattr(prefill_attention, "CHUNK", chunk)
    query, key, value = drawn(2, 6, 13, 4), drawn(2, 2, 13, 4, seed=1), drawn(2, 2, 13, 4, seed=2)
    gate = drawn(2, 2, 13, seed=3)
    found = evicting_attention(query, key, value, F.logsigmoid(gate), window, 0.4)
    expected = naive(query, key, value, F.logsigmoid(gate), window, 0.4)
    torch.testing.assert_close(found, expected)
    direction = drawn(*found.shape, seed=4).detach()
    inputs = (query, key, value, gate)
    for a, b in zip(
        torch.autograd.grad(found, inputs, direction, retain_graph=True),
        torch.autograd.grad(expected, inputs, direction, allow_unused=True),
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_open_gates_are_causal_attention_and_closed_ones_a_window():
    query, key, value = drawn(1, 6, 40, 8), drawn(1, 2, 40, 8, seed=1), drawn(1, 2, 40, 8, seed=2)
    sdpa = dict(scale=0.3, enable_gqa=True)
    gate = torch.zeros(1, 2, 40)
    found = evicting_attention(query, key, value, gate, 5, 0.3)
    full = F.scaled_dot_product_attention(query, key, value, is_causal=True, **sdpa)
    torch.testing.assert_close(found, full)
    ago = torch.arange(40)[:, None] - torch.arange(40)
    mask = (ago >= 0) & (ago <= 5)
    windowed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **sdpa)
    found = evicting_attention(query, key, value, gate + MASKED, 5, 0.3)
    torch.testing.assert_close(found, windowed)


def test_scores_are_not_rounded_to_the_dtype_of_the_model(dtype):
    """Peaked attention: scores of tens, which bfloat16 would round by tenths."""
    kind = getattr(torch, dtype)
    query, key, value = (drawn(1, n, 40, 8, seed=n).detach().to(kind) for n in (6, 2, 2))
    query, gate = query * 16, torch.zeros(1, 2, 40)
    sdpa = dict(is_causal=True, scale=0.3, enable_gqa=True)
    plain, right = (
        F.scaled_dot_product_attention(*(x.to(each) for x in (query, key, value)), **sdpa)
        for each in (kind, torch.float64)
    )
    rounding.assert_close(evicting_attention(query, key, value, gate, 5, 0.3), plain, right)
