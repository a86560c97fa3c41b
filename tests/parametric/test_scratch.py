"""An anchor from nothing: it reads any text, and learns with its bank, all tokens counted."""

import dataclasses

import pytest
import torch

from kit.models import embedder
from kit.parametric import facts, scratch
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
