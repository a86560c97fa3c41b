"""Chat messages of the plain arms; an arm is one way of prompting, and one function.

Arms differ only in the factor that is compared: the text of the question is always the same. The
arms of other systems add retrieved memory; their control is `format_only`.
"""

from collections.abc import Callable, Iterable

from kit.schema import Problem, Prompt

# The format that the format arm requests, and that `Grade.compliant` checks in every arm.
FORM = "answer line"
FORMAT_INSTRUCTION = (
    "Think step by step, then write the final answer alone on the last line as\nAnswer: <answer>"
)


def plain(problem: Problem, thinking: bool = False) -> Prompt:
    """The question alone: the baseline."""
    return Prompt(problem, "plain", (("user", problem.question),), thinking)


def format_only(problem: Problem, thinking: bool = False) -> Prompt:
    """The question and a format instruction: the control of every memory arm."""
    text = f"{problem.question}\n\n{FORMAT_INSTRUCTION}"
    return Prompt(problem, "format", (("user", text),), thinking)


def build(arm: Callable[..., Prompt], problems: Iterable[Problem], thinking=False) -> list[Prompt]:
    """One prompt of `arm` per problem, in order."""
    return [arm(problem, thinking) for problem in problems]
