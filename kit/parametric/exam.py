"""What each arm of parametric memory answers: two probes of the same questions, by arm.

An arm is asked to choose among options and in free words (`kit.parametric.qa`), each training of it
by itself. Beside the arms of `FactStudy` there are retrieved passages, blocked and edited blocks,
and an anchor that was trained from random weights.

Source: https://arxiv.org/abs/2510.02375, section 4.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit.analysis import contrasts, tables
from kit.data import prompts
from kit.evaluation.evaluate import MemoryConfig, evaluate
from kit.evaluation.store import Store
from kit.models.load import Model
from kit.parametric import facts, qa, scratch
from kit.parametric.bank import ParametricBank
from kit.parametric.facts import Fact
from kit.parametric.rag import Passages
from kit.parametric.study import FactStudy, Layout
from kit.parametric.train import MemoryTrainConfig
from kit.schema import Problem, Sampling

Trained = tuple[Model, ParametricBank | None]


class Edit(NamedTuple):
    """What training one subtree on other answers changed."""

    subtree: int
    inside: tuple[int, int]  # answers changed of all, to questions that go to the subtree
    outside: tuple[int, int]  # the same of all other questions
    given: tuple[float, float]  # percent of the new answers given, before and after

    def __str__(self) -> str:
        return (
            f"subtree {self.subtree} edited: {self.inside[0]} of {self.inside[1]} answers to its "
            f"questions changed, {self.outside[0]} of {self.outside[1]} others; the new answer is "
            f"given to {self.given[0]:.0f}% of its questions before, {self.given[1]:.0f}% after"
        )


@dataclass
class Exam:
    """Answers by arm to `questions`, each with its `options`; stored ones are not asked again."""

    study: FactStudy
    layout: Layout
    recipe: MemoryTrainConfig
    questions: Sequence[Problem]
    options: Sequence[Sequence[str]]
    store: Store
    report: Callable[[str], object] = print
    chosen: dict[str, pd.DataFrame] = field(default_factory=dict)  # among options, by arm
    free: dict[str, pd.DataFrame] = field(default_factory=dict)  # in free words
    banks: dict[str, list[ParametricBank | None]] = field(default_factory=dict)  # of each training

    def ask(
        self, arm: str, trained: Sequence[Trained], passages: Sequence[list[str]] | None = None
    ) -> None:
        """Both probes of an arm, of each of its trainings, with `passages` in each prompt."""
        choices, answers = {}, {}
        for seed, (model, bank) in enumerate(trained):
            how = arm, bank, passages, seed
            choices[seed] = qa.multiple_choice(
                model, self.questions, self.options, self.store, *how
            )
            answers[seed] = qa.short_answer(model, self.questions, self.store, *how)
        self.chosen[arm], self.free[arm] = (contrasts.pooled(arm, of) for of in (choices, answers))
        self.banks[arm] = [bank for _, bank in trained]
        shares = [100 * of[arm]["correct"].mean() for of in (self.chosen, self.free)]
        self.report(f"{arm:20} of four options {shares[0]:5.1f}%, in free words {shares[1]:5.1f}%")

    def train(self, arm: str, seeds: int) -> None:
        """Train an arm of `FactStudy.arm` so many times, and ask each."""
        recipes = [replace(self.recipe, seed=seed) for seed in range(seeds)]
        self.ask(arm, [self.study.arm(arm, self.layout, recipe) for recipe in recipes])

    def retrieve(self, passages: Passages, k: int) -> None:
        """The `k` nearest passages in each prompt, alone and beside fetched blocks."""
        contexts = passages.search([problem.question for problem in self.questions], k)
        name = "rag" if k == 1 else f"rag {k}"
        for arm, bank in ((name, None), (f"{name} + fetched", self.banks["fetched"][0])):
            self.ask(arm, [(self.study.model, bank)], contexts)

    def from_nothing(self, anchor: Model, rate: float) -> None:
        """The arms of `kit.parametric.scratch`, in which `anchor` and its memory read all tokens of
        the sentences at a learning rate of the anchor of `rate`."""
        study = replace(
            self.study, model=anchor, sentences=tuple(scratch.whole(self.study.sentences))
        )
        recipe = replace(self.recipe, anchor_rate=rate)
        for arm in scratch.ARMS:
            self.ask(f"scratch {arm}", [study.arm(arm, self.layout, recipe)])

    @property
    def paths(self) -> dict[str, tuple[int, ...]]:
        """The path of each question, by its id."""
        paths = self.banks["fetched"][0].paths([problem.question for problem in self.questions])
        return dict(zip([problem.id for problem in self.questions], paths, strict=True))

    def most_useful(self, family: str) -> int:
        """The subtree to which most of a family's questions go that only fetched blocks answer; all
        of its questions count where there are none, all questions where the family has none."""
        paths = self.paths
        ids = [p.id for p in self.questions if p.family == family] or [*paths]
        right = {arm: self._first(arm) for arm in ("plain", "fetched")}
        gained = [one for one in ids if right["fetched"][one] > right["plain"][one]]
        return Counter(paths[one][0] for one in gained or ids).most_common(1)[0][0]

    def _first(self, arm: str) -> pd.Series:
        """Whether the first training of an arm answered in free words, by question."""
        return self.free[arm].query("training == 0").set_index("problem_id")["correct"]

    def block(self, subtree: int) -> None:
        """Every training without the blocks of a subtree, and the first one without each level."""
        folders = [bank.folder for bank in self.banks["fetched"]]
        arms = {"without subtree": ({"without": [[subtree]]}, folders)}
        for level in range(len(self.layout.sizes)):
            arms[f"without level {level + 1}"] = {"off": [level]}, folders[:1]
        model, embedder = self.study.model, self.study.embedder
        for arm, (blocked, of) in arms.items():
            banks = [ParametricBank(folder, model, embedder, **blocked) for folder in of]
            self.ask(arm, [(model, bank) for bank in banks])

    def by_subtree(self) -> pd.DataFrame:
        """Free answers of the first training, percent, by the subtree that a question goes to."""
        paths = self.paths
        right = pd.DataFrame({arm: self._first(arm) for arm in ("plain", "fetched")})
        groups = right.groupby(lambda one: paths[one][0])
        table = (100 * groups.mean()).add_suffix(", %").assign(questions=groups.size())
        return table.rename_axis("subtree").reset_index()

    def edit(self, subtree: int, known: Sequence[Fact]) -> Edit:
        """Train the blocks of one subtree on another answer to each of the `known` facts, the one
        of the fact before it, and put them in the place of the old ones."""
        other = {fact: known[i - 1].answer for i, fact in enumerate(known)}
        altered = [
            replace(s, completion=f" {other[s.fact]}.") if s.fact in other else s
            for s in self.study.sentences
        ]
        old = self.banks["fetched"][0]
        new = self.study.edited(self.layout, self.recipe, subtree, altered)
        model, fact_of = self.study.model, {facts.name(fact): fact for fact in known}
        before, after = (
            qa.short_answer(model, self.questions, self.store, *of).set_index("problem_id")["text"]
            for of in (("fetched", old), ("edited", new))
        )
        changed = after != before.reindex(after.index)
        inside = changed.index.map({one: path[0] for one, path in self.paths.items()}) == subtree
        asked = [
            replace(p, answer=other[fact_of[p.id]])
            for p in self.questions
            if self.paths[p.id][0] == subtree
        ]
        given = tuple(
            tables.share(qa.short_answer(model, asked, self.store, f"edited, {of}", bank))[0]
            for of, bank in (("before", old), ("after", new))
        )
        of_each = [(int(changed[rows].sum()), int(rows.sum())) for rows in (inside, ~inside)]
        return Edit(subtree, *of_each, given)

    def costs(self, passages: Passages) -> pd.DataFrame:
        """Accuracy by both probes beside what an arm fetches, stores, holds and reads: parameters,
        tokens of training, and bytes. Controls that only misuse a bank are left out."""
        rows, tokens = [], self.study.tokens * self.recipe.epochs
        sizes = passages.nbytes()
        searched = sizes["vectors"] + sizes["texts"] / len(passages.texts)  # and one text read
        for arm, frame in self.chosen.items():
            if arm == "wrong" or arm.startswith("without"):
                continue
            bank, rag = self.banks[arm][0], "rag" in arm
            untrained = arm in ("plain", "larger anchor") or (rag and not bank)
            row = {"arm": arm, "accuracy": tables.share(frame)}
            row |= {"free": tables.share(self.free[arm])}
            row |= {"fetched": bank.shape.fetched if bank else 0}
            row |= {"stored": bank.shape.parameters if bank else 0}
            row |= {"trained": 0 if untrained else tokens}
            held = bank.nbytes() if bank else {"bank": 0, "fetched": 0}
            row |= {"held_bytes": held["bank"] + rag * sum(sizes.values())}
            row |= {"read_bytes": held["fetched"] + rag * searched}
            rows.append(row | {"prompt_tokens": frame["prompt_tokens"].mean()})
        return pd.DataFrame(rows)

    def results(self) -> dict:
        """Entries of the stage's results from which `kit.report.recompute` makes its tables."""
        parts = {"options": self.chosen, "free": self.free}
        keys = sorted({key for of in parts.values() for each in of.values() for key in each["key"]})
        frames = {name: contrasts.index_records(of, keys) for name, of in parts.items()}
        return {"keys": keys, "frames": frames, "where": self.layout.where}


def reached(
    study: FactStudy, layouts: Mapping[str, Layout], questions: Sequence[Problem]
) -> pd.DataFrame:
    """Share of the sentences with its answer that were trained into the blocks which a question
    fetches, percent by level, mean over the questions of each family; see `FactStudy.coverage`."""
    families, rows = [problem.family for problem in questions], []
    for arm, layout in layouts.items():
        shares = pd.DataFrame(100 * study.coverage(layout, questions)).groupby(families).mean()
        shares.columns = [f"level {level + 1}, %" for level in shares]
        rows += [{"arm": arm, "family": of} | row.to_dict() for of, row in shares.iterrows()]
    return pd.DataFrame(rows)


def by_reach(
    study: FactStudy, layout: Layout, answers: pd.DataFrame, questions: Sequence[Problem]
) -> pd.DataFrame:
    """Right `answers`, percent, by the share of a question's sentences in the leaf it fetches."""
    last = pd.Series(study.coverage(layout, questions)[:, -1], [p.id for p in questions])
    names = ["none", "up to half", "more than half"]
    bins = pd.cut(answers["problem_id"].map(last), [-1, 0, 0.5, 1], labels=names)
    groups = answers.groupby(bins, observed=True)["correct"]
    table = pd.DataFrame({"right, %": 100 * groups.mean(), "answers": groups.size()})
    return table.rename_axis("sentences in its leaf").reset_index()


def elsewhere(
    model: Model,
    banks: Mapping[str, ParametricBank | None],
    suite: Sequence[Problem],
    texts: Mapping[str, Sequence[str]],
    store: Store,
) -> tuple[pd.DataFrame, dict[str, dict[str, list[float]]]]:
    """What memory costs where it does not help: by arm the accuracy on the problems of `suite` and
    the mean nats per token of each kind of text, and those of each text. Every problem and text
    fetches its own blocks."""
    rows, nats = [], {}
    for arm, bank in banks.items():
        items = [replace(p, arm=arm) for p in prompts.build(prompts.plain, suite)]
        records = evaluate(model, items, Sampling(96), store, memory=MemoryConfig(bank=bank))
        nats[arm] = {kind: qa.nll_per_token(model, lines, bank).tolist()
                     for kind, lines in texts.items() if lines}  # fmt: skip
        means = {kind: float(np.mean(values)) for kind, values in nats[arm].items()}
        rows.append({"arm": arm, "accuracy": tables.share(records)} | means)
    return pd.DataFrame(rows), nats
