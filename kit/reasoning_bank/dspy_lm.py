"""A language model for DSPy over `kit.inference.decode`: concurrent calls are decoded as one queue.

DSPy calls a model once per prompt. Here a call waits for its fellows: inside `together` until
every program that still runs has asked, so that a hundred programs take as many decodings as one
of them makes calls, and which prompts are decoded together does not depend on the clock.
DSPy's own cache knows the model's name only, hence the name says weights, dtype and memory.

Source of the contract: DSPy 3.4, `dspy.lm15` (Request in, Response out).
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage, response_to_events

from kit.evaluation.evaluate import Memory
from kit.inference import decode
from kit.models.load import Model
from kit.schema import Problem, Prompt, Sampling, digest

GATHER_S = 0.02  # how long a call outside `together` waits for others
logging.getLogger("dspy.clients.lm").setLevel(logging.ERROR)  # `Engine.cut` counts cut answers
REFUSED = ("response_format", "reasoning", "frequency_penalty", "presence_penalty")


class Engine:
    """Answers DSPy's requests with `model`, `batch_size` sequences at once.

    `calls`, `rounds`, `prompt_tokens` and `new_tokens` count what was asked and decoded; `cut`
    the answers that reached their limit of tokens.
    """

    def __init__(
        self,
        model: Model,
        max_new_tokens: int = 256,
        batch_size: int = 64,
        memory: Memory = Memory(),  # noqa: B008 (frozen)
    ):
        self.model, self.max_new_tokens = model, max_new_tokens
        self.batch_size, self.memory = batch_size, memory
        self.calls = self.rounds = self.prompt_tokens = self.new_tokens = self.cut = 0
        self._waiting: list[tuple[Request, Future]] = []
        self._running: int | None = None  # programs inside `together` that may still ask
        self._changed = threading.Condition()
        self._decoding = threading.Lock()

    @property
    def name(self) -> str:
        """The model string for DSPy: all that determines an answer but the request."""
        memory = digest(self.memory.key, 8)
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"kit/{self.model.name}@{self.model.weights_hash}/{dtype}/{memory}"

    def complete(self, request: Request) -> Response:
        """Answer one request, together with those that wait at the same time."""
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

    def together(self, programs: list[Callable[[], object]]) -> list:
        """Run every program in a thread of its own; their results, or the exceptions they raised.

        A decoding starts when all that still run are waiting for one.
        """
        if not programs:
            return []
        with self._changed:
            if self._running is not None:
                raise RuntimeError("Engine.together is running already; run one after the other.")
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
        """Decode what was asked, requests of equal sampling as one queue."""
        queues: dict[Sampling, list] = {}
        for request, future in part:
            try:
                sampling, asked = self._read(request)
            except Exception as error:  # the caller's, not its neighbours'
                future.set_exception(error)
            else:
                queues.setdefault(sampling, []).append((asked, request, future))
        for sampling in sorted(queues, key=str):
            queue = sorted(queues[sampling], key=lambda entry: entry[0].problem_id)
            try:
                done = decode.decode(
                    self.model,
                    [asked for asked, _, _ in queue],
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
            for (_, request, future), generation in zip(queue, done, strict=True):
                future.set_result(self._response(request, generation))

    def _read(self, request: Request) -> tuple[Sampling, decode.Request]:
        """How to draw, and what to continue. The same request with the same seed draws the same."""
        config = request.config
        asked = [name for name in REFUSED if getattr(config, name)]
        if asked or request.tools or config.stop:
            raise ValueError(
                f"The kit's engine takes no {', '.join(asked) or 'tools or stop strings'}; "
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
        prompt = Prompt(Problem("", "", "", "", 0, "dspy"), "dspy", tuple(messages))
        ids = decode.tokenize(self.model, prompt)
        return sampling, decode.Request(ids, json.dumps([prompt.id, config.seed]))

    def _response(self, request: Request, generation) -> Response:
        self.calls += 1
        self.prompt_tokens += generation.prompt_tokens
        self.new_tokens += generation.new_tokens
        self.cut += generation.finish == "length"
        usage = dict(input_tokens=generation.prompt_tokens, output_tokens=generation.new_tokens)
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant([TextPart(generation.text)]),
            finish_reason=generation.finish,
            usage=Usage(**usage, total_tokens=sum(usage.values())),
        )


def language_model(engine: Engine, **settings) -> dspy.LM:
    """`dspy.LM` over the engine; `settings` as temperature and max_tokens are its defaults."""
    return dspy.LM(engine.name, engine=engine, **{"cache": False, "num_retries": 0} | settings)
