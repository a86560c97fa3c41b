"""Fidelity of an eviction policy on given text, by teacher forcing.

The text is fed to the slot cache that also decodes, token by token, so nothing is simulated. The
predictions are compared with those of full attention: KL divergence, surprisal and live tokens.
Policies are compared at equal live tokens, the delay window of DMS included.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy
import pandas
import torch

from kit.dms import distillation
from kit.inference.decode import slots_attached, versions
from kit.inference.kv_cache import SlotCache
from kit.inference.packed_weights import pack
from kit.inference.policies import DMS, Full
from kit.models.load import Model, check_head, twin
from kit.paths import atomic
from kit.schema import digest

QUALITY_VERSION = 2  # of what `teacher_forced_kl` measures; raise it by one when that may change


@torch.inference_mode()
def teacher_forced_kl(
    model: Model,
    ids: torch.Tensor,
    policy: Full = Full(),  # noqa: B008 (frozen)
    prompt: int = 32,
    quantized=None,
    teacher: Model | None = None,
) -> pandas.DataFrame:
    """One row per sequence of `ids` [N, T]: its first `prompt` tokens are prefilled.

    kl: KL(full || policy), nats per token; nats: surprisal of the text under the policy;
    full_nats: under full attention; live_tokens: entries attended per fed token, mean over
    layers and heads; kept_fraction: that over what full attention attends; kv_bytes: allocated
    by the cache at the end, per sequence.
    """
    count, length = ids.shape
    if not 0 < prompt < length - 1:
        raise ValueError(f"prompt is {prompt}; the sequences have {length} tokens.")
    ids, teacher = ids.to(model.device), teacher or model
    states, live = [], []
    packed = pack(model.weights)
    cache = SlotCache(model.weights, count, policy=policy, quantized=quantized)
    with slots_attached(model, packed), policy.attached(model.weights):
        positions = cache.prefill([[i] for i in range(count)], [prompt] * count)
        packed = ids[:, :prompt].reshape(1, -1)
        _final(model, cache, packed, positions)
        for t in range(prompt, length - 1):
            positions = cache.step(list(range(count)))
            states.append(_final(model, cache, ids[None, :, t], positions)[0])
            live.append(cache.attended.clone())
    student_states = torch.stack(states, 1)  # [N, T - prompt - 1, hidden size]
    heads = model.weights.lm_head.weight, teacher.weights.lm_head.weight
    rows = []
    for row in range(count):
        teacher_states = _whole(teacher, ids[row], prompt)
        each = distillation.compare(
            student_states[row], teacher_states, *heads, ids[row, prompt + 1 :]
        )
        rows.append({name: float(values.double().mean()) for name, values in each.items()})
    frame = pandas.DataFrame(rows)
    frame["live_tokens"] = torch.stack(live).double().mean(0).cpu().numpy()
    frame["kept_fraction"] = frame["live_tokens"] / numpy.arange(prompt + 1, length).mean()
    return frame.assign(kv_bytes=cache.nbytes() / count, policy=policy.name)


@torch.inference_mode()
def rounding(model: Model, ids: torch.Tensor, prompt: int = 32) -> pandas.DataFrame:
    """kl per sequence of `ids` [N, T]: KL(exact || model), nats per token, on the tokens of
    `teacher_forced_kl`.

    "Exact" is the same model computed in a wider dtype. A KL of this size between two ways to
    compute the same text is rounding, not a difference.
    """
    wide = torch.float64 if model.dtype == torch.float32 else torch.float32
    exact = dataclasses.replace(model, weights=twin(model.weights, wide))
    heads, rows = (model.weights.lm_head.weight, exact.weights.lm_head.weight), []
    for row in ids.to(model.device):
        pair = (_whole(each, row, prompt) for each in (model, exact))
        kl = distillation.compare(*pair, *heads, row[prompt + 1 :])["kl"]
        rows.append(float(kl.mean()))
    return pandas.DataFrame({"kl": rows})


def cached_teacher_forced_kl(
    folder: Path, model: Model, ids, policy: Full, prompt: int = 32
) -> pandas.DataFrame:
    """`teacher_forced_kl`, cached in `folder` as Parquet."""
    runs = [model.weights_hash, str(model.dtype), model.device.type, torch.__version__]
    runs += [*versions(model), QUALITY_VERSION]
    file = Path(folder) / f"{digest([*runs, policy.key, prompt, ids.tolist()])}.parquet"
    if not file.is_file():
        frame = teacher_forced_kl(model, ids, policy, prompt)
        with atomic(file) as part:
            frame.to_parquet(part)
    return pandas.read_parquet(file)


def at_equal_live_tokens(
    folder: Path,
    model: Model,
    ids: torch.Tensor,
    evictors: Mapping,
    rivals: Iterable,
    prompt: int,
    shares: bool = False,
) -> dict[tuple[str, float], pandas.DataFrame]:
    """`cached_teacher_forced_kl` of the full cache, of each evictor, by its compression, and of
    each kind of policy in `rivals` with as many live tokens as that evictor took, rounded up: by a
    constant number of tokens, as published, and with `shares` also by a constant share of the text.

    By policy ("tova", "tova, share") and compression; the full cache has compression 1.
    """

    def measure(policy: Full) -> pandas.DataFrame:
        return cached_teacher_forced_kl(folder, model, ids, policy, prompt)

    frames = {("full", 1): measure(Full())}
    for compression, evictor in evictors.items():
        frames["dms", compression] = measure(DMS(evictor))
        live = frames["dms", compression]["live_tokens"].mean()
        for kind in rivals:
            budgets = [kind(kept_tokens=ids.shape[1])]
            budgets += [kind(kept_fraction=1.0)] if shares else []
            for budget in budgets:
                rival = match_live_tokens(budget, live, prompt, ids.shape[1])
                name = rival.key["policy"] + ", share" * (rival.kept_tokens is None)
                frames[name, compression] = measure(rival)
    return frames


@torch.inference_mode()
def kept_positions(model: Model, ids: torch.Tensor, policy: Full, prompt: int = 32) -> list:
    """Live positions after feeding one sequence [T], per layer and head, as of `live_positions`."""
    cache, ids = SlotCache(model.weights, 1, policy), ids.to(model.device)
    with slots_attached(model), policy.attached(model.weights):
        _final(model, cache, ids[None, :prompt], cache.prefill([[0]], [prompt]))
        for token in ids[prompt:]:
            _final(model, cache, token.view(1, 1), cache.step([0]))
    return cache.live_positions(0)


def _whole(model: Model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Final hidden states under full attention of one sequence [T], from token `prompt` to the last
    but one: [T - prompt - 1, hidden size]."""
    check_head(model.weights)
    out = model.weights.base_model(input_ids=ids[None], use_cache=False)
    return out.last_hidden_state[0, prompt:-1]


def _final(model: Model, cache: SlotCache, tokens, positions) -> torch.Tensor:
    """Final hidden states of the announced tokens: [1, N, hidden size]."""
    out = model.weights.base_model(
        input_ids=tokens, position_ids=positions, use_cache=False, slots=cache
    )
    return out.last_hidden_state


def match_live_tokens(policy, live_tokens: float, prompt: int, length: int):
    """`policy` with the smallest `kept_tokens`, or `kept_fraction` in steps of 0.005 where it has
    one, whose mean live tokens reach `live_tokens`.

    For sequences of `length` tokens of which `prompt` are prefilled. Rounded up, so that a rival
    of DMS never has less memory than DMS.
    """
    attended = numpy.arange(prompt + 1, length)
    rounds = max(1, policy.buffer) if policy.decoding else length  # between two evictions
    reduced = numpy.maximum(prompt, (attended - 1) // rounds * rounds)  # last after so many tokens
    if policy.kept_tokens is None:
        budgets = [dict(kept_fraction=step / 200) for step in range(1, 201)]
    else:
        least = getattr(policy, "sinks", getattr(policy, "window", 0)) + 1
        budgets = [dict(kept_tokens=tokens) for tokens in range(least, length + 1)]
    for budget in budgets:
        matched = dataclasses.replace(policy, **budget)
        kept = numpy.minimum(reduced, matched.budget(torch.tensor(reduced)).numpy())
        if (kept + attended - reduced).mean() >= live_tokens:
            break
    return matched
