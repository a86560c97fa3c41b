"""The two models that several test files share: the bundled one, and a tiny one that can talk."""

import dataclasses
import gc
import json
import os
import weakref
from pathlib import Path

import pytest

# As the Makefile has it: threads that spin while they wait slow everything else down.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

TOKENS = 4096  # of the tiny model: what the bundled one has 49,152 of takes most of a tiny step


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request) -> str:
    """The dtypes that all computing code must run in; what they may change: tests.rounding."""
    return request.param


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network."""
    from kit import paths

    monkeypatch.setattr(paths, "REVISIONS", tmp_path / "kit" / "revisions.json")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


@pytest.fixture
def one_at_a_time(monkeypatch):
    """References to the weights of all models loaded from folders, each when none of the others is
    left; Python collects circles of references only when told to."""
    from kit.models import load

    from_folder, loaded = load._from_folder, []

    def load_alone(*args):
        assert not any(weights() for weights in loaded), "an earlier model is still in memory"
        model = from_folder(*args)
        loaded.append(weakref.ref(model.weights))
        return model

    monkeypatch.setattr(load, "_from_folder", load_alone)
    gc.collect()
    gc.disable()
    yield loaded
    gc.enable()


@pytest.fixture(scope="session")
def bundled():
    """The bundled real model in float32."""
    from kit.models.load import BUNDLED, load

    return load(BUNDLED, dtype="float32")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, bundled) -> Path:
    """A saved Llama of 0.1 M random weights, with the first of the bundled model's tokens."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    config = LlamaConfig(**shape, **heads, vocab_size=TOKENS, eos_token_id=2, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    weights.save_pretrained(folder)
    save_tokenizer(bundled.tokenizer, folder)
    return folder


def save_tokenizer(tokenizer, folder: Path) -> None:
    """The first TOKENS tokens of the bundled tokenizer, with which it still reads any text."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    pairs = text["model"]
    pairs["vocab"] = {token: number for token, number in pairs["vocab"].items() if number < TOKENS}
    pairs["merges"] = [pair for pair in pairs["merges"] if "".join(pair) in pairs["vocab"]]
    file.write_text(json.dumps(text))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """That model, loaded; no test may leave it changed to those that follow."""
    model = loaded(tiny_folder, "float32")
    before = {name: value.clone() for name, value in model.weights.state_dict().items()}
    yield model
    after = model.weights.state_dict()
    assert [name for name in before if not after[name].equal(before[name])] == []
    assert [name for name, part in model.weights.named_modules() if "forward" in vars(part)] == []


def loaded(tiny_folder: Path, dtype: str):
    """The tiny model in `dtype`; where a file's tests run in several, its own fixture `tiny`."""
    from kit.models.load import load

    return dataclasses.replace(load(str(tiny_folder), dtype=dtype), name="tiny")
