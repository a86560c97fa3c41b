"""Programs as a small model sees them, and what is read from its replies."""

import asyncio
import json
from typing import Literal

import dspy
import pytest
from dspy.adapters.baml_adapter import BAMLAdapter
from dspy.utils.exceptions import AdapterParseError

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.calculator import calculate
from kit.reasoning_bank.dspy_backend import Lines, language_model
from kit.reasoning_bank.programs import (
    FAILED,
    Compare,
    Extractor,
    Judge,
    Lesson,
    SelfJudge,
    Solve,
    Solver,
    ToolSolver,
    fault,
    shown,
    worked,
)
from kit.reasoning_bank.strategy import Strategy
from kit.schema import Problem
from tests.scripted import Scripted

LESSON = "Title: Count twice\nWhen: Letters repeat.\nLesson: Go through the word again."


def with_replies(*replies: str):
    """The engine that says `replies` in turn, and a context in which it does."""
    engine = Scripted(replies)
    return engine, dspy.context(lm=language_model(engine), adapter=Lines())


def test_a_prompt_is_plain():
    inputs = {"question": "What is 2 + 2?", "strategies": "- Strategy: Count. Use fingers."}
    assert Lines().format(Solve, [], inputs) == [
        {"role": "system", "content": f"{FORMAT_INSTRUCTION}\n\n{inputs['strategies']}"},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    messages = Lines().format(Judge, [], {"question": "Q", "solution": "S"})
    assert messages[1]["content"] == "Question:\nQ\n\nSolution:\nS"
    demo = dspy.Example(question="q", solution="s", correct=False)
    messages = Lines().format(Judge, [demo], {"question": "Q", "solution": "S"})
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "no"


def test_several_outputs_are_named_on_lines_of_their_own():
    signature = dspy.Signature("question -> reasoning, answer: int", "Solve it.")
    demo = dspy.Example(question="q", reasoning="One and one.", answer=2)
    messages = Lines().format(signature, [demo, dspy.Example(question="half")], {"question": "Q"})
    assert messages[0]["content"] == (
        "Solve it.\n\nWrite\n\nReasoning: <reasoning>\nAnswer: <answer>"
    )
    assert messages[2]["content"] == "Reasoning: One and one.\nAnswer: 2" and len(messages) == 4
    for reply in ("Reasoning: two twos\nAnswer: 4", "two twos\n**Answer:** 4"):
        assert Lines().parse(signature, reply) == {"reasoning": "two twos", "answer": 4}
    with pytest.raises(AdapterParseError):
        Lines().parse(signature, "Reasoning: two twos")


def test_a_chain_of_thought_solves():
    engine, context = with_replies("Half of 8 is 4.\nAnswer: 4")
    with context:
        found = dspy.ChainOfThought(Solve)(question="Half of 8?", strategies="")
    assert (found.reasoning, found.answer) == ("Half of 8 is 4.", "4") and len(engine.asked) == 1


@pytest.mark.parametrize("kind, said, value", [
    (list[int], "[1, 2]", [1, 2]),
    (float, "2.5", 2.5),
    (Literal["up", "down"], "up", "up"),
    (float, "high", None),
])  # fmt: skip
def test_outputs_are_typed(kind, said, value):
    signature = dspy.Signature({"a": (str, dspy.InputField()), "b": (kind, dspy.OutputField())})
    if value is None:
        with pytest.raises(AdapterParseError):
            Lines().parse(signature, said)
    else:
        assert Lines().parse(signature, said) == {"b": value}


@pytest.mark.parametrize("said, read", [
    ("The sum is right.\nCorrect: yes", True),
    ("There are no errors in line 1, but 2 + 2 is 4. Correct: **no**", False),
    ("Yes.", True), ("**no**, it is wrong", False), ("I think YES", True), ("know", None),
])  # fmt: skip
def test_a_judgement_gives_reasons_and_ends_in_yes_or_no(said, read):
    engine, context = with_replies(said)
    judge = SelfJudge()
    with context:
        assert judge(question="Q", solution="S").correct is read
    assert judge.unparsed == ([said] if read is None else []), "no verdict is not a wrong"
    assert len(engine.asked) == 1, "nothing is asked again in another format"
    assert "step by step" in engine.asked[0][0][1]


@pytest.mark.parametrize(
    "adapter", [Lines, dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter, BAMLAdapter]
)
def test_an_unreadable_reply_is_counted_and_not_raised(adapter):
    """By whichever adapter, with and without await."""
    engine, solver = Scripted([""] * 9), Solver()
    with dspy.context(lm=language_model(engine), adapter=adapter()):
        assert solver(question="Q").answer is None and len(solver.unparsed) == 1
        assert asyncio.run(solver.acall(question="Q")).answer is None and len(solver.unparsed) == 2


@pytest.mark.parametrize(
    "adapter, reply",
    [
        (dspy.ChatAdapter, "[[ ## lessons ## ]]\n{}\n\n[[ ## completed ## ]]"),
        (dspy.JSONAdapter, '{{"lessons": {}}}'),
        (dspy.XMLAdapter, "<lessons>{}</lessons>"),
    ],
)
def test_lessons_are_typed_by_every_adapter(adapter, reply):
    given = [{"title": "T", "description": "D", "content": "C"}]
    engine = Scripted([reply.format(json.dumps(given))])
    with dspy.context(lm=language_model(engine), adapter=adapter()):
        (lesson,) = Extractor()("Q", [("a", True)]).lessons
    assert lesson == Lesson(**given[0]) and len(engine.asked) == 1


@pytest.mark.parametrize(
    "text, titles",
    [
        (LESSON, ["Count twice"]),
        (f"Sure!\n\n**Title:** A\n**When:** B\n**Lesson:** C\n\n{LESSON}", ["A", "Count twice"]),
        ("\n\n".join([LESSON] * 5), ["Count twice"] * 5),
        ("Title: only", []),
        ("Title: \nWhen: x\nLesson: y", []),
        ("", []),
        ("Lesson: first\nTitle: wrong order\nWhen: never", []),
    ],
)
def test_lessons_are_read_in_the_asked_form_only(text, titles):
    found = Lesson.read(text) or []
    assert [lesson.title for lesson in found] == titles
    assert all(lesson.content for lesson in found)


@pytest.mark.parametrize(
    "tail", ["\n\nSure, more?", "\nWhen: Again.", "\nQuestion: What is 1 + 1?"]
)
def test_what_follows_a_lesson_is_not_part_of_it(tail):
    assert Lesson.read(LESSON + tail) == Lesson.read(LESSON)


def test_the_extractor_asks_by_outcome_and_contrasts_several():
    engine, context = with_replies(LESSON, LESSON, LESSON)
    with context:
        extract = Extractor()
        for tried in ([("a", True)], [("a", False)], [("a", True), ("b", False)]):
            assert extract("Q", tried).lessons[0].title == "Count twice"
    systems = [messages[0][1] for messages in engine.asked]
    assert "is correct" in systems[0] and "is wrong" in systems[1] and "Several" in systems[2]
    assert engine.asked[2][-1][1].endswith("[correct] a\n\n[wrong] b")
    (demo,) = Extractor().succeeded.demos[0].lessons
    assert engine.asked[0][2] == ("assistant", str(demo)) and Lesson.read(str(demo)) == [demo]


@pytest.mark.parametrize("content, reason", [
    ("Write both numbers over each other and add from the right.", ""),
    ("11 / 11 / 11", "too few words"),
    ("Just add them up.", "too few words"),
    ("Ask what one more group would change: it adds its whole size, so multiply.",
     "copy of the example in the prompt"),
    ("Find out how many apples Tom has after he buys more.", "copy of the question"),
    ("Add all the apples together, so the answer is 19.", "states an answer"),
    ("Put the two heaps of apples together, which gives 12.", "states an answer"),
])  # fmt: skip
def test_a_lesson_not_worth_keeping_has_a_fault(content, reason):
    problem = Problem(
        "p", "How many apples has Tom after he buys 5 more than his 7?", "12", "f", 1, "s"
    )
    made = Lesson(title="T", description="D.", content=content)
    assert fault(made, problem) == reason
    titled = made.model_copy(update={"title": "Do not add the number of groups to its size"})
    assert fault(titled, problem) in (reason, "copy of the example in the prompt")


@pytest.mark.parametrize("before, reply, after", [
    ("", "12 * 3 - 1", "12 * 3 - 1 = 35"),
    ("", "<think>gcd?</think>\n GCD(12, 18) = 3\nbecause", "GCD(12, 18) = 6"),  # its value counts
    ("", "Add: 34 + 91 = 231", "34 + 91 = 125"),
    ("2 * 3 = 6", "6 + 1", "2 * 3 = 6\n6 + 1 = 7"),
    ("2 * 3 = 6", "12 / 2", "2 * 3 = 6\n12 / 2 = 6\nAnswer: 6"),  # nothing new
    ("2 * 3 = 6", "Answer: 7\nIt is 7.", "2 * 3 = 6\nAnswer: 7"),
    ("", "1 / 0", "Error: division by zero"),
    ("", "exit()", "Error: 'exit()' is no number and no known operation"),
    ("", None, "Error: an expression has 1 to 200 signs, this one 0"),
])  # fmt: skip
def test_the_tool_says_what_an_expression_is_worth(before, reply, after):
    assert worked(before, reply) == after


def test_an_error_does_not_repeat_a_long_reply():
    said = worked("", "I would add them all " * 20)
    assert said.startswith(FAILED) and len(said) < 80


@pytest.mark.parametrize("replies, steps, answer, counts", [
    (["4 * 5", "20 - 3", "Answer: 17"], 6, "4 * 5 = 20\n20 - 3 = 17\nAnswer: 17", (2, 0)),
    (["4 * 5 = 9", "4 * 5 = 20"], 6, "4 * 5 = 20\n4 * 5 = 20\nAnswer: 20", (2, 0)),
    (["x", "2 + 2", "5", "y", "z"], 6, None, (5, 3)),  # two errors in a row end it
    (["1", "2", "3"], 3, "1 = 1\n2 = 2\n3 = 3", (3, 0)),  # as many steps as it may take
])  # fmt: skip
def test_a_solver_with_a_tool_goes_on_until_it_answers(replies, steps, answer, counts):
    engine, context = with_replies(*replies)
    solver = ToolSolver(steps)
    with context:
        found = solver("How much?", "- Strategy: T. C.")
    assert (found.calls, found.errors) == counts and len(engine.asked) == len(replies)
    assert answer is None or found.answer == answer
    system, last = engine.asked[-1][0][1], engine.asked[-1][-1][1]
    assert "Strategy: T. C." in system and "8 * 3" in engine.asked[0][2][1]
    assert last.startswith("Question:\nHow much?") and "nothing yet" in engine.asked[0][-1][1]
    assert all(line in last for line in found.answer.splitlines()[: len(replies) - 1])


def test_a_solver_with_a_tool_is_an_ordinary_program(tmp_path):
    """By another adapter, awaited, saved and loaded."""
    replies = [f"[[ ## step ## ]]\n{step}\n\n[[ ## completed ## ]]" for step in ("2 + 2", "2 + 2")]
    solver = ToolSolver()
    solver.step.signature = solver.step.signature.with_instructions("Be brief.")
    solver.save(tmp_path / "solver.json")
    again = ToolSolver()
    again.load(tmp_path / "solver.json")
    engine = Scripted(replies)
    with dspy.context(lm=language_model(engine), adapter=dspy.ChatAdapter()):
        found = asyncio.run(again.acall(question="Q"))
    assert found.answer == "2 + 2 = 4\n2 + 2 = 4\nAnswer: 4" and found.calls == 2
    assert "Be brief." in engine.asked[0][0][1] and len(again.step.demos) == 2


def test_react_calls_the_calculator_by_the_adapter_for_small_models():
    said = "Next thought: multiply\nNext tool name: {}\nNext tool args: {}"
    replies = [said.format("calculate", '{"expression": "8 * 3"}'), said.format("finish", "{}")]
    engine, context = with_replies(*replies, "Reasoning: 8 times 3.\nAnswer: 24")
    with context:
        found = dspy.ReAct("question -> answer", tools=[calculate])(question="8 legs, 3 spiders?")
    assert found.answer == "24" and found.trajectory["observation_0"] == "24"
    assert "24" in engine.asked[1][-1][1], "the second step sees what the tool said"


def test_a_lesson_becomes_a_strategy_with_its_origin():
    problem = Problem("p7", "How many?", "3", "gcd", 2, "laptop")
    lesson = Lesson(title="T", description="D.", content="C.")
    made = lesson.strategy(problem, False, "m@w", extractor="e", step=4)
    assert made == Strategy("T", "D.", "C.", "failure", "p7", "gcd", 2, "How many?", "m@w", "e", 4)


def test_strategies_are_shown_without_their_origin():
    made = Strategy("T", "D.", "C.", "failure", "p1", "f", 1, "secret question", "m", "x")
    text = shown([made])
    assert "Mistake to avoid: T. C." in text and "secret" not in text and "p1" not in text
    assert shown([]) == ""


def test_programs_are_saved_and_loaded(tmp_path):
    made = Extractor()
    made.succeeded.signature = made.succeeded.signature.with_instructions("Be brief.")
    made.save(tmp_path / "extractor.json")
    again = Extractor()
    again.load(tmp_path / "extractor.json")
    assert again.succeeded.signature.instructions == "Be brief."
    assert again.compare.signature.instructions == Compare.instructions
    assert again.dump_state() == made.dump_state()
