"""`make bench-peers`: do our policies keep the prompt tokens that kvpress keeps?

    compare.py prepare -> job.json -> kvpress_kept.py (.venv-peers) -> kept.json -> compare.py

Both sides read the same token ids with the same weights in float32, kvpress under transformers
5.2, the kit under its own. Budgets are given in tokens, so that only the choice is compared;
how a fraction is rounded is counted apart. Prompts only: kvpress prunes a prompt and, but
for its decoding wrappers, leaves what is generated alone. Gemma3 is left out: kvpress 0.5.5
would prune the sliding layers of its text model. Random Qwen3 weights give all keys one norm,
so Knorm says nothing there. Exit code 1 where equal rules differ.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import groupby

import torch
from tabulate import tabulate

from kit import paths
from kit.data import problems
from kit.inference import policies
from kit.inference.decode import slots_attached
from kit.inference.kv_cache import SlotCache
from kit.models.load import BUNDLED, Model, load
from kit.pipeline import provenance

WORK = paths.OUTPUTS / "peers"  # the job, kvpress' answer, and the random models
MODELS = ("random:llama", "random:qwen3", BUNDLED)
LENGTHS = (211, 397, 600)  # tokens per prompt; not multiples, so that rounding shows
RATIOS = (0.5, 0.75, 0.875, 0.9)  # kvpress' compression_ratio: the share of the prompt dropped
KEYS_WITHIN = 1e-3  # relative; beyond it the two sides did not read the same prompt

# kvpress_kept.py's name of a method -> our policy for it
OURS = {
    "StreamingLLMPress": lambda **budget: policies.Window(sinks=4, **budget),
    "KnormPress": policies.Knorm,
    "TOVA, newest competes": policies.TOVA,
    "TOVAPress": policies.TOVA,
    "observed, H2O's rule": policies.H2O,
    "ObservedAttentionPress": policies.H2O,
    "SnapKVPress": lambda **budget: policies.SnapKV(window=16, **budget),
    "RandomPress": policies.Random,
}
EQUAL_RULES = {
    "StreamingLLMPress": "Window: the first 4 tokens and the newest",
    "KnormPress": "Knorm: the lowest key norms",
    "TOVA, newest competes": "TOVA: attention of the last query, mean over all heads of a layer",
    "observed, H2O's rule": "H2O: kvpress' attention scores summed, the newest half kept",
    "SnapKVPress": "SnapKV: attention of the last 16 queries, averaged over 5 tokens",
}
OTHER_RULES = {
    "TOVAPress": "kvpress always keeps the newest token, TOVA (paper and kit) lets it compete",
    "ObservedAttentionPress": "kvpress divides the attention a key received by the number of "
    "queries that could see it and protects no recent tokens; H2O sums, half its budget is recent",
    "RandomPress": "different draws: the overlap that chance gives",
}

Kept = list[list[list[int]]]  # layer -> KV head -> sorted positions


@dataclass(frozen=True)
class Row:
    """One method at one ratio with one model, over all prompts, layers and KV heads."""

    model: str
    method: str
    compression_ratio: float
    sets: int  # kept sets compared: prompts x layers x heads
    equal: int  # of these, position for position the same
    jaccard: float  # mean over sets of |both| / |either|
    wrong_size: int  # sets of different size
    kept: int  # positions that kvpress kept, over all sets
    ties: int  # positions whose scores differ from the cut by rounding only
    differ: int  # positions kept by one side only, ties not counted
    fraction_minus_peer: tuple[int, ...]  # per prompt: our budget for the fraction minus kvpress'

    @property
    def verdict(self) -> str:
        """In capitals where it fails: sizes must agree, and positions where the rules do."""
        if self.wrong_size:
            return "WRONG SIZE"
        if self.method not in EQUAL_RULES:
            return "equal" if self.equal == self.sets else "other rule"
        if self.differ:
            return "DIFFERS"
        if self.ties > self.kept / 2:
            return "ties decide"
        return "equal" if self.equal == self.sets else "equal but for ties"


def overlap(ours: Kept, theirs: Kept, ties: Kept) -> dict[str, float]:
    """Sums over all sets of one prompt: the count fields of Row, and `jaccard` as a sum."""
    total = dict.fromkeys(("sets", "equal", "jaccard", "wrong_size", "kept", "ties", "differ"), 0)
    for mine, peer, tied in zip(ours, theirs, ties, strict=True):
        for a, b, tie in zip(map(set, mine), map(set, peer), map(set, tied), strict=True):
            total["sets"] += 1
            total["equal"] += a == b
            total["jaccard"] += len(a & b) / len(a | b)
            total["wrong_size"] += len(a) != len(b)
            total["kept"] += len(b)
            total["ties"] += len(tie)
            total["differ"] += len((a ^ b) - tie)
    return total


def row(model: str, method: str, ratio: float, pairs: list, rounding: list[int]) -> Row:
    """One row from [(ours, theirs, ties)] of all prompts."""
    parts = [overlap(*pair) for pair in pairs]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    total["jaccard"] /= total["sets"]
    return Row(model, method, ratio, **total, fraction_minus_peer=tuple(rounding))


# ---- our side -------------------------------------------------------------------------------


class Fan:
    """Several caches that read one prompt in one forward pass; the first one answers."""

    def __init__(self, caches: list[SlotCache]):
        self.caches = caches
        self.dense = []  # mean absolute key per layer, as kvpress_kept.py notes it

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        self.dense.append(key.abs().mean().item())
        return [cache.attend(layer, query, key, value, scale) for cache in self.caches][0]


@torch.inference_mode()
def read(model: Model, ids: list[int], chosen: list) -> Fan:
    """One cache per policy of `chosen`, each with the whole prompt read as sequence 0."""
    fan = Fan([SlotCache(model.weights, 1, policy=policy) for policy in chosen])
    positions = [cache.prefill([[0]], [len(ids)]) for cache in fan.caches][0]
    with slots_attached(model):
        model.weights(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
            slots=fan,
        )
    return fan


def same_prompt(name: str, ours: list[float], theirs: list[float]) -> None:
    """ValueError where the mean absolute keys of a layer differ: nothing else is comparable."""
    for layer, (mine, peer) in enumerate(zip(ours, theirs, strict=True)):
        if abs(mine - peer) > KEYS_WITHIN * peer:
            raise ValueError(
                f"{name}, layer {layer}: mean absolute key {mine:.6g} here, {peer:.6g} in "
                "kvpress; the two sides did not read the same prompt with the same weights."
            )


def compare(model: Model, prompts: list[list[int]], peer: list[dict]) -> list[Row]:
    """All rows of one model; `peer` is kvpress' answer per prompt."""
    cells = [(method, ratio) for method in OURS for ratio in RATIOS]
    pairs, rounding = {cell: [] for cell in cells}, {cell: [] for cell in cells}
    for ids, answer in zip(prompts, peer, strict=True):
        found = [answer["runs"][method][str(ratio)] for method, ratio in cells]
        sizes = [len(run["kept"][0][0]) for run in found]
        chosen = [OURS[method](kept_tokens=n) for (method, _), n in zip(cells, sizes)]
        fan = read(model, ids, chosen)
        same_prompt(model.name, fan.dense, answer["dense"])
        for cell, cache, run, size in zip(cells, fan.caches, found, sizes):
            ours = [[head.tolist() for head in layer] for layer in cache.live_positions(0)]
            pairs[cell].append((ours, run["kept"], run["ties"]))
            by_fraction = OURS[cell[0]](kept_fraction=round(1 - cell[1], 9))
            rounding[cell].append(by_fraction.budget(torch.tensor(len(ids))).item() - size)
    return [row(model.name, *cell, pairs[cell], rounding[cell]) for cell in cells]


# ---- the two calls --------------------------------------------------------------------------


def prepare() -> None:
    """Write the job: model folders relative to the job file, token ids, ratios."""
    text = "\n".join(p.question for p in problems.load("laptop", "test").problems)
    job = {"ratios": RATIOS, "models": {}}
    for name in MODELS:
        model = load(name, dtype="float32")
        if name == BUNDLED:
            folder, ids = paths.MODELS / "smollm2-135m", model.tokenizer(text).input_ids
        else:  # 256 tokens: the bytes of the same text
            folder, ids = WORK / name.replace(":", "-"), list(text.encode())
            model.weights.save_pretrained(folder)
        starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
        prompts = [ids[start : start + n] for start, n in zip(starts, LENGTHS)]
        job["models"][name] = os.path.relpath(folder, WORK), prompts
    provenance.write_json(WORK / "job.json", job)


def main() -> int:
    """Compare with kvpress' answer, print the table, write outputs/peers.json: exit code."""
    job, peer = (json.loads((WORK / name).read_text()) for name in ("job.json", "kept.json"))
    rows = []
    for name, (_, prompts) in job["models"].items():
        rows += compare(load(name, dtype="float32"), prompts, peer["models"][name])
    print(table(rows))
    ours = {name: metadata.version(name) for name in ("transformers", "torch")}
    result = {
        "versions": {"kit": ours, "peer": peer["versions"]},
        "prompt_tokens": LENGTHS,
        "equal_rules": EQUAL_RULES,
        "other_rules": OTHER_RULES,
        "rows": [{**asdict(r), "verdict": r.verdict} for r in rows],
    }
    provenance.write_json(paths.OUTPUTS / "peers.json", result)
    return 1 if any(r.verdict.isupper() for r in rows) else 0


def table(rows: list[Row]) -> str:
    """One line per model and method, the ratios side by side, and the rules."""
    cells = []
    for (model, method), group in groupby(rows, key=lambda r: (r.model, r.method)):
        group = list(group)
        equal = " ".join(f"{r.equal}/{r.sets}" for r in group)
        jaccard = " ".join(f"{r.jaccard:.3f}" for r in group)
        differ, ties = (sum(counts) for counts in zip(*((r.differ, r.ties) for r in group)))
        verdict = ", ".join(dict.fromkeys(r.verdict for r in group))
        cells.append([model, method, equal, jaccard, differ, ties, verdict])
    at = " ".join(f"{ratio:g}" for ratio in RATIOS)
    head = ["model", "kvpress", f"equal sets, dropped {at}", "Jaccard", "differ", "ties", "verdict"]
    odd = sum(n != 0 for r in rows for n in r.fraction_minus_peer)
    total = sum(len(r.fraction_minus_peer) for r in rows)
    lines = [tabulate(cells, head, disable_numparse=True), ""]
    lines += ["Must be equal, but for ties (scores that rounding may order either way):"]
    lines += [f"  {method} = {rule}" for method, rule in EQUAL_RULES.items()]
    lines += ["Other rules, only sizes must agree:"]
    lines += [f"  {method}: {reason}" for method, reason in OTHER_RULES.items()]
    lines += [
        f"The budget of a kept fraction is not kvpress' in {odd} of {total} cases: kvpress rounds",
        "length * (1 - ratio) down as the floating-point number it is, 59 of 600 at ratio 0.9.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(prepare() if sys.argv[1:] == ["prepare"] else main())
