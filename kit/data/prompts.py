"""The only place that builds chat messages: one function per arm.

An arm is a way of asking. Arms differ only in what is compared; the question itself is
always the same text. Later arms add retrieved memory; their control is `format_only`.
"""

from collections.abc import Callable, Iterable

from kit.schema import Problem, Prompt

# What the format arm asks for and what `Grade.compliant` checks, in both arms.
FORM = "answer line"
FORMAT_INSTRUCTION = (
    "Think step by step, then write the final answer alone on the last line as\nAnswer: <answer>"
)


def plain(problem: Problem, thinking: bool = False) -> Prompt:
    """The question and nothing else: the baseline."""
    return Prompt(problem, "plain", (("user", problem.question),), thinking)


def format_only(problem: Problem, thinking: bool = False) -> Prompt:
    """The question and a format instruction: the control that every memory arm must beat."""
    text = f"{problem.question}\n\n{FORMAT_INSTRUCTION}"
    return Prompt(problem, "format", (("user", text),), thinking)


def build(arm: Callable[..., Prompt], problems: Iterable[Problem], thinking=False) -> list[Prompt]:
    """One prompt of `arm` per problem, in order."""
    return [arm(problem, thinking) for problem in problems]
