"""Rejection sampling: from graded records to training sequences with loss on the completion only.

Accepted are correct, finished and distinct answers, at most a few per problem, so that easy
problems do not outweigh the others. Sources: STaR, https://arxiv.org/abs/2203.14465, Section 3.1;
rejection sampling fine-tuning (RFT), https://arxiv.org/abs/2308.01825.
"""

from collections.abc import Sequence

import pandas

from kit.inference import decode
from kit.models.load import Model
from kit.schema import Problem, Prompt, digest


def accept(records: pandas.DataFrame, cap: int = 2, seed: int = 0) -> pandas.DataFrame:
    """Correct, finished, distinct answers, at most `cap` per problem, drawn by hash of `seed`.

    ValueError where there is none.
    """
    if cap < 1:
        raise ValueError(f"cap is {cap}; take at least one answer per problem.")
    good = records[records["correct"] & (records["finish"] == "stop")]
    if good.empty:
        problems = records["problem_id"].nunique()
        raise ValueError(
            f"None of {len(records)} answers to {problems} problems is correct and ended: there "
            f"is nothing to learn from; take easier problems, more samples or more tokens."
        )
    once = _shuffled(good, seed).drop_duplicates(["problem_id", "text"])
    return once.groupby("problem_id").head(cap)


def sample_unfiltered(
    records: pandas.DataFrame, accepted: pandas.DataFrame, seed: int = 0
) -> pandas.DataFrame:
    """The control of `accepted`, a part of `records`: as many ended answers of each problem, right
    or wrong, drawn by hash of `seed`."""
    counts = accepted["problem_id"].value_counts()
    ended = records[(records["finish"] == "stop") & records["problem_id"].isin(counts.index)]
    ended = _shuffled(ended, seed)
    return ended[ended.groupby("problem_id").cumcount() < ended["problem_id"].map(counts)]


def with_reward_variance(
    records: pandas.DataFrame, problems: Sequence[Problem], least: int = 1
) -> list[Problem]:
    """The problems that some attempts in `records` solved and others did not; all of `problems`
    where these are fewer than `least`. A GRPO group with equal rewards has no gradient."""
    shares = records.groupby("problem_id")["correct"].mean()
    mixed = [problem for problem in problems if 0 < shares.get(problem.id, 0) < 1]
    return mixed if len(mixed) >= least else list(problems)


def _shuffled(records: pandas.DataFrame, seed: int) -> pandas.DataFrame:
    order = records["key"].map(lambda key: digest([seed, key]))
    return records.loc[order.sort_values().index]


def training_sequences(
    model: Model, rows: pandas.DataFrame, prompts: Sequence[Prompt]
) -> list[dict]:
    """`input_ids` and `completion_mask` (1 on the answer) of each row: the prompt of its problem in
    `prompts`, then its text and the end-of-sequence token; lists of one length per row.

    Context distillation: prompts without the context under which the answers were sampled move that
    context into the weights (https://arxiv.org/abs/2209.15189). ValueError naming a problem without
    a prompt.
    """
    by_problem = {prompt.problem.id: prompt for prompt in prompts}
    stop = model.tokenizer.eos_token_id
    examples = []
    for row in rows.itertuples():
        if row.problem_id not in by_problem:
            raise ValueError(f"No prompt for problem {row.problem_id}; give one for each row.")
        prompt = list(decode.tokenize(model, by_problem[row.problem_id]))
        answer = model.tokenizer(row.text, add_special_tokens=False)["input_ids"] + [stop]
        mask = [0] * len(prompt) + [1] * len(answer)
        examples.append({"input_ids": prompt + answer, "completion_mask": mask})
    return examples
