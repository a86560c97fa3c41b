"""DSPy programs that solve, judge and extract strategies, with prompts that a small model follows.

A program is a dspy.Module over typed signatures. `dspy_backend.Lines` renders and parses them for a
small model; every adapter of DSPy does for a model that writes JSON.

Sources: ReasoningBank, https://arxiv.org/abs/2509.25140: Figs. 7-10 for the tasks of judge and
extractor (the wording is our own), Section 3.3 for memory-aware test-time scaling (MaTTS).
"""

import re
from collections.abc import Sequence
from textwrap import shorten
from typing import ClassVar

import dspy
from dspy.utils.exceptions import AdapterParseError
from pydantic import BaseModel, Field

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.calculator import ExpressionError, calculate
from kit.reasoning_bank.dspy_backend import Lines, thoughtless
from kit.reasoning_bank.strategy import Strategy, leaks_answer
from kit.schema import Problem

ITEMS = 3  # most lessons of one trajectory, as published
LEAD = "Lessons from problems solved before. Use what fits; their numbers are not yours."
SPIDERS = "A spider has 8 legs. How many legs do 3 spiders have?"  # asked in worked examples
LABEL = r"^\W*(?:title|when|lesson|question|problem|solution|answer)\W*:"  # starts a new part
LESSON = re.compile(
    rf"^\W*title\W*:(.+?)^\W*when\W*:(.+?)^\W*lesson\W*:(.+?)(?={LABEL}|^\s*$|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
FEWEST, ALIKE = 5, 0.6  # words of a lesson; share of words from which it is a copy
STEPS = 6  # most calls of the model that a `ToolSolver` makes
NO_WORK, FAILED, ANSWER = "nothing yet", "Error:", r"\W*answer\W*:"  # parts of its work


class Lesson(BaseModel):
    """One lesson extracted from an attempt."""

    title: str
    description: str = Field(description="one sentence: when to use it, and when not")
    content: str = Field(description="one to three sentences: what to do")

    FORM: ClassVar[str] = (
        "Title: <a few words>\nWhen: <one sentence>\nLesson: <one to three sentences>"
    )

    def __str__(self) -> str:
        return f"Title: {self.title}\nWhen: {self.description}\nLesson: {self.content}"

    def strategy(self, problem: Problem, correct: bool, model: str, **origin) -> Strategy:
        """The lesson of an attempt at `problem`, as a bank keeps it; `origin` is the `extractor`
        and, while a bank is built, the `step`."""
        kind = "success" if correct else "failure"
        return Strategy.of(problem, **self.model_dump(), kind=kind, model=model, **origin)

    @classmethod
    def read(cls, text: str) -> list["Lesson"] | None:
        """Every lesson in `text` that has the requested form; None of none."""
        lessons = []
        for match in LESSON.finditer(text):
            title, when, lesson = (" ".join(part.strip(" *\n").split()) for part in match.groups())
            if title and lesson:
                lessons.append(cls(title=title, description=when, content=lesson))
        return lessons or None


class Solve(dspy.Signature):
    __doc__ = FORMAT_INSTRUCTION

    strategies: str = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Judge(dspy.Signature):
    """Check the solution of the problem step by step and say what is right or wrong in it. Then
    write on the last line whether its final answer is correct, as
    Correct: yes or no"""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    correct: bool = dspy.OutputField()


class Succeeded(dspy.Signature):
    """The solution of the problem is correct. First think about why. What did it do that would
    help with other problems of this kind, and when would it not? Do not repeat its numbers."""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    lessons: list[Lesson] = dspy.OutputField()


class Failed(dspy.Signature):
    """The solution of the problem is wrong. First think about why. What should be done otherwise
    with problems of this kind? Do not repeat its numbers."""

    question: str = dspy.InputField()
    solution: str = dspy.InputField()
    lessons: list[Lesson] = dspy.OutputField()


class Compare(dspy.Signature):
    """Several solutions of one problem, some correct and some wrong. What do the correct ones do
    that the wrong ones do not? Do not repeat their numbers."""

    question: str = dspy.InputField()
    solutions: str = dspy.InputField()
    lessons: list[Lesson] = dspy.OutputField()


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
    number: int = dspy.OutputField()


class Step(dspy.Signature):
    """Write the one arithmetic expression whose value answers the problem, or is the next step to
    it. Use numbers, + - * /, gcd(a, b) and lcm(a, b). Write nothing else; you are told the value.
    Where a value answers the problem, write
    Answer: <value>"""

    strategies: str = dspy.InputField()
    question: str = dspy.InputField()
    work: str = dspy.InputField(desc="what was calculated so far")
    step: str = dspy.OutputField()


def fault(lesson: Lesson, problem: Problem) -> str:
    """Why a lesson extracted from `problem` is rejected, "" if it is accepted."""
    words = _words(lesson.content)
    if len(words) < FEWEST:
        return "too few words"
    examples = [lesson for demo in _demos() for lesson in demo.lessons]
    overlaps = [_overlap(words, _words(example.content)) for example in examples]
    if len(title := _words(lesson.title)) >= FEWEST:
        overlaps += [_overlap(title, _words(example.title)) for example in examples]
    if max(overlaps) >= ALIKE:
        return "copy of the example in the prompt"
    if _overlap(words, _words(problem.question)) >= ALIKE:
        return "copy of the question"
    text = f"{lesson.title}. {lesson.description} {lesson.content}"
    if STATED.search(text) or leaks_answer(text, problem.answer, problem.question):
        return "states an answer"
    return ""


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W\d_]+", text.lower())}


def _overlap(one: set[str], other: set[str]) -> float:
    """Share of the words of the smaller set that the other has too."""
    return len(one & other) / max(1, min(len(one), len(other)))


def shown(strategies: Sequence[Strategy]) -> str:
    """Retrieved strategies as the text of a prompt, "" of none."""
    lines = [
        f"- {'Mistake to avoid' if s.kind == 'failure' else 'Strategy'}: {s.title}. {s.content}"
        for s in strategies
    ]
    return "\n".join([LEAD, *lines]) if lines else ""


class Program(dspy.Module):
    """A module whose replies that could not be read are counted: they lie in `unparsed`, and their
    fields are None."""

    def __init__(self):
        super().__init__()
        self.unparsed: list[str] = []

    def invoke(self, predict, seed: int | None = None, **inputs) -> dspy.Prediction:
        """One call of `predict`, whatever the adapter. Equal calls without a seed draw anew."""
        try:
            return predict(**inputs, config=_config(seed))
        except AdapterParseError as error:
            return self._unreadable(predict, error)

    async def ainvoke(self, predict, seed: int | None = None, **inputs) -> dspy.Prediction:
        """The same for `acall`."""
        try:
            return await predict.acall(**inputs, config=_config(seed))
        except AdapterParseError as error:
            return self._unreadable(predict, error)

    def _unreadable(self, predict, error: AdapterParseError) -> dspy.Prediction:
        self.unparsed.append(str(error.lm_response or ""))
        (inner,) = [each for _, each in predict.named_predictors()] or [predict]
        return dspy.Prediction(**dict.fromkeys(inner.signature.output_fields))


def _config(seed: int | None) -> dict:
    return {} if seed is None else {"seed": seed}


class Solver(Program):
    """Answers a question, given strategies."""

    def __init__(self):
        super().__init__()
        self.solve = dspy.Predict(Solve)

    def forward(self, question: str, strategies: str = "", seed: int | None = None):
        return self.invoke(self.solve, seed, question=question, strategies=strategies)

    async def aforward(self, question: str, strategies: str = "", seed: int | None = None):
        return await self.ainvoke(self.solve, seed, question=question, strategies=strategies)


class SelfJudge(Program):
    """A model's judgement of a solution, with its reasons first: True, False, or None where there
    is no verdict, which is not a "wrong"."""

    def __init__(self, max_tokens: int = 256):
        super().__init__()
        self.judge = dspy.Predict(Judge, temperature=0.0, max_tokens=max_tokens)

    def forward(self, question: str, solution: str):
        return self.invoke(self.judge, 0, question=question, solution=solution)

    async def aforward(self, question: str, solution: str):
        return await self.ainvoke(self.judge, 0, question=question, solution=solution)


class Extractor(Program):
    """Extracts lessons from one trajectory, or by contrast from several of one problem."""

    def __init__(self):
        super().__init__()
        self.succeeded, self.failed = dspy.Predict(Succeeded), dspy.Predict(Failed)
        self.compare = dspy.Predict(Compare)
        for predict, demo in zip((self.succeeded, self.failed, self.compare), _demos()):
            predict.demos = [demo]

    def forward(
        self, question: str, solutions: Sequence[tuple[str, bool]], seed: int | None = None
    ):
        """`solutions`: text and whether it is correct, of each trajectory."""
        predict, fields = self._choose_predictor(solutions)
        return self.invoke(predict, seed, question=question, **fields)

    async def aforward(
        self, question: str, solutions: Sequence[tuple[str, bool]], seed: int | None = None
    ):
        predict, fields = self._choose_predictor(solutions)
        return await self.ainvoke(predict, seed, question=question, **fields)

    def _choose_predictor(self, solutions):
        if len(solutions) == 1:
            ((text, correct),) = solutions
            return (self.succeeded if correct else self.failed), {"solution": text}
        marked = [f"[{'correct' if correct else 'wrong'}] {text}" for text, correct in solutions]
        return self.compare, {"solutions": "\n\n".join(marked)}


class ToolSolver(Program):
    """Answers a question with the calculator as a tool, in at most `steps` calls of the model.

    Each reply is one expression, and its value, or why it has none, is shown to the next call; the
    `answer` is all of this. `calls` counts the expressions, `errors` those without a value. This is
    ReAct (https://arxiv.org/abs/2210.03629) without its thoughts and names of tools, a form that a
    model of 135M parameters does not keep; a larger one may take `dspy.ReAct(Solve, [calculate])`.
    """

    def __init__(self, steps: int = STEPS):
        super().__init__()
        self.steps, self.step = steps, dspy.Predict(Step)
        self.step.demos = _calculated()

    def forward(self, question: str, strategies: str = "", seed: int | None = None):
        work = ""
        while not finished(work, self.steps):
            inputs = dict(question=question, strategies=strategies, work=work or NO_WORK)
            work = worked(work, self.invoke(self.step, seed, **inputs).step)
        return _used(work)

    async def aforward(self, question: str, strategies: str = "", seed: int | None = None):
        work = ""
        while not finished(work, self.steps):
            inputs = dict(question=question, strategies=strategies, work=work or NO_WORK)
            work = worked(work, (await self.ainvoke(self.step, seed, **inputs)).step)
        return _used(work)


def worked(work: str, reply: str | None) -> str:
    """The `work` of a `ToolSolver` with what the next reply adds: an expression and its value, an
    error, or the answer. A value that repeats the last one is the answer."""
    lines = [line for line in thoughtless(reply or "").splitlines() if line.strip()]
    first, done = lines[0].strip() if lines else "", work.splitlines()
    if re.match(ANSWER, first, re.IGNORECASE):
        return "\n".join([*done, first])
    expression = re.sub(r"^\W*[A-Za-z ]+:", "", first).partition("=")[0].strip()
    try:
        value = calculate(expression.lower())  # LCM(4, 6) is written as well
    except ExpressionError as error:
        return "\n".join([*done, f"{FAILED} {shorten(str(error), 60)}"])
    repeats = done and done[-1].endswith(f"= {value}")
    return "\n".join([*done, f"{expression} = {value}", *[f"Answer: {value}"] * bool(repeats)])


def answered(work: str) -> bool:
    """Whether the work ends in an answer."""
    lines = work.splitlines()
    return bool(lines and re.match(ANSWER, lines[-1], re.IGNORECASE))


def finished(work: str, steps: int) -> bool:
    """Whether the work ends in an answer or in two errors, or `steps` are used up."""
    lines = work.splitlines()
    failed = [line.startswith(FAILED) for line in lines[-2:]]
    return answered(work) or failed == [True, True] or len(lines) >= steps


def tool_calls(work: str) -> tuple[int, int]:
    """Calls of the calculator in the work, and those that it could not evaluate."""
    calls = [line for line in work.splitlines() if not re.match(ANSWER, line, re.IGNORECASE)]
    return len(calls), sum(line.startswith(FAILED) for line in calls)


def _used(work: str) -> dspy.Prediction:
    calls, errors = tool_calls(work)
    return dspy.Prediction(answer=work, calls=calls, errors=errors)


def numbered(texts: Sequence[str]) -> str:
    """Solutions numbered from 1, the form that `Choose` takes."""
    return "\n\n".join(f"[{i}] {text}" for i, text in enumerate(texts, 1))


def picked(reply: str, count: int) -> int:
    """Index of the solution that a reply to `Choose` names; 0 where it names none of `count`."""
    try:
        number = Lines().parse(Choose, reply)["number"]
    except AdapterParseError:
        return 0
    return number - 1 if 0 < number <= count else 0


def _demos() -> list[dspy.Example]:
    """One worked example per extraction signature, of a family that no problem set has."""
    right = "Each spider has 8 legs, so 3 spiders have 3 * 8 = 24 legs.\nAnswer: 24"
    wrong = "There are 3 spiders and 8 legs, so 3 + 8 = 11 legs.\nAnswer: 11"
    multiply = Lesson(
        title="Multiply equal groups",
        description="The same amount is there several times.",
        content="Name the size of one group and the number of groups, then multiply the two.",
    )
    added = Lesson(
        title="Do not add the number of groups to their size",
        description="The same amount is there several times.",
        content="Ask what one more group would change. If it adds its whole size, multiply.",
    )
    both = f"[correct] {right}\n\n[wrong] {wrong}"
    return [
        dspy.Example(question=SPIDERS, solution=right, lessons=[multiply]),
        dspy.Example(question=SPIDERS, solution=wrong, lessons=[added]),
        dspy.Example(question=SPIDERS, solutions=both, lessons=[multiply]),
    ]


def _calculated() -> list[dspy.Example]:
    """The worked example of a `ToolSolver`, step by step."""
    steps = [(NO_WORK, "8 * 3"), ("8 * 3 = 24", "Answer: 24")]
    return [dspy.Example(question=SPIDERS, work=work, step=step) for work, step in steps]


STATED = re.compile(r"\b(?:answer|result)\b[\s\W]*(?:is|was|=|:)?[\s\W]*-?\d", re.IGNORECASE)
