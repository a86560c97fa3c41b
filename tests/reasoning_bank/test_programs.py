"""Programs as a small model sees them, and what is read from its replies."""

import asyncio
import json
from typing import Literal

import dspy
import pytest
from dspy.adapters.baml_adapter import BAMLAdapter
from dspy.utils.exceptions import AdapterParseError

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.dspy_backend import Lines, language_model
from kit.reasoning_bank.programs import (
    Compare,
    Extractor,
    Judge,
    Lesson,
    SelfJudge,
    Solve,
    Solver,
    fault,
    shown,
    worked_out,
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


@pytest.mark.parametrize(
    "said, answer",
    [
        ("12 * 3 - 1", "12 * 3 - 1 = 35\nAnswer: 35"),
        ("gcd(12, 18)\nbecause", "gcd(12, 18) = 6\nAnswer: 6"),
        ("I would add them.", "I would add them."),
        ("exit()", "exit()"),
        ("", ""),
    ],
)
def test_the_calculator_works_out_what_the_model_writes(said, answer):
    assert worked_out(said) == answer


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
