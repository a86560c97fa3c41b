"""Soft and hard eviction gates over whole sequences: the attention in which evictors are trained.

Gates take the place of the slot cache: an attached Evictor passes them its logits, and the model's
attention layers call them to attend. Soft gates (relaxed by a temperature and noise) let gradients
through; hard gates evict as the slot cache does, for all tokens at once.

Sources: Dynamic Memory Sparsification, https://arxiv.org/abs/2506.05345;
https://github.com/NVIDIA/Model-Optimizer, experimental/dms at a2fbac7.
"""

import copy
from dataclasses import replace

import pandas
import torch
import torch.nn.functional as F

from kit.dms import distillation
from kit.dms.evictor import Evictor
from kit.inference.block_table import MASKED
from kit.inference.decode import slots_attached
from kit.inference.kv_cache import layer_windows
from kit.inference.prefill_attention import evicting_attention
from kit.models.load import Model, check_head


class Gates:
    """Takes the place of the slot cache for whole sequences [B, T] at once.

    With `temperature` 0 gates are hard and without noise, as in the slot cache. `noise`: of each
    layer that evicts, uniform numbers [B, H, T], from which the logistic noise is made; they are
    given, so that layers computed again in the backward pass meet the same ones.
    """

    def __init__(self, windows, window: int = 1, temperature: float = 0.0, noise=None):
        self.windows, self.window, self.temperature = windows, window, temperature
        self.noise = noise or {}
        self.log_keep: dict[int, torch.Tensor] = {}  # layer -> [B, H, T]
        self.closed: dict[int, torch.Tensor] = {}  # layer -> [B, H, T], 0 or 1

    def set_eviction_logits(self, layer: int, logits: torch.Tensor) -> None:
        """Take the logits [B, T, H] of a layer; token t+1 decides for t, none for the last."""
        logits = F.pad(logits[:, 1:].transpose(1, 2), (0, 1), value=MASKED)  # [B, H, T]
        hard = (logits > 0).float()
        if self.temperature == 0:
            self.log_keep[layer], self.closed[layer] = hard * MASKED, hard
            return
        if layer in self.noise:
            # The difference of two Gumbel variables, as the official code draws it, is logistic.
            logits = logits + self.noise[layer].clamp(1e-6, 1 - 1e-6).logit()
        logits = logits / self.temperature
        soft = logits.sigmoid()
        self.log_keep[layer] = F.logsigmoid(-logits).clamp_min(MASKED)  # log(1 - alpha)
        # Straight through; a layer that is computed again is counted once and holds no memory.
        self.closed.setdefault(layer, (logits > 0).float() + soft - soft.detach())

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attention of one layer: [B, T, H*G, D]."""
        if layer in self.log_keep:
            keep = self.log_keep.pop(layer)
            out = evicting_attention(query, key, value, keep, self.window, scale)
            return out.transpose(1, 2)
        mask, window = None, self.windows[layer]
        if window is not None:
            at = torch.arange(query.shape[2], device=query.device)
            ago = at[:, None] - at[None, :]
            mask = (ago >= 0) & (ago < window)
        out = F.scaled_dot_product_attention(
            *(query, key, value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2)

    def eviction_rate(self, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Share of gates closed of each sequence, over all layers, heads and decided tokens: [B].

        `lengths` [B] are tokens without padding; none is decided about the last one.
        """
        rates = []
        for closed in self.closed.values():
            decided = torch.arange(1, closed.shape[-1], device=closed.device)
            decided = decided.expand(len(closed), 1, -1)
            if lengths is not None:
                decided = decided < lengths[:, None, None]
            else:
                decided = decided > 0
            total = (closed[..., :-1] * decided).sum((1, 2))
            rates.append(total / (decided.sum((1, 2)) * closed.shape[1]))
        return torch.stack(rates).mean(0)

    def live_tokens(self) -> torch.Tensor:
        """Entries each query sees, mean over the layers that evict and their heads: [B, T]."""
        total = 0.0
        for closed in self.closed.values():
            count = torch.arange(1, closed.shape[-1] + 1, device=closed.device)
            evicted = F.pad(closed.cumsum(-1), (self.window + 1, 0))[..., : closed.shape[-1]]
            total = total + (count - evicted).mean(1)
        return total / len(self.closed)


def hidden(weights, ids: torch.Tensor, gates: Gates) -> torch.Tensor:
    """Final hidden states of whole sequences [B, T] under `gates`: [B, T, hidden size]."""
    check_head(weights)
    out = weights.base_model(input_ids=ids, use_cache=False, slots=gates)
    return out.last_hidden_state


def attention_weights(log_keep: torch.Tensor, window: int) -> torch.Tensor:
    """The attention weights of each query of one head under gates `log_keep` [T], all scores being
    equal: [T, T]."""
    length = len(log_keep)
    equal = torch.zeros(1, 1, length, 1)
    keys_told_apart = torch.eye(length)[None, None]
    return evicting_attention(
        equal, equal, keys_told_apart, log_keep.float()[None, None], window, 1.0
    )[0, 0]


@torch.inference_mode()
def measure(
    model: Model, evictor: Evictor, ids: torch.Tensor, teacher: Model | None = None, batch: int = 4
) -> pandas.DataFrame:
    """One row per sequence of `ids` [S, T] under hard gates; teacher: `model` itself unless its
    weights were trained.

    kl: KL(teacher || student) in nats per token; nats and full_nats: surprisal of the text with
    and without eviction; live_tokens: what a query attends to, mean over the evicting layers,
    their heads and all positions; kept_fraction: that over full attention's.
    """
    teacher, windows = teacher or model, layer_windows(model.weights.config.get_text_config())
    heads = model.weights.lm_head.weight, teacher.weights.lm_head.weight
    frames = []
    for part in ids.to(model.device).split(batch):
        with slots_attached(teacher):
            teacher_states = hidden(teacher.weights, part, Gates(windows))
        student_states, live = _hard(model, evictor, part)
        flat = student_states[:, :-1].flatten(0, 1), teacher_states[:, :-1].flatten(0, 1)
        scores = distillation.compare(*flat, *heads, part[:, 1:].flatten())
        scores = {k: v.view(len(part), -1).double().mean(1) for k, v in scores.items()}
        frames.append(pandas.DataFrame({k: v.cpu() for k, v in scores.items()}))
        frames[-1]["live_tokens"] = live.cpu()
    frame = pandas.concat(frames, ignore_index=True)
    frame["kept_fraction"] = frame["live_tokens"] / ((ids.shape[1] + 1) / 2)
    return frame


@torch.inference_mode()
def at_fraction(
    model: Model, evictor: Evictor, ids: torch.Tensor, kept_fraction: float, tolerance=0.005
) -> Evictor:
    """The evictor with its threshold shifted until it keeps `kept_fraction` of `ids` [S, T], to
    compare evictors at equal memory.

    Where 12 bisections of the offset do not meet `tolerance`, the closest of them is returned.
    """
    low, high, ids = -64.0, 64.0, ids.to(model.device)
    rows = []
    for _ in range(12):
        shift = (low + high) / 2
        moved = copy.copy(evictor)  # shares its parameters
        moved.recipe = replace(evictor.recipe, logit_offset=evictor.recipe.logit_offset + shift)
        fraction = float(_hard(model, moved, ids)[1].mean()) / ((ids.shape[1] + 1) / 2)
        rows.append((abs(fraction - kept_fraction), moved))
        if rows[-1][0] < tolerance:
            break
        low, high = (shift, high) if fraction > kept_fraction else (low, shift)
    return min(rows, key=lambda pair: pair[0])[1]


def _hard(model: Model, evictor: Evictor, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states [S, T, hidden size] under hard gates and live tokens per sequence [S]."""
    windows = layer_windows(model.weights.config.get_text_config())
    gates = Gates(windows, evictor.window)
    with slots_attached(model), evictor.attached(model.weights):
        states = hidden(model.weights, ids, gates)
    return states, gates.live_tokens().double().mean(1)
