"""Arms of parametric memory: equal sizes, shared data, controls, and what an edit touches."""

import dataclasses

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
    told = tuple(facts.tell(known, 60, seed=0))
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


def test_all_sentences_of_a_subject_lie_on_one_path(study):
    tree = study.tree(LAYOUT)
    paths, rows = study.paths(tree), study.rows(tree, 64)
    text = {row.path: "" for row in rows}
    for row in rows:
        text[row.path] += study.model.tokenizer.decode(row.ids)
    for sentence in study.sentences:
        assert sentence.context in text[paths[sentence.fact]]
    assert len({path[0] for path in paths.values()}) == 2


def test_arms_differ_in_what_they_fetch_and_are_trained_once(study):
    seen = []
    again = dataclasses.replace(study, report=seen.append)
    banks = {}
    for name in ("fetched", "wrong", "generic", "shared", "flat", "lora-qk", "fetched-early"):
        layout = dataclasses.replace(LAYOUT, layers=1) if name == "fetched-early" else LAYOUT
        model, banks[name] = again.arm(name, layout, RECIPE)
        assert model is study.model
    question = ["Which nation does Lagos belong to?"]
    path = banks["fetched"].paths(question)[0]
    wrong = banks["wrong"].paths(question)[0]
    assert wrong[0] == 1 - path[0]
    assert torch.equal(banks["wrong"].fetch(wrong)[0], banks["fetched"].fetch(wrong)[0])
    assert not torch.equal(banks["shared"].fetch((0,))[0], banks["generic"].fetch((0,))[0])
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
    all_of_them = dataclasses.replace(LAYOUT, where="late")
    with pytest.raises(ValueError, match=r"fetched-early has the layers of fetched, \(0, 1\)"):
        study.arm("fetched-early", all_of_them, RECIPE)


def test_the_model_itself_can_be_trained_alone_or_together(study):
    before = {name: value.clone() for name, value in study.model.weights.state_dict().items()}
    alone, nothing = study.arm("continued", LAYOUT, RECIPE)
    together, bank = study.arm("co-trained", LAYOUT, RECIPE)
    assert nothing is None
    assert len({study.model.weights_hash, alone.weights_hash, together.weights_hash}) == 3
    assert alone.dtype == together.dtype == study.model.dtype
    assert bank.shape == LAYOUT.shape(study.model)
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
