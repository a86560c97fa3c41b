"""Protocols of the strategy study: the kit's own, and those that were published.

A protocol says all that a profile's sizes do not: instruction, thinking, temperatures, where memory
stands, what is retrieved and how, what a bank is written by, how often it is drawn.

Sources: reasoning-bank-slm at f25696b (src/llm_client.py, src/extraction/extractor.py,
src/judge/evaluator.py and its README); ReasoningBank, https://arxiv.org/abs/2509.25140, Sections 3
and 4 and appendix A. Instructions are worded anew.
"""

import re
from dataclasses import dataclass, replace

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.reasoning_bank.build import WIDTH, BankBuildConfig
from kit.reasoning_bank.dspy_backend import PLACES
from kit.reasoning_bank.programs import ITEMS
from kit.schema import Sampling

BOTH = (
    "Solve the problem step by step. Write\nREASONING: <the steps of your calculation>\n"
    "ANSWER: <only the final answer, a number>"
)


@dataclass(frozen=True)
class Protocol:
    """The settings of a study besides its sizes; the defaults are the kit's own choices."""

    instruction: str = FORMAT_INSTRUCTION  # of all arms but the plain one
    thinking: bool = False
    temperature: float = 0.2  # of all answers to test problems
    place: str = ""  # of memory; "" is where the positive control finds it read best
    k: int = 2  # strategies in a prompt; past problems where `key` is "question"
    key: str = "text"  # what retrieval compares, see `ReasoningBank.retrieve`
    embedded: str = "text"  # of a strategy, see `ReasoningBank`
    families: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # of training, of test; () is all
    solve_temperature: float = 0.7  # of attempts on training problems
    extract_temperature: float = 0.7
    extract_tokens: int = 160
    judge_tokens: int = 160
    corrected: bool = False  # whether who learns from a failure is told the right answer
    group: int = 16  # problems of the streaming loop between two additions; 1 is after every task
    widths: tuple[int, ...] = (WIDTH,)  # of MaTTS; several are a curve, with one without memory
    sweep: tuple[int, ...] = (1, 4)  # of k
    draws: int = 3  # banks, each of its own seed, where there are further arms
    graded: bool = False  # by `published_grade` too

    @property
    def places(self) -> tuple[str, ...]:
        """The places among which the positive control chooses."""
        return (self.place,) if self.place else PLACES

    @property
    def lessons(self) -> int:
        """Most strategies in a prompt."""
        return self.k * (ITEMS if self.key == "question" else 1)

    @property
    def retrieval(self) -> dict:
        """Arguments of `build.retrieved`."""
        return {"k": self.k, "key": self.key}

    @property
    def wording(self) -> dict:
        """Arguments of `build.with_instruction`."""
        return {"instruction": self.instruction, "thinking": self.thinking}

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How answers to test problems are sampled."""
        return Sampling(max_new_tokens, self.temperature, top_p=0.95)

    def choice(self, max_new_tokens: int) -> Sampling:
        """How a choice among several answers is sampled: its number, after any thoughts."""
        return Sampling(max_new_tokens if self.thinking else 8)

    def bank(self, judge: str, solve_tokens: int, place: str) -> BankBuildConfig:
        """How the bank is built from training problems."""
        same = ("extract_temperature", "extract_tokens", "judge_tokens", "corrected", "embedded")
        own = {name: getattr(self, name) for name in same} | self.wording
        own |= {"temperature": self.solve_temperature, "place": place}
        return BankBuildConfig(judge=judge, solve_tokens=solve_tokens, **own)


# Qwen3-1.7B thinks unless told not to. The bank is of Algebra, the test of Intermediate Algebra;
# at most three lessons of a problem, in 2,048 tokens (thoughts included).
SLM = Protocol(
    instruction=BOTH,
    thinking=True,
    temperature=0.1,
    place="system",
    embedded="summary",
    families=(("algebra",), ("intermediate_algebra",)),
    solve_temperature=0.1,
    extract_temperature=0.1,
    extract_tokens=2048,
    corrected=True,
    graded=True,
)
PROTOCOLS = {
    "kit": Protocol(),
    "reasoning-bank-slm": SLM,
    "reasoning-bank-slm-all": replace(SLM, families=((), ())),  # of all subjects
    # The agent answers at 0.7, the judge at 0, the extractor at 1.0; one past experience with all
    # its lessons, found by its task; what was learnt is appended after every task.
    "reasoningbank": Protocol(
        thinking=True,
        temperature=0.7,
        place="system",
        k=1,
        key="question",
        extract_temperature=1.0,
        extract_tokens=2048,
        judge_tokens=2048,
        group=1,
        widths=(1, 2, 3, 4, 5),
        sweep=(1, 2, 3, 4),
    ),
}


def load(name: str) -> Protocol:
    """A protocol by its name; ValueError for another one."""
    if name not in PROTOCOLS:
        raise ValueError(f"No protocol {name!r}; there are {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def published_grade(text: str, answer: str) -> bool:
    """Whether the grader of reasoning-bank-slm calls a reply right, with its faults: a boxed answer
    ends at the first closing brace, and what is no number by itself counts as its last one."""
    if "REASONING:" in text and "ANSWER:" in text:
        answer_text = text.split("ANSWER:")[1].strip()
    else:
        answer_text = ["", *re.findall(r"-?\d+\.?\d*", text)][-1]
    gold = answer.partition("}")[0]
    one, other = _number(answer_text), _number(gold)
    if one is None or other is None:
        return _plain(answer_text) == _plain(gold)
    return abs(one - other) < 0.01


def _number(text: str) -> float | None:
    """The boxed number in a text, a fraction, or the last number."""
    boxed = re.search(r"\\boxed\{([^}]+)\}", text)
    if boxed or text.count("/") == 1:
        return _value(boxed[1] if boxed else text)
    numbers = re.findall(r"[-+]?\d{1,3}(?:,\d{3})*(?:\.\d+)?", text)
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> float | None:
    parts = re.sub(r"[\\$,%]", "", text).split("/")
    try:
        over, under = map(float, parts if len(parts) == 2 else ("/".join(parts), 1))
        return over / under
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[\\${}]", "", text.lower()).split())
