"""Builds a bank: retrieve, solve, judge, extract, append.

Problems are processed in groups of fixed size. The strategies of a group are added in one commit
and tagged `step-N`; a killed build continues at the first group without a tag and ends with the
same bank, since the decoding batches depend on the group only. The table "steps" beside that of the
bank holds the cost and the judgements of each step.

Offline, as in reasoning-bank-slm: no retrieval, judged by the gold answers, one pass over training
problems, then frozen. Streaming, as in ReasoningBank (https://arxiv.org/abs/2509.25140, Section
3.2): judged by the model itself, each group solved with the strategies of the groups before it.
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
WIDTH = 3  # default number of trajectories, or of revisions, of MaTTS
STEP = pyarrow.schema(
    [
        ("step", pyarrow.int64()),
        ("lessons", pyarrow.int64()),
        ("unread", pyarrow.int64()),  # replies that could not be parsed
        ("prompt_tokens", pyarrow.int64()),
        ("new_tokens", pyarrow.int64()),
        ("seconds", pyarrow.float64()),
        ("judged", pyarrow.list_(pyarrow.bool_())),  # of the attempts, by record key
    ]
)


@dataclass(frozen=True)
class BankBuildConfig:
    """Settings of a bank build."""

    judge: str = "gold"  # "gold": the grader; "self": the model's own opinion, without labels
    k: int = 0  # strategies retrieved while building; 0 is offline
    key: str = "question"  # what retrieval compares, see ReasoningBank.retrieve
    width: int = 1  # trajectories per problem; 2 or more are contrasted (parallel MaTTS)
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
    """The bank of `config`, in a subfolder of `folder` named by a hash of all that determines it,
    and the records that `fill_bank` returns."""
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
    """Fill `bank` from `problems`; returns the graded records of the attempts.

    Their column `judged` is True, False, or None where the judgement could not be parsed.
    """
    adapter, frames = Lines(), []
    groups = [problems[i : i + config.group] for i in range(0, len(problems), config.group)]
    with dspy.context(lm=language_model(engine, temperature=config.temperature), adapter=adapter):
        if "start" not in bank.tags():
            bank.tag("start")
        judgements, tags = steps(bank).set_index("step")["judged"].to_dict(), bank.tags()
        for step, group in enumerate(groups):
            start, tokens, unparsed = time.perf_counter(), _tokens(engine), len(adapter.failed)
            past = bank.checkout(_tag(step - 1)) if config.k else bank
            frame = _solve(past, engine, group, store, config)
            frames.append(frame)
            if _tag(step) in tags:
                frame["judged"] = list(judgements[step])
                continue
            frame["judged"] = _judge(engine, frame, config)
            new = bank.add(_extract(engine, group, frame, config, step))
            cost = {"seconds": time.perf_counter() - start}
            cost |= {"unread": len(adapter.failed) - unparsed}
            cost |= {name: now - tokens[name] for name, now in _tokens(engine).items()}
            _note(bank, {"step": step, "judged": frame["judged"].tolist(), "lessons": new} | cost)
            bank.tag(_tag(step))
            rest = f", {cost['unread']} replies unread" if cost["unread"] else ""
            report(f"step {step + 1}/{len(groups)}: {new} lessons, {len(bank)} in all{rest}")
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
    """One row per step of `fill_bank`: lessons, judgements of its attempts, seconds, and tokens of
    judging and extracting (those of the attempts are in their records)."""
    if "steps" not in bank.database.list_tables().tables:
        return pandas.DataFrame({name: [] for name in STEP.names})
    table = bank.database.open_table("steps").to_pandas()
    return table.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


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
    calls = [partial(judge, question=r.question, solution=r.text) for r in frame.itertuples()]
    return [_result(outcome).correct for outcome in engine.run_batched(calls)]


def _extract(engine: Engine, group, frame, config: BankBuildConfig, step: int) -> list[Strategy]:
    """The strategies extracted from each problem of the group whose judgement could be parsed."""
    extractor, calls, sources = Extractor(), [], []
    for problem in group:
        rows = frame[(frame["problem_id"] == problem.id) & frame["judged"].notna()]
        attempts = [(row.text, bool(row.judged)) for row in rows.itertuples()]
        if attempts:
            calls.append(partial(extractor, problem.question, attempts, seed=step))
            sources.append((problem, any(correct for _, correct in attempts)))
    fingerprint = digest([extractor.dump_state(), config.extract_tokens], 12)
    with dspy.context(
        lm=language_model(
            engine, temperature=config.extract_temperature, max_tokens=config.extract_tokens
        )
    ):
        outcomes = engine.run_batched(calls)
    return [
        Strategy(
            **lesson,
            kind="success" if correct else "failure",
            problem_id=problem.id,
            family=problem.family,
            level=problem.level,
            question=problem.question,
            model=f"{engine.model.name}@{engine.model.weights_hash}",
            extractor=fingerprint,
            step=step,
        )
        for (problem, correct), outcome in zip(sources, outcomes, strict=True)
        for lesson in lessons(_result(outcome).lessons)
    ]


def _result(outcome):
    """A program's result; its exception is raised."""
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
