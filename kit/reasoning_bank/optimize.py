"""DSPy's prompt optimizers on training problems, with the kit's grader as metric.

BootstrapFewShot adds correct attempts to the prompt as demonstrations; MIPROv2 searches over
instructions and demonstrations; GEPA rewrites instructions with a stronger reflection model, named
by the environment variable KIT_REFLECTION_MODEL in DSPy's notation ("openai/gpt-5-mini"), whose key
stays in the variable that its provider reads.

Sources: DSPy, https://arxiv.org/abs/2310.03714; MIPRO, https://arxiv.org/abs/2406.11695; GEPA,
https://arxiv.org/abs/2507.19457.
"""

import os
from collections.abc import Sequence

import dspy

from kit.evaluation import grader
from kit.schema import Problem

OPTIMIZERS = ("bootstrap", "mipro", "gepa")
REFLECTION = "KIT_REFLECTION_MODEL"


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
    proposer: dspy.BaseLM | None = None,
) -> dspy.Module:
    """An optimized copy of `program`; model and adapter are those of the DSPy context.

    `how` is one of OPTIMIZERS, `demos` the most demonstrations in a prompt, `trials` the number of
    candidates. `proposer` writes the instructions: the same model for MIPROv2 unless it is given,
    for GEPA that of KIT_REFLECTION_MODEL. ValueError for another optimizer, for a problem in both
    splits, or without a proposer for GEPA.
    """
    if how not in OPTIMIZERS:
        raise ValueError(f"No optimizer {how!r}; choose one of {', '.join(OPTIMIZERS)}.")
    overlap = {p.id for p in train} & {p.id for p in validation}
    if overlap:
        raise ValueError(f"Problem {min(overlap)} is in train and validation; keep them apart.")
    data = dict(trainset=examples(train))
    if how == "bootstrap":
        few = dspy.BootstrapFewShot(metric, max_bootstrapped_demos=demos, max_labeled_demos=0)
        return few.compile(program, **data)
    data["valset"] = examples(validation)
    if how == "gepa":
        calls, reflection = trials * len(validation), proposer or _stronger()
        optimizer = dspy.GEPA(feedback, max_metric_calls=calls, reflection_lm=reflection, seed=seed)
        return optimizer.compile(program, **data)
    few = dict(max_bootstrapped_demos=demos, max_labeled_demos=0, prompt_model=proposer)
    search = dspy.MIPROv2(metric, auto=None, num_candidates=max(2, trials // 2), seed=seed, **few)
    # A small model cannot make use of programs or data sets: it proposes another wording only.
    aware = ("data", "program", "tip", "fewshot")
    plain = {f"{what}_aware_proposer": False for what in aware}
    return search.compile(program, num_trials=trials, minibatch=False, **plain, **data)


def _stronger() -> dspy.LM:
    name = os.environ.get(REFLECTION)
    if not name:
        raise ValueError(
            f"GEPA needs a stronger model to reflect: set {REFLECTION} to one that DSPy knows, or "
            f"choose bootstrap or mipro."
        )
    return dspy.LM(name, temperature=1.0)
