"""DSPy's optimisers on the kit's programs: correct attempts become demos, gold does not leak."""

import dspy
import pandas
import pytest

from kit.data import problems
from kit.reasoning_bank import optimize
from kit.reasoning_bank.dspy_backend import Engine, Lines, language_model
from kit.reasoning_bank.programs import Solver
from tests.runs import record
from tests.scripted import Scripted


@pytest.fixture(scope="module")
def sums():
    return problems.load("laptop", "train", families=["chain_sum"], levels=[1]).problems


@pytest.fixture
def model(sums):
    """Solves every second sum, and all of them under the instruction that it proposes itself."""
    gold = {p.question: p.answer for p in sums}
    even = {p.question for p in sums[::2]}

    def reply(messages):
        question = messages[-1][1]
        if question not in gold:
            return "Count on your fingers."
        knows = question in even or "fingers" in messages[0][1]
        return f"I see.\nAnswer: {gold[question] if knows else 'a lot'}"

    engine = Scripted(reply)
    with dspy.context(lm=language_model(engine, temperature=0.5), adapter=Lines()):
        yield engine


def score(program, tests) -> float:
    scored = [optimize.metric(e, program(question=e.question)) for e in optimize.examples(tests)]
    return sum(scored) / len(scored)


def test_bootstrap_shows_attempts_that_were_correct(model, sums):
    made = optimize.optimize(Solver(), sums[:6], [], demos=2)
    demos = made.solve.demos
    assert [d.question for d in demos] == [sums[0].question, sums[2].question]
    assert all("I see." in d.answer for d in demos), "its own words, not the gold answer"
    made(question="What now?")
    assert [role for role, _ in model.asked[-1]] == ["system", *["user", "assistant"] * 2, "user"]


def test_mipro_finds_the_instruction_that_helps(model, sums):
    assert score(Solver(), sums[10:16]) == 0.5
    made = optimize.optimize(Solver(), sums[:6], sums[6:10], "mipro", trials=4)
    assert "fingers" in made.solve.signature.instructions
    assert score(made, sums[10:16]) == 1.0


def test_a_program_asked_again_is_not_luckier(sums, tiny):
    """What MIPROv2 asks of the unchanged program at a temperature is drawn once."""
    engine, drawn = Engine(tiny, max_new_tokens=6), {}
    asked, real = [], engine.complete

    def complete(request):
        response = real(request)
        asked.append((str(request.messages), str(request.system)))
        drawn.setdefault(asked[-1], set()).add(response.text)
        return response

    engine.complete = complete
    proposer = language_model(Scripted(lambda messages: "Count on your fingers."))
    with dspy.context(lm=language_model(engine, temperature=1.0), adapter=Lines()):
        optimize.optimize(Solver(), sums[:3], sums[3:6], "mipro", trials=4, proposer=proposer)
    assert len(asked) > len(drawn), "some were asked again"
    assert {len(texts) for texts in drawn.values()} == {1}


def test_gold_answers_are_in_no_prompt(model, sums):
    optimize.optimize(Solver(), sums[1:8:2], [], demos=2)
    for asked, problem in zip(model.asked, sums[1:8:2], strict=False):
        assert not any(f"Answer: {problem.answer}" in text for _, text in asked)


def test_gepa_says_what_it_lacks(model, sums, monkeypatch):
    monkeypatch.delenv("KIT_REFLECTION_MODEL", raising=False)
    with pytest.raises(ValueError, match="set KIT_REFLECTION_MODEL to one that DSPy knows"):
        optimize.optimize(Solver(), sums[:2], sums[2:4], "gepa")
    told = optimize.feedback(optimize.examples(sums[:1])[0], dspy.Prediction(answer="Answer: 99"))
    assert told.score == 0 and told.feedback == f"Wrong: answered 99, it is {sums[0].answer}."


@pytest.mark.parametrize("given", [False, True])
def test_gepa_takes_the_instruction_of_a_stronger_model(model, sums, monkeypatch, given):
    said = '{"new_instruction": "Count on your fingers."}'
    stronger = Scripted(lambda messages: said)
    proposer, other = language_model(stronger), language_model(Scripted(["Be brief."]))
    monkeypatch.setattr(optimize, "_stronger", lambda: other if given else proposer)
    split = sums[:6], sums[6:10]
    given_proposer = {"proposer": proposer} if given else {}
    made = optimize.optimize(Solver(), *split, "gepa", trials=8, **given_proposer)
    assert "fingers" in made.solve.signature.instructions and stronger.asked
    assert score(made, sums[10:16]) == 1.0


def test_gains_are_shown_on_each_split_with_what_was_changed():
    plain, made = Solver(), Solver()
    made.solve.signature = made.solve.signature.with_instructions("Count on your fingers.")
    made.solve.demos = [dspy.Example(question="1 + 1", answer="2")]
    named = {"format-only": (0, 0, 1, 1), "mipro": (1, 1, 1, 0), "gepa": (0, 0, 1, 1)}
    rows = [
        vars(record(arm, i, bool(right))) for arm in named for i, right in enumerate(named[arm])
    ]
    solvers, records = {"mipro": made, "gepa": plain}, {"validation": pandas.DataFrame(rows)}
    table = optimize.gains(solvers, records, "format-only").set_index("arm")
    assert table["instruction"]["mipro"] == "Count on your fingers."
    assert table["instruction"]["gepa"] == plain.solve.signature.instructions
    assert table["examples"].to_dict() == {"mipro": 1, "gepa": 0}
    assert [table["validation"][arm][0] for arm in solvers] == [75.0, 50.0]
    difference = table["validation, minus format-only"]
    assert difference["mipro"][0] == 25.0 and difference["mipro"][1] < 25 < difference["mipro"][2]
    assert difference["gepa"][0] == 0.0


def test_wrong_questions_are_one_sentence(model, sums):
    with pytest.raises(ValueError, match="No optimizer 'best'; choose one of bootstrap"):
        optimize.optimize(Solver(), sums[:2], [], "best")
    with pytest.raises(ValueError, match="is in train and validation"):
        optimize.optimize(Solver(), sums[:2], sums[1:3], "mipro")
