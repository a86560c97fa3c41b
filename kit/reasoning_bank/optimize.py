"""DSPy's prompt optimizers on training problems, with the kit's grader as metric.

BootstrapFewShot adds correct attempts to the prompt as demonstrations; MIPROv2 searches over
instructions and demonstrations; GEPA rewrites instructions with a stronger reflection model, named
by the environment variable KIT_REFLECTION_MODEL in DSPy's notation ("openai/gpt-4.1-mini"), whose
key stays in the variable that its provider reads.

Sources: DSPy, https://arxiv.org/abs/2310.03714; MIPRO, https://arxiv.org/abs/2406.11695; GEPA,
https://arxiv.org/abs/2507.19457.
"""

import os
from collections.abc import Mapping, Sequence

import dspy
import pandas

from kit.analysis import contrasts, tables
from kit.evaluation import grader
from kit.reasoning_bank.build import Teacher
from kit.reasoning_bank.dspy_backend import Engine, language_model
from kit.reasoning_bank.programs import Solver
from kit.schema import Problem

OPTIMIZERS = ("bootstrap", "mipro", "gepa")
REFLECTION = "KIT_REFLECTION_MODEL"
INSTRUCTION_TOKENS = 512  # most of an instruction that a proposer writes
THREADS = 32  # attempts at once, which a kit engine decodes as one batch
REFLECTED = 8  # attempts that GEPA reflects on at a time; on three a small model hardly differs


def examples(problems: Sequence[Problem]) -> list[dspy.Example]:
    """Problems as DSPy examples; `gold` is for the metric and never in a prompt."""
    return [
        dspy.Example(question=p.question, strategies="", gold=p.answer, asks=p.asks).with_inputs(
            "question", "strategies"
        )
        for p in problems
    ]


def metric(example, prediction, trace=None) -> bool:
    """Whether the grader finds the answer correct."""
    return _graded(example, prediction).correct


def feedback(example, prediction, trace=None, pred_name=None, pred_trace=None):
    """The metric of GEPA: score and textual feedback."""
    verdict = _graded(example, prediction)
    answer = verdict.extracted or "nothing that could be read"
    text = "Correct." if verdict.correct else f"Wrong: answered {answer}, it is {example.gold}."
    return dspy.Prediction(score=float(verdict.correct), feedback=text)


def _graded(example, prediction):
    return grader.grade(prediction.answer or "", example.gold, asks=example.get("asks", "any"))


def optimize(
    program: dspy.Module,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    how: str = "bootstrap",
    demos: int = 2,
    trials: int = 6,
    seed: int = 0,
    proposer: Teacher | None = None,
) -> dspy.Module:
    """An optimized copy of `program`; model and adapter are those of the DSPy context.

    `how` is one of OPTIMIZERS, `demos` the most demonstrations in a prompt, `trials` the number of
    candidates. `proposer`, an engine or a dspy.LM, writes the instructions: the same model for
    MIPROv2 unless it is given, for GEPA that of KIT_REFLECTION_MODEL. ValueError for another
    optimizer, for a problem in both splits, or without a proposer for GEPA.
    """
    if how not in OPTIMIZERS:
        raise ValueError(f"No optimizer {how!r}; choose one of {', '.join(OPTIMIZERS)}.")
    overlap = {p.id for p in train} & {p.id for p in validation}
    if overlap:
        raise ValueError(f"Problem {min(overlap)} is in train and validation; keep them apart.")
    student, data = dspy.settings.lm, dict(trainset=examples(train))
    if how != "bootstrap":
        data["valset"] = examples(validation)
    writer = _writer(proposer) if proposer else _stronger() if how == "gepa" else student
    few = dict(max_bootstrapped_demos=demos, max_labeled_demos=0)
    more, options = dict(seed=seed, num_threads=THREADS), {}
    # Equal requests draw equal tokens, so that programs differ in score by their prompts alone.
    with dspy.context(lm=student.copy(seed=seed)):
        if how == "bootstrap":
            optimizer = dspy.BootstrapFewShot(metric, **few)
        elif how == "gepa":
            more["reflection_minibatch_size"] = min(REFLECTED, len(train))
            more["max_metric_calls"] = trials * len(validation)
            optimizer = dspy.GEPA(feedback, reflection_lm=writer, **more)
        else:
            more |= dict(auto=None, num_candidates=max(2, trials // 2), prompt_model=writer)
            optimizer = dspy.MIPROv2(metric, **few, **more)
            # A small model makes no use of programs or data sets: it proposes another wording only.
            aware = ("data", "program", "tip", "fewshot")
            options = {f"{what}_aware_proposer": False for what in aware}
            options |= dict(num_trials=trials, minibatch=False)
        return optimizer.compile(program, **data, **options)


def gains(
    solvers: Mapping[str, Solver], records: Mapping[str, pandas.DataFrame], control: str
) -> pandas.DataFrame:
    """One row per solver by its arm: instruction, worked examples in its prompt, and for each split
    of `records` its accuracy, percent, and the difference from the arm `control`, points."""
    rows = []
    for arm, solver in solvers.items():
        row = {"arm": arm, "instruction": solver.solve.signature.instructions}
        row["examples"] = len(solver.solve.demos)
        for split, frame in records.items():
            contrast = {"measure": "accuracy", "arm": arm, "control": control}
            gain = contrasts.compute(contrast, frame)
            row[split] = tables.share(frame[frame["arm"] == arm])
            row[f"{split}, minus {control}"] = (gain.estimate, gain.low, gain.high)
        rows.append(row)
    return pandas.DataFrame(rows)


def _writer(proposer: Teacher) -> dspy.BaseLM:
    if isinstance(proposer, Engine):
        return language_model(proposer, temperature=1.0, max_tokens=INSTRUCTION_TOKENS)
    return proposer.copy(temperature=1.0)


def _stronger() -> dspy.LM:
    name = os.environ.get(REFLECTION)
    if not name:
        raise ValueError(
            f"GEPA needs a stronger model to reflect: set {REFLECTION} to one that DSPy knows, or "
            f"choose bootstrap or mipro."
        )
    return dspy.LM(name, temperature=1.0)
