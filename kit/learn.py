"""The loop that fills a bank: retrieve, solve, judge, extract, append.

Problems go through it in groups of fixed size. What a group learnt is added in one commit and
tagged `step-N`; a killed build goes on at the first group without a tag and ends with the same
bank, because which prompts are decoded together depends on the group only.

Offline, as reasoning-bank-slm did it: nothing retrieved, judged by the gold answers, one pass over
training problems, then frozen. Streaming, as ReasoningBank did it: judged by the model itself,
each group solved with what the groups before it learnt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import dspy
import pandas

from kit import arms
from kit.adapter import Lines
from kit.agent import Extractor, SelfJudge, lessons
from kit.engine import Engine, language_model
from kit.evaluate import evaluate
from kit.lessons import Strategy
from kit.schema import Problem, Sampling, digest
from kit.store import Store
from kit.strategies import Bank

JUDGES = ("gold", "self")


@dataclass(frozen=True)
class Recipe:
    """How a bank is built."""

    judge: str = "gold"  # "gold": the grader; "self": the model's own opinion, without labels
    k: int = 0  # retrieved while building; 0 is offline
    by: str = "question"  # what retrieval compares, see Bank.search
    width: int = 1  # trajectories per problem; from 2 on they are contrasted (parallel MaTTS)
    temperature: float = 0.7  # of solving and extracting
    solve_tokens: int = 128
    extract_tokens: int = 160
    group: int = 32  # problems between two commits

    def __post_init__(self):
        if self.judge not in JUDGES or min(self.width, self.group) < 1 or self.k < 0:
            raise ValueError(
                f"judge is {self.judge!r}, width {self.width}, group {self.group}, k {self.k}; "
                f"judge is one of {JUDGES}, width and group at least 1, k at least 0."
            )


def learn(
    bank: Bank,
    engine: Engine,
    problems: Sequence[Problem],
    store: Store,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    report: Callable[[str], None] = print,
) -> pandas.DataFrame:
    """Fill `bank` from `problems`; records of the attempts with a column `judged` (True, False or
    None where the judgement could not be read) come back."""
    adapter, frames = Lines(), []
    groups = [problems[i : i + recipe.group] for i in range(0, len(problems), recipe.group)]
    with dspy.context(lm=language_model(engine, temperature=recipe.temperature), adapter=adapter):
        if "start" not in bank.tags():
            bank.tag("start")
        for step, group in enumerate(groups):
            known = bank.checkout(_tag(step - 1)) if recipe.k else bank
            frame = _solve(known, engine, group, store, recipe)
            frame["judged"] = _judge(engine, frame, recipe)
            frames.append(frame)
            if _tag(step) in bank.tags():
                continue
            found = _extract(engine, group, frame, recipe, step)
            new = bank.add(found)
            bank.tag(_tag(step))
            unread = f", {len(adapter.failed)} replies unread" if adapter.failed else ""
            report(f"step {step + 1}/{len(groups)}: {new} lessons, {len(bank)} in all{unread}")
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()


def _tag(step: int) -> str:
    return f"step-{step:04}" if step >= 0 else "start"


def _solve(bank: Bank, engine: Engine, group, store: Store, recipe: Recipe) -> pandas.DataFrame:
    if recipe.k:
        prompts = arms.retrieved(bank, group, recipe.k, arm="streaming", by=recipe.by)
    else:
        prompts = arms.format_only(group)
    sampling = Sampling(recipe.solve_tokens, recipe.temperature, top_p=0.95)
    return evaluate(
        engine.model, prompts, sampling, store, recipe.width, engine.batch_size,
        report=lambda line: None, memory=engine.memory,
    )  # fmt: skip


def _judge(engine: Engine, frame: pandas.DataFrame, recipe: Recipe) -> list[bool | None]:
    if recipe.judge == "gold":
        return frame["correct"].tolist()
    judge = SelfJudge()
    asked = [partial(judge, question=r.question, solution=r.text) for r in frame.itertuples()]
    return [_got(result).correct for result in engine.together(asked)]


def _extract(engine: Engine, group, frame, recipe: Recipe, step: int) -> list[Strategy]:
    """What each problem of the group taught; nothing where no judgement could be read."""
    extractor, asked, about = Extractor(), [], []
    for problem in group:
        mine = frame[(frame["problem_id"] == problem.id) & frame["judged"].notna()]
        tried = [(row.text, bool(row.judged)) for row in mine.itertuples()]
        if tried:
            asked.append(partial(extractor, problem.question, tried, seed=step))
            about.append((problem, any(correct for _, correct in tried)))
    made_by = digest([extractor.dump_state(), recipe.extract_tokens], 12)
    with dspy.context(
        lm=language_model(engine, temperature=recipe.temperature, max_tokens=recipe.extract_tokens)
    ):
        results = engine.together(asked)
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
