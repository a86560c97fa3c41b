"""Phase 2: solve, grade, remember, train on what was right, and again.

Memory is a bank of worked examples: training problems that were solved. A question asked after
those most like it is answered better and more briefly; trained on such answers without the
examples, the model takes what these said into its weights. A round does this once, and adds what
it solved to the bank of the next. Each training starts at the base (STaR, arXiv 2203.14465).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from kit.analysis import stats
from kit.data import prompts
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.models.embedder import Embedder
from kit.models.load import Model, load
from kit.reasoning_bank import programs
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.strategy import Strategy
from kit.schema import Problem, Prompt, Sampling, digest
from kit.training import checkpoint_selection, rejection_sampling, sft

ARMS = ("own", "kept", "internalised", "unfiltered")  # see `data`


@dataclass(frozen=True)
class Plan:
    """How training problems are sampled, and what is learnt from."""

    k: int = 3  # examples in a prompt
    given: int = 4  # problems per family and level that are in the bank at first, answers and all
    samples: int = 6  # answers per training problem and way of asking
    cap: int = 2  # traces per problem
    max_new_tokens: int = 64
    temperature: float = 0.8

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, top_p=0.95)


def given(problems: Sequence[Problem], each: int) -> list[Strategy]:
    """The first `each` problems of every family and level with their answers, as examples."""
    table = pandas.DataFrame({"problem": problems, "key": [(p.family, p.level) for p in problems]})
    first = table.groupby("key", sort=True).head(each)["problem"]
    return [
        Strategy(
            title="Worked example", description="", content=f"{p.question}\nAnswer: {p.answer}",
            kind="success", problem_id=p.id, family=p.family, level=p.level, question=p.question,
            model=p.source, extractor="gold answer",
        )
        for p in first
    ]  # fmt: skip


def start(folder: Path, embedder: Embedder, items: Sequence[Strategy], *parts) -> ReasoningBank:
    """The bank of `items` before the first round, in a folder of `folder` named by these and by
    `parts`, all else that determines what the rounds will add."""
    name = digest([sorted(item.id for item in items), embedder.fingerprint, *parts], 12)
    bank = ReasoningBank(f"{folder}/{name}", embedder)
    if not bank.tags():
        bank.add(items)
    return bank


def remembered(bank: ReasoningBank, problems: Sequence[Problem], k: int) -> list[Prompt]:
    """Each question after the `k` past ones most like it and their answers, the nearest last."""
    made = []
    for problem in problems:
        found = bank.retrieve(problem, k, key="question")
        turns = [turn for item in reversed(found.strategies) for turn in _turns(item)]
        ids = tuple(item.id for item in found.strategies)
        messages = (*turns, ("user", problem.question))
        made.append(
            Prompt(problem, "remembered", messages, retrieved=ids, refused=len(found.filtered))
        )
    return made


def _turns(item: Strategy) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", item.question), ("assistant", item.content.removeprefix(f"{item.question}\n"))


def data(
    arm: str, model: Model, plain: pandas.DataFrame, with_memory: pandas.DataFrame,
    asked: Sequence[Prompt], cap: int, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """What an arm is trained on, see `traces.sequences`.

    own           correct answers to the plain question, as it was asked
    kept          correct answers given with memory, after the prompts `asked` with that memory
    internalised  the same answers after the plain question
    unfiltered    as many answers given with memory, right or wrong, after the plain question
    """
    if arm not in ARMS:
        raise ValueError(f"No arm {arm!r}; there are {', '.join(ARMS)}.")
    good = rejection_sampling.accepted(plain if arm == "own" else with_memory, cap, seed)
    if arm == "unfiltered":
        good = rejection_sampling.unfiltered(with_memory, len(good), seed)
    bare = prompts.build(prompts.plain, [prompt.problem for prompt in asked])
    return rejection_sampling.sequences(model, good, asked if arm == "kept" else bare)


def compound(
    base: str,
    bank: ReasoningBank,
    train: Sequence[Problem],
    rounds: int,
    plan: Plan,
    recipe: sft.SFTConfig,
    store: Store,
    folder: Path,
    report: Callable[[str], None] = print,
) -> list[str]:
    """`rounds` times: solve with the bank, grade, add to the bank, train; the models after each.

    The state of the bank before round i is tagged `round-i`. Killed, it goes on where it was.
    """
    found, frames = [base], []
    for number in range(rounds):
        model = load(found[-1])
        known = tagged(bank, number)
        asked = remembered(known, train, plan.k)
        frames.append(evaluate(model, asked, plan.sampling, store, plan.samples, report=_silent))
        solved = pandas.concat(frames, ignore_index=True)
        has = {item.problem_id for item in known.strategies()}
        bank.add([item for item in programs.examples(frames[-1]) if item.problem_id not in has])
        share, then = 100 * frames[-1]["correct"].mean(), len(tagged(bank, number + 1))
        report(f"round {number + 1}: {share:.1f}% of the answers correct, {then} examples")
        rows = data("internalised", model, solved, solved, asked, plan.cap, recipe.seed)
        found.append(str(sft.sft(base, rows, recipe, folder)))
    return found


def tagged(bank: ReasoningBank, number: int) -> ReasoningBank:
    """The bank as it was before round `number`, which is now where that round has not begun."""
    if f"round-{number}" not in bank.tags():
        bank.tag(f"round-{number}")
    return bank.checkout(f"round-{number}")


def exam(
    name: str, asked: Sequence[Prompt], store: Store, max_new_tokens: int, samples: int = 1
) -> pandas.DataFrame:
    """Records of the model `name` on `asked`: greedy, or `samples` at temperature 0.6."""
    sampling = Sampling(max_new_tokens)
    if samples > 1:
        sampling = Sampling(max_new_tokens, temperature=0.6, top_p=0.95)
    return evaluate(load(name), list(asked), sampling, store, samples, report=_silent)


def best_against_last(
    place: Path,
    validation: Sequence[Prompt],
    test: Sequence[Prompt],
    store: Store,
    max_new_tokens: int,
) -> dict:
    """The checkpoint of a training that is best on validation, and the last one, on the test.

    `luck`: by how many points the best of as many equal checkpoints would exceed their mean.
    """
    there = {step: str(folder) for step, folder in sft.kept(place).items()}

    def accuracy(step: int, asked: Sequence[Prompt]) -> float:
        return exam(there[step], asked, store, max_new_tokens)["correct"].mean()

    found = {step: accuracy(step, validation) for step in there}
    best, mean = checkpoint_selection.chosen(found), sum(found.values()) / len(found)
    luck = stats.best_of_optimism(mean, len(validation), len(found))
    row = {"validation": found[best], "test, chosen": accuracy(best, test)}
    row |= {"test, last": accuracy(max(there), test), "luck": luck}
    shares = {name: 100 * float(value) for name, value in row.items()}
    return {"checkpoints": len(there), "chosen step": best} | shares


def _silent(line: str) -> None:
    pass
