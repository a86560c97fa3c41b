"""The nouns: what flows from a question to a graded record.

Problem -> Prompt -> Generation -> Grade -> Record. All frozen; a step returns a new
object. Units stand in the field names: tokens, bytes, seconds.
"""

import hashlib
import json
from dataclasses import dataclass

ASKS = ("any", "evaluated", "simplified", "factored")  # a value, or a value in a form
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
    asks: str = "any"  # form that its answer must have, one of ASKS


@dataclass(frozen=True)
class Prompt:
    """Chat messages for one problem under one arm."""

    problem: Problem
    arm: str  # "plain", "format", ...
    messages: tuple[tuple[str, str], ...]  # (role, content) in order
    thinking: bool = False  # passed to chat templates that know enable_thinking
    retrieved: tuple[str, ...] = ()  # ids of the strategies shown
    refused: int = 0  # strategies that the guard of the bank kept back

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def id(self) -> str:
        """Hash of all that the model will see of this prompt."""
        return digest([self.problem.source, self.problem.id, self.messages, self.thinking])


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    seed: int = 0  # run seed; each sample derives its own from (problem, sample, seed)


@dataclass(frozen=True)
class Generation:
    """What one sequence cost and said."""

    text: str
    token_ids: tuple[int, ...]  # new tokens, without the stop token
    prompt_tokens: int
    new_tokens: int  # tokens generated, the stop token included
    finish: str  # "stop" or "length"
    seconds: float  # from its prefill to its last token, shared with its batch
    kv_reads_tokens: float  # sum over steps of live KV entries attended, mean over layers and heads
    kv_peak_tokens: float  # largest number of live KV entries, mean over layers and heads
    kv_peak_bytes: int  # the same in bytes, summed over layers and heads
    joules: float = 0.0  # its new tokens' share of what the devices drew; 0 where none counts
    forced: tuple["Generation | None", ...] = ()  # at each cut, None where it had ended before
    stop_id: int | None = None  # the token that ended it


@dataclass(frozen=True)
class Grade:
    """Verdict of the one grader on one text."""

    correct: bool
    extracted: str  # the answer that was found, "" when none
    reason: str  # "equal", "different", "no answer", "timeout", "memory", ...
    method: str  # where the answer was found: "boxed", "answer line", "last number", "none"
    compliant: bool  # the text follows the requested format, right or wrong


@dataclass(frozen=True)
class Record:
    """One row of the run store: everything known about one sample."""

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
    refused: int = 0  # strategies kept back because they would have given something away
    joules: float = 0.0  # its new tokens' share of what the devices drew; 0 where none counts
    dtype: str = ""  # of the weights that decoded it, one of DTYPES; "" in records of before
    asks: str = "any"  # form that the answer must have, as in Problem
