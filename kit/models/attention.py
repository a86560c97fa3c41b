"""Whether the slot cache of `kit.inference.kv_cache` can serve a model.

It serves decoders in which every layer attends once, by the softmax of scaled products over all or
a window of the earlier tokens, with keys and values of the shape that the config names, and in
which tokens meet nowhere else. `unserved` finds that out by one small step of the model itself;
docs/models.md has a table of kinds.
"""

import torch
from transformers import AttentionInterface, PreTrainedModel

IDS, POSITIONS = (5, 9, 5, 9), (0, 1, 0, 1)  # one prompt of two tokens twice, packed in a row
KEPT = (0, 2, 1, 3)  # of the logits: each token beside its twin


def _probe(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention by which each token attends to itself alone, and which notes in the list `slots`
    how it was called."""
    kwargs["slots"].append((module.layer_idx, query, key, value, attention_mask, scaling, kwargs))
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None


# transformers builds no mask, since no mask function has this name.
AttentionInterface.register("kit_probe", _probe)


def layer_windows(config) -> list[int | None]:
    """Sliding window of each layer, None for full attention. Of a config without `layer_types`
    (Mistral, Mixtral, Phi-3) every layer slides where it names a window."""
    slides = getattr(config, "sliding_window", None) is not None
    kind = "sliding_attention" if slides else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"{config.model_type} has layers of kind {sorted(unknown)}; not supported."
        )
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


@torch.inference_mode()
def unserved(weights: PreTrainedModel) -> str:
    """Why the slot cache cannot serve a model, as half a sentence; "" if it can."""
    config, before = weights.config.get_text_config(), weights.config._attn_implementation
    if not hasattr(config, "num_key_value_heads"):  # GPT-2, GPT-NeoX, OPT, Falcon
        return "its config names no key-value heads"
    weights.set_attn_implementation("kit_probe")
    if weights.config._attn_implementation != "kit_probe":  # transformers only warns
        return "its attention cannot be replaced"
    calls: list[tuple] = []
    try:
        ids, positions = torch.tensor([[IDS], [POSITIONS]], device=weights.device)
        logit_positions = torch.tensor(KEPT, device=weights.device)
        how = dict(use_cache=False, logits_to_keep=logit_positions, slots=calls)
        logits = weights(input_ids=ids, position_ids=positions, **how).logits[0]
        return _misfit(config, calls) or _unlike(logits[0::2], logits[1::2])
    except Exception as error:  # of code that anybody may have written
        why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(". ")
        return f"it fails on packed prompts ({why})"
    finally:
        weights.set_attn_implementation(before)


def _misfit(config, calls: list[tuple]) -> str:
    """The properties of the calls of `_probe` that the slot cache does not expect."""
    try:
        windows = layer_windows(config)
    except ValueError as error:
        return str(error).rstrip(".").removesuffix("; not supported")
    if [layer for layer, *_ in calls] != [*range(len(windows))]:
        return f"{len(calls)} attentions stand in its {len(windows)} layers, where one each should"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = {(1, config.num_key_value_heads, len(IDS), size)}
    for layer, query, key, value, mask, scaling, how in calls:
        if {key.shape, value.shape} != expected:
            return f"its keys and values differ in shape, or from its config, at layer {layer}"
        if how.get("softcap") is not None:
            return "it caps the scores of its attention"
        if how.get("s_aux") is not None:
            return "its attention has sinks"
        if mask is not None or how.get("position_bias") is not None or scaling is None:
            return "it adds to the scores of its attention"
        if how.get("sliding_window", windows[layer]) != windows[layer]:
            return f"its config does not say which tokens layer {layer} attends to"
        for rows in (query, key, value):
            if why := _unlike(rows[:, :, :2], rows[:, :, 2:]):
                return why
    return ""


def _unlike(one: torch.Tensor, other: torch.Tensor) -> str:
    """What it means if two equal prompts, each token of which attends to itself, differ by more
    than rounding in many layers does."""
    same = one.shape == other.shape
    if same and (one - other).abs().max() <= torch.finfo(one.dtype).eps ** 0.5 * one.abs().max():
        return ""
    return "its tokens meet outside of attention, or have other positions than they are given"
