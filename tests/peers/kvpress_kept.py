"""Which prompt tokens kvpress 0.5.5 keeps: the peer's half of `make bench-peers`.

Runs in .venv-peers, knows nothing of the kit and needs no tokenizer: it reads the job that
`compare.py prepare` wrote (model folders, token ids, compression ratios) and writes the kept
positions per method, ratio, layer and KV head. One dense forward pass per prompt: a press
prunes after attention, so in a prefill no layer sees what another has dropped, and every
press may act on the keys of the same pass.

    python tests/peers/kvpress_kept.py job.json kept.json
"""

import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import transformers
from kvpress import (
    BasePress,
    KnormPress,
    ObservedAttentionPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.utils import compute_n_kept

TIE = 1e-4  # relative distance of two scores below which another build may order them otherwise


@dataclass
class StrictTOVAPress(TOVAPress):
    """TOVAPress with the paper's rule (arXiv 2401.06104): the newest token competes like any other.

    kvpress gives it a score above all others, and says so in a comment.
    """

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
        scores[..., -1] = attentions[:, :, -1, -1].mean(1, keepdim=True)
        return scores


@dataclass
class HeavyHitterPress(ObservedAttentionPress):
    """ObservedAttentionPress with H2O's rule (arXiv 2306.14048) in place of its own.

    kvpress divides the attention that a key has received by the number of queries that could
    see it and protects no recent tokens. Here the division is undone, and the newest half of
    the budget is kept, rounded down.
    """

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        mean = super().score(module, hidden_states, keys, values, attentions, kwargs)
        length = keys.shape[2]
        total = mean * torch.arange(length, 0, -1)
        recent = compute_n_kept(length, self.compression_ratio) // 2
        total[..., length - recent :] = torch.inf
        return total


METHODS = {
    "StreamingLLMPress": lambda ratio: StreamingLLMPress(ratio, n_sink=4),
    "TOVAPress": TOVAPress,
    "TOVA, newest competes": StrictTOVAPress,
    "KnormPress": KnormPress,
    "ObservedAttentionPress": ObservedAttentionPress,
    "observed, H2O's rule": HeavyHitterPress,
    "SnapKVPress": lambda ratio: SnapKVPress(ratio, window_size=16, kernel_size=5),
    "RandomPress": lambda ratio: RandomPress(ratio, seed=0),
}


class Watch(BasePress):
    """Lets every method compress the keys of one layer, notes what is left, drops nothing."""

    def __init__(self, ratios: list[float]):
        self.ratios = ratios
        self.dense = []  # mean absolute key per layer: has the other side read the same prompt?
        self.runs = {name: {str(r): {"kept": [], "ties": []} for r in ratios} for name in METHODS}

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """Run all methods on one layer: `keys` [1, H, T, D] in the order of the prompt.

        No method here looks at values, so each value is replaced by its position and tells,
        after the pruning, which tokens are left.
        """
        at = torch.arange(keys.shape[2], dtype=torch.float32)[None, None, :, None].expand_as(values)
        inputs = module, hidden_states, keys, at, attentions, kwargs
        self.dense.append(keys.abs().mean().item())
        for name, make in METHODS.items():
            for ratio in self.ratios:
                press, found = make(ratio), self.runs[name][str(ratio)]
                kept = positions(*press.compress(*inputs), keys)
                found["kept"].append(kept)
                found["ties"].append(ties(press.score(*inputs)[0], kept))
        return keys, values


def positions(left: torch.Tensor, at: torch.Tensor, keys: torch.Tensor) -> list[list[int]]:
    """Sorted positions of what is left of `keys` [1, H, T, D], per KV head."""
    index = at[0, :, :, 0].long()  # [H, kept]
    if not torch.equal(left[0], torch.stack([k[i] for k, i in zip(keys[0], index)])):
        raise ValueError(
            "the keys that kvpress left are not the prompt's keys at the positions kept"
        )
    return index.sort(-1).values.tolist()


def ties(scores: torch.Tensor, kept: list[list[int]]) -> list[list[int]]:
    """Positions on either side of the cut whose scores [H, T] differ by rounding only."""
    found = []
    for score, mine in zip(scores, kept):
        inside = torch.zeros(len(score), dtype=torch.bool)
        inside[mine] = True
        low, high = score[inside].min(), score[~inside].max()
        near = TIE * max(abs(low), abs(high))
        close = (inside & (score <= high + near)) | (~inside & (score >= low - near))
        found.append(close.nonzero().flatten().tolist())
    return found


@torch.inference_mode()
def watch(model, ids: list[int], ratios: list[float]) -> dict:
    """One prompt read densely: {tokens, dense, runs: {method: {ratio: kept, ties}}}."""
    press = Watch(ratios)
    with press(model):
        model(torch.tensor([ids]), past_key_values=transformers.DynamicCache(), logits_to_keep=1)
    return {"tokens": len(ids), "dense": press.dense, "runs": press.runs}


def main(job_file: Path, out_file: Path) -> None:
    job, found = json.loads(job_file.read_text()), {}
    for name, (folder, prompts) in job["models"].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job_file.parent / folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        found[name] = [watch(model, ids, job["ratios"]) for ids in prompts]
        print(f"kvpress has read {len(prompts)} prompts with {name}", flush=True)
    versions = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    out_file.write_text(json.dumps({"versions": versions, "models": found}))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
