"""What the kit said when its versions were last raised, frozen in `golden.json`.

Records are stored under DECODE_VERSION and GRADE_VERSION, raised by hand. Here lies what they vouch
for: tokens and costs of tiny models under every policy, in float64 from weights that are the same
on every machine; verdicts of the decided cases; what text costs, and what options are worth. After
a version was raised, or a case added,

    python -m tests.test_golden

freezes anew; it refuses where something changed and its version was not raised.
"""

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from kit.dms import evictor, fidelity
from kit.evaluation import grader
from kit.inference import decode
from kit.inference.budget_forcing import BudgetForcing
from kit.inference.decode import Request
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import DMS, H2O, RKV, TOVA, Full, Knorm, Random, SnapKV, Window
from kit.models.load import Model
from kit.parametric import cluster_tree, ffn_memory, qa, shards
from kit.parametric.bank import ParametricBank, assemble_bank
from kit.schema import Sampling
from tests import toys
from tests.evaluation.test_grader import ASKED, CASES, SENTENCES, TABLE

FILE = Path(__file__).with_name("golden.json")
GREEDY = Sampling(max_new_tokens=12)
WARM = replace(GREEDY, temperature=0.6, top_p=0.95)
FORCED = BudgetForcing((3, 9), (7, 8), 3, wait_tokens=(9,), max_waits=1)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Uniform in [-1, 1), float64: raw bits of Philox, the same in each numpy, torch and CPU."""
    raw = numpy.random.Philox(key=seed).random_raw(math.prod(shape))
    return torch.from_numpy((raw >> 11) * 2.0**-52 - 1).view(shape)


def model(family: str, dtype: str = "float64") -> Model:
    """A toy whose every matrix is `numbers`; of its 256 tokens, eight end a text."""
    toy = toys.toy(family, dtype)
    for seed, parameter in enumerate(toy.weights.parameters()):
        if parameter.dim() > 1:
            parameter.data.copy_(0.4 * numbers(seed, *parameter.shape))
    toy.weights.generation_config.eos_token_id = [*range(0, 256, 32)]
    return toy


def dms(toy: Model, recipe: evictor.EvictorRecipe) -> DMS:
    """A policy that forgets about half of the tokens, eight later."""
    fixed = evictor.Evictor(toy.weights, replace(recipe, window=8), toy.weights_hash)
    for seed, linear in enumerate(getattr(fixed, "linear", ())):
        linear.weight.data.copy_(0.03 * numbers(100 + seed, *linear.weight.shape))
        linear.bias.data.fill_(0.17)
    return DMS(fixed.requires_grad_(False))


def bank(toy: Model, folder: Path, kind: str) -> ParametricBank:
    """Three subtrees of two levels."""
    shape, files = ffn_memory.shape(toy.weights, kind, (1, 2), (3, 2), 3), []
    for node in range(3):
        sizes = [(3**level, *shape.block(level)) for level in range(2)]
        blocks = [0.5 * numbers(200 + node, *size).float() for size in sizes]
        files.append(shards.write(folder / shards.name(node), blocks))
    levels = tuple(numbers(300 + i, 3**i, 3, 8).float().numpy() for i in range(2))
    assemble_bank(folder, toy, cluster_tree.Tree(levels), shape, files)
    return ParametricBank(folder, toy)


def prompt(seed: int, start: int, end: int) -> tuple[int, ...]:
    """Tokens `start` to `end` of a permutation: equal tokens would have keys of equal norm."""
    return tuple(numbers(400 + seed, 256).argsort()[start:end].tolist())


def requests(memory: ParametricBank | None = None) -> list[Request]:
    """Prompts of many lengths, three of which begin alike, and a second sample of one."""
    prompts = [prompt(0, 0, 41), prompt(1, 0, 3), prompt(0, 0, 36) + prompt(0, 50, 59)]
    prompts += [prompt(2, 0, 24), prompt(0, 0, 43), prompt(3, 0, 11)]
    paths = [()] * len(prompts)
    if memory:
        paths = [tuple(row) for row in memory.tree.assign(numbers(500, 6, 8).numpy()).tolist()]
    asked = [Request(ids, f"p{i}", 0, path) for i, (ids, path) in enumerate(zip(prompts, paths))]
    return [*asked, replace(asked[2], sample=1)]


def told(generation) -> list[str]:
    """Tokens, then how it ended and what it cost; then the same of what was forced."""
    if generation is None:
        return ["ended before"]
    g, tokens = generation, " ".join(map(str, generation.token_ids))
    cost = f"{g.kv_reads_tokens:.3f} {g.kv_peak_tokens:.3f} {g.kv_peak_bytes}"
    return [f"{tokens} | {g.finish} {cost}", *(line for each in g.forced for line in told(each))]


def said(toy: Model, sampling=WARM, batch_size: int = 3, **how) -> list[str]:
    done = decode.decode(toy, requests(how.get("bank")), sampling, batch_size, **how)
    return [line for generation in done for line in told(generation)]


def tokens(dtype: str = "float64") -> dict[str, list[str]]:
    """What models say, by case."""
    llama, qwen3, gemma3 = (model(family, dtype) for family in ("llama", "qwen3", "gemma3"))
    kinds = (Window, TOVA, H2O, Random, Knorm)
    policies = [Full(), *(kind(8) for kind in kinds), SnapKV(8, window=3)]
    policies += [Window(kept_fraction=0.4), TOVA(kept_fraction=0.4), RKV(8, buffer=4, window=3)]
    runs = {policy.name: dict(policy=policy) for policy in policies}
    for recipe in (evictor.LAPTOP, evictor.PAPER):
        runs[f"dms {recipe.source}"] = dict(policy=dms(llama, recipe))
    for bits in (8, 4, 2):
        runs[f"kv {bits}-bit"] = dict(quantized=Quantized(bits, 16, 4))
    runs["h2o 8, kv 4-bit"] = dict(policy=H2O(8), quantized=Quantized(4, 16, 4))
    runs["forcing"] = dict(forcing=FORCED)
    runs["forcing, tova 8"] = dict(forcing=FORCED, policy=TOVA(8))
    found = {}
    for name, how in runs.items():
        found[f"{name}, greedy"] = said(llama, GREEDY, **how)
        found[f"{name}, sampled"] = said(llama, **how)
    for size in (1, 64):
        found[f"full, batch of {size}"] = said(llama, batch_size=size)
    found["full, top-k 5"] = said(llama, replace(WARM, temperature=1.5, top_k=5, seed=1))
    for toy in (qwen3, gemma3):
        for policy in (Full(), TOVA(8), H2O(8), dms(toy, evictor.LAPTOP)):
            found[f"{toy.name}, {policy.name}"] = said(toy, policy=policy)
        found[f"{toy.name}, kv 4-bit"] = said(toy, quantized=Quantized(4, 16, 4))
    for kind in ffn_memory.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            memory = bank(qwen3, Path(folder), kind)
            found[f"bank {kind}"] = said(qwen3, bank=memory)
            if kind == "ffn":
                found["bank ffn, h2o 8"] = said(qwen3, GREEDY, bank=memory, policy=H2O(8))
    twice = llama.weights.lm_head.weight.data
    twice[1::2] = twice[::2]  # two tokens of each logit
    found["ties, greedy"] = said(llama, GREEDY)
    return found


def verdicts() -> dict[str, str]:
    """Verdicts of all decided cases, by gold and text."""
    rows = [(c["text"], c["gold"], "any", c.get("asks", "any")) for c in CASES]
    rows += [(rf"\boxed{{{answer}}}", gold, "boxed", "any") for gold, answer, _ in TABLE]
    rows += [(text, gold, "answer line", "any") for text, gold, _ in SENTENCES]
    rows += [(f"Answer: {answer}", gold, "answer line", asks) for asks, gold, answer, _ in ASKED]
    found = {}
    for form in grader.FORMS:
        asked = [row for row in rows if row[2] == form]
        texts, golds, _, asks = zip(*asked)
        for row, v in zip(asked, grader.grade_many(texts, golds, form, asks)):
            kept = f"{v.method}, {'' if v.compliant else 'not '}as asked: {v.extracted}"
            found[json.dumps(row, ensure_ascii=False)] = f"{v.reason}, {kept}"
    return found


def measures() -> dict[str, list[str]]:
    """What text costs under policies: means, to six digits."""
    toy, ids = model("llama"), torch.tensor([prompt(seed, 0, 48) for seed in (4, 5)])
    found = {}
    for policy in (TOVA(8), dms(toy, evictor.LAPTOP)):
        frame = fidelity.teacher_forced_kl(toy, ids, policy).drop(columns="policy")
        found[policy.name] = [f"{name} {row[name]:.6f}" for row in frame.to_dict("records")
                              for name in frame]  # fmt: skip
    return found


class Bytes:
    """A tokenizer: a byte is a token."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode()]}


def likelihoods() -> dict[str, list[str]]:
    """Log-probabilities of options, and surprisal of text, to three digits."""
    toy = replace(model("llama"), tokenizer=Bytes())
    texts = ["Question: Where is Lagos?\nAnswer:", "Question: Who?\nAnswer:"]
    worth = qa.likelihoods(toy, texts, [["Nigeria", "Peru"], ["I", "they"]])
    found = {text: [f"{x:.3f}" for x in row] for text, row in zip(texts, worth)}
    return found | {"surprisal": [f"{x:.3f}" for x in qa.nll_per_token(toy, texts)]}


FROZEN = {
    "DECODE_VERSION": (decode, tokens),
    "GRADE_VERSION": (grader, verdicts),
    "QUALITY_VERSION": (fidelity, measures),
    "PROBE_VERSION": (qa, likelihoods),
}


def fault(name: str, version: int, now: dict, golden: dict) -> str:
    """Why `now` may not be frozen under `version` of `name`, in a sentence; "" where it may."""
    before = golden["cases"]
    changed = [case for case in now if case in before and now[case] != before[case]]
    if version > golden["version"] or (version == golden["version"] and not changed):
        return ""
    what = f"of {len(before)} frozen cases {len(changed)} changed, {changed[:3]}"
    return (f"Under {name} {version} {what}: undo what changed them, or raise {name} above "
            f"{golden['version']}, so that nothing stored before is taken for what would be made "
            f"now, and run `python -m tests.test_golden`.")  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_nothing_changes_unless_its_version_is_raised(name):
    module, make = FROZEN[name]
    now, version, golden = make(), getattr(module, name), json.loads(FILE.read_text())[name]
    assert not (why := fault(name, version, now, golden)), why
    assert (version, now) == (golden["version"], golden["cases"]), (
        f"{FILE.name} has other cases, or those of {name} {golden['version']}; "
        f"run `python -m tests.test_golden`."
    )


def test_what_changed_is_frozen_under_a_higher_version_alone():
    golden = {"version": 2, "cases": {"a": ["1"], "b": ["2"]}}
    other = {"a": ["1"], "b": ["3"]}
    assert fault("V", 2, golden["cases"] | {"c": ["4"]}, golden) == "", "a case more"
    assert fault("V", 3, other, golden) == ""
    for version in (1, 2):
        assert "1 changed, ['b']: undo what" in fault("V", version, other, golden)
    assert fault("V", 1, golden["cases"], golden)


def freeze() -> None:
    """Write `golden.json`; a sentence instead where a version is to be raised, or where rounding
    decides a token, so that another CPU could say another."""
    golden, made = json.loads(FILE.read_text()) if FILE.is_file() else {}, {}
    for name, (module, make) in FROZEN.items():
        made[name] = {"version": getattr(module, name), "cases": make()}
        before = golden.get(name, {"version": 0, "cases": {}})
        if why := fault(name, *made[name].values(), before):
            sys.exit(why)
    for case, lines in tokens("float32").items():
        for line, other in zip(made["DECODE_VERSION"]["cases"][case], lines, strict=True):
            if line.partition("|")[0] != other.partition("|")[0]:
                sys.exit(f"{case}: float32 says {other}, float64 {line}; take another seed.")
    FILE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    freeze()
