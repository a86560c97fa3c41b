"""The arms of the strategy study: prompts that differ in what memory says, and in nothing else.

Every arm with memory has the instructions of the format-only control and the same token budget.
Each prompt counts the strategies that the leakage guard filtered. The arms "retrieved" and
"format-only" are made by `build`, which retrieves while it builds a bank. MaTTS is Section 3.3 of
https://arxiv.org/abs/2509.25140.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas

from kit.analysis import contrasts
from kit.evaluation.evaluate import derive
from kit.evaluation.store import Store
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.build import solve_prompt
from kit.reasoning_bank.dspy_backend import chat_messages
from kit.reasoning_bank.programs import (
    NO_WORK,
    Choose,
    Revise,
    Solver,
    ToolSolver,
    answered,
    finished,
    numbered,
    picked,
    shown,
    tool_calls,
    worked,
)
from kit.reasoning_bank.strategy import RetrievalResult, Strategy, leak_reason
from kit.schema import Problem, Prompt, Sampling, digest

DECLARED = ("format-only", "retrieved")  # the arms of the declared contrast
BUDGET = 1500  # most tokens of memory in a prompt
COSTS = ["prompt_tokens", "new_tokens", "seconds", "joules"]  # summed over samples, as the peaks
COSTS += ["kv_reads_tokens", "kv_peak_tokens", "kv_peak_bytes"]  # are, since samples share a batch


def random_retrieval(
    bank: ReasoningBank, problems, k: int = 2, seed: int = 0, place: str = "system"
) -> list[Prompt]:
    """Up to `k` strategies drawn at random for each problem, leaks filtered."""
    items, prompts = bank.strategies(), []
    for problem in problems:
        order = random.Random(f"{seed} {problem.id}").sample(items, len(items))
        result = _filter(order, problem, k)
        prompts.append(solve_prompt(problem, "random", shown(result.strategies), result, place))
    return prompts


def shuffled(
    bank: ReasoningBank, problems, k: int = 2, seed: int = 0, place: str = "system", **how
) -> list[Prompt]:
    """The strategies retrieved for another problem, of another family if there is one."""
    results = {problem.id: bank.retrieve(problem, k, **how) for problem in problems}
    prompts = []
    for problem in problems:
        others = [p for p in problems if p.family != problem.family] or [
            p for p in problems if p.id != problem.id
        ]
        other = random.Random(f"{seed} {problem.id}").choice(others or [problem])
        strategies = results[other.id].strategies
        result = _filter(strategies, problem, len(strategies))
        prompts.append(solve_prompt(problem, "shuffled", shown(result.strategies), result, place))
    return prompts


def irrelevant(like: Sequence[Prompt], text: str, tokenizer, place: str = "system") -> list[Prompt]:
    """Unrelated prose from `text`, of as many tokens as the memory of each prompt in `like`."""
    ids, prompts = tokenizer(text, add_special_tokens=False)["input_ids"], []
    for each in like:
        count = memory_tokens(each, tokenizer)
        start = int(digest(each.problem.id, 8), 16) % max(1, len(ids) - count)
        words = tokenizer.decode(ids[start : start + count]).strip()
        prompts.append(solve_prompt(each.problem, "irrelevant", words, place=place))
    return prompts


def oracle_hint(
    problems: Sequence[Problem], place: str = "system", arm: str = "gold-hint"
) -> list[Prompt]:
    """The gold answer as memory: an upper bound for any memory, and so the positive control."""
    text = "A note says that the answer is {}."
    return [solve_prompt(p, arm, text.format(p.answer), place=place) for p in problems]


def with_tool(
    program: ToolSolver,
    prompts: Sequence[Prompt],
    evaluate: Callable[..., pandas.DataFrame],
    store: Store,
    arm: str = "tools",
    place: str = "system",
) -> pandas.DataFrame:
    """The records of `program` on the problems, and with the memory, of `prompts`: text and cost of
    all its steps. `evaluate(prompts)` returns the records of a step."""
    predict, parts, live = program.step, [], list(prompts)
    work = {each.problem.id: "" for each in prompts}
    while live:
        asked = []
        for each in live:
            inputs = {"question": each.problem.question, "strategies": memory_of(each)}
            inputs["work"] = work[each.problem.id] or NO_WORK
            messages = chat_messages(predict.signature, *predict.demos, place=place, **inputs)
            asked.append(replace(each, arm=f"{arm}-step{len(parts) + 1}", messages=messages))
        parts.append(evaluate(asked))
        for row in parts[-1].itertuples():
            work[row.problem_id] = worked(work[row.problem_id], row.text)
        live = [each for each in live if not finished(work[each.problem.id], program.steps)]
    steps = pandas.concat(parts, ignore_index=True)
    costs = steps.groupby("problem_id")[COSTS].sum()
    last = steps.drop_duplicates("problem_id", keep="last").set_index("problem_id")
    last = last.assign(**costs.loc[last.index]).reset_index().astype(steps.dtypes)
    return derive(last, [work[name] for name in last["problem_id"]], arm, store)


def tool_use(records: pandas.DataFrame) -> pandas.DataFrame:
    """One row per arm of `with_tool` in `records`: problems, `calls` of the calculator, `errors`,
    the calls without a value, and `answered`, the problems that ended in an answer."""
    rows = []
    for arm, texts in records[records["arm"].str.match("tools")].groupby("arm")["text"]:
        calls, errors = map(sum, zip(*map(tool_calls, texts), strict=True))
        row = {"arm": arm, "problems": len(texts), "calls": calls, "errors": errors}
        rows.append(row | {"answered": sum(map(answered, texts))})
    return pandas.DataFrame(rows, columns=["arm", "problems", "calls", "errors", "answered"])


def revisions(
    records: pandas.DataFrame,
    prompts: Sequence[Prompt],
    place: str = "system",
    arm: str = "matts-sequential",
) -> list[Prompt]:
    """Sequential MaTTS (self-refinement): prompts to check and rewrite the answers in `records` to
    `prompts`, whose memory stays in the prompt."""
    answers = dict(zip(records["problem_id"], records["text"], strict=True))
    revised = []
    for each in prompts:
        inputs = {"solution": answers[each.problem.id].strip(), "strategies": memory_of(each)}
        messages = chat_messages(Revise, place=place, question=each.problem.question, **inputs)
        revised.append(replace(each, arm=arm, messages=messages))
    return revised


def choices(samples: pandas.DataFrame, problems: Sequence[Problem]) -> list[Prompt]:
    """Parallel MaTTS (best of n): prompts to choose one of the `samples` of a problem by number."""
    prompts = []
    for problem in problems:
        texts = samples[samples["problem_id"] == problem.id].sort_values("sample")["text"]
        messages = chat_messages(Choose, question=problem.question, solutions=numbered(texts))
        prompts.append(Prompt(problem, "matts-choice", messages))
    return prompts


def chosen_samples(samples: pandas.DataFrame, replies: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of `samples` that `replies` to `choices` name, the first where a reply names none;
    each carries the costs of all samples and of the choice."""
    choice, rows = replies.set_index("problem_id"), []
    for problem, attempts in samples.sort_values("sample").groupby("problem_id"):
        best = attempts.iloc[picked(choice["text"][problem], len(attempts))].to_dict()
        costs = attempts[COSTS].sum() + choice.loc[problem, COSTS]
        rows.append(best | costs.to_dict())
    return pandas.DataFrame(rows).astype(samples.dtypes)


def scaled(
    prompts: Sequence[Prompt],
    answers: pandas.DataFrame,
    widths: Sequence[int],
    evaluate: Callable[..., pandas.DataFrame],
    store: Store,
    choice: Sampling = Sampling(8),  # noqa: B008 (frozen)
    place: str = "system",
    name: str = "matts",
) -> pandas.DataFrame:
    """Test-time scaling of `prompts` to each of `widths`: the records of as many checks one after
    another (`answers` are those of the prompts), and of the model's choice among as many samples.

    `evaluate(prompts, samples[, sampling])` returns records, `choice` samples a choice. The arms of
    the widest are named "matts-sequential" and "matts-parallel", of others also by width
    ("matts-parallel-2"), and "matts-samples" has the samples of the widest. With prompts without
    memory, under another `name`, this is the control that costs as much.
    """
    widest, frames, checked = max(widths), [], answers
    problems = [each.problem for each in prompts]
    label = {width: "" if width == widest else f"-{width}" for width in widths}
    for width in range(1, widest + 1):
        arm = f"{name}-sequential{label.get(width, '-between')}"
        checked = evaluate(revisions(checked, prompts, place, arm), 1)
        frames += [checked] if width in widths else []
    samples = evaluate([replace(each, arm=f"{name}-samples") for each in prompts], widest)
    for width in widths:
        several = samples[samples["sample"] < width]
        replies = evaluate(choices(several, problems), 1, choice)
        best = chosen_samples(several, replies)
        arm = f"{name}-parallel{label[width]}"
        frames.append(derive(best, best["text"].tolist(), arm, store))
    return pandas.concat([*frames, samples], ignore_index=True)


def over_draws(
    draws: Sequence[pandas.DataFrame], control: pandas.DataFrame
) -> contrasts.Measurement:
    """Accuracy with memory minus that of `control`, in points, on the problems that all `draws` of
    a bank were tried on; draws are crossed with problems in its interval."""
    common = set.intersection(*(set(frame["problem_id"]) for frame in draws))
    trainings = {draw: frame[frame["problem_id"].isin(common)] for draw, frame in enumerate(draws)}
    records = pandas.concat([contrasts.pooled("drawn", trainings), control.assign(arm="control")])
    return contrasts.compute({"measure": "accuracy", "arm": "drawn", "control": "control"}, records)


def from_program(
    program: Solver, prompts: Sequence[Prompt], arm: str, place: str = "system"
) -> list[Prompt]:
    """The same problems and memory as in `prompts`, asked as a solver does to which `optimize` gave
    other instructions or worked examples."""
    solve, made = program.solve, []
    for each in prompts:
        inputs = dict(strategies=memory_of(each), question=each.problem.question)
        messages = chat_messages(solve.signature, *solve.demos, place=place, **inputs)
        made.append(replace(each, arm=arm, messages=messages))
    return made


def subset(bank: ReasoningBank, size: int, folder) -> ReasoningBank:
    """A bank in `folder` with the first `size` strategies of `bank` by id, or all of fewer."""
    part = ReasoningBank(folder, bank.embedder, embedded=bank.embedded)
    part.add(sorted(bank.strategies(), key=lambda item: item.id)[:size])
    return part


def contribution(treated: pandas.DataFrame, control: pandas.DataFrame) -> pandas.DataFrame:
    """Per strategy `id`: `prompts` that contained it, and `points`, the mean gain in accuracy over
    `control` on their problems. Sorted by points, then id."""
    by_problem = treated.set_index("problem_id")
    gain = 100.0 * (
        by_problem["correct"].astype(float) - control.set_index("problem_id")["correct"]
    )
    rows = by_problem.assign(gain=gain)["retrieved"].str.split().explode().dropna()
    table = pandas.DataFrame({"id": rows, "points": gain.reindex(rows.index)})
    mean = table.groupby("id")["points"].agg(prompts="size", points="mean").reset_index()
    return mean.sort_values(["points", "id"], ascending=[False, True], ignore_index=True)


def harmful(treated: pandas.DataFrame, control: pandas.DataFrame) -> list[str]:
    """Ids of the strategies to delete: those whose mean `contribution` is below zero.

    Contributions on training problems are leave-one-out: the leakage guard never returns a strategy
    for its own problem.
    """
    table = contribution(treated, control)
    return table.loc[table["points"] < 0, "id"].tolist()


def distinct(
    prompts: Sequence[Prompt], before: Sequence[Prompt] = ()
) -> tuple[list[Prompt], list[str]]:
    """The prompts without arms that only repeat the prompts of another one, also of one in
    `before`; and a sentence about each arm left out.

    The two arms of the declared contrast are never left out, but said to be one.
    """
    prompt_ids: dict[str, dict[str, str]] = {}
    for each in (*before, *prompts):
        prompt_ids.setdefault(each.arm, {})[each.problem.id] = each.id
    new = dict.fromkeys(each.arm for each in prompts)
    duplicates, sentences = set(), []
    for arm in sorted(new, key=lambda arm: arm not in DECLARED):
        names = (*DECLARED, *prompt_ids)
        others = [
            name for name in names if name in prompt_ids and name != arm and name not in duplicates
        ]
        same = [name for name in others if prompt_ids[arm].items() <= prompt_ids[name].items()]
        if same and arm in DECLARED:
            if arm == DECLARED[1] and DECLARED[0] in same:
                sentences.append(f"{arm} asks what {DECLARED[0]} asks: no memory was found.")
        elif same:
            duplicates.add(arm)
            sentences.append(f"{arm} is left out: its prompts are those of {same[0]}.")
    return [each for each in prompts if each.arm not in duplicates], sentences


def memory_of(prompt: Prompt) -> str:
    """The memory in a prompt of `solve_prompt`, "" of the plain arm."""
    if prompt.messages[0][0] != "system":
        return ""
    (_, system), (_, user) = solve_prompt(prompt.problem, prompt.arm).messages
    texts = [text for _, text in prompt.messages]
    if len(texts) > 2:
        return texts[2]  # RECALL and an answer to it lie between
    return (texts[0].removeprefix(system) + texts[1].removeprefix(user).removesuffix(user)).strip()


def memory_tokens(prompt: Prompt, tokenizer) -> int:
    """Tokens of `memory_of` a prompt."""
    return len(tokenizer(memory_of(prompt), add_special_tokens=False)["input_ids"])


def check_token_budget(prompts: Sequence[Prompt], tokenizer, tokens: int = BUDGET) -> list[Prompt]:
    """The same prompts; ValueError naming the first whose memory is longer than `tokens`."""
    for each in prompts:
        count = memory_tokens(each, tokenizer)
        if count > tokens:
            raise ValueError(
                f"Arm {each.arm!r} gives problem {each.problem.id} {count} tokens of memory, the "
                f"budget is {tokens} (items {', '.join(each.retrieved) or 'none'}); raise the "
                f"budget, lower k or forget the item."
            )
    return list(prompts)


def _filter(items: Sequence[Strategy], problem: Problem, k: int) -> RetrievalResult:
    allowed, filtered = [], {}
    for item in items:
        if len(allowed) == k:
            break
        if reason := leak_reason(item, problem):
            filtered[item.id] = reason
        else:
            allowed.append(item)
    return RetrievalResult(tuple(allowed), (0.0,) * len(allowed), filtered)
