"""The data types of the pipeline, from a question to a graded record.

Problem -> Prompt -> Generation -> Grade -> Record. All are frozen; each step returns a new object.
Field names carry the units: tokens, bytes, seconds.
"""

import hashlib
import json
from dataclasses import dataclass

ASKS = ("any", "evaluated", "simplified", "factored")  # any form, or a required one
DIGITS = 12  # of a stored float: the low bits differ between machines and mean nothing
DTYPES = ("float32", "bfloat16", "float16", "float64")  # that weights are loaded as


def digest(value, length: int = 64) -> str:
    """SHA-256 of the canonical JSON of `value`, first `length` hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer."""

    id: str  # unique inside its problem set
    question: str
    answer: str  # gold answer, plain text or LaTeX without \boxed
    family: str  # task family or subject
    level: int  # difficulty, 1 is easiest; 0 where the source gives none
    source: str  # name of the problem set, for example "math" or "laptop"
    asks: str = "any"  # required form of the answer, one of ASKS


@dataclass(frozen=True)
class Prompt:
    """Chat messages for one problem under one arm."""

    problem: Problem
    arm: str  # "plain", "format", ...
    messages: tuple[tuple[str, str], ...]  # (role, content) in order
    thinking: bool = False  # passed as enable_thinking to chat templates that support it
    retrieved: tuple[str, ...] = ()  # ids of the strategies shown
    refused: int = 0  # strategies filtered by the leakage guard

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages in the form that chat templates take."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def id(self) -> str:
        """Hash of everything in this prompt that the model sees."""
        return digest([self.problem.source, self.problem.id, self.messages, self.thinking])


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    seed: int = 0  # run seed; each sample derives its own from (problem, sample, seed)


@dataclass(frozen=True)
class Generation:
    """Text and cost of one generated sequence."""

    text: str
    token_ids: tuple[int, ...]  # new tokens, without the stop token
    prompt_tokens: int
    new_tokens: int  # tokens generated, the stop token included
    finish: str  # "stop" or "length"
    seconds: float  # from prefill to the last token; the batch shares this time
    kv_reads_tokens: float  # sum over steps of live KV entries attended, mean over layers and heads
    kv_peak_tokens: float  # largest number of live KV entries, mean over layers and heads
    kv_peak_bytes: int  # the same in bytes, summed over layers and heads
    joules: float = 0.0  # energy of its new tokens, a share of the batch's; 0 without counters
    forced: tuple["Generation | None", ...] = ()  # per forced budget, None if it ended before
    stop_id: int | None = None  # the token that ended it


@dataclass(frozen=True)
class Grade:
    """Verdict of the grader on one text."""

    correct: bool
    extracted: str  # the extracted answer, "" if there is none
    reason: str  # "equal", "different", "no answer", "timeout", "memory", ...
    method: str  # where it was extracted from: "boxed", "answer line", "last number", "none"
    compliant: bool  # the text follows the requested format, right or wrong
    grade_version: int = 0  # `kit.evaluation.grader.GRADE_VERSION` of the grader


@dataclass(frozen=True)
class Record:
    """One row of the run store: everything recorded about one sample."""

    key: str  # hash of all that determines the tokens and the grade
    generation_key: str  # hash of all that determines the tokens
    model: str
    weights_hash: str
    arm: str
    policy: str
    source: str
    problem_id: str
    family: str
    level: int
    sample: int
    seed: int
    temperature: float
    question: str
    answer: str
    prompt_id: str
    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    kv_reads_tokens: float
    kv_peak_tokens: float
    kv_peak_bytes: int
    correct: bool
    extracted: str
    reason: str
    method: str
    compliant: bool
    retrieved: str = ""  # ids of the strategies in the prompt, joined by spaces
    refused: int = 0  # strategies filtered by the leakage guard
    joules: float = 0.0  # energy of its new tokens; 0 without counters
    dtype: str = ""  # of the weights, one of DTYPES; "" in records of older kits
    asks: str = "any"  # required form of the answer, as in Problem
    grade_version: int = 0  # as in Grade; 0 in records of older kits
