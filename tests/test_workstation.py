"""The workstation profile to its end, on a local hub cache with tiny files under the real names.

Only the training of evictors is shortened: a step on 4,096 tokens takes seconds on any model.

The models are Qwen3 networks of two small layers with the bundled tokenizer. Their head is zero,
so that every token is equally likely, and half of the vocabulary ends an answer: the 16,384 new
tokens of the profile are never reached.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pandas
import torch
from fake_hub import build_cache
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from kit import paths, published
from kit.store import Store

MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B-Instruct-2507")
EMBEDDER = "Qwen/Qwen3-Embedding-0.6B"
MATH = "EleutherAI/hendrycks_math"


def tiny_qwen3(folder, tokenizer, seed: int) -> dict[str, bytes]:
    """The files of a saved Qwen3 with real vocabulary and context, and hardly any weights."""
    config = Qwen3Config(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.zeros_(weights.lm_head.weight)
    weights.generation_config = GenerationConfig(eos_token_id=list(range(0, 49152, 2)))
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def math_rows(subject: str) -> bytes:
    """A parquet file of one problem per level of one subject, in the published columns."""
    rows = [
        {
            "problem": f"In {subject}, what is ${level} + {len(subject)}$?",
            "level": f"Level {level}",
            "type": subject.replace("_", " ").title(),
            "solution": f"It is $\\boxed{{{level + len(subject)}}}$.",
        }
        for level in range(1, 6)
    ]
    buffer = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def shortened(folder):
    """A copy of the notebooks whose workstation profile trains for a moment."""
    shutil.copytree(paths.ROOT / "notebooks", folder)
    profile = folder / "profiles" / "workstation.toml"
    text = profile.read_text()
    for knob, short in {"RAMP_STEPS": 2, "CONTEXT": 64, "HELD_OUT": 2, "PROBLEMS": 14}.items():
        head, table = text.split('["03_dms"]')
        table, count = re.subn(rf"(?m)^{knob} = \d+$", f"{knob} = {short}", table, count=1)
        assert count == 1, knob
        text = f'{head}["03_dms"]{table}'
    profile.write_text(text)
    return folder


def kit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kit", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=paths.ROOT, env=env, capture_output=True, text=True)


def test_the_workstation_profile_runs_to_its_end(tmp_path, bundled):
    hub, cache, outputs = (tmp_path / name for name in ("hub", "cache", "outputs"))
    for seed, repo in enumerate([*MODELS, EMBEDDER]):
        build_cache(hub, "model", repo, tiny_qwen3(tmp_path / str(seed), bundled.tokenizer, seed))
    names = [n for split in ("test", "train") for n in published.SOURCES["math"].files[split]]
    files = {name: math_rows(name.split("/")[0] + name.split("/")[1][:5]) for name in names}
    build_cache(hub, "dataset", MATH, files)
    cache.mkdir()
    (cache / "models").symlink_to(paths.MODELS)
    environment = {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "KIT_CACHE": str(cache),
        "KIT_OUTPUTS": str(outputs),
        "KIT_NOTEBOOKS": str(shortened(tmp_path / "notebooks")),
    }
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
    rivals = {"window", "tova", "h2o", "random"}
    assert policies == {"full", "dms-2x", "dms-4x", "dms-8x", *rivals}
    assert set(said["measurements"]) >= {"dms-delayed-eviction", "dms-steps-paper-cr4"}
    said = json.loads((folder / "results" / "02_strategies.json").read_text())
    arms = Store(folder / "store").table(set(said["keys"]))["arm"].value_counts()
    assert {"plain", "format-only", "irrelevant", "random", "streaming"} <= set(arms.index)
    assert arms.pop("matts-samples") == 3 * 14
    assert (arms == 14).all() and len(arms) == 23, arms
    pinned = json.loads((cache / "revisions.json").read_text())
    assert set(pinned.values()) == {"a" * 40} and len(pinned) == 4
    again = kit("reproduce", "--profile", "workstation", **environment)
    assert again.returncode == 0 and "done in" not in again.stdout, again.stdout[-2000:]
