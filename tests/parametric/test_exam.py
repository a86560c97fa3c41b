"""What arms of parametric memory answer, against the probes asked one by one."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from kit.evaluation.store import Store
from kit.models import embedder
from kit.parametric import exam, facts, qa
from kit.parametric.bank import ParametricBank
from kit.parametric.rag import Passages
from kit.parametric.study import FactStudy, Layout
from kit.parametric.train import MemoryTrainConfig
from kit.report import recompute

LAYOUT = Layout(branching=2, sizes=(6, 4), layers=2, where="all")
RECIPE = MemoryTrainConfig(batch=2, context=64, learning_rate=1e-2)
KNOWN = tuple(facts.load(["cities", "elements"], cities=20))
OFTEN = facts.times(KNOWN, 60)
ASKED = facts.build_questions(KNOWN, {"cities": 4, "elements": 6}, OFTEN)
OPTIONS = [facts.options(problem, KNOWN) for problem in ASKED]


@pytest.fixture(scope="module")
def passages(tmp_path_factory) -> Passages:
    texts = [s.context + s.completion for s in facts.build_sentences(KNOWN, 60, seed=0)]
    return Passages(tmp_path_factory.mktemp("passages"), texts, embedder.load())


@pytest.fixture(scope="module")
def answered(tiny, passages, tmp_path_factory) -> exam.Exam:
    folder = tmp_path_factory.mktemp("exam")
    sentences = tuple(facts.build_sentences(KNOWN, 60, seed=0))
    study = FactStudy(tiny, embedder.load(), KNOWN, sentences, folder / "memory")
    lines: list[str] = []
    made = exam.Exam(
        study, LAYOUT, RECIPE, ASKED, OPTIONS, Store(folder / "store"), report=lines.append
    )
    made.ask("plain", [(tiny, None)])
    made.train("fetched", 2)
    made.train("wrong", 1)
    made.retrieve(passages, 1)
    made.block(0)
    assert [line.split(" of four")[0].strip() for line in lines] == [*made.chosen]
    return made


def test_an_arm_is_asked_by_both_probes_once_per_training(answered, tiny, tmp_path):
    arms = ["plain", "fetched", "wrong", "rag", "rag + fetched"]
    arms += ["without subtree", "without level 1", "without level 2"]
    assert [*answered.chosen] == [*answered.free] == arms
    counts = {arm: frame["training"].nunique() for arm, frame in answered.free.items()}
    assert {arm for arm, count in counts.items() if count == 2} == {"fetched", "without subtree"}
    bank = answered.banks["fetched"][1]
    for probe, how in ((qa.multiple_choice, (OPTIONS,)), (qa.short_answer, ())):
        alone = probe(tiny, ASKED, *how, Store(tmp_path / probe.__name__), "fetched", bank, seed=1)
        frame = (answered.chosen if how else answered.free)["fetched"].query("training == 1")
        both = [each.set_index("problem_id")["text"].sort_index() for each in (frame, alone)]
        assert both[0].equals(both[1])


def test_the_results_lead_back_to_the_same_frames_and_tables(answered):
    results = answered.results()
    records = answered.store.table(set(results["keys"]))
    assert set(records["key"]) == set(results["keys"]) and results["where"] == "all"
    again = recompute.table("05_parametric", recompute.RECALLED, results, records)
    pd.testing.assert_frame_equal(again, recompute.fetched(answered.free))


def test_a_subtree_is_useful_by_what_only_fetched_blocks_answer(answered):
    paths = answered.paths
    assert [*paths] == [p.id for p in ASKED]
    assert answered.banks["fetched"][0].paths([ASKED[3].question]) == [paths[ASKED[3].id]]
    elements = [p.id for p in ASKED if p.family == "elements"]
    for target in elements:
        right = {"plain": dict.fromkeys(paths, False), "fetched": dict.fromkeys(paths, False)}
        right["fetched"][target] = True
        free = {arm: pd.DataFrame({"problem_id": [*of], "correct": [*of.values()], "training": 0})
                for arm, of in right.items()}  # fmt: skip
        assert dataclasses.replace(answered, free=free).most_useful("elements") == paths[target][0]
    counts = np.bincount([paths[one][0] for one in elements])
    nothing = {arm: each.assign(correct=False) for arm, each in free.items()}
    assert counts[dataclasses.replace(answered, free=nothing).most_useful("elements")] == max(
        counts
    )
    table = dataclasses.replace(answered, free=free).by_subtree().set_index("subtree")
    assert table["questions"].sum() == len(ASKED) and (table["plain, %"] == 0).all()
    node = paths[elements[-1]][0]
    assert table.loc[node, "fetched, %"] == pytest.approx(100 / table.loc[node, "questions"])


def test_an_edit_changes_no_answer_outside_its_subtree(answered):
    for subtree in (0, 1):
        edit = answered.edit(subtree, KNOWN)
        count = sum(path[0] == subtree for path in answered.paths.values())
        assert edit.inside[1] == count and edit.outside == (0, len(ASKED) - count)
        assert f"0 of {len(ASKED) - count} others" in str(edit)


def test_costs_are_those_of_bank_and_passages(answered, passages):
    rows = answered.costs(passages).set_index("arm")
    assert [*rows.index] == ["plain", "fetched", "rag", "rag + fetched"]
    bank: ParametricBank = answered.banks["fetched"][0]
    assert rows.loc["fetched", "held_bytes"] == bank.nbytes()["bank"]
    assert rows.loc["fetched", "read_bytes"] == bank.nbytes()["fetched"]
    sizes = passages.nbytes()
    assert rows.loc["rag", "held_bytes"] == sum(sizes.values())
    one = sizes["vectors"] + sizes["texts"] / len(passages.texts)
    assert rows.loc["rag", "read_bytes"] == pytest.approx(one)
    for column in ("held_bytes", "read_bytes"):
        parts = rows.loc[["rag", "fetched"], column].sum()
        assert rows.loc["rag + fetched", column] == pytest.approx(parts)
    assert (rows["trained"] > 0).to_dict() == {
        "plain": False, "fetched": True, "rag": False, "rag + fetched": True
    }  # fmt: skip
    assert rows.loc["rag", "prompt_tokens"] > rows.loc["plain", "prompt_tokens"]


def test_reach_bounds_recall_by_family_and_by_question(answered):
    study = answered.study
    rows = exam.reached(study, {"fetched": LAYOUT, "one": LAYOUT.one()}, ASKED)
    assert rows["arm"].tolist() == ["fetched"] * 2 + ["one"] * 2
    shares = study.coverage(LAYOUT, ASKED)
    cities = [p.family == "cities" for p in ASKED]
    assert rows.loc[0, "level 1, %"] == pytest.approx(np.nanmean(100 * shares[cities, 0]))
    assert set(rows.loc[2:, "level 1, %"]) == {100.0}, "a shared block is told everything"
    answers = answered.free["fetched"]
    table = exam.by_reach(study, LAYOUT, answers, ASKED)
    assert table["answers"].sum() == 2 * np.isfinite(shares[:, -1]).sum(), "of both trainings"


def test_elsewhere_a_memory_that_is_turned_off_costs_nothing(answered, tiny):
    folder = answered.banks["fetched"][0].folder
    off = ParametricBank(folder, tiny, answered.study.embedder, off=[0, 1])
    banks = {"plain": None, "off": off, "fetched": answered.banks["fetched"][0]}
    texts = {"prose": ["The sea is salty.", "A letter has come."], "none": []}
    table, nats = exam.elsewhere(tiny, banks, ASKED[:1], texts, answered.store)
    assert [*table.columns] == ["arm", "accuracy", "prose"]
    assert nats["off"]["prose"] == pytest.approx(nats["plain"]["prose"], abs=1e-4)
    assert np.abs(np.subtract(nats["fetched"]["prose"], nats["plain"]["prose"])).max() > 1e-3
    assert table.loc[0, "prose"] == pytest.approx(np.mean(nats["plain"]["prose"]))
    assert {*recompute.on_prose({arm: each["prose"] for arm, each in nats.items()})} == {
        "hier-posthoc-common-loss"
    }
