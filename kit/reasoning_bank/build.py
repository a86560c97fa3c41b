"""Builds a bank: retrieve, solve, judge, extract, append.

Problems are processed in groups of fixed size. The strategies of a group are added in one commit
and tagged `step-N`; a killed build continues at the first group without a tag and ends with the
same bank, since the decoding batches depend on the group only. The table "steps" beside that of the
bank holds the cost and the judgements of each step.

Offline, as in reasoning-bank-slm: no retrieval, judged by the gold answers, one pass over training
problems, then frozen. Streaming, as in ReasoningBank (https://arxiv.org/abs/2509.25140, Section
3.2): judged by the model itself, each group solved with the strategies of the groups before it.

Whoever writes the bank need not be who reads it: the teacher, who judges and extracts, is the
solver's engine, that of another model, or any `dspy.LM`, such as a server.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from functools import partial

import dspy
import pandas
import pyarrow

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.inference.decode import versions
from kit.models.embedder import Embedder
from kit.models.load import load
from kit.pipeline import progress
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.dspy_backend import Engine, Lines, chat_messages, language_model
from kit.reasoning_bank.programs import ITEMS, Extractor, SelfJudge, Solve, fault, shown
from kit.reasoning_bank.strategy import RetrievalResult, Strategy
from kit.schema import Problem, Prompt, Sampling, digest

JUDGES = ("gold", "self")
Teacher = Engine | dspy.BaseLM
CALLS = 8  # of a dspy.LM at once
WIDTH = 3  # default number of trajectories, or of revisions, of MaTTS
CONTRAST_ITEMS = 5  # most lessons of several trajectories together, as published
DRAW = 1_000_000  # between the seeds of two draws of a bank
STEP = pyarrow.schema(
    [
        ("step", pyarrow.int64()),
        ("lessons", pyarrow.int64()),
        ("unparsed", pyarrow.int64()),  # replies that could not be parsed
        ("rejected", pyarrow.list_(pyarrow.string())),  # why, of each lesson not kept
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
    place: str = "system"  # of retrieved strategies in a prompt, see `Lines`
    width: int = 1  # trajectories per problem; 2 or more are contrasted (parallel MaTTS)
    temperature: float = 0.7  # of solving
    solve_tokens: int = 128
    extract_temperature: float = 0.7
    extract_tokens: int = 160
    judge_tokens: int = 160  # of a judgement with its reasons
    group: int = 32  # problems between two commits; 1 appends after every task
    seed: int = 0  # of attempts and lessons; another one draws another bank
    instruction: str = FORMAT_INSTRUCTION  # of solving
    thinking: bool = False  # while solving
    corrected: bool = False  # whether who learns from a failure is told the right answer
    embedded: str = "text"  # of a strategy, see `ReasoningBank`

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
    teacher: Teacher | None = None,
) -> tuple[ReasoningBank, pandas.DataFrame]:
    """The bank of `config`, in a subfolder of `folder` named by a hash of all that determines it,
    and the records that `fill_bank` returns."""
    programs = [Extractor().dump_state(), SelfJudge().dump_state()]
    programs += versions(engine.model)
    parts = [engine.name, embedder.fingerprint, asdict(config), *programs]
    parts += [_name(teacher)] if teacher else []
    name = digest([*parts, [problem.id for problem in problems]], 12)
    bank = ReasoningBank(f"{folder}/{name}", embedder, embedded=config.embedded)
    return bank, fill_bank(bank, engine, problems, store, config, teacher=teacher)


def fill_bank(
    bank: ReasoningBank,
    engine: Engine,
    problems: Sequence[Problem],
    store: Store,
    config: BankBuildConfig = BankBuildConfig(),  # noqa: B008 (frozen)
    report: Callable[[str], None] | None = None,
    teacher: Teacher | None = None,
) -> pandas.DataFrame:
    """Fill `bank` from `problems`; returns the graded records of the attempts.

    `engine` solves, `teacher` judges and extracts, by default the same. The column `judged` is
    True, False, or None where there was no verdict: such an attempt teaches nothing.
    """
    frames, teacher, report = [], teacher or engine, report or progress.in_place()
    groups = [problems[i : i + config.group] for i in range(0, len(problems), config.group)]
    if "start" not in bank.tags():
        bank.tag("start")
    judgements, tags = steps(bank).set_index("step")["judged"].to_dict(), bank.tags()
    for step, group in enumerate(groups):
        start = time.perf_counter()
        past = bank.checkout(_tag(step - 1)) if config.k else bank
        frame = _solve(past, engine, group, store, config)
        frames.append(frame)
        if _tag(step) in tags:
            frame["judged"] = list(judgements[step])
            continue
        judge, extractor, reasons = SelfJudge(config.judge_tokens), Extractor(), []
        with teacher_context(teacher, config) as tokens:
            frame["judged"] = _judge(teacher, judge, frame, config)
            lessons = _extract(teacher, extractor, group, frame, config, step, reasons)
        new = bank.add(lessons)
        unparsed = len(judge.unparsed) + len(extractor.unparsed)
        cost = {"seconds": time.perf_counter() - start, "unparsed": unparsed, "rejected": reasons}
        _note(
            bank, {"step": step, "judged": frame["judged"].tolist(), "lessons": new} | cost | tokens
        )
        bank.tag(_tag(step))
        rest = f", {len(reasons)} rejected" if reasons else ""
        rest += f", {unparsed} replies unparsed" if unparsed else ""
        report(f"step {step + 1}/{len(groups)}: {new} lessons, {len(bank)} in all{rest}")
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()


def teacher(name: str) -> Teacher:
    """A teacher by name: an engine of a model that `load` knows, or a server that DSPy knows, as
    "openai/gpt-4.1-mini" (its address and key in the variables that its provider reads)."""
    return Engine(load(name)) if ":" in name.partition("/")[0] else dspy.LM(name)


def _name(teacher: Teacher) -> str:
    """The author of a lesson, as the bank stores it."""
    if isinstance(teacher, Engine):
        return f"{teacher.model.name}@{teacher.model.weights_hash}"
    return teacher.model


@contextmanager
def teacher_context(teacher: Teacher, config: BankBuildConfig) -> Iterator[dict[str, int]]:
    """The DSPy context in which the teacher answers; the dictionary has its tokens afterwards.

    A kit engine is prompted by `Lines`, a dspy.LM by the adapter that DSPy is configured with.
    """
    how = dict(temperature=config.extract_temperature, max_tokens=config.extract_tokens)
    tokens = {"prompt_tokens": 0, "new_tokens": 0}
    if isinstance(teacher, Engine):
        before = {name: getattr(teacher, name) for name in tokens}
        with dspy.context(lm=language_model(teacher, **how), adapter=Lines()):
            yield tokens
        tokens |= {name: getattr(teacher, name) - count for name, count in before.items()}
    else:
        adapter = dspy.settings.adapter or dspy.ChatAdapter()
        with (
            dspy.context(lm=teacher.copy(**how), adapter=adapter),
            dspy.track_usage() as usage_tracker,
        ):
            yield tokens
        for usage in usage_tracker.get_total_tokens().values():
            tokens["prompt_tokens"] += usage.get("prompt_tokens") or 0
            tokens["new_tokens"] += usage.get("completion_tokens") or 0


def _together(teacher: Teacher, calls: Sequence[Callable[[], object]]) -> list:
    """The results of all calls, in order; the first exception is raised."""
    if isinstance(teacher, Engine):
        outcomes = teacher.run_batched([*calls])
    else:
        with ThreadPoolExecutor(CALLS) as pool:
            running = [pool.submit(copy_context().run, call) for call in calls]
        outcomes = [each.exception() or each.result() for each in running]
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def solve_prompt(
    problem: Problem,
    arm: str,
    memory: str = "",
    retrieval: RetrievalResult = RetrievalResult((), (), {}),  # noqa: B008
    place: str = "system",
) -> Prompt:
    """The question under the instructions of `programs.Solve`, with `memory` at one of
    `dspy_backend.PLACES`.

    `retrieval` is where `memory` comes from: its ids and the number that the leakage guard filtered
    stand in the prompt.
    """
    messages = chat_messages(Solve, place=place, strategies=memory, question=problem.question)
    ids = tuple(item.id for item in retrieval.strategies)
    return Prompt(problem, arm, messages, retrieved=ids, refused=len(retrieval.filtered))


def with_instruction(
    prompts: Sequence[Prompt], instruction: str = FORMAT_INSTRUCTION, thinking: bool = False
) -> list[Prompt]:
    """The same prompts with another `instruction` for that of `programs.Solve`, wherever it stands,
    and with or without `thinking`."""
    return [
        replace(
            each,
            messages=tuple(
                (role, text.replace(FORMAT_INSTRUCTION, instruction))
                for role, text in each.messages
            ),
            thinking=thinking,
        )
        for each in prompts
    ]


def format_only(problems: Sequence[Problem]) -> list[Prompt]:
    """The same instructions without memory: the control of retrieved strategies."""
    return [solve_prompt(problem, "format-only") for problem in problems]


def retrieved(
    bank: ReasoningBank,
    problems: Sequence[Problem],
    k: int = 2,
    arm: str = "retrieved",
    place: str = "system",
    **how,
) -> list[Prompt]:
    """Prompts with the strategies of `bank.retrieve(problem, k, **how)`."""
    prompts = []
    for problem in problems:
        retrieval = bank.retrieve(problem, k, **how)
        prompts.append(solve_prompt(problem, arm, shown(retrieval.strategies), retrieval, place))
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


def _tag(step: int) -> str:
    return f"step-{step:04}" if step >= 0 else "start"


def _solve(
    bank: ReasoningBank, engine: Engine, group, store: Store, config: BankBuildConfig
) -> pandas.DataFrame:
    if config.k:
        prompts = retrieved(bank, group, config.k, "streaming", config.place, key=config.key)
    else:
        prompts = format_only(group)
    prompts = with_instruction(prompts, config.instruction, config.thinking)
    sampling = Sampling(config.solve_tokens, config.temperature, top_p=0.95, seed=config.seed)
    return evaluate(
        engine.model, prompts, sampling, store, config.width, engine.batch_size,
        report=lambda line: None, memory=engine.memory,
    )  # fmt: skip


def _judge(
    teacher: Teacher, judge: SelfJudge, frame: pandas.DataFrame, config: BankBuildConfig
) -> list[bool | None]:
    if config.judge == "gold":
        return frame["correct"].tolist()
    calls = [partial(judge, question=r.question, solution=r.text) for r in frame.itertuples()]
    return [outcome.correct for outcome in _together(teacher, calls)]


def _extract(
    teacher: Teacher, extractor: Extractor, group, frame, config, step: int, reasons: list[str]
) -> list[Strategy]:
    """The strategies extracted from each problem of the group on which there was a verdict; why
    others are not kept goes to `reasons`."""
    calls, sources, lessons = [], [], []
    for problem in group:
        rows = frame[(frame["problem_id"] == problem.id) & frame["judged"].notna()]
        attempts = [(row.text, bool(row.judged)) for row in rows.itertuples()]
        if config.corrected:
            hint = f"\n\nThe correct answer is {problem.answer}."
            attempts = [(text if correct else text + hint, correct) for text, correct in attempts]
        if attempts:
            seed = step + DRAW * config.seed
            calls.append(partial(extractor, problem.question, attempts, seed=seed))
            sources.append((problem, any(correct for _, correct in attempts)))
    fingerprint = digest([extractor.dump_state(), config.extract_tokens], 12)
    for (problem, correct), outcome in zip(sources, _together(teacher, calls), strict=True):
        for lesson in (outcome.lessons or [])[: ITEMS if config.width == 1 else CONTRAST_ITEMS]:
            if reason := fault(lesson, problem):
                reasons.append(reason)
                continue
            origin = dict(extractor=fingerprint, step=step)
            lessons.append(lesson.strategy(problem, correct, _name(teacher), **origin))
    return lessons
