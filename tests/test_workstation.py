"""The workstation profile to its end, on a local hub cache with tiny files under the real names, in
bfloat16 whatever the machine, as on a GPU.

Only the trainings are shortened: a step on thousands of tokens takes seconds on any model.

The models are Qwen3 networks of two small layers with the first tokens of the bundled one. What
they say does not depend on what they read: a 3, a 7 or one of two tokens that end the answer, each
as likely at any temperature. So the thousands of new tokens that the profile allows are never
reached, and some answers are right.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from kit import paths
from kit.data import sources
from kit.evaluation.store import Store
from kit.parametric import wikipedia
from kit.reasoning_bank import protocols
from kit.report import verify
from tests.conftest import TOKENS, save_tokenizer
from tests.fake_hub import build_cache

MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B-Instruct-2507")
KNOWING = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B")
REINFORCED = ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",)
REINFORCED += tuple(f"knoveleng/Open-RS{number}" for number in (1, 2, 3))
SWEPT = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B")
EMBEDDER = "Qwen/Qwen3-Embedding-0.6B"
MATH = "EleutherAI/hendrycks_math"
GOLDS = (3, 7)  # all answers, and all that the models say


def tiny_qwen3(folder, tokenizer, seed: int) -> dict[str, bytes]:
    """The files of a saved Qwen3 with real context, and hardly any weights."""
    config = Qwen3Config(
        vocab_size=TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.ones_(weights.model.embed_tokens.weight)
    torch.nn.init.zeros_(weights.lm_head.weight)
    ends = [0, tokenizer.eos_token_id]
    said = [*ends, *(tokenizer.convert_tokens_to_ids(str(gold)) for gold in GOLDS)]
    with torch.no_grad():
        state = weights.model(torch.tensor([said]))[0][0, 0]
        weights.lm_head.weight[said] = 20 * state / state.square().sum()
    weights.generation_config = GenerationConfig(eos_token_id=ends)
    weights.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def math_rows(subject: str, half: str, count: int) -> bytes:
    """A parquet file of one subject in the published columns: `count` of levels 3 and 4 each, and
    of the others eight, as many as it takes for each split to have some."""
    rows = [
        {
            "problem": f"In {half} {subject}, what is ${level + 5 * i} + {gold - level - 5 * i}$?",
            "level": f"Level {level}",
            "type": subject.replace("_", " ").title(),
            "solution": f"It is $\\boxed{{{gold}}}$.",
        }
        for level in range(1, 6)
        for i in range(count if level in (3, 4) else 8)
        for gold in [GOLDS[level % 2]]
    ]
    return parquet(rows)


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def benchmark_rows() -> dict[str, tuple[dict, ...]]:
    """Two rows of each benchmark of Open-RS, and of its training set, in the published columns."""
    asked = [f"Of {number} apples, all are eaten; how many were there?" for number in GOLDS]
    rows = zip(asked, GOLDS, strict=True)
    by_name = {
        name: []
        for name in ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad", "open-rs")
    }
    for question, gold in rows:
        by_name["aime24"].append({"id": gold, "problem": question, "answer": f"{gold:03}"})
        by_name["aime25"].append({"id": str(gold), "problem": question, "answer": str(gold)})
        by_name["amc23"].append({"id": gold, "question": question, "answer": float(gold)})
        by_name["math500"].append(
            {"problem": question, "answer": str(gold), "subject": "Algebra", "level": 3}
            | {"unique_id": f"test/algebra/{gold}.json"}
        )
        by_name["minerva"].append({"question": question, "answer": str(gold)})
        by_name["olympiad"].append({"question": question, "final_answer": [str(gold)]})
    for number in range(40):
        gold, level = GOLDS[number % 2], "Easy" if number % 7 == 0 else "Hard"
        row = {"problem": f"What is {number} - {number - gold}?", "solution": "", "level": level}
        by_name["open-rs"].append(row | {"answer": str(gold)})
    return by_name


SHORT = {
    "01_baseline": {"PROBLEMS": 14},
    "02_strategies": {"TRAIN": 14, "TEST": 14, "CONTROLS": "[14, 3]"},
    "03_dms": {"RAMP_STEPS": 2, "CONTEXT": 64, "TEXTS": "[2000, 2, 2]", "PROBLEMS": 14},
    "04_phase2": {
        "PROBLEMS": "[14, 7, 14]",
        "SFT": "{ arms = ['own', 'kept', 'internalised', 'unfiltered'], seeds = 2, steps = 2, "
        "batch = 2, micro_batch = 1, keep_every = 1 }",
        "GRPO": "{ seeds = 2, steps = 2, groups = 2, size = 3, micro_batch = 3, keep_every = 1 }",
    },
    "06_memory_budget": {
        "PROBLEMS": '["aime25", 2]',
        "GRID": '{ bits = [16, 4], policies = ["full", "window 48"], kv_bits = [16, 4], '
        "tokens = [4, 8], widths = [1, 2], waits = 1 }",
        "SAMPLES": 2,
        "RECIPE": "{ batch = 4, context = 192 }",
    },
    "05_parametric": {
        "FACTS": '{ families = ["cities", "capitals", "elements", "symbols"], cities = 20 }',
        "TOLD": "[60, 4]",
        "QUESTIONS": "{ cities = 4, elements = 8 }",
        "SEEDS": "2",
        "ARMS": "{ wrong = 2, shared = 2, shared-bank = 1, shared-lora-ffn = 1, flat = 1, "
        'continued = 1, co-trained = 1, "co-trained generic" = 1, lora-vo = 1, kv = 1, '
        "fetched-oracle = 2, fetched-early = 2 }",
        "LAYOUT": "{ branching = 4, sizes = [256, 128], layers = 1 }",
        "ANCHORS": '{ larger = "hub:Qwen/Qwen2.5-1.5B", scratch = { hidden = 32, layers = 1, '
        "rate = 1e-3 } }",
        "ELSEWHERE": '["laptop", 2, 4]',
    },
}


def shortened(folder, name: str = "workstation", short: dict = SHORT):
    """A copy of the notebooks whose profile `name` trains for a moment."""
    shutil.copytree(paths.ROOT / "notebooks", folder)
    profile = folder / "profiles" / f"{name}.toml"
    text = profile.read_text()
    for notebook, knobs in short.items():
        for knob, value in knobs.items():
            head, table = text.split(f'["{notebook}"]\n')
            table, count = re.subn(rf"(?m)^{knob} = .+$", f"{knob} = {value}", table, count=1)
            assert count == 1, knob
            text = f'{head}["{notebook}"]\n{table}'
    profile.write_text(text)
    return folder


def kit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kit", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=paths.ROOT, env=env, capture_output=True, text=True)


def surroundings(tmp_path, tokenizer, repos, notebooks, count: int = 3) -> dict[str, str]:
    """A hub cache with tiny `repos` and MATH, see `math_rows`, and the environment of
    `kit` that reads it."""
    hub, cache, outputs = (tmp_path / name for name in ("hub", "cache", "outputs"))
    for seed, repo in enumerate(sorted(repos)):
        build_cache(hub, "model", repo, tiny_qwen3(tmp_path / str(seed), tokenizer, seed))
    names = [n for split in ("test", "train") for n in sources.SOURCES["math"].files[split]]
    files = {name: math_rows(*name.split("-")[0].split("/"), count) for name in names}
    build_cache(hub, "dataset", MATH, files)
    cache.mkdir()
    (cache / "models").symlink_to(paths.MODELS)
    return {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "KIT_CACHE": str(cache),
        "KIT_DATA": "",
        "KIT_DTYPE": "bfloat16",
        "KIT_OUTPUTS": str(outputs),
        "KIT_NOTEBOOKS": str(notebooks),
    }


PUBLISHED = {"TRAIN": 4, "TEST": 6, "FURTHER": 3, "CONTROLS": "[3, 3]"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reasoning-bank-slm", "reasoningbank"])
def test_a_published_protocol_runs_to_its_end(tmp_path, bundled, name):
    notebooks = shortened(tmp_path / "notebooks", name, {"02_strategies": PUBLISHED})
    repos = {MODELS[0], EMBEDDER}
    environment = surroundings(tmp_path, bundled.tokenizer, repos, notebooks, count=20)
    done = kit("reproduce", "--profile", name, "--only", "02", "--force", **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    own = "rbslm-memory-gain" if name == "reasoning-bank-slm" else "rb-k1-against-k0"
    lines = [line for line in done.stdout.splitlines() if f" {own}: " in line]
    assert lines and not any("needs the" in line for line in lines), lines
    folder = tmp_path / "outputs" / name
    said = json.loads((folder / "results" / "02_strategies.json").read_text())
    records = Store(folder / "store").table(set(said["keys"]))
    arms, protocol = records["arm"].value_counts(), protocols.load(name)
    assert arms["format-only"] == arms["retrieved"] == 6 and said["placement"]["place"] == "system"
    assert said["draws"]["banks"] == 3 and said["draws"]["gain"]["unit"] == "points"
    if name == "reasoningbank":
        ways = [
            f"{who}-{way}" for who in ("matts", "no-memory") for way in ("sequential", "parallel")
        ]
        scaled = {way + width for way in ways for width in ("-2", "-3", "-4", "")}
        whole = Store(folder / "store").table()["arm"]  # also of arms that ask the same on toys
        assert scaled <= {*whole} and (whole == "no-memory-samples").sum() == 15
    else:
        assert {*records["family"]} - {"planted"} >= {"intermediate_algebra"}
    tested = records[records["arm"].isin(["format-only", "retrieved", "streaming"])]
    assert {*tested["temperature"]} == {protocol.temperature}


@pytest.mark.slow
def test_the_workstation_profile_runs_to_its_end(tmp_path, bundled):
    hub, cache, outputs = (tmp_path / name for name in ("hub", "cache", "outputs"))
    repos = {*MODELS, *SWEPT, *KNOWING, EMBEDDER, *REINFORCED}
    notebooks = shortened(tmp_path / "notebooks")
    environment = surroundings(tmp_path, bundled.tokenizer, repos, notebooks)
    for name, rows in benchmark_rows().items():
        ((file,),) = sources.SOURCES[name].files.values()
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        made = parquet(rows) if file.endswith("parquet") else lines
        build_cache(hub, "dataset", sources.SOURCES[name].repo, {file: made})
    pages = [
        {"title": f"Town {i}", "text": f"It has {i} streets and a mill. " * 400} for i in range(4)
    ]
    build_cache(hub, "dataset", wikipedia.REPO, {wikipedia.FILE: parquet(pages)})
    done = kit("reproduce", "--profile", "workstation", "--force", **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in (*MODELS, EMBEDDER, MATH, "GPU memory", "free", "Verdicts:", "report.html"):
        assert said in done.stdout, said
    folder = outputs / "workstation"
    said = json.loads((folder / "results" / "01_baseline.json").read_text())
    records = Store(folder / "store").table(set(said["keys"]))
    assert set(records["model"]) == {f"hub:{repo}" for repo in MODELS}
    assert set(records["level"]) == {3, 4} and records["family"].nunique() == 7
    assert len(records) == 2 * 2 * 3 * 14 and (records["finish"] == "stop").all()
    said = json.loads((folder / "results" / "03_dms.json").read_text())
    evicted = Store(folder / "store").table(set(said["keys"]))
    policies = {name.split()[0] for name in evicted["policy"]}
    rivals = {"window", "tova", "h2o", "rkv", "random"}
    assert policies == {"full", "dms-2x", "dms-4x", "dms-8x", *rivals}
    diverges = all(min(said["kl"][kind]) > 0 for kind in ("delayed", "immediate"))
    assert set(said["measurements"]) == ({"dms-delayed-eviction"} if diverges else set())
    said = json.loads((folder / "results" / "02_strategies.json").read_text())
    arms = Store(folder / "store").table(set(said["keys"]))["arm"].value_counts()
    asked = ("plain", "format-only", "retrieved", "gold-hint", "matts-sequential")
    assert {arms[arm] for arm in asked} == {14} and arms["matts-samples"] == 3 * 14
    repeats = {"random", "streaming", "matts-parallel"}
    assert not repeats & set(arms.index), "they repeat another: the bank is empty"
    assert (Store(folder / "store").table()["arm"] == "matts-parallel").sum() == 14
    planted = {"planted-retrieved", "planted-shuffled", "planted-random", "planted-irrelevant"}
    assert planted | {"no-hint", "hint-system", "hint-after"} < set(arms.index)
    said = json.loads((folder / "results" / "04_phase2.json").read_text())
    assert {"own", "kept", "internalised", "unfiltered", "grpo", "grpo base"} <= {
        row["arm"] for row in said["arms"]
    }
    stored = Store(folder / "store").table(set(said["keys"]))
    per_arm = stored[stored["source"] == "aime24"]["arm"].value_counts()
    assert per_arm.to_dict() == {
        arm: 20 for arm in ("r1-distill", "open-rs1", "open-rs2", "open-rs3")
    }
    assert {"grpo-step1", "grpo-step2"} <= set(stored[stored["source"] == "math500"]["arm"])
    said = json.loads((folder / "results" / "05_parametric.json").read_text())
    stored = Store(folder / "store").table(set(said["keys"]))
    seeds = stored.groupby("arm")["seed"].nunique().to_dict()
    assert {arm for arm, count in seeds.items() if count == 2} == {
        *("fetched", "wrong", "shared", "fetched-oracle", "fetched-early", "without subtree"),
    }
    once = {"plain", "larger anchor", "flat", "kv", "lora-vo", "co-trained generic"}
    once |= {"rag 5 + fetched", "without level 2", "shared-bank", "shared-lora-ffn"}
    assert once < set(seeds)
    named = {row["arm"] for row in said["bytes"]}
    assert {"scratch continued", "scratch co-trained", "scratch co-trained generic"} < named
    assert {"larger anchor", "shared-bank", "rag 5 + fetched"} < named
    assert set(said["elsewhere"][0]) == {"arm", "accuracy", "questions", "prose", "told", "unseen"}
    measured = {"hier-160m-specific", "hier-fetched-parameters", "hier-late-over-early"}
    measured |= {"hier-block-removal", "hier-posthoc-common-loss"}
    assert measured < set(said["measurements"])
    said = json.loads((folder / "results" / "06_memory_budget.json").read_text())
    assert {row["model"] for row in said["scenarios"]} == {f"hub:{repo}" for repo in SWEPT}
    assert len(said["scenarios"]) == 3 * 8 * 4 and said["generations"] == 3 * 8 * 2 * 2
    assert {"nab-eviction-over-quantisation", "nab-scale-threshold", "nab-weights-4b-8bit"} < set(
        said["measurements"]
    )
    assert set(said["keys"]) <= Store(folder / "store").keys()
    whole = Store(folder / "store").table()  # an anchor from nothing is trained in float32
    assert set(whole[~whole["arm"].str.startswith("scratch")]["dtype"]) == {"bfloat16"}
    verdicts = json.loads((folder / "results" / "07_verdicts.json").read_text())["verdicts"]
    judged = {row["claim"]: row["verdict"] for row in verdicts if row["system"] == "open-rs"}
    assert judged["openrs-rs3-aime24-gain"] and judged["openrs-completions"] == "differs"
    pinned = json.loads((cache / "revisions.json").read_text())
    assert set(pinned.values()) == {"a" * 40} and len(pinned) == 1 + 4 + 4 + 7 + 2 + 2
    done = kit("bundle", "--profile", "workstation", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    checked = verify.check(folder / "bundle.zip")
    tables = {line.split(":")[0] for line in checked.unchecked if ", table " in line}
    assert checked.differences == [] and tables == {
        "02_strategies, table 'Every bank in full'",  # texts of which records keep the ids
        "06_memory_budget, table 'What to run here'",
        "06_memory_budget, table 'Ledger, by formula and allocated'",
    }
    again = kit("reproduce", "--profile", "workstation", **environment)
    assert again.returncode == 0 and "done in" not in again.stdout, again.stdout[-2000:]
