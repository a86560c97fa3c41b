"""The arms of the strategy study differ in what memory says, and in nothing else."""

import dspy
import pandas as pd
import pytest

from kit.data import problems
from kit.data.prompts import FORMAT_INSTRUCTION
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.models import embedder
from kit.reasoning_bank import arms, build
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.dspy_backend import PLACES, Engine, Lines, language_model
from kit.reasoning_bank.programs import Solver, ToolSolver
from kit.schema import Sampling
from tests.reasoning_bank.test_bank import lesson

PROSE = " ".join(f"The river carries sand number {i} to the sea." for i in range(200))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    made = ReasoningBank(tmp_path_factory.mktemp("bank"), embedder.load())
    made.add([lesson(p) for p in problems.load("laptop", "train").problems[::5]])
    return made


@pytest.fixture(scope="module")
def tests():
    return problems.load("laptop", "test").problems[::10]


def memory(prompt) -> str:
    bare = build.solve_prompt(prompt.problem, prompt.arm).messages
    assert prompt.messages[1:] == bare[1:], "the question is the same in every arm"
    assert prompt.messages[0][1].startswith(bare[0][1]), "the instructions are the same"
    return prompt.messages[0][1].removeprefix(bare[0][1]).strip()


def test_all_arms_share_instructions_and_question(bank, tests, bundled):
    tokenizer = bundled.tokenizer
    found = build.retrieved(bank, tests)
    every = {
        "format-only": build.format_only(tests),
        "retrieved": found,
        "random": arms.random_retrieval(bank, tests),
        "shuffled": arms.shuffled(bank, tests),
        "irrelevant": arms.irrelevant(found, PROSE, tokenizer),
        "gold-hint": arms.oracle_hint(tests),
    }
    for arm, prompts in every.items():
        assert [p.problem for p in prompts] == list(tests) and {p.arm for p in prompts} == {arm}
        texts = [memory(p) for p in prompts]
        assert not any(texts) if arm == "format-only" else all(texts)
    lengths = [
        [len(tokenizer(memory(p))["input_ids"]) for p in every[arm]]
        for arm in ("retrieved", "irrelevant")
    ]
    assert max(abs(a - b) for a, b in zip(*lengths, strict=True)) <= 2


@pytest.mark.parametrize("place", PLACES)
def test_memory_is_as_long_at_every_place(bank, tests, bundled, place):
    tokenizer = bundled.tokenizer
    found = build.retrieved(bank, tests, place=place)
    below = [arms.memory_tokens(p, tokenizer) for p in build.retrieved(bank, tests)]
    assert [arms.memory_tokens(p, tokenizer) for p in found] == below and min(below) > 20
    same = [p.messages for p in arms.irrelevant(found, PROSE, tokenizer, place)]
    texts = [" ".join(said for _, said in messages) for messages in same]
    assert all("river" in text and p.question in text for p, text in zip(tests, texts))
    assert arms.memory_tokens(build.format_only(tests)[0], tokenizer) == 0


def test_what_is_shown_is_recorded_and_passed_the_guard(bank, tests):
    items = {item.id: item for item in bank.strategies()}
    for prompts in (
        build.retrieved(bank, tests),
        arms.random_retrieval(bank, tests),
        arms.shuffled(bank, tests),
    ):
        for each in prompts:
            assert len(each.retrieved) == 2
            assert all(items[i].content in memory(each) for i in each.retrieved)
    assert build.retrieved(bank, tests, k=0, arm="k=0")[0].retrieved == ()
    assert build.retrieved(bank, tests, kinds=["failure"])[0].retrieved == ()


def test_controls_are_what_they_say(bank, tests):
    items = {item.id: item for item in bank.strategies()}
    own = {p.problem.id: p.retrieved for p in build.retrieved(bank, tests)}
    shuffled = arms.shuffled(bank, tests)
    assert shuffled == arms.shuffled(bank, tests) != arms.shuffled(bank, tests, seed=1)
    other = [p for p in shuffled if p.retrieved != own[p.problem.id]]
    assert len(other) > 0.8 * len(tests), "shuffling changes what is shown"
    drawn = arms.random_retrieval(bank, tests)
    assert drawn == arms.random_retrieval(bank, tests) != arms.random_retrieval(bank, tests, seed=1)
    families = {items[i].family for p in drawn for i in p.retrieved}
    assert len(families) == 7, "random items are of all families"
    assert all(p.problem.answer in memory(p) for p in arms.oracle_hint(tests))


def test_memory_over_the_budget_is_one_sentence(bank, tests, bundled):
    prompts = build.retrieved(bank, tests)
    assert arms.check_token_budget(prompts, bundled.tokenizer) == prompts
    with pytest.raises(ValueError, match=r"the budget is 10 \(items [0-9a-f]{16}"):
        arms.check_token_budget(prompts, bundled.tokenizer, 10)


def test_a_revision_shows_the_first_answer(bank, tests):
    prompts = build.retrieved(bank, tests)[:3]
    records = pd.DataFrame(
        {"problem_id": [p.problem.id for p in prompts], "text": [" one", "two", "three"]}
    )
    again = arms.revisions(records, prompts)
    assert [p.messages[1][1].rpartition("\n")[2] for p in again] == ["one", "two", "three"]
    kept = [arms.memory_of(p) for p in prompts]
    assert all(text and text in p.messages[0][1] for text, p in zip(kept, again)), "memory stays"
    assert {p.arm for p in again} == {"matts-sequential"}
    assert [p.problem for p in again] == [p.problem for p in prompts]


def test_scaling_without_memory_costs_what_it_costs_with_it(bank, tests, tiny, tmp_path):
    store, calls = Store(tmp_path), []

    def ask(prompts, samples=1, sampling=Sampling(8, temperature=1.0)):  # noqa: B008 (frozen)
        calls.append((prompts[0].arm, samples, len(prompts)))
        return evaluate(tiny, prompts, sampling, store, samples, report=lambda line: None)

    made = {}
    for name, prompts in (("matts", build.retrieved(bank, tests[:2])),
                          ("no-memory", build.format_only(tests[:2]))):  # fmt: skip
        records = arms.scaled(prompts, ask(prompts), (1, 3), ask, store, name=name)
        made[name] = records["arm"].value_counts().to_dict()
        assert {*records["temperature"]} == {1.0}
    assert made["matts"] == {"matts-samples": 6, "matts-sequential-1": 2, "matts-parallel-1": 2,
                             "matts-sequential": 2, "matts-parallel": 2}  # fmt: skip
    assert {*made["no-memory"]} == {arm.replace("matts", "no-memory") for arm in made["matts"]}
    half = len(calls) // 2
    assert [call[1:] for call in calls[:half]] == [call[1:] for call in calls[half:]]


def test_draws_of_a_bank_are_crossed_with_problems():
    def frame(correct):
        rows = {"problem_id": [*"abcdefgh"][: len(correct)], "correct": [c == "1" for c in correct]}
        same = dict(arm="a", source="s", seed=0, sample=0, model="m", weights_hash="w",
                    policy="full", finish="stop", family="f", level=1, temperature=0.0,
                    compliant=True, method="none", extracted="", answer="", asks="any")  # fmt: skip
        return pd.DataFrame(rows).assign(**same)

    control = frame("00000000")
    one = arms.over_draws([frame("11110000")], control)
    same = arms.over_draws([frame("11110000")] * 3, control)
    apart = arms.over_draws([frame(x) for x in ("11110000", "1111", "0000")], control)
    assert one.estimate == same.estimate == 50 and one.n == 8
    assert apart.estimate == pytest.approx(200 / 3) and apart.n == 4
    assert apart.high - apart.low > same.high - same.low, "banks that differ widen the interval"


def test_one_of_several_samples_is_chosen_by_its_number(tests):
    samples = pd.DataFrame(
        [
            {"problem_id": p.id, "sample": i, "text": f"try {i}", **dict.fromkeys(arms.COSTS, 10.0)}
            for p in tests[:3]
            for i in (1, 0, 2)
        ]
    )
    asked = arms.choices(samples, tests[:3])
    assert asked[0].messages[1][1].endswith("[1] try 0\n\n[2] try 1\n\n[3] try 2")
    said = zip(tests, ("Number 3.", "The seventh", "4"), strict=False)
    replies = pd.DataFrame(
        [{"problem_id": p.id, "text": t, **dict.fromkeys(arms.COSTS, 1.0)} for p, t in said]
    )
    found = arms.chosen_samples(samples, replies).set_index("problem_id")
    assert [found["text"][p.id] for p in tests[:3]] == ["try 2", "try 0", "try 0"]
    assert (found[arms.COSTS] == 31).all(axis=None), "three answers and a choice were paid for"


@pytest.mark.parametrize("place", PLACES)
def test_an_optimized_solver_asks_in_every_arm_what_it_was_given(bank, tests, place):
    solver, found = Solver(), build.retrieved(bank, tests[:3], place=place)
    same = arms.from_program(solver, found, "retrieved", place)
    assert same == found and all(arms.memory_of(p) for p in found)
    solver.solve.demos = [dspy.Example(question="What is 1 + 1?", strategies="", answer="Two.")]
    solver.solve.signature = solver.solve.signature.with_instructions("Be brief.")
    for before, made in zip(found, arms.from_program(solver, found, "brief", place), strict=True):
        said = [(role, text.replace(FORMAT_INSTRUCTION, "Be brief."))
                for role, text in before.messages]  # fmt: skip
        said[1:1] = [("user", "What is 1 + 1?"), ("assistant", "Two.")]
        assert made.messages == tuple(said) and made.arm == "brief"
        assert made.retrieved == before.retrieved and made.refused == before.refused


def test_a_subset_is_part_of_its_bank(bank, tmp_path):
    part = arms.subset(bank, 10, tmp_path / "10")
    assert len(part) == 10 == len(arms.subset(bank, 10, tmp_path / "10"))
    assert set(part.strategies()) <= set(bank.strategies())
    assert len(arms.subset(bank, 10**6, tmp_path / "all")) == len(bank)


def test_what_a_strategy_contributes_is_paired_by_problem():
    treated = pd.DataFrame(
        {
            "problem_id": ["p", "q", "r"],
            "correct": [True, False, True],
            "retrieved": ["a b", "a", ""],
        }
    )
    control = pd.DataFrame({"problem_id": ["r", "q", "p"], "correct": [True, True, False]})
    found = arms.contribution(treated, control)
    assert found.to_dict("records") == [
        {"id": "b", "prompts": 1, "points": 100.0},
        {"id": "a", "prompts": 2, "points": 0.0},
    ]
    assert arms.harmful(treated, control) == []
    assert arms.harmful(treated.assign(correct=False), control) == ["a"]


def test_the_arm_with_a_tool_asks_what_the_program_asks(bank, tests, tiny, tmp_path):
    """Greedily, by the prompts of an arm and by the DSPy module: the same steps to the letter."""
    store, asked = Store(tmp_path), []

    def ask(prompts):
        records = evaluate(tiny, prompts, Sampling(6), store, report=lambda line: None)
        asked.append(records)
        return records

    prompts, solver = build.retrieved(bank, tests[:4]), ToolSolver(steps=3)
    records = arms.with_tool(solver, prompts, ask, store).set_index("problem_id")
    with dspy.context(lm=language_model(Engine(tiny, 6), temperature=0.0), adapter=Lines()):
        found = {p.problem.id: solver(p.problem.question, arms.memory_of(p)) for p in prompts}
    assert {name: each.answer for name, each in found.items()} == records["text"].to_dict()
    steps = pd.concat(asked)
    assert {*steps["arm"]} <= {"tools-step1", "tools-step2", "tools-step3"} and len(asked) > 1
    costs = steps.groupby("problem_id")[arms.COSTS].sum().loc[records.index]
    assert (costs == records[arms.COSTS]).all(axis=None)
    shown = {p.problem.id: " ".join(p.retrieved) for p in prompts}
    assert records["retrieved"].to_dict() == shown and all(shown.values())
    (row,) = arms.tool_use(records.reset_index()).to_dict("records")
    assert row["calls"] == sum(each.calls for each in found.values())
    assert row["errors"] == sum(each.errors for each in found.values())
    again = arms.with_tool(solver, prompts, ask, store).set_index("problem_id")
    assert {*again["key"]} == {*records["key"]}, "a second run decodes and stores nothing new"


def test_calls_of_the_tool_are_counted_by_arm():
    texts = {
        "tools": ["2 + 2 = 4\nAnswer: 4", "Error: no\nError: no"],
        "tools-retrieved": ["1 = 1"],
    }
    rows = [{"arm": arm, "text": text} for arm in texts for text in texts[arm]]
    table = arms.tool_use(pd.DataFrame([*rows, {"arm": "plain", "text": "4"}]))
    assert table.to_dict("records") == [
        {"arm": "tools", "problems": 2, "calls": 3, "errors": 2, "answered": 1},
        {"arm": "tools-retrieved", "problems": 1, "calls": 1, "errors": 0, "answered": 0},
    ]


def test_an_arm_that_repeats_another_is_left_out_and_said_to_be(bank, tests, tmp_path):
    small = arms.subset(bank, 2, tmp_path / "2")
    queue = [*build.format_only(tests), *build.retrieved(small, tests)]
    queue += [*arms.random_retrieval(small, tests[:5], k=0), *arms.oracle_hint(tests)]
    kept, said = arms.distinct(queue)
    assert {p.arm for p in kept} == {"format-only", "retrieved", "gold-hint"}
    assert said == ["random is left out: its prompts are those of format-only."]
    more = build.retrieved(small, tests[:4], arm="k2"), build.retrieved(small, tests[:4], 1, "k1")
    kept, said = arms.distinct([*more[0], *more[1]], queue)
    assert {p.arm for p in kept} == {"k1"}
    assert said == ["k2 is left out: its prompts are those of retrieved."]
    empty = [*build.format_only(tests), *build.retrieved(small, tests, k=0)]
    kept, said = arms.distinct(empty)
    assert kept == empty and said == ["retrieved asks what format-only asks: no memory was found."]
