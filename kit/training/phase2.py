"""Phase 2 as a study: traces, trainings on them, exams, compounding, GRPO, and what came of each.

`Study` holds what is fixed before the run; each of its methods is one stage, which resumes where it
was stopped, since records are stored and trainings are named by all that determines them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kit.analysis import contrasts, stats, tables
from kit.data import problems, prompts
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.models.embedder import Embedder
from kit.models.load import Model, load
from kit.reasoning_bank import strategy
from kit.reasoning_bank.bank import ReasoningBank
from kit.schema import Problem, Prompt
from kit.training import (
    checkpoint_selection,
    expert_iteration,
    grpo,
    rejection_sampling,
    rewards,
    sft,
)
from kit.training.expert_iteration import Plan, evaluate_checkpoint
from kit.training.sft import SFTConfig

Trainings = Mapping[tuple[str, int], Path]  # trained models by arm and seed
WAYS = ("without the bank", "with the bank")  # of asking, in `Study.compound`


@dataclass(frozen=True)
class Study:
    """What is fixed before Phase 2 runs on a model."""

    model: Model
    embedder: Embedder
    train: Sequence[Problem]
    validation: Sequence[Problem]
    test: Sequence[Problem]
    held_out: Sequence[Problem]  # tested as well, of families that are never trained on
    plan: Plan
    recipe: SFTConfig
    arms: Sequence[str]  # of `expert_iteration.training_set`
    seeds: int
    store: Store
    folder: Path

    @property
    def families(self) -> list[str]:
        """The families that are trained on."""
        return sorted({problem.family for problem in self.train})

    @cached_property
    def own_answers(self) -> pd.DataFrame:
        """Graded answers of the model to the training problems, asked plainly."""
        return self._sampled(self.model, prompts.build(prompts.plain, self.train))

    @cached_property
    def bank(self) -> ReasoningBank:
        """The bank of worked examples: gold answers of a few problems, or own answers."""
        first = expert_iteration.seed_examples(self.train, self.plan.given)
        ids = [problem.id for problem in self.train]
        identity = [self.model.weights_hash, asdict(self.plan), sft.identity(self.recipe), ids]
        return expert_iteration.seed_bank(
            self.folder / "banks", self.embedder, first or strategy.examples(self.own_answers),
            *identity,
        )  # fmt: skip

    def with_examples(self, asked: Sequence[Problem], number: int = 0) -> list[Prompt]:
        """Problems after the examples most like them, from the bank before round `number`."""
        bank = expert_iteration.bank_before_round(self.bank, number)
        return expert_iteration.few_shot_prompts(bank, asked, self.plan.k)

    def _sampled(self, model: Model, asked: Sequence[Prompt]) -> pd.DataFrame:
        return evaluate(model, asked, self.plan.sampling, self.store, self.plan.samples)

    def sample(self) -> dict[str, pd.DataFrame]:
        """Graded answers to the training problems by how they were asked, and those of a better
        model where the plan names one."""
        answers = {"plain": self.own_answers}
        answers["with examples"] = self._sampled(self.model, self.with_examples(self.train))
        if self.plan.teacher:
            plain = prompts.build(prompts.plain, self.train)
            answers["teacher"] = self._sampled(load(self.plan.teacher), plain)
        return answers

    def fine_tune(
        self, answers: Mapping[str, pd.DataFrame], report: Callable[[str], None] = print
    ) -> dict[tuple[str, int], Path]:
        """A training of each arm and seed on `answers`, see `sample`: the models by both."""
        few_shot, weights = self.with_examples(self.train), {}
        for arm in self.arms:
            own = answers["teacher" if arm == "distilled" else "plain"]
            for seed in range(self.seeds):
                rows = expert_iteration.training_set(
                    arm, self.model, own, answers["with examples"], few_shot, self.plan.cap, seed
                )
                keep_every = self.recipe.keep_every if arm == "internalised" else 0
                config = replace(self.recipe, seed=seed, keep_every=keep_every)
                place = sft.sft(self.model.name, rows, config, self.folder / "tuned")
                losses = [row["loss"] for row in sft.history(place)]
                report(f"{arm:13} seed {seed}: {len(rows)} traces, loss {losses[0]:.2f} to "
                       f"{losses[-1]:.2f}")  # fmt: skip
                weights[arm, seed] = place
        return weights

    @cached_property
    def exam(self) -> list[Prompt]:
        """The test problems, of the families held out too, asked plainly."""
        return prompts.build(prompts.plain, [*self.test, *self.held_out])

    def examine(self, model: Model | str, asked: Sequence[Prompt] = ()) -> pd.DataFrame:
        """Graded greedy answers of a model, or the one of that name, to the exam or to `asked`."""
        return evaluate_checkpoint(model, asked or self.exam, self.store, self.plan.exam_tokens)

    def examine_all(self, trained: Trainings) -> dict[str, pd.DataFrame]:
        """Exams by arm: the base model, without and with examples, and each training; the arm
        `kept` is asked with examples, as it was trained."""
        remembered = self.with_examples([*self.test, *self.held_out])
        frames = {}
        for name, asked in (("base", self.exam), ("base with examples", remembered)):
            frames[name] = contrasts.pooled(name, {0: self.examine(self.model, asked)})
        for arm in self.arms:
            asked = remembered if arm == "kept" else self.exam
            by_seed = {seed: self.examine(str(trained[arm, seed]), asked)
                       for seed in range(self.seeds)}  # fmt: skip
            frames[arm] = contrasts.pooled(arm, by_seed)
        return frames

    def compound(self, rounds: int) -> dict[str, pd.DataFrame]:
        """Exams after each of `rounds` rounds of expert iteration, by WAYS of asking; the round
        stands for the training. With the bank means that before the next round."""
        chain = expert_iteration.run_rounds(
            self.model.name, self.bank, self.train, rounds, self.plan, self.recipe, self.store,
            self.folder / "tuned",
        )  # fmt: skip
        ways = {way: {} for way in WAYS}
        for number, name in enumerate(chain):
            model = load(name) if number else self.model
            for way, asked in zip(WAYS, (self.exam, self.with_examples(self.test, number))):
                ways[way][number] = self.examine(model, asked)
        return {way: contrasts.pooled(way, by_round) for way, by_round in ways.items()}

    def reinforce(
        self,
        config: grpo.GRPOConfig,
        seeds: int,
        follow: Callable[[], Callable[[dict], None]],
        base: str = "",
        problem_set: str = "",
    ) -> list[Path]:
        """A training by GRPO for each of `seeds`, on several GPUs by `accelerate launch`: the
        models. `base` is another model than that of the study, and `problem_set` names other
        training problems than its own with reward variance; `follow` makes what reports each."""
        learnt = rejection_sampling.with_reward_variance(
            self.own_answers, self.train, config.groups
        )
        if problem_set:
            learnt = problems.load(problem_set, "train").problems
        asked, cards = prompts.build(config.arm, learnt), torch.cuda.device_count()
        run = grpo.grpo if cards < 2 else partial(grpo.launch, processes=cards)
        place, base = self.folder / "grpo", base or self.model.name
        return [run(base, asked, replace(config, seed=seed), place, follow())
                for seed in range(seeds)]  # fmt: skip

    def select(self, places: Trainings) -> pd.DataFrame:
        """One row per training: its checkpoint that is best on validation against its last."""
        asked = [prompts.build(prompts.plain, part) for part in (self.validation, self.test)]
        how = *asked, self.store, self.plan.exam_tokens
        return pd.DataFrame([
            {"training": arm, "seed": seed} | expert_iteration.best_against_last(place, *how)
            for (arm, seed), place in places.items()
        ])  # fmt: skip


def reward_table(
    texts: Mapping[str, str], gold: str, question: str, tokenizer, longest: int
) -> pd.DataFrame:
    """What each reward of GRPO says of the texts of an answer, by their names; `longest` is the
    limit of the rewards of length."""
    columns = {"completions": [*texts.values()], "gold": [gold] * len(texts)}
    columns["completion_ids"] = [tokenizer(text)["input_ids"] for text in texts.values()]
    columns["prompts"] = [question] * len(texts)
    names = ["accuracy", "compliance", "think", "cosine_published", "cosine", "drift", "repetition"]
    values = {name: getattr(rewards, name)(**columns, longest=longest)
              for name in (*names, "overlong")}  # fmt: skip
    return pd.DataFrame(values, index=[*texts])


def cosine_curves(longest: int = 1000) -> pd.DataFrame:
    """The cosine reward of right and wrong answers of up to 4 times the limit of `longest`
    characters and as many tokens, as published and as described; `ratio` is length over limit."""
    table = pd.DataFrame({"ratio": np.linspace(0.05, 4, 160)})
    lengths = [round(longest * ratio) for ratio in table["ratio"]]
    for end, name in (("4", "right"), ("5", "wrong")):
        texts = [f"\nAnswer: {end}".rjust(length, ".") for length in lengths]
        columns = {"completions": texts, "gold": ["4"] * len(texts), "longest": longest}
        columns["completion_ids"] = [*map(range, lengths)]
        table[f"{name}, published"] = rewards.cosine_published(**columns)
        table[f"{name}, described"] = rewards.cosine(**columns)
    return table


def group_table(answers: pd.DataFrame) -> pd.DataFrame:
    """One group of GRPO: the end of each answer, its reward for accuracy, its advantage and its
    tokens."""
    reward = pd.Series(rewards.accuracy([*answers["text"]], [*answers["answer"]]))
    return pd.DataFrame({
        "end of the answer": answers["text"].str.strip().str[-40:], "reward": reward,
        "advantage": rewards.advantages(reward), "tokens": answers["new_tokens"],
    })  # fmt: skip


def traces(answers: Mapping[str, pd.DataFrame], cap: int) -> pd.DataFrame:
    """What there is to learn from, by how it was asked: share of correct answers in percent, traces
    that are accepted (at most `cap` a problem), their problems, mean tokens of an answer."""
    rows = []
    for name, frame in answers.items():
        accepted = rejection_sampling.accept(frame, cap)
        row = {"asked": name, "correct, %": 100 * frame["correct"].mean(), "traces": len(accepted)}
        row |= {"problems": accepted["problem_id"].nunique()}
        rows.append(row | {"tokens": frame["new_tokens"].mean()})
    return pd.DataFrame(rows)


def cut_short(frames: Mapping[str, pd.DataFrame], tokens: int) -> str:
    """A clause for contrasts of exams in which less than `tables.ENDED` percent of an arm's answers
    ended before their limit of `tokens`; "" where all arms ended more."""
    rates = {arm: 100 * (frame["finish"] == "stop").mean() for arm, frame in frames.items()}
    worst = min(rates, key=rates.get)
    if rates[worst] >= tables.ENDED:
        return ""
    return f" at {tokens} tokens, where {worst} ends {rates[worst]:.0f}% of its answers"


def benchmark(
    models: Mapping[str, str], steps: Mapping[int, Path], store: Store
) -> list[pd.DataFrame]:
    """Graded answers of published models by arm to all benchmarks of Open-RS, and of the saved
    `steps` of a training to MATH-500; none without `models`."""
    trained = {f"grpo-step{step}": str(place) for step, place in steps.items()} if models else {}
    records = []
    for arm, name in {**models, **trained}.items():
        for source in checkpoint_selection.BENCHMARKS if arm in models else ("math500",):
            asked = prompts.build(prompts.plain, problems.load(source, "test").problems)
            asked = [replace(prompt, arm=arm) for prompt in asked]
            samples = checkpoint_selection.samples_per_problem(len(asked))
            how = asked, store, checkpoint_selection.TOKENS, samples
            records.append(evaluate_checkpoint(name, *how))
    return records


def before_and_after(
    before: pd.DataFrame, after: pd.DataFrame, count: int = 3
) -> list[tuple[str, str, str, str]]:
    """Question, gold answer, and a model's text before and after a training, of `count` problems:
    first those that it solves only after."""
    before = before.set_index("problem_id")
    after = after.query("training == 0").set_index("problem_id")
    gains = after.index[after["correct"] & ~before["correct"].reindex(after.index)]
    shown = [*gains[: count - 1], *after.index.difference(gains)][:count]
    return [(before["question"][key], before["answer"][key], before["text"][key].strip()[:300],
             after["text"][key].strip()) for key in shown]  # fmt: skip


def commonest(frames: Mapping[str, pd.DataFrame], families: Sequence[str]) -> pd.DataFrame:
    """The commonest answer of each arm to each family, with its share."""
    columns = {}
    for arm, frame in frames.items():
        answers = contrasts.commonest(frame[frame["family"].isin(families)])
        texts = answers["answer"].replace("", "none")
        columns[arm] = texts + answers["share"].map(" ({:.0f}%)".format)
    return pd.DataFrame(columns)


def costs(places: Trainings, dollars_per_hour: float) -> pd.DataFrame:
    """What each training took, see `sft.cost`, and its dollars at the rent of a machine."""
    table = pd.DataFrame([
        {"training": arm, "seed": seed, **sft.cost(place)} for (arm, seed), place in places.items()
    ])  # fmt: skip
    return table.assign(dollars=table["seconds"] / 3600 * dollars_per_hour)


def learning(places: Sequence[Path]) -> str:
    """How rewards and lengths of GRPO changed from the first to the last third of its steps, and
    how many of its groups taught nothing."""
    log = pd.concat([pd.DataFrame(sft.history(place)) for place in places])
    third = max(1, len(log) // 3)
    parts = log.nsmallest(third, "step"), log.nlargest(third, "step")
    ends = [part[["reward", "completions/mean_length"]].mean() for part in parts]
    changes = ", ".join(f"reward {reward:.2f} at {length:.0f} tokens" for reward, length in ends)
    idle = 100 * log["frac_reward_zero_std"].mean()
    return (
        f"GRPO, first and last third of its steps, on the problems that it learns from: {changes}\n"
        f"{idle:.0f}% of its groups had equal rewards, hence no gradient"
    )


def sentence(frames: pd.DataFrame, arm: str, control: str, clause: str) -> str:
    """What `arm` does to accuracy against `control`, with its interval and the power that there was
    to see it; `clause` of `cut_short`."""
    effect = contrasts.compute({"measure": "accuracy", "arm": arm, "control": control}, frames)
    word = "raises" if effect.low > 0 else "lowers" if effect.high < 0 else "is not shown to change"
    interval = f"{effect.estimate:+.1f} points [{effect.low:.1f}, {effect.high:.1f}]"
    seen = stats.minimum_detectable(effect.low, effect.high)
    return (
        f"{arm} {word} accuracy against {control}{clause}: {interval}; an exam as precise as this "
        f"shows a true difference of {seen:.1f} points in 80% of cases"
    )
