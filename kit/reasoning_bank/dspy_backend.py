"""DSPy on `kit.inference.decode`: a batching language model, and an adapter for small models.

DSPy calls a model once per prompt. `Engine` collects calls: inside `run_batched` a decoding starts
once every program that still runs waits for one, so that a hundred programs take as many decodings
as one of them makes calls, and the batches do not depend on the clock. DSPy's own cache knows only
the name of the model, so the name contains weights, dtype and memory.

`Lines` renders a signature as plain chat messages: instructions in the system message, the inputs
in the user message, and retrieved strategies at one of PLACES. A reply that cannot be parsed is
never requested again in another format; `programs.Program` counts it.

Interface: `dspy.lm15` of DSPy 3.4 (Request in, Response out), https://dspy.ai.
"""

import asyncio
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import chain
from typing import get_args, get_origin

import dspy
from dspy.adapters.utils import parse_value
from dspy.lm15 import Message, Request, Response, TextPart, Usage, response_to_events
from dspy.utils.exceptions import AdapterParseError

from kit.evaluation.evaluate import MemoryConfig
from kit.inference import decode
from kit.models.load import Model
from kit.schema import Problem, Prompt, Sampling, digest

GATHER_S = 0.02  # seconds that a call outside `run_batched` waits for others
logging.getLogger("dspy.clients.lm").setLevel(logging.ERROR)  # `Engine.truncated` counts them
# Where retrieved strategies stand: below the instructions, in the user message before or after the
# question, or as an earlier turn of the chat.
PLACES = ("system", "before", "after", "turns")
RECALL = "What do you know that may help with the next problem?"  # asks for them in "turns"
VERDICT = re.compile(r"\b(yes|no)\b(?=\W*(?:$|[,.;:!*\n]))", re.IGNORECASE)  # not "no errors"
REFUSED = ("response_format", "reasoning", "frequency_penalty", "presence_penalty")


class Engine:
    """Answers DSPy's requests with `model`, `batch_size` sequences at once.

    Counters: `calls` answered, `rounds` of decoding, `prompt_tokens`, `new_tokens`, and answers
    `truncated` at their token limit.
    """

    def __init__(
        self,
        model: Model,
        max_new_tokens: int = 256,
        batch_size: int = 64,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
        thinking: bool = False,
    ):
        self.model, self.max_new_tokens, self.thinking = model, max_new_tokens, thinking
        self.batch_size, self.memory = batch_size, memory
        self.calls = self.rounds = self.prompt_tokens = self.new_tokens = self.truncated = 0
        self._unseeded: Counter = Counter()  # requests without a seed
        self._waiting: list[tuple[Request, Future]] = []
        self._running: int | None = None  # programs inside `run_batched` that may still ask
        self._changed = threading.Condition()
        self._decoding = threading.Lock()

    @property
    def name(self) -> str:
        """The model string for DSPy: all that determines an answer except the request."""
        memory = digest(self.memory.key, 8)
        dtype = str(self.model.dtype).removeprefix("torch.")
        name = f"kit/{self.model.name}@{self.model.weights_hash}/{dtype}/{memory}"
        return f"{name}/thinking" if self.thinking else name

    def complete(self, request: Request) -> Response:
        """Answer one request in a batch with those that wait at the same time."""
        future: Future = Future()
        with self._changed:
            self._waiting.append((request, future))
            self._changed.notify_all()
        if self._running is None:
            self._gather()
        return future.result()

    def stream(self, request: Request) -> Iterator:
        return response_to_events(self.complete(request))

    def close(self) -> None:
        """Nothing to close: the engine borrows the model."""

    def run_batched(self, programs: list[Callable[[], object]]) -> list:
        """Run every program in a thread of its own and return their results or exceptions.

        A decoding starts when all programs that still run wait for one.
        """
        if not programs:
            return []
        with self._changed:
            if self._running is not None:
                raise RuntimeError(
                    "Engine.run_batched is running already; run one after the other."
                )
            self._running = len(programs)
        try:
            with ThreadPoolExecutor(len(programs)) as pool:
                futures = [pool.submit(copy_context().run, self._run, p) for p in programs]
                while True:
                    with self._changed:
                        self._changed.wait_for(lambda: len(self._waiting) >= self._running)
                        part, self._waiting = self._waiting, []
                        if not part and not self._running:
                            break
                    self._answer(part)
                return [future.exception() or future.result() for future in futures]
        finally:
            self._running = None

    def _run(self, program: Callable[[], object]):
        try:
            return program()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _gather(self) -> None:
        """Wait until no call has come for a while, then answer all that wait."""
        with self._changed:
            before = -1
            while before != len(self._waiting):
                before = len(self._waiting)
                self._changed.wait(GATHER_S)
        with self._decoding:
            with self._changed:
                part, self._waiting = self._waiting, []
            self._answer(part)  # nothing where another call has answered them all

    def _answer(self, part: list[tuple[Request, Future]]) -> None:
        """Decode the requests; those with equal sampling parameters form one queue."""
        queues: dict[Sampling, list] = {}
        for request, future in part:
            try:
                sampling, ids = self._read(request)
            except Exception as error:  # belongs to this caller only
                future.set_exception(error)
            else:
                queues.setdefault(sampling, []).append((ids, request, future))
        for sampling in sorted(queues, key=str):
            queue = sorted(queues[sampling], key=lambda entry: entry[0].problem_id)
            try:
                generations = decode.decode(
                    self.model,
                    [ids for ids, _, _ in queue],
                    sampling,
                    self.batch_size,
                    policy=self.memory.policy,
                    quantized=self.memory.quantized,
                )
            except Exception as error:
                for _, _, future in queue:
                    future.set_exception(error)
                continue
            self.rounds += 1
            for (_, request, future), generation in zip(queue, generations, strict=True):
                future.set_result(self._response(request, generation))

    def _read(self, request: Request) -> tuple[Sampling, decode.Request]:
        """Sampling parameters and prompt. Equal requests with equal seeds draw equal tokens;
        without a seed the second draws the second sample, as further rollouts of DSPy expect."""
        config = request.config
        refused = [name for name in REFUSED if getattr(config, name)]
        if refused or request.tools or config.stop:
            raise ValueError(
                f"The kit's engine takes no {', '.join(refused) or 'tools or stop strings'}; "
                f"leave it out."
            )
        messages = [(message.role, message.text or "") for message in request.messages]
        if request.system is not None:
            system = request.system
            text = system if isinstance(system, str) else "".join(part.text for part in system)
            messages.insert(0, ("system", text))
        sampling = Sampling(
            max_new_tokens=config.max_tokens or self.max_new_tokens,
            temperature=config.temperature or 0.0,
            top_p=config.top_p or 1.0,
            top_k=config.top_k or 0,
        )
        problem = Problem("", "", "", "", 0, "dspy")
        prompt = Prompt(problem, "dspy", tuple(messages), self.thinking)
        ids = decode.tokenize(self.model, prompt)
        name, sample = json.dumps([prompt.id, config.seed]), 0
        if config.seed is None:
            sample = self._unseeded[name, sampling]
            self._unseeded[name, sampling] += 1
        return sampling, decode.Request(ids, name, sample)

    def _response(self, request: Request, generation) -> Response:
        self.calls += 1
        self.prompt_tokens += generation.prompt_tokens
        self.new_tokens += generation.new_tokens
        self.truncated += generation.finish == "length"
        usage = dict(input_tokens=generation.prompt_tokens, output_tokens=generation.new_tokens)
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant([TextPart(generation.text)]),
            finish_reason=generation.finish,
            usage=Usage(**usage, total_tokens=sum(usage.values())),
        )


class AsyncEngine:
    """The engine for `acall` of DSPy: each request waits in a thread, so that all share batches."""

    def __init__(self, engine: Engine):
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        return await asyncio.to_thread(self.engine.complete, request)

    async def stream(self, request: Request):
        for event in response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        """Nothing to close: the engine borrows the model."""


def language_model(engine: Engine, **settings) -> dspy.LM:
    """`dspy.LM` over the engine; `settings` as temperature and max_tokens are its defaults."""
    both = {"engine": engine, "async_engine": AsyncEngine(engine)}
    return dspy.LM(engine.name, **both | {"cache": False, "num_retries": 0} | settings)


class Lines(dspy.Adapter):
    """Renders a signature as plain chat messages, and reads plain replies.

    A reply to several output fields names each on a line of its own. Where one cannot be read as
    its type, AdapterParseError is raised, as by DSPy's own adapters, and the call is not repeated.
    `place` is where strategies stand, one of PLACES.
    """

    def __init__(self, place: str = "system"):
        super().__init__()
        if place not in PLACES:
            raise ValueError(f"No place {place!r} for strategies; it is one of {PLACES}.")
        self.place = place

    def format(self, signature, demos, inputs) -> list[dict]:
        """System: instructions. Demos as earlier turns. User: the inputs. Strategies at `place`."""
        outputs, recalled = signature.output_fields, []
        system = "\n\n".join([signature.instructions.strip(), *_forms(outputs)])
        user = _user(signature, inputs)
        if strategies := inputs.get("strategies"):
            if self.place == "system":
                system += f"\n\n{strategies}"
            elif self.place == "before":
                user = f"{strategies}\n\n{user}"
            elif self.place == "after":
                user += f"\n\n{strategies}"
            else:
                recalled = [("user", RECALL), ("assistant", strategies)]
        whole = [demo for demo in demos if {*outputs} <= {*demo.keys()}]
        messages = [(("user", _user(signature, demo)), ("assistant", _reply(outputs, demo)))
                 for demo in whole]  # fmt: skip
        turns = [("system", system), *chain(*messages), *recalled, ("user", user)]
        return [{"role": role, "content": content} for role, content in turns]

    def format_user_message_content(self, signature, inputs, *parts, **more) -> str:
        """The inputs alone: how `dspy.ReAct` writes down its steps."""
        return _user(signature, inputs)

    def parse(self, signature, completion: str) -> dict:
        """The output fields, each read as its type."""
        fields = signature.output_fields
        parts = _parts([*fields], completion)
        values = {name: _read(parts.get(name, ""), field.annotation)
                  for name, field in fields.items()}  # fmt: skip
        if None in values.values():
            raise AdapterParseError("Lines", signature, completion)
        return values


def _forms(outputs) -> list[str]:
    """The form of each output field that is not one plain text."""
    written = [_model(field.annotation).FORM for field in outputs.values()
               if _model(field.annotation)]  # fmt: skip
    if len(outputs) > 1:
        lines = "\n".join(f"{_label(name)}: <{name}>" for name in outputs)
        return [f"Write\n\n{lines}", *written]
    return [f"Write\n\n{form}" for form in written]


def _model(kind):
    """The type of the items of a list field that has a plain form: FORM and `read`."""
    items = get_args(kind) if get_origin(kind) is list else ()
    return items[0] if items and hasattr(items[0], "FORM") else None


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _parts(names: list[str], completion: str) -> dict[str, str]:
    """The text of each field: all of it for one, else what follows its label. What precedes every
    label belongs to the first field."""
    if len(names) == 1:
        return {names[0]: completion}
    labels = "|".join(re.escape(_label(name)) for name in names)
    pieces = re.split(rf"^\W*({labels})\W*:", completion, flags=re.MULTILINE | re.IGNORECASE)
    parts = {names[0]: pieces[0]} if pieces[0].strip() else {}
    for label, text in zip(pieces[1::2], pieces[2::2], strict=True):
        (name,) = [name for name in names if _label(name).lower() == label.lower()]
        parts[name] = text.strip(" *\n")
    return parts


def _reply(outputs, demo) -> str:
    """The reply of a worked example."""
    texts = {name: _text(demo[name], field.annotation) for name, field in outputs.items()}
    if len(texts) == 1:
        return texts.popitem()[1]
    return "\n".join(f"{_label(name)}: {text}" for name, text in texts.items())


def chat_messages(
    signature, *demos, place: str = "system", **inputs
) -> tuple[tuple[str, str], ...]:
    """The messages that `Lines` renders of a signature, as (role, text) pairs of a `Prompt`."""
    messages = Lines(place).format(signature, demos, inputs)
    return tuple((message["role"], message["content"]) for message in messages)


def _user(signature, inputs) -> str:
    """The inputs of the user message; a single input stands without its name."""
    fields = {k: inputs[k] for k in signature.input_fields if k != "strategies" and k in inputs}
    if len(fields) == 1:
        return str(*fields.values())
    return "\n\n".join(f"{name.capitalize()}:\n{value}" for name, value in fields.items())


def _text(value, kind) -> str:
    if model := _model(kind):
        return "\n\n".join(str(model.model_validate(item)) for item in value)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def thoughtless(completion: str) -> str:
    """What a reply says beside thoughts, also those that were broken off."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def _read(completion: str, kind):
    """The reply as `kind`, None where it says none or several; what was thought is no reply, nor
    are thoughts that were broken off."""
    text = thoughtless(completion)
    if model := _model(kind):
        return model.read(text)
    if kind in (bool, bool | None):
        first = re.finditer(r"^\W*(yes|no)\b", text, re.IGNORECASE)
        matches = [*VERDICT.finditer(text)] or [*first]
        return matches[-1][1].lower() == "yes" if matches else None
    if kind in (int, int | None):
        first, numbers = re.match(r"\W*(\d{1,9})\b", text), {*re.findall(r"\d+", text)}
        number = first[1] if first else numbers.pop() if len(numbers) == 1 else ""
        return int(number) if 0 < len(number) < 10 else None
    if kind in (str, str | None):
        return completion.strip() or None
    try:
        return parse_value(text.strip(), kind)
    except (ValueError, SyntaxError):  # pydantic's, and of what is no literal
        return None
