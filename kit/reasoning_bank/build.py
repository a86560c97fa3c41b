"""The loop that fills a bank: retrieve, solve, judge, extract, append.

Problems go through it in groups of fixed size. What a group learnt is added in one commit and
tagged `step-N`; a killed build goes on at the first group without a tag and ends with the same
bank, because which prompts are decoded together depends on the group only.

What each step cost and judged stands in the table "steps" beside the bank's.

Offline, as reasoning-bank-slm did it: nothing retrieved, judged by the gold answers, one pass over
training problems, then frozen. Streaming, as ReasoningBank did it: judged by the model itself,
each group solved with what the groups before it learnt.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import dspy
import pandas
import pyarrow

from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.inference.decode import DECODE_VERSION
from kit.models.embedder import Embedder
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.dspy_backend import Engine, Lines, chat_messages, language_model
from kit.reasoning_bank.programs import Extractor, SelfJudge, Solve, lessons, shown
from kit.reasoning_bank.strategy import RetrievalResult, Strategy
from kit.schema import Problem, Prompt, Sampling, digest

JUDGES = ("gold", "self")
WIDTH = 3  # trajectories, or self-checks, of MaTTS where nothing else is said
STEP = pyarrow.schema(
    [
        ("step", pyarrow.int64()),
        ("lessons", pyarrow.int64()),
        ("unread", pyarrow.int64()),  # replies without what was asked for
        ("prompt_tokens", pyarrow.int64()),
        ("new_tokens", pyarrow.int64()),
        ("seconds", pyarrow.float64()),
        ("judged", pyarrow.list_(pyarrow.bool_())),  # of the attempts, by record key
    ]
)


@dataclass(frozen=True)
class BankBuildConfig:
    """How a bank is built."""

    judge: str = "gold"  # "gold": the grader; "self": the model's own opinion, without labels
    k: int = 0  # retrieved while building; 0 is offline
    key: str = "question"  # what retrieval compares, see ReasoningBank.retrieve
    width: int = 1  # trajectories per problem; from 2 on they are contrasted (parallel MaTTS)
    temperature: float = 0.7  # of solving
    solve_tokens: int = 128
    extract_temperature: float = 0.7
    extract_tokens: int = 160
    group: int = 32  # problems between two commits

    def __post_init__(self):
        if self.judge not in JUDGES or min(self.width, self.group) < 1 or self.k < 0:
            raise ValueError(
                f"judge is {self.judge!r}, width {self.width}, group {self.group}, k {self.k}; "
                f"judge is one of {JUDGES}, width and group at least 1, k at least 0."
            )


def build_bank(
    folder,
    engine: Engine,
    embedder: Embedder,
    problems: Sequence[Problem],
    store: Store,
    config: BankBuildConfig,
) -> tuple[ReasoningBank, pandas.DataFrame]:
    """The bank of `config` in a folder of `folder` named by all that determines it, and what
    `learn` gives."""
    programs = [Extractor().dump_state(), SelfJudge().dump_state(), DECODE_VERSION]
    parts = [engine.name, engine.batch_size, embedder.fingerprint, asdict(config), *programs]
    name = digest([*parts, [problem.id for problem in problems]], 12)
    bank = ReasoningBank(f"{folder}/{name}", embedder)
    return bank, fill_bank(bank, engine, problems, store, config)


def fill_bank(
    bank: ReasoningBank,
    engine: Engine,
    problems: Sequence[Problem],
    store: Store,
    config: BankBuildConfig = BankBuildConfig(),  # noqa: B008 (frozen)
    report: Callable[[str], None] = print,
) -> pandas.DataFrame:
    """Fill `bank` from `problems`; records of the attempts with a column `judged` (True, False or
    None where the judgement could not be read) come back."""
    adapter, frames = Lines(), []
    groups = [problems[i : i + config.group] for i in range(0, len(problems), config.group)]
    with dspy.context(lm=language_model(engine, temperature=config.temperature), adapter=adapter):
        if "start" not in bank.tags():
            bank.tag("start")
        done, tags = steps(bank).set_index("step")["judged"].to_dict(), bank.tags()
        for step, group in enumerate(groups):
            began, asked, unread = time.perf_counter(), _tokens(engine), len(adapter.failed)
            known = bank.checkout(_tag(step - 1)) if config.k else bank
            frame = _solve(known, engine, group, store, config)
            frames.append(frame)
            if _tag(step) in tags:
                frame["judged"] = list(done[step])
                continue
            frame["judged"] = _judge(engine, frame, config)
            new = bank.add(_extract(engine, group, frame, config, step))
            cost = {"seconds": time.perf_counter() - began, "unread": len(adapter.failed) - unread}
            cost |= {name: now - asked[name] for name, now in _tokens(engine).items()}
            _note(bank, {"step": step, "judged": frame["judged"].tolist(), "lessons": new} | cost)
            bank.tag(_tag(step))
            said = f", {cost['unread']} replies unread" if cost["unread"] else ""
            report(f"step {step + 1}/{len(groups)}: {new} lessons, {len(bank)} in all{said}")
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()


def solve_prompt(
    problem: Problem,
    arm: str,
    memory: str = "",
    retrieval: RetrievalResult = RetrievalResult((), (), {}),  # noqa: B008
) -> Prompt:
    """The question under the instructions of `programs.Solve`, with `memory` below them.

    `retrieval` is where `memory` comes from: its ids and the number that the leakage guard filtered
    stand in the prompt.
    """
    messages = chat_messages(Solve, strategies=memory, question=problem.question)
    ids = tuple(item.id for item in retrieval.strategies)
    return Prompt(problem, arm, messages, retrieved=ids, refused=len(retrieval.filtered))


def format_only(problems: Sequence[Problem]) -> list[Prompt]:
    """The same instructions without memory: the control of retrieved strategies."""
    return [solve_prompt(problem, "format-only") for problem in problems]


def retrieved(
    bank: ReasoningBank, problems: Sequence[Problem], k: int = 2, arm: str = "retrieved", **how
) -> list[Prompt]:
    """Prompts with the strategies of `bank.retrieve(problem, k, **how)`."""
    prompts = []
    for problem in problems:
        retrieval = bank.retrieve(problem, k, **how)
        prompts.append(solve_prompt(problem, arm, shown(retrieval.strategies), retrieval))
    return prompts


def steps(bank: ReasoningBank) -> pandas.DataFrame:
    """One row per step of `learn`: lessons, judgements of its attempts, its seconds, and the tokens
    of judging and extracting (those of the attempts stand in their records)."""
    if "steps" not in bank.database.list_tables().tables:
        return pandas.DataFrame({name: [] for name in STEP.names})
    found = bank.database.open_table("steps").to_pandas()
    return found.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def _note(bank: ReasoningBank, row: dict) -> None:
    table = bank.database.create_table("steps", schema=STEP, exist_ok=True)
    table.add(pyarrow.Table.from_pylist([row], schema=STEP))


def _tokens(engine: Engine) -> dict[str, int]:
    return {"prompt_tokens": engine.prompt_tokens, "new_tokens": engine.new_tokens}


def _tag(step: int) -> str:
    return f"step-{step:04}" if step >= 0 else "start"


def _solve(
    bank: ReasoningBank, engine: Engine, group, store: Store, config: BankBuildConfig
) -> pandas.DataFrame:
    if config.k:
        prompts = retrieved(bank, group, config.k, arm="streaming", key=config.key)
    else:
        prompts = format_only(group)
    sampling = Sampling(config.solve_tokens, config.temperature, top_p=0.95)
    return evaluate(
        engine.model, prompts, sampling, store, config.width, engine.batch_size,
        report=lambda line: None, memory=engine.memory,
    )  # fmt: skip


def _judge(engine: Engine, frame: pandas.DataFrame, config: BankBuildConfig) -> list[bool | None]:
    if config.judge == "gold":
        return frame["correct"].tolist()
    judge = SelfJudge()
    asked = [partial(judge, question=r.question, solution=r.text) for r in frame.itertuples()]
    return [_got(result).correct for result in engine.run_batched(asked)]


def _extract(engine: Engine, group, frame, config: BankBuildConfig, step: int) -> list[Strategy]:
    """What each problem of the group taught; nothing where no judgement could be read."""
    extractor, asked, about = Extractor(), [], []
    for problem in group:
        mine = frame[(frame["problem_id"] == problem.id) & frame["judged"].notna()]
        tried = [(row.text, bool(row.judged)) for row in mine.itertuples()]
        if tried:
            asked.append(partial(extractor, problem.question, tried, seed=step))
            about.append((problem, any(correct for _, correct in tried)))
    made_by = digest([extractor.dump_state(), config.extract_tokens], 12)
    with dspy.context(
        lm=language_model(
            engine, temperature=config.extract_temperature, max_tokens=config.extract_tokens
        )
    ):
        results = engine.run_batched(asked)
    return [
        Strategy(
            **lesson,
            kind="success" if correct else "failure",
            problem_id=problem.id,
            family=problem.family,
            level=problem.level,
            question=problem.question,
            model=f"{engine.model.name}@{engine.model.weights_hash}",
            extractor=made_by,
            step=step,
        )
        for (problem, correct), result in zip(about, results, strict=True)
        for lesson in lessons(_got(result).lessons)
    ]


def _got(result):
    """A program's result; what it raised is raised."""
    if isinstance(result, BaseException):
        raise result
    return result
