"""Programs as a small model sees them, and what is read from its replies."""

import dspy
import pytest

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.dspy_backend import Lines, language_model
from kit.reasoning_bank.programs import (
    Compare,
    Extractor,
    Judge,
    SelfJudge,
    Solve,
    Solver,
    lessons,
    shown,
    worked_out,
)
from kit.reasoning_bank.strategy import Strategy
from tests.scripted import Scripted

LESSON = "Title: Count twice\nWhen: Letters repeat.\nLesson: Go through the word again."


def with_replies(*replies: str):
    """A context in which the model says `replies` in turn, and the engine that does."""
    engine = Scripted(replies)
    adapter = Lines()
    return engine, adapter, dspy.context(lm=language_model(engine), adapter=adapter)


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


def test_signatures_with_several_outputs_are_refused():
    with pytest.raises(ValueError, match="several output fields; Lines reads one"):
        Lines().format(dspy.Signature("a -> b, c"), [], {"a": 1})


@pytest.mark.parametrize(
    "said, read",
    [("Yes.", True), ("**no**, it is wrong", False), ("I think YES", True), ("know", None)],
)
def test_a_judgement_is_the_first_yes_or_no(said, read):
    engine, adapter, context = with_replies(said)
    with context:
        assert SelfJudge()(question="Q", solution="S").correct is read
    assert adapter.failed == ([said] if read is None else [])
    assert len(engine.asked) == 1, "nothing is asked again in another format"


def test_an_empty_reply_is_counted_and_not_raised():
    engine, adapter, context = with_replies("", "fine")
    with context:
        assert Solver()(question="Q").answer is None
        assert Solver()(question="Q").answer == "fine"
    assert len(adapter.failed) == 1 and len(engine.asked) == 2


@pytest.mark.parametrize(
    "text, titles",
    [
        (LESSON, ["Count twice"]),
        (f"Sure!\n\n**Title:** A\n**When:** B\n**Lesson:** C\n\n{LESSON}", ["A", "Count twice"]),
        ("\n\n".join([LESSON] * 5), ["Count twice"] * 3),
        ("Title: only", []),
        ("Title: \nWhen: x\nLesson: y", []),
        ("", []),
        (None, []),
        ("Lesson: first\nTitle: wrong order\nWhen: never", []),
    ],
)
def test_lessons_are_read_in_the_asked_form_only(text, titles):
    found = lessons(text)
    assert [lesson["title"] for lesson in found] == titles
    assert all(lesson["content"] and lesson.keys() >= {"description"} for lesson in found)


@pytest.mark.parametrize(
    "tail", ["\n\nSure, more?", "\nWhen: Again.", "\nQuestion: What is 1 + 1?"]
)
def test_what_follows_a_lesson_is_not_part_of_it(tail):
    assert lessons(LESSON + tail) == lessons(LESSON)


def test_the_extractor_asks_by_outcome_and_contrasts_several():
    engine, _, context = with_replies(LESSON, LESSON, LESSON)
    with context:
        extract = Extractor()
        for tried in ([("a", True)], [("a", False)], [("a", True), ("b", False)]):
            assert lessons(extract("Q", tried).lessons)[0]["title"] == "Count twice"
    systems = [messages[0][1] for messages in engine.asked]
    assert "is correct" in systems[0] and "is wrong" in systems[1] and "Several" in systems[2]
    assert engine.asked[2][-1][1].endswith("[correct] a\n\n[wrong] b")
    assert engine.asked[0][2] == ("assistant", Extractor().succeeded.demos[0].lessons)
    for predict in Extractor().predictors():
        demo = predict.demos[0].lessons
        assert lessons(demo) == [], "the worked example of the prompt is no lesson"
        assert lessons(demo.replace("group", "heap")), "it is in the asked form"


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
