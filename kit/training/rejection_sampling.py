"""What is learnt from: graded records to token sequences, loss on the completion only.

Rejection sampling (STaR, arXiv 2203.14465; RFT, arXiv 2308.01825): correct answers that ended,
no text twice, and at most a few per problem, so that easy problems do not outweigh the others.
"""

from collections.abc import Sequence

import pandas

from kit.inference import decode
from kit.models.load import Model
from kit.schema import Problem, Prompt, digest


def accepted(records: pandas.DataFrame, cap: int = 2, seed: int = 0) -> pandas.DataFrame:
    """Correct, ended, different answers, at most `cap` per problem, drawn by hash of `seed`.

    ValueError where there is none: nothing could be learnt.
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
    once = _drawn(good, seed).drop_duplicates(["problem_id", "text"])
    return once.groupby("problem_id").head(cap)


def unfiltered(records: pandas.DataFrame, count: int, seed: int = 0) -> pandas.DataFrame:
    """The control: `count` answers that ended, right or wrong, drawn by hash of `seed`."""
    ended = records[records["finish"] == "stop"]
    if len(ended) < count:
        raise ValueError(f"{len(ended)} answers ended, {count} are asked for; sample more.")
    return _drawn(ended, seed).head(count)


def learnable(
    records: pandas.DataFrame, problems: Sequence[Problem], least: int = 1
) -> list[Problem]:
    """The problems that some attempts in `records` solved and some did not, all of `problems` where
    these are fewer than `least`. A group of equal rewards has no gradient."""
    shares = records.groupby("problem_id")["correct"].mean()
    found = [problem for problem in problems if 0 < shares.get(problem.id, 0) < 1]
    return found if len(found) >= least else list(problems)


def _drawn(records: pandas.DataFrame, seed: int) -> pandas.DataFrame:
    order = records["key"].map(lambda key: digest([seed, key]))
    return records.loc[order.sort_values().index]


def sequences(model: Model, rows: pandas.DataFrame, prompts: Sequence[Prompt]) -> list[dict]:
    """`input_ids` and `completion_mask` of each row: its problem's prompt in `prompts`, then its
    text and the token that ends an answer.

    Prompts other than those that the answers were given to take what these said into the weights.
    """
    asked = {prompt.problem.id: prompt for prompt in prompts}
    stop = model.tokenizer.eos_token_id
    made = []
    for row in rows.itertuples():
        if row.problem_id not in asked:
            raise ValueError(f"No prompt for problem {row.problem_id}; give one for each row.")
        prompt = list(decode.tokenize(model, asked[row.problem_id]))
        said = model.tokenizer(row.text, add_special_tokens=False)["input_ids"] + [stop]
        mask = [0] * len(prompt) + [1] * len(said)
        made.append({"input_ids": prompt + said, "completion_mask": mask})
    return made
