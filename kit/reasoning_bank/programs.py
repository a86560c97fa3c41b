"""DSPy programs that solve, judge and learn, in prompts that a small model can follow.

A program is a dspy.Module over typed signatures with one output field each, rendered and read by
`adapter.Lines`.

Sources: ReasoningBank (arXiv 2509.25140), Figs. 7-10, for what is asked of judge and extractor;
the wording is our own. MaTTS: its Section 3.3.
"""

import re
from collections.abc import Sequence

import dspy
import pandas
from dspy.utils.exceptions import AdapterParseError

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.calculator import Unreadable, calculate
from kit.reasoning_bank.strategy import Strategy

ITEMS = 3  # lessons taken from one trajectory, as published
LEAD = "Lessons from problems solved before. Use what fits; their numbers are not yours."
SPIDERS = "A spider has 8 legs. How many legs do 3 spiders have?"  # asked in worked examples
FORM = "Title: <a few words>\nWhen: <one sentence>\nLesson: <one to three sentences>"

LABEL = r"^\W*(?:title|when|lesson|question|problem|solution|answer)\W*:"  # a line that starts anew
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
    """Title, description and content of each lesson that `text` writes in the asked form.

    What repeats the worked example of the prompt is no lesson and left out.
    """
    found = []
    for match in LESSON.finditer(text or ""):
        title, when, content = (" ".join(part.strip(" *\n").split()) for part in match.groups())
        if title and content and content not in COPIED:
            found.append({"title": title, "description": when, "content": content})
    return found[:ITEMS]


def shown(strategies: Sequence[Strategy]) -> str:
    """What stands in the prompt of retrieved strategies, "" of none."""
    lines = [
        f"- {'Mistake to avoid' if s.kind == 'failure' else 'Strategy'}: {s.title}. {s.content}"
        for s in strategies
    ]
    return "\n".join([LEAD, *lines]) if lines else ""


class Solver(dspy.Module):
    """Question and strategies to an answer."""

    def __init__(self):
        super().__init__()
        self.solve = dspy.Predict(Solve)

    def forward(self, question: str, strategies: str = "", seed: int = 0):
        return _ask(self.solve, seed, question=question, strategies=strategies)


class SelfJudge(dspy.Module):
    """Whether a solution is correct, by the model's own opinion: True, False, or None unread."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Judge, temperature=0.0, max_tokens=8)

    def forward(self, question: str, solution: str):
        return _ask(self.judge, 0, question=question, solution=solution)


class Extractor(dspy.Module):
    """Lessons from one trajectory that succeeded or failed, or from several of one problem."""

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
        told = [f"[{'correct' if correct else 'wrong'}] {text}" for text, correct in solutions]
        return _ask(self.compare, seed, question=question, solutions="\n\n".join(told))


class SelfCheck(dspy.Module):
    """Sequential MaTTS: solve, then check and revise `checks` times; `steps` holds them all."""

    def __init__(self, checks: int = 2):
        super().__init__()
        self.solver, self.revise, self.checks = Solver(), dspy.Predict(Revise), checks

    def forward(self, question: str, strategies: str = "", seed: int = 0):
        steps = [self.solver(question=question, strategies=strategies, seed=seed).answer]
        for check in range(self.checks):
            again = _ask(self.revise, seed + check, question=question, solution=steps[-1] or "")
            steps.append(again.answer)
        return dspy.Prediction(answer=steps[-1], steps=steps)


class Calculate(dspy.Module):
    """The model writes an expression, the calculator works it out (the act of ReAct, once)."""

    def __init__(self):
        super().__init__()
        self.express = dspy.Predict(Express)
        self.express.demos = [EXPRESSED]

    def forward(self, question: str, seed: int = 0):
        expression = _ask(self.express, seed, question=question).expression
        return dspy.Prediction(expression=expression, answer=worked_out(expression or ""))


def worked_out(expression: str) -> str:
    """What the calculator makes of the first line of `expression`; the text where it cannot."""
    first = expression.strip().splitlines()[0] if expression.strip() else ""
    try:
        value = calculate(first)
    except Unreadable:
        return expression
    return f"{first} = {value}\nAnswer: {value}"


class BestOf(dspy.Module):
    """Parallel MaTTS: `width` solutions, of which the model chooses one; `steps` holds them all."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.solver, self.width = Solver(), width
        self.choose = dspy.Predict(Choose, temperature=0.0, max_tokens=8)

    def forward(self, question: str, strategies: str = "", seed: int = 0):
        steps = [
            self.solver(question=question, strategies=strategies, seed=seed + i).answer or ""
            for i in range(self.width)
        ]
        told = numbered(steps)
        number = _ask(self.choose, seed, question=question, solutions=told).number
        return dspy.Prediction(answer=steps[picked(number, self.width)], steps=steps)


def numbered(texts: Sequence[str]) -> str:
    """Solutions as `Choose` is shown them."""
    return "\n\n".join(f"[{i}] {text}" for i, text in enumerate(texts, 1))


def picked(number: int | None, count: int) -> int:
    """Index of the solution that `Choose` named, of the first where it named none of `count`."""
    return number - 1 if number and number <= count else 0


def _ask(predict: dspy.Predict, seed: int, **inputs) -> dspy.Prediction:
    """One call; an empty completion is a field of None and counted, not an exception."""
    try:
        return predict(**inputs, config={"seed": seed})
    except AdapterParseError as error:
        dspy.settings.adapter.failed.append(str(error.lm_response or ""))
        return dspy.Prediction(**dict.fromkeys(predict.signature.output_fields))


def examples(records: pandas.DataFrame, longest: int = 256) -> list[Strategy]:
    """Worked examples instead of lessons: correct attempts of at most `longest` tokens, as they
    stand, one per problem."""
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
    """One worked example per extracting signature, of a family that no problem set has."""
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
}  # what the worked examples of the prompts say
