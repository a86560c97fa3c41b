"""The arms of the strategy study: prompts that differ in what memory says, and in nothing else.

Every arm with memory stands under the same instructions as the format-only control and within
the same budget of tokens; what the guard of the bank kept back is counted in each prompt.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pandas

from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.build import solve_prompt
from kit.reasoning_bank.dspy_backend import Lines, chat_messages
from kit.reasoning_bank.programs import (
    EXPRESSED,
    Choose,
    Express,
    Revise,
    Solver,
    numbered,
    picked,
    shown,
)
from kit.reasoning_bank.strategy import RetrievalResult, Strategy, leak_reason
from kit.schema import Problem, Prompt, digest

BUDGET = 1500  # tokens that memory may take in a prompt
SPENT = ["prompt_tokens", "new_tokens", "seconds"]
SPENT += [
    "kv_reads_tokens",
    "kv_peak_tokens",
    "kv_peak_bytes",
    "joules",
]  # samples run side by side


def random_retrieval(
    bank: ReasoningBank, problems, k: int = 2, seed: int = 0, arm: str = "random"
) -> list[Prompt]:
    """`k` strategies drawn at random for each problem, the guard passed."""
    items, prompts = bank.strategies(), []
    for problem in problems:
        order = random.Random(f"{seed} {problem.id}").sample(items, len(items))
        found = _allowed(order, problem, k)
        prompts.append(solve_prompt(problem, arm, shown(found.strategies), found))
    return prompts


def shuffled(bank: ReasoningBank, problems, k: int = 2, seed: int = 0, **search) -> list[Prompt]:
    """What another problem, of another family where there is one, retrieved."""
    found = {problem.id: bank.retrieve(problem, k, **search) for problem in problems}
    prompts = []
    for problem in problems:
        others = [p for p in problems if p.family != problem.family] or [
            p for p in problems if p.id != problem.id
        ]
        other = random.Random(f"{seed} {problem.id}").choice(others or [problem])
        theirs = _allowed(found[other.id].strategies, problem, k)
        prompts.append(solve_prompt(problem, "shuffled", shown(theirs.strategies), theirs))
    return prompts


def irrelevant(like: Sequence[Prompt], text: str, tokenizer) -> list[Prompt]:
    """Prose that has nothing to do with the problem, as many tokens of it as each of `like` has."""
    ids, prompts = tokenizer(text, add_special_tokens=False)["input_ids"], []
    for each in like:
        bare = solve_prompt(each.problem, "irrelevant")
        memory = each.messages[0][1].removeprefix(bare.messages[0][1]).strip()
        count = len(tokenizer(memory, add_special_tokens=False)["input_ids"])
        start = int(digest(each.problem.id, 8), 16) % max(1, len(ids) - count)
        words = tokenizer.decode(ids[start : start + count]).strip()
        prompts.append(solve_prompt(each.problem, "irrelevant", words))
    return prompts


def oracle_hint(problems: Sequence[Problem]) -> list[Prompt]:
    """The gold answer stands in the prompt: what the best conceivable memory could give."""
    text = "A note says that the answer is {}."
    return [solve_prompt(p, "gold-hint", text.format(p.answer)) for p in problems]


def expressions(problems: Sequence[Problem]) -> list[Prompt]:
    """What the calculator arm asks; `programs.worked_out` turns the replies into answers."""
    return [
        Prompt(p, "expression", chat_messages(Express, EXPRESSED, question=p.question))
        for p in problems
    ]


def revisions(records: pandas.DataFrame, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Sequential MaTTS: the answers in `records` to `prompts`, to be checked and written again."""
    answers = dict(zip(records["problem_id"], records["text"], strict=True))
    made = []
    for each in prompts:
        first = answers[each.problem.id].strip()
        given = chat_messages(Revise, question=each.problem.question, solution=first)
        made.append(replace(each, arm="matts-sequential", messages=given))
    return made


def choices(samples: pandas.DataFrame, problems: Sequence[Problem]) -> list[Prompt]:
    """Parallel MaTTS: all `samples` of a problem, of which one is to be chosen by its number."""
    made = []
    for problem in problems:
        texts = samples[samples["problem_id"] == problem.id].sort_values("sample")["text"]
        given = chat_messages(Choose, question=problem.question, solutions=numbered(texts))
        made.append(Prompt(problem, "matts-choice", given))
    return made


def chosen_samples(samples: pandas.DataFrame, replies: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of `samples` that `replies` to `choices` name, the first where one names none;
    the costs of all samples and of the choice are theirs."""
    said, read, rows = replies.set_index("problem_id"), Lines().parse, []
    for problem, tried in samples.sort_values("sample").groupby("problem_id"):
        number = read(Choose, said["text"][problem])["number"]
        best = tried.iloc[picked(number, len(tried))].to_dict()
        spent = tried[SPENT].sum() + said.loc[problem, SPENT]
        rows.append(best | spent.to_dict())
    return pandas.DataFrame(rows).astype(samples.dtypes)


def from_program(program: Solver, problems: Sequence[Problem], arm: str) -> list[Prompt]:
    """What a solver asks that `optimize` has given other instructions or worked examples."""
    ask, made = program.solve, []
    for problem in problems:
        given = chat_messages(ask.signature, *ask.demos, strategies="", question=problem.question)
        made.append(Prompt(problem, arm, given))
    return made


def subset(bank: ReasoningBank, size: int, folder) -> ReasoningBank:
    """A bank of `size` of the strategies in `bank`, in `folder`; of all where there are fewer."""
    made = ReasoningBank(folder, bank.embedder)
    made.add(sorted(bank.strategies(), key=lambda item: item.id)[:size])
    return made


def contribution(treated: pandas.DataFrame, control: pandas.DataFrame) -> pandas.DataFrame:
    """Per strategy: prompts it stood in, and by how much those were answered better than under
    `control` (points, mean over problems). Sorted by points, then id."""
    by = treated.set_index("problem_id")
    gain = 100.0 * (by["correct"].astype(float) - control.set_index("problem_id")["correct"])
    rows = by.assign(gain=gain)["retrieved"].str.split().explode().dropna()
    table = pandas.DataFrame({"id": rows, "points": gain.reindex(rows.index)})
    found = table.groupby("id")["points"].agg(prompts="size", points="mean").reset_index()
    return found.sort_values(["points", "id"], ascending=[False, True], ignore_index=True)


def harmful(treated: pandas.DataFrame, control: pandas.DataFrame) -> list[str]:
    """The rule of forgetting: strategies whose mean `contribution` is below zero.

    On training problems this is measured without a strategy's own problem, which the guard of
    the bank keeps apart from it.
    """
    found = contribution(treated, control)
    return found.loc[found["points"] < 0, "id"].tolist()


def check_token_budget(prompts: Sequence[Prompt], tokenizer, tokens: int = BUDGET) -> list[Prompt]:
    """The same prompts; ValueError naming the first whose memory is longer than `tokens`."""
    for each in prompts:
        if each.messages[0][0] != "system":
            continue  # the plain arm
        bare = solve_prompt(each.problem, each.arm).messages[0][1]
        memory = each.messages[0][1].removeprefix(bare)
        count = len(tokenizer(memory, add_special_tokens=False)["input_ids"])
        if count > tokens:
            raise ValueError(
                f"Arm {each.arm!r} gives problem {each.problem.id} {count} tokens of memory, the "
                f"budget is {tokens} (items {', '.join(each.retrieved) or 'none'}); raise the "
                f"budget, lower k or forget the item."
            )
    return list(prompts)


def _allowed(items: Sequence[Strategy], problem: Problem, k: int) -> RetrievalResult:
    kept, filtered = [], {}
    for item in items:
        if len(kept) == k:
            break
        if reason := leak_reason(item, problem):
            filtered[item.id] = reason
        else:
            kept.append(item)
    return RetrievalResult(tuple(kept), (0.0,) * len(kept), filtered)
