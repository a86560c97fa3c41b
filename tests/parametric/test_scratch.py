"""An anchor from nothing: it reads any text, and learns with its bank, all tokens counted."""

import dataclasses

import numpy as np
import pytest
import torch

from kit.models import embedder
from kit.parametric import facts, qa, scratch, wikipedia
from kit.parametric.study import FactStudy, Layout
from kit.parametric.train import IGNORED, MemoryTrainConfig, completion_loss, pack_rows

LAYOUT = Layout(branching=2, sizes=(6, 4), layers=2)


def test_it_reads_any_text_and_is_random_by_its_seed(bundled, tmp_path):
    made = [scratch.untrained(tmp_path / f"{n}", bundled, 64, 2, seed)
            for n, seed in enumerate((0, 0, 1))]  # fmt: skip
    assert made[0].weights_hash == made[1].weights_hash != made[2].weights_hash
    for text in ("The atomic number of tin is 50.", "Ḩadā’iq al Qubbah lies in Egypt."):
        ids = made[0].tokenizer(text)["input_ids"]
        assert max(ids) < scratch.TOKENS and made[0].tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="hidden is 40; use a multiple of 32"):
        scratch.untrained(tmp_path / "odd", bundled, 40, 2)


def test_all_tokens_but_the_first_are_learnt(bundled, tmp_path):
    model = scratch.untrained(tmp_path, bundled, 32, 1)
    said = scratch.whole(facts.build_sentences(facts.load(["elements"]), 6, seed=0))
    (row,) = pack_rows(model, [(s.context, s.completion) for s in said], [(0,)] * 6, 256)
    starts = (row.positions == 0).nonzero()[:6, 0].tolist()
    ends = [at - 1 for at in starts[1:]]
    spoken = (row.targets != IGNORED).nonzero()[:, 0].tolist()
    assert set(range(max(spoken) + 1)) - {*spoken} == {*ends}
    assert all(row.targets[at] == row.ids[at + 1] for at in spoken)


def test_anchor_and_bank_learn_from_nothing_and_the_generic_block_is_of_the_same_anchor(
    bundled, tmp_path
):
    known = tuple(facts.load(["cities"], 12))
    told = tuple(scratch.whole(facts.build_sentences(known, 60, seed=0)))
    anchor = scratch.untrained(tmp_path / "anchor", bundled, 64, 2)
    study = FactStudy(anchor, embedder.load(), known, told, tmp_path / "memory")
    recipe = MemoryTrainConfig(batch=1, context=64, epochs=3, anchor_rate=3e-3)
    (row, *_) = study.rows(LAYOUT, 64)
    before, losses, found = completion_loss(anchor, [row]).item(), {}, {}
    for name in ("continued", "co-trained", "co-trained generic"):
        seen = []
        where = dataclasses.replace(study, report=seen.append)
        found[name] = where.arm(name, LAYOUT, recipe)
        losses[name] = [step["loss"] for step in seen]
    for name in ("continued", "co-trained"):
        assert losses[name][0] > 0.8 * before and losses[name][-1] < 0.6 * before, name
    assert losses["co-trained generic"] == [], "trained together with the bank"
    hashes = {name: model.weights_hash for name, (model, _) in found.items()}
    assert hashes["co-trained"] == hashes["co-trained generic"] != hashes["continued"]
    assert found["continued"][1] is None
    fetched, generic = (found[name][1] for name in ("co-trained", "co-trained generic"))
    path = fetched.paths([told[0].completion])[0]
    assert not torch.equal(torch.cat(fetched.fetch(path), 1), generic.fetch((0,))[0])


def test_an_anchor_reads_articles_with_what_it_fetched_in_training(bundled, tmp_path):
    def article(number: int) -> wikipedia.Article:
        words = [f"{place}{number}" for place in ("harbour", "market", "bridge", "tower")]
        lines = [" ".join(words[(i * j + i) % 4] for i in range(8)) + "." for j in range(9)]
        return wikipedia.Article(f"Town {number}", "\n".join(lines))

    articles = [article(number) for number in range(5)]
    recipe = MemoryTrainConfig(batch=2, context=64, epochs=8, anchor_rate=3e-3)
    how = articles, {"hidden": 64, "layers": 2}, LAYOUT, recipe
    rows = scratch.on_articles(tmp_path, bundled, embedder.load(), *how)
    counts = rows.groupby(["arm", "kind"]).size().unstack()
    assert (counts["same"] == 4).all() and (counts["other"] == 9).all() and len(counts) == 4
    sizes = rows.groupby("arm")["parameters"].first()
    assert sizes["alone"] + 2 * 10 * 3 * 64 == sizes["fetched"]
    assert sizes["fetched"] == sizes["generic"] == sizes["wider"]
    anchor = scratch.untrained(tmp_path / "again", bundled, 64, 2)
    texts = wikipedia.paragraphs(articles, anchor, 64).same
    at_first = qa.nll_per_token(anchor, [s.context + s.completion for s in texts])
    by = rows.set_index(["arm", "kind"])["nats"]
    for arm in sizes.index:
        assert (by[arm, "same"].to_numpy() < 0.7 * at_first).all(), arm
        assert by[arm, "same"].mean() < by[arm, "other"].mean(), "what is specific was learnt"
    table = scratch.compared(rows).set_index("arm")
    gain, low, high = table.loc["alone", "fetched gains, same"]
    gains = by["alone", "same"].to_numpy() - by["fetched", "same"].to_numpy()
    assert gain == pytest.approx(gains.mean())  # of one text each
    assert high - low == pytest.approx(2 * 3.1824 * gains.std(ddof=1) / 2, rel=1e-3)
    assert table.loc["wider", "perplexity, other"] == pytest.approx(
        np.exp(by["wider", "other"].mean())
    )
