"""Attention over whole prompts, with keys that are evicted after a delay (DMS).

`evicting_attention` serves training, with a soft gate per key and gradients, and prefill, with a
hard gate: in the hard limit it equals the slot cache token by token.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kit.inference.block_table import MASKED

CHUNK = 512  # query rows whose scores are in memory at once


def evicting_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_keep: torch.Tensor,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention in which key k is ungated for query q while q - k <= window.

    Later queries attend to it with `log_keep` added to its score: log(1 - alpha) of DMS
    (arXiv 2506.05345, training), 0 for a kept key and MASKED for an evicted one.
    query [B, H*G, T, D]; key, value [B, H, T, D]; log_keep [B, H, T] float32;
    returns [B, H*G, T, D] in the dtype of the values. Scores and their softmax are at least
    float32, also under autocast, as those of the slot cache are; those of more than CHUNK queries
    are computed again in the backward pass instead of kept.
    """
    heads, length = key.shape[1:3]
    again = torch.is_grad_enabled() and length > CHUNK
    out = []
    with torch.autocast(query.device.type, enabled=False):
        precise = torch.promote_types(query.dtype, torch.float32)
        grouped = (query.to(precise) * scale).unflatten(1, (heads, -1))  # [B, H, G, T, D]
        for first in range(0, length, CHUNK):
            rows = grouped[:, :, :, first : first + CHUNK]
            past = (x[:, :, : first + CHUNK] for x in (key, value, log_keep))
            inputs = rows, *past, window, first
            out.append(checkpoint(_rows, *inputs, use_reentrant=False) if again else _rows(*inputs))
    return torch.cat(out, 3).flatten(1, 2)


def _rows(query, key, value, log_keep, window: int, first: int) -> torch.Tensor:
    """The queries [B, H, G, t, D] from position `first` on, over the keys up to the last one."""
    group, rows = query.shape[2:4]
    scores = query.flatten(2, 3) @ key.to(query.dtype).transpose(-1, -2)  # [B, H, G*t, end]
    at = torch.arange(key.shape[2], device=key.device)
    ago = at[first : first + rows, None] - at  # [t, end]
    penalty = log_keep.unsqueeze(2).to(query.dtype)
    bias = penalty.where(ago > window, 0.0).masked_fill(ago < 0, MASKED)
    scores = scores.unflatten(2, (group, rows)) + bias.unsqueeze(2)
    weight = scores.softmax(-1).to(value.dtype).flatten(2, 3)
    return (weight @ value).unflatten(2, (group, rows))


def prompt_attention(
    query, key, value, scale: float, window=None, evicted=None, delay: int = 0, padding: int = 0
):
    """Attention of the last T tokens of a prompt of S, and how many entries the very last sees
    before the `padding`.

    query [H*G, T, D]; key, value [H, S, D]; returns [H*G, T, D] and a number. `window`: of sliding
    attention, the token itself included; `evicted` [H, S] bool takes effect after `delay` tokens
    and needs the whole prompt, T = S.
    """
    length, mask = key.shape[1], None
    attended = length - padding
    query, key, value = query[None], key[None], value[None]
    if evicted is not None:
        log_keep = evicted[None].float() * MASKED
        out = evicting_attention(query, key, value, log_keep, delay, scale)
        return out[0], attended - evicted[:, : max(0, attended - 1 - delay)].sum(1).double().mean()
    sliding = window is not None and length > window
    if sliding or query.shape[2] < length:
        at = torch.arange(length, device=key.device)
        ago = at[length - query.shape[2] :, None] - at
        mask = ago >= 0
        if sliding:
            mask, attended = mask & (ago < window), min(attended, window)
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out[0], attended
