"""Phase 2: expert iteration with a bank of worked examples.

One round: sample answers to the training problems with few-shot examples from the bank, grade them,
fine-tune the base model on the correct ones without the examples (context distillation,
https://arxiv.org/abs/2209.15189), and add the solved problems to the bank of the next round. Every
fine-tuning starts from the base model, as in STaR (https://arxiv.org/abs/2203.14465, Section 3.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas

from kit.analysis import stats
from kit.data import prompts
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.models.embedder import Embedder
from kit.models.load import Model, load
from kit.reasoning_bank import strategy
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.strategy import Strategy
from kit.schema import Problem, Prompt, Sampling, digest
from kit.training import checkpoint_selection, rejection_sampling, sft

# Names in stored records, see `training_set`.
ARMS = ("own", "kept", "internalised", "unfiltered", "distilled")


@dataclass(frozen=True)
class Plan:
    """How answers to the training problems are sampled and selected."""

    k: int = 3  # examples in a prompt
    given: int = 4  # problems per family and level in the first bank, with gold answers
    samples: int = 6  # answers per training problem, with and without examples each
    cap: int = 2  # most training examples per problem
    max_new_tokens: int = 64
    temperature: float = 0.8
    exam_tokens: int = 256  # where an answer of an exam is cut: 95% of those of every arm end
    teacher: str = ""  # a better model, whose correct answers the arm "distilled" learns

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, top_p=0.95)


def seed_examples(problems: Sequence[Problem], each: int) -> list[Strategy]:
    """Worked examples: the first `each` problems of every family and level with gold answers."""
    table = pandas.DataFrame({"problem": problems, "key": [(p.family, p.level) for p in problems]})
    first = table.groupby("key", sort=True).head(each)["problem"]
    return [
        Strategy.of(
            p, title="Worked example", description="", content=f"{p.question}\nAnswer: {p.answer}",
            kind="success", model=p.source, extractor="gold answer",
        )
        for p in first
    ]  # fmt: skip


def seed_bank(folder: Path, embedder: Embedder, items: Sequence[Strategy], *parts) -> ReasoningBank:
    """The bank of `items` before the first round, in a subfolder of `folder` named by a hash of
    `items` and of `parts`, all else that determines what the rounds will add."""
    name = digest([sorted(item.id for item in items), embedder.fingerprint, *parts], 12)
    bank = ReasoningBank(f"{folder}/{name}", embedder)
    if not bank.tags():
        bank.add(items)
    return bank


def few_shot_prompts(bank: ReasoningBank, problems: Sequence[Problem], k: int) -> list[Prompt]:
    """Each question after the `k` most similar past questions with answers, the nearest last."""
    queue = []
    for problem in problems:
        result = bank.retrieve(problem, k, key="question")
        turns = [turn for item in reversed(result.strategies) for turn in _turns(item)]
        ids = tuple(item.id for item in result.strategies)
        messages, filtered = (*turns, ("user", problem.question)), len(result.filtered)
        queue.append(Prompt(problem, "remembered", messages, retrieved=ids, refused=filtered))
    return queue


def _turns(item: Strategy) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", item.question), ("assistant", item.content.removeprefix(f"{item.question}\n"))


def training_set(
    arm: str, model: Model, plain: pandas.DataFrame, with_memory: pandas.DataFrame,
    few_shot: Sequence[Prompt], cap: int, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """The training examples of an arm, see `rejection_sampling.training_sequences`.

    own           rejection sampling fine-tuning (RFT): correct answers to the plain question
    kept          RFT with context: correct answers sampled with memory, after the few-shot prompts
    internalised  context distillation: the same answers after the plain question
    unfiltered    its control: of each problem as many answers sampled with memory, right or not
    distilled     as own, where `plain` has the answers of another, better model

    `plain` and `with_memory` are graded records without and with memory, `few_shot` the
    prompts with examples. ValueError for an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"No arm {arm!r}; there are {', '.join(ARMS)}.")
    source = plain if arm in ("own", "distilled") else with_memory
    traces = rejection_sampling.accept(source, cap, seed)
    if arm == "unfiltered":
        traces = rejection_sampling.sample_unfiltered(source, traces, seed)
    bare = prompts.build(prompts.plain, [prompt.problem for prompt in few_shot])
    return rejection_sampling.training_sequences(model, traces, few_shot if arm == "kept" else bare)


def commonest_answers(problems: Sequence[Problem]) -> dict[str, str]:
    """The gold answer that most of the problems of each family have; of several the first by text.

    What a model that has learnt nothing but this earns is `contrasts.constant`."""
    table = pandas.DataFrame([(p.family, p.answer) for p in problems], columns=["family", "answer"])
    return table.groupby("family")["answer"].agg(lambda answers: answers.mode()[0]).to_dict()


def run_rounds(
    base: str,
    bank: ReasoningBank,
    train: Sequence[Problem],
    rounds: int,
    plan: Plan,
    config: sft.SFTConfig,
    store: Store,
    folder: Path,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Run `rounds` rounds; the base model and the model after each round, by folder.

    The state of the bank before round i is tagged `round-i`. A killed run continues where it was.
    """
    chain, frames = [base], []
    for number in range(rounds):
        model = load(chain[-1])
        examples = bank_before_round(bank, number)
        queue = few_shot_prompts(examples, train, plan.k)
        frames.append(evaluate(model, queue, plan.sampling, store, plan.samples, report=_silent))
        solved = pandas.concat(frames, ignore_index=True)
        solved_ids = {item.problem_id for item in examples.strategies()}
        bank.add(
            [item for item in strategy.examples(frames[-1]) if item.problem_id not in solved_ids]
        )
        share, size = 100 * frames[-1]["correct"].mean(), len(bank_before_round(bank, number + 1))
        report(f"round {number + 1}: {share:.1f}% of the answers correct, {size} examples")
        rows = training_set("internalised", model, solved, solved, queue, plan.cap, config.seed)
        chain.append(str(sft.sft(base, rows, config, folder)))
    return chain


def bank_before_round(bank: ReasoningBank, number: int) -> ReasoningBank:
    """The bank as it was before round `number`; tagged now if that round has not begun."""
    if f"round-{number}" not in bank.tags():
        bank.tag(f"round-{number}")
    return bank.checkout(f"round-{number}")


def evaluate_checkpoint(
    model: Model | str,
    questions: Sequence[Prompt],
    store: Store,
    max_new_tokens: int,
    samples: int = 1,
) -> pandas.DataFrame:
    """Graded records of a model, or the one of that name, on `questions`: greedy, or `samples` at
    temperature 0.6."""
    sampling = Sampling(max_new_tokens)
    if samples > 1:
        sampling = Sampling(max_new_tokens, temperature=0.6, top_p=0.95)
    model = load(model) if isinstance(model, str) else model
    return evaluate(model, list(questions), sampling, store, samples, report=_silent)


def best_against_last(
    place: Path,
    validation: Sequence[Prompt],
    test: Sequence[Prompt],
    store: Store,
    max_new_tokens: int,
) -> dict:
    """Test accuracy of the checkpoint that is best on validation, and of the last one, in percent.

    `expected optimism`: by how many points the best of as many checkpoints of equal true accuracy
    would exceed their mean.
    """
    folders = {step: str(folder) for step, folder in sft.saved_models(place).items()}
    loaded = lru_cache(maxsize=1)(load)  # the chosen one is most often the last

    def accuracy(step: int, questions: Sequence[Prompt]) -> float:
        model = loaded(folders[step])
        return evaluate_checkpoint(model, questions, store, max_new_tokens)["correct"].mean()

    scores = {step: accuracy(step, validation) for step in folders}
    best, mean = checkpoint_selection.select(scores), sum(scores.values()) / len(scores)
    optimism = stats.best_of_optimism(mean, len(validation), len(scores))
    row = {"validation": scores[best], "test, chosen": accuracy(best, test)}
    row |= {"test, last": accuracy(max(folders), test), "expected optimism": optimism}
    shares = {name: 100 * float(value) for name, value in row.items()}
    return {"checkpoints": len(folders), "chosen step": best} | shares


def _silent(line: str) -> None:
    pass
