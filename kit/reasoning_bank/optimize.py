"""Programs made better by DSPy's optimisers, on training problems, with the kit's grader as metric.

BootstrapFewShot puts attempts that the grader found correct into the prompt; MIPROv2 searches
instructions and such examples together; GEPA rewrites instructions and needs a stronger model to
reflect, named by the environment variable KIT_REFLECTION_MODEL as DSPy names models
("openai/gpt-5-mini"); its key stays in the variable that its provider reads.

Sources: DSPy, arXiv 2310.03714; MIPRO, arXiv 2406.11695; GEPA, arXiv 2507.19457.
"""

import os
from collections.abc import Sequence

import dspy

from kit.evaluation import grader
from kit.schema import Problem

OPTIMIZERS = ("bootstrap", "mipro", "gepa")
REFLECTION = "KIT_REFLECTION_MODEL"


def examples(problems: Sequence[Problem]) -> list[dspy.Example]:
    """Problems as DSPy takes them; `gold` is for the metric and never in a prompt."""
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
    """The same for GEPA, which also wants to be told why."""
    verdict = _graded(example, prediction)
    said = verdict.extracted or "nothing that could be read"
    told = "Correct." if verdict.correct else f"Wrong: answered {said}, it is {example.gold}."
    return dspy.Prediction(score=float(verdict.correct), feedback=told)


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
) -> dspy.Module:
    """A better copy of `program`, whose model and adapter are those of the DSPy context.

    `demos` is the most worked examples in a prompt, `trials` the candidates that are tried.
    """
    if how not in OPTIMIZERS:
        raise ValueError(f"No optimiser {how!r}; choose one of {', '.join(OPTIMIZERS)}.")
    overlap = {p.id for p in train} & {p.id for p in validation}
    if overlap:
        raise ValueError(f"Problem {min(overlap)} is in train and validation; keep them apart.")
    given = dict(trainset=examples(train))
    if how == "bootstrap":
        few = dspy.BootstrapFewShot(metric, max_bootstrapped_demos=demos, max_labeled_demos=0)
        return few.compile(program, **given)
    given["valset"] = examples(validation)
    if how == "gepa":
        calls = dict(max_metric_calls=trials * len(validation), reflection_lm=_stronger())
        return dspy.GEPA(feedback, **calls, seed=seed).compile(program, **given)
    few = dict(max_bootstrapped_demos=demos, max_labeled_demos=0)
    search = dspy.MIPROv2(metric, auto=None, num_candidates=max(2, trials // 2), seed=seed, **few)
    # A small model cannot read programs or data sets: it is asked for another wording only.
    aware = ("data", "program", "tip", "fewshot")
    plain = {f"{what}_aware_proposer": False for what in aware}
    return search.compile(program, num_trials=trials, minibatch=False, **plain, **given)


def _stronger() -> dspy.LM:
    name = os.environ.get(REFLECTION)
    if not name:
        raise ValueError(
            f"GEPA needs a stronger model to reflect: set {REFLECTION} to one that DSPy knows, or "
            f"choose bootstrap or mipro."
        )
    return dspy.LM(name, temperature=1.0)
