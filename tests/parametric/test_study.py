"""Arms of parametric memory: equal sizes, shared data, controls, and what an edit touches."""

import dataclasses

import numpy as np
import pytest
import torch

from kit.data import problems, prompts
from kit.inference import decode
from kit.models import embedder
from kit.parametric import facts, ffn_memory
from kit.parametric.study import FactStudy, Layout, solved_as_facts
from kit.parametric.train import MemoryTrainConfig, encode_sentence
from kit.pipeline import stages
from tests.conftest import loaded

LAYOUT = Layout(branching=2, sizes=(6, 4), layers=2, where="all")
RECIPE = MemoryTrainConfig(batch=2, context=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tiny(tiny_folder, dtype):
    return loaded(tiny_folder, dtype)


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    known = tuple(facts.load(["cities", "capitals"], cities=40)[:60])
    told = tuple(facts.build_sentences(known, 60, seed=0))
    return FactStudy(tiny, embedder.load(), known, told, tmp_path_factory.mktemp("study"))


def test_every_arm_fetches_as_much(bundled):
    layout = Layout(branching=4, sizes=(32, 16))
    plain = layout.shape(bundled)
    assert plain.fetched == 3 * 576 * 10 * 48 and plain.layers == tuple(range(20, 30))
    for other in (layout.one(), layout.flat()):
        assert other.shape(bundled).fetched == plain.fetched
    assert layout.flat().shape(bundled).nodes == (16,)
    for kind in ffn_memory.KINDS:
        shape = dataclasses.replace(layout, kind=kind).shape(bundled)
        assert shape.fetched == pytest.approx(plain.fetched, rel=0.04), kind


@pytest.mark.parametrize("routing", ("text", "subject"))
def test_what_is_told_is_trained_where_its_own_text_or_its_subject_lies(study, routing):
    layout = dataclasses.replace(LAYOUT, routing=routing)
    tree, paths, rows = study.tree(layout), study.paths(layout), study.rows(layout, 64)
    text = {row.path: "" for row in rows}
    for row in rows:
        text[row.path] += study.model.tokenizer.decode(row.ids)
    for sentence, path in zip(study.sentences, paths, strict=True):
        assert sentence.context + sentence.completion in text[path]
    assert len({path[0] for path in paths}) == 2
    if routing == "text":
        own = study.embedder.embed([sentence.document for sentence in study.sentences])
    else:
        vectors = facts.subjects(study.facts, study.embedder)
        own = vectors[[study.facts.index(sentence.fact) for sentence in study.sentences]]
    assert paths == [tuple(path) for path in tree.assign(own).tolist()]


def test_the_share_that_reaches_a_question_is_of_the_sentences_that_tell_its_answer(study):
    often = facts.times(study.facts, 60)
    asked = facts.build_questions(study.facts, {"cities": 8, "capitals": 8}, often)
    goes = study.tree(LAYOUT).assign(study.embedder.embed([p.question for p in asked])).tolist()
    shares = study.coverage(LAYOUT, asked)
    assert shares.shape == (16, 2)
    for problem, path, share in zip(asked, goes, shares, strict=True):
        mine = [place for sentence, place in zip(study.sentences, study.paths(LAYOUT), strict=True)
                if facts.name(sentence.fact) == problem.id]  # fmt: skip
        for level in (0, 1):
            there = [place[level] == path[level] for place in mine]
            assert (share[level] == sum(there) / len(there)) if there else np.isnan(share[level])
    assert (
        not np.isnan(shares).all()
        and (np.nan_to_num(shares[:, 0]) >= np.nan_to_num(shares[:, 1])).all()
    )
    one = study.coverage(LAYOUT.one(), asked)
    assert set(one[~np.isnan(one)]) == {1.0}, "a shared block is told everything"


def test_arms_differ_in_what_they_fetch_and_are_trained_once(study):
    seen = []
    again = dataclasses.replace(study, report=seen.append)
    banks = {}
    names = ("fetched", "wrong", "shared", "shared-bank", "shared-lora-qk", "flat", "deep",
             "lora-qk", "fetched-early", "fetched-oracle", "fetched-half")  # fmt: skip
    for name in names:
        layout = dataclasses.replace(LAYOUT, layers=1) if name == "fetched-early" else LAYOUT
        model, banks[name] = again.arm(name, layout, RECIPE)
        assert model is study.model
    question = ["The city of Lagos is located in the country of"]
    path = banks["fetched"].paths(question)[0]
    wrong = banks["wrong"].paths(question)[0]
    assert wrong[0] == 1 - path[0]
    assert torch.equal(banks["wrong"].fetch(wrong)[0], banks["fetched"].fetch(wrong)[0])
    shapes = {name: bank.shape for name, bank in banks.items()}
    same = {"fetched", "wrong", "shared", "flat", "deep", "fetched-oracle"}
    assert {shapes[name].fetched for name in same} == {shapes["fetched"].fetched}
    assert shapes["shared-bank"].parameters == shapes["fetched"].parameters
    assert shapes["fetched-half"].fetched == shapes["fetched"].fetched / 2
    assert shapes["shared-lora-qk"].nodes == (1,) and shapes["shared-lora-qk"].kind == "lora-qk"
    assert shapes["deep"].nodes == (2, 4, 8)
    assert len({bank.key for bank in banks.values()}) == len(banks)
    steps = len(seen)
    for name in banks:
        layout = dataclasses.replace(LAYOUT, layers=1) if name == "fetched-early" else LAYOUT
        again.arm(name, layout, RECIPE)
    assert len(seen) == steps, "trained before"


def test_arms_of_other_layers_lie_in_other_layers(study):
    places = ("early", "middle", "late", "uniform")
    for profile, depth in (("laptop", 30), ("workstation", 24)):  # SmolLM2-135M, Qwen2.5-0.5B
        count = stages.read_profile(profile)["05_parametric"]["LAYOUT"].get("layers", 10)
        assert len({ffn_memory.choose_layers(count, depth, where) for where in places}) == 4, (
            profile
        )
    everywhere = dataclasses.replace(LAYOUT, where="late")
    said = r"fetched-early and fetched are one arm: both have 10 units in layers \[0, 1\]"
    with pytest.raises(ValueError, match=said):
        study.arm("fetched-early", everywhere, RECIPE)
    nearly = dataclasses.replace(LAYOUT, where="late", layers=1)
    study.refuse_equal(["fetched", "wrong", "fetched-early", "continued"], nearly)
    with pytest.raises(ValueError, match="fetched-middle and fetched-early are one arm"):
        study.refuse_equal(["fetched", "fetched-early", "fetched-middle"], nearly)
    with pytest.raises(ValueError, match="shared-bank and shared are one arm"):
        flat = dataclasses.replace(LAYOUT, branching=1)
        study.refuse_equal(["shared", "shared-bank"], flat)


def test_the_model_itself_can_be_trained_alone_or_together(study):
    before = {name: value.clone() for name, value in study.model.weights.state_dict().items()}
    alone, nothing = study.arm("continued", LAYOUT, RECIPE)
    together, bank = study.arm("co-trained", LAYOUT, RECIPE)
    assert nothing is None
    assert len({study.model.weights_hash, alone.weights_hash, together.weights_hash}) == 3
    assert alone.dtype == together.dtype == study.model.dtype
    assert bank.shape == LAYOUT.shape(study.model)
    same, generic = study.arm("co-trained generic", LAYOUT, RECIPE)
    assert same.weights_hash == together.weights_hash
    assert generic.shape.nodes == (1,) and generic.shape.fetched == bank.shape.fetched
    assert not torch.equal(generic.fetch((0,))[0], torch.cat(bank.fetch((0, 0)), 1))
    after = study.model.weights.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_edit_changes_its_subtree_and_no_other(study):
    altered = [dataclasses.replace(s, completion=" Atlantis.") for s in study.sentences]
    bank = study.arm("fetched", LAYOUT, RECIPE)[1]
    edited = study.edited(LAYOUT, RECIPE, 1, altered)
    assert not torch.equal(edited.fetch((1, 2))[0], bank.fetch((1, 2))[0])
    for path in ((0, 0), (0, 1)):
        for ours, theirs in zip(edited.fetch(path), bank.fetch(path), strict=True):
            assert torch.equal(ours, theirs)


def test_solved_problems_are_told_as_they_are_asked(bundled):
    asked = prompts.build(prompts.plain, problems.load("laptop", "train", n=3).problems)
    for prompt, said in zip(asked, solved_as_facts(bundled, asked), strict=True):
        ids, read = encode_sentence(bundled, said.context, said.completion)
        assert tuple(ids[:read]) == decode.tokenize(bundled, prompt)
        assert ids[-1] in bundled.stop_ids
        assert bundled.tokenizer.decode(ids[read:-1]) == f"Answer: {prompt.problem.answer}"
        assert said.fact.subject == prompt.problem.question
