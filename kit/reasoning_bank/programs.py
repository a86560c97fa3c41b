"""DSPy programs that solve, judge and extract strategies, with prompts that a small model follows.

A program is a dspy.Module over typed signatures with one output field each, rendered and parsed by
`dspy_backend.Lines`.

Sources: ReasoningBank, https://arxiv.org/abs/2509.25140: Figs. 7-10 for the tasks of judge and
extractor (the wording is our own), Section 3.3 for memory-aware test-time scaling (MaTTS).
"""

import re
from collections.abc import Sequence

import dspy
import pandas
from dspy.utils.exceptions import AdapterParseError

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.calculator import ExpressionError, calculate
from kit.reasoning_bank.strategy import Strategy

ITEMS = 3  # most lessons of one trajectory, as published
LEAD = "Lessons from problems solved before. Use what fits; their numbers are not yours."
SPIDERS = "A spider has 8 legs. How many legs do 3 spiders have?"  # asked in worked examples
FORM = "Title: <a few words>\nWhen: <one sentence>\nLesson: <one to three sentences>"

LABEL = r"^\W*(?:title|when|lesson|question|problem|solution|answer)\W*:"  # starts a new part
LESSON = re.compile(
    rf"^\W*title\W*:(.+?)^\W*when\W*:(.+?)^\W*lesson\W*:(.+?)(?={LABEL}|^\s*$|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


class Solve(dspy.Signature):
    __doc__ = FORMAT_INSTRUCTION

    strategies: str = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Judge(dspy.Signature):
    """Check the solution of the problem step by step in your head. Is its final answer correct?
    Reply with one word: yes or no."""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    correct: bool | None = dspy.OutputField()


class Succeeded(dspy.Signature):
    __doc__ = f"""The solution of the problem is correct. What did it do that would help with other
problems of this kind? Do not repeat its numbers. Write

{FORM}"""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    lessons: str = dspy.OutputField()


class Failed(dspy.Signature):
    __doc__ = f"""The solution of the problem is wrong. What should be done otherwise with problems
of this kind? Do not repeat its numbers. Write

{FORM}"""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    lessons: str = dspy.OutputField()


class Compare(dspy.Signature):
    __doc__ = f"""Several solutions of one problem, some correct and some wrong. What do the correct
ones do that the wrong ones do not? Do not repeat their numbers. Write

{FORM}"""

    question: str = dspy.InputField()
    solutions: str = dspy.InputField()
    lessons: str = dspy.OutputField()


class Revise(dspy.Signature):
    __doc__ = f"""Check the solution of the problem for mistakes and write it again, correct.
{FORMAT_INSTRUCTION}"""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Choose(dspy.Signature):
    """Several solutions of one problem. Which is most likely correct? Reply with its number."""

    question: str = dspy.InputField()
    solutions: str = dspy.InputField()
    number: int | None = dspy.OutputField()


class Express(dspy.Signature):
    """Write the one arithmetic expression whose value answers the problem. Use numbers, + - * /,
    gcd(a, b) and lcm(a, b). Write nothing else."""

    question: str = dspy.InputField()
    expression: str = dspy.OutputField()


def lessons(text: str | None) -> list[dict]:
    """Title, description and content of each lesson in `text` that has the requested form.

    Copies of the worked example of the prompt are left out.
    """
    parsed = []
    for match in LESSON.finditer(text or ""):
        title, when, content = (" ".join(part.strip(" *\n").split()) for part in match.groups())
        if title and content and content not in COPIED:
            parsed.append({"title": title, "description": when, "content": content})
    return parsed[:ITEMS]


def shown(strategies: Sequence[Strategy]) -> str:
    """Retrieved strategies as the text of a prompt, "" of none."""
    lines = [
        f"- {'Mistake to avoid' if s.kind == 'failure' else 'Strategy'}: {s.title}. {s.content}"
        for s in strategies
    ]
    return "\n".join([LEAD, *lines]) if lines else ""


class Solver(dspy.Module):
    """Answers a question, given strategies."""

    def __init__(self):
        super().__init__()
        self.solve = dspy.Predict(Solve)

    def forward(self, question: str, strategies: str = "", seed: int = 0):
        return _ask(self.solve, seed, question=question, strategies=strategies)


class SelfJudge(dspy.Module):
    """The model's own judgement of a solution: True, False, or None where it cannot be parsed."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Judge, temperature=0.0, max_tokens=8)

    def forward(self, question: str, solution: str):
        return _ask(self.judge, 0, question=question, solution=solution)


class Extractor(dspy.Module):
    """Extracts lessons from one trajectory, or by contrast from several of one problem."""

    def __init__(self):
        super().__init__()
        self.succeeded, self.failed = dspy.Predict(Succeeded), dspy.Predict(Failed)
        self.compare = dspy.Predict(Compare)
        for predict, demo in zip((self.succeeded, self.failed, self.compare), _demos()):
            predict.demos = [demo]

    def forward(self, question: str, solutions: Sequence[tuple[str, bool]], seed: int = 0):
        """`solutions`: text and whether it is correct, of each trajectory."""
        if len(solutions) == 1:
            ((text, correct),) = solutions
            program = self.succeeded if correct else self.failed
            return _ask(program, seed, question=question, solution=text)
        marked = [f"[{'correct' if correct else 'wrong'}] {text}" for text, correct in solutions]
        return _ask(self.compare, seed, question=question, solutions="\n\n".join(marked))


def worked_out(expression: str) -> str:
    """The first line of `expression` evaluated by the calculator; the text where that fails."""
    first = expression.strip().splitlines()[0] if expression.strip() else ""
    try:
        value = calculate(first)
    except ExpressionError:
        return expression
    return f"{first} = {value}\nAnswer: {value}"


def numbered(texts: Sequence[str]) -> str:
    """Solutions numbered from 1, the form that `Choose` takes."""
    return "\n\n".join(f"[{i}] {text}" for i, text in enumerate(texts, 1))


def picked(number: int | None, count: int) -> int:
    """Index of the solution that `Choose` named; 0 where it named none of `count`."""
    return number - 1 if number and number <= count else 0


def _ask(predict: dspy.Predict, seed: int, **inputs) -> dspy.Prediction:
    """One call; an empty completion is counted and gives a field of None, not an exception."""
    try:
        return predict(**inputs, config={"seed": seed})
    except AdapterParseError as error:
        dspy.settings.adapter.failed.append(str(error.lm_response or ""))
        return dspy.Prediction(**dict.fromkeys(predict.signature.output_fields))


def examples(records: pandas.DataFrame, longest: int = 256) -> list[Strategy]:
    """Worked examples instead of lessons: correct attempts of at most `longest` tokens, verbatim,
    one per problem."""
    rows = records[records["correct"] & (records["new_tokens"] <= longest)]
    rows = rows.drop_duplicates("problem_id")
    return [
        Strategy(
            title="Worked example",
            description="",
            content=f"{row.question}\n{row.text.strip()}",
            kind="success",
            problem_id=row.problem_id,
            family=row.family,
            level=row.level,
            question=row.question,
            model=f"{row.model}@{row.weights_hash}",
            extractor="trajectory",
        )
        for row in rows.itertuples()
    ]


def _demos() -> list[dspy.Example]:
    """One worked example per extraction signature, of a family that no problem set has."""
    right = "Each spider has 8 legs, so 3 spiders have 3 * 8 = 24 legs.\nAnswer: 24"
    wrong = "There are 3 spiders and 8 legs, so 3 + 8 = 11 legs.\nAnswer: 11"
    multiply = (
        "Title: Multiply equal groups\n"
        "When: The same amount is there several times.\n"
        "Lesson: Name the size of one group and the number of groups, then multiply the two."
    )
    added = (
        "Title: Do not add the number of groups to their size\n"
        "When: The same amount is there several times.\n"
        "Lesson: Ask what one more group would change. If it adds its whole size, multiply."
    )
    both = f"[correct] {right}\n\n[wrong] {wrong}"
    return [
        dspy.Example(question=SPIDERS, solution=right, lessons=multiply),
        dspy.Example(question=SPIDERS, solution=wrong, lessons=added),
        dspy.Example(question=SPIDERS, solutions=both, lessons=multiply),
    ]


EXPRESSED = dspy.Example(question=SPIDERS, expression="8 * 3")
COPIED = {
    " ".join(demo.lessons.partition("Lesson:")[2].split()) for demo in _demos()
}  # lessons of the worked examples in the prompts
