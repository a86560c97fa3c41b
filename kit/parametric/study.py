"""Compares where the same facts can be stored: fetched blocks, other layouts of them, the model.

An arm is a model with or without a bank. All arms are trained on the same sentences, as often, and
a context fetches equally many parameters in each that does not say otherwise. Training itself is
that of `kit.parametric.train`.

    python -m kit train-bank FOLDER --only 0 --only 1

trains two subtrees of a bank; other processes or machines that share FOLDER train the others.

Source: https://arxiv.org/abs/2510.02375, sections 4 and 5.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kit.models.embedder import Embedder
from kit.models.load import Model, load
from kit.parametric import cluster_tree, facts, ffn_memory, shards
from kit.parametric.activation_cache import ActivationCache
from kit.parametric.bank import ParametricBank, assemble_bank
from kit.parametric.facts import Fact, Sentence
from kit.parametric.ffn_memory import Shape
from kit.parametric.train import (
    BankTraining,
    MemoryTrainConfig,
    Row,
    encode_sentence,
    pack_rows,
    train_bank,
)
from kit.schema import Problem, Prompt

CO_TRAINED = 1e-4  # learning rate of the model where it is trained too and the recipe has none
SCALES = {"quarter": 0.25, "half": 0.5, "double": 2.0, "fourfold": 4.0}  # of the units of a block
MODELS = ("continued", "co-trained", "co-trained generic")  # arms in which the model is trained


@dataclass(frozen=True)
class Layout:
    """Placement and size of memory."""

    branching: int = 4
    sizes: tuple[int, ...] = (32, 16)  # feed-forward units per layer, by level
    where: str = "late"  # see ffn_memory.choose_layers
    layers: int = 10
    kind: str = "ffn"  # see ffn_memory.KINDS
    routing: str = "text"  # of what is told: by its own embedding; "subject", by an oracle

    def shape(self, model: Model) -> Shape:
        """The Shape on `model`; other kinds have as many units as match the parameters of "ffn"."""
        depth = model.weights.config.get_text_config().num_hidden_layers
        layers = ffn_memory.choose_layers(min(self.layers, depth), depth, self.where)
        shape = ffn_memory.shape(model.weights, self.kind, layers, self.sizes, self.branching)
        plain = ffn_memory.shape(model.weights, "ffn", layers, self.sizes, self.branching)
        sizes = tuple(max(1, round(size * plain.row / shape.row)) for size in self.sizes)
        return dataclasses.replace(shape, sizes=sizes)

    def one(self) -> "Layout":
        """The parameters that a context fetches as one block shared by all contexts."""
        return self._levels(1, sum(self.sizes))

    def whole(self) -> "Layout":
        """All parameters of the bank as one block, which every context reads."""
        units = [size * self.branching ** (level + 1) for level, size in enumerate(self.sizes)]
        return self._levels(1, sum(units))

    def flat(self) -> "Layout":
        """One level with as many leaves, each with all parameters that a context fetches."""
        return self._levels(self.branching ** len(self.sizes), sum(self.sizes))

    def deep(self) -> "Layout":
        """One more level, which takes half of the units of the last."""
        *upper, last = self.sizes
        return self._levels(self.branching, *upper, last - last // 2, last // 2)

    def _levels(self, branching: int, *sizes: int) -> "Layout":
        return dataclasses.replace(self, branching=branching, sizes=sizes)

    def arm(self, name: str) -> "Layout":
        """The layout of an arm that has a bank and a frozen model, see `FactStudy.arm`."""
        whose, _, part = name.partition("-")
        if whose == "shared" and part != "bank":
            return dataclasses.replace(self.one(), kind=part or self.kind)
        if name in ("fetched", "wrong", "co-trained", "co-trained generic"):
            return self
        if name in ("flat", "deep", "shared-bank"):
            return {"flat": self.flat, "deep": self.deep, "shared-bank": self.whole}[name]()
        if name in ffn_memory.KINDS:
            return dataclasses.replace(self, kind=name)
        if part == "oracle":
            return dataclasses.replace(self, routing="subject")
        if part in SCALES:
            sizes = tuple(max(1, round(SCALES[part] * size)) for size in self.sizes)
            return dataclasses.replace(self, sizes=sizes)
        return dataclasses.replace(self, where=part if whose == "fetched" else name)


def solved_as_facts(model: Model, prompts: Sequence[Prompt]) -> list[Sentence]:
    """Training sentences from solved problems: the answer after the question's prompt."""
    sentences = []
    for rank, prompt in enumerate(prompts):
        p, how = prompt.problem, {"add_generation_prompt": True, "enable_thinking": prompt.thinking}
        prompt_text = model.tokenizer.apply_chat_template(prompt.chat, tokenize=False, **how)
        fact, text = Fact("worked", p.question, p.answer, rank), f"{p.question}: {p.answer}"
        sentences.append(Sentence(prompt_text, f"Answer: {p.answer}", fact, text))
    return sentences


@dataclass(frozen=True)
class FactStudy:
    """Facts, the sentences that state them, the model to train and the folder of all trainings."""

    model: Model
    embedder: Embedder
    facts: tuple[Fact, ...]
    sentences: tuple[Sentence, ...]
    folder: Path
    report: Callable[[dict], None] = lambda figures: None

    @cached_property
    def _prefixes(self) -> dict[int, ActivationCache | None]:
        return {}

    def prefix_activations(self, shape: Shape) -> ActivationCache | None:
        """Activations below the first layer with memory, shared by all trainings."""
        first = min(shape.layers)
        if first not in self._prefixes:
            ids = {*self._ids}
            fits = ActivationCache.fits(self.model, first, sum(map(len, ids)))
            self._prefixes[first] = ActivationCache(self.model, first, ids) if fits else None
        return self._prefixes[first]

    @cached_property
    def _cached(self) -> dict:
        return {}

    def _embedded(self, routing: str) -> tuple[np.ndarray, list[int]]:
        """Unit vectors to cluster, each once, [N, dimension], and the one of each sentence."""
        if routing not in ("text", "subject"):
            raise ValueError(f"routing is {routing!r}; use text or subject")
        if routing not in self._cached:
            if routing == "text":
                of = [sentence.text for sentence in self.sentences]
                once = list(dict.fromkeys(of))
                vectors = self.embedder.embed(once)
            else:
                of, once = [sentence.fact for sentence in self.sentences], self.facts
                vectors = facts.subjects(self.facts, self.embedder)
            place = {item: number for number, item in enumerate(once)}
            self._cached[routing] = vectors, [place[item] for item in of]
        return self._cached[routing]

    def tree(self, layout: Layout) -> cluster_tree.Tree:
        """Clusters of the training sentences, fitted once."""
        key = layout.branching, len(layout.sizes), layout.routing
        if key not in self._cached:
            vectors, _ = self._embedded(layout.routing)
            self._cached[key] = cluster_tree.fit(vectors, *key[:2])
        return self._cached[key]

    def paths(self, layout: Layout) -> list[tuple[int, ...]]:
        """The path of each sentence."""
        vectors, of = self._embedded(layout.routing)
        paths = self.tree(layout).assign(vectors).tolist()
        return [tuple(paths[number]) for number in of]

    def rows(self, layout: Layout, context: int) -> list[Row]:
        """The sentences packed along their paths, tokenized once."""
        key = layout.branching, len(layout.sizes), layout.routing, context
        if key not in self._cached:
            self._cached[key] = self._packed(self.sentences, layout, context)
        return self._cached[key]

    def _packed(self, sentences: Sequence[Sentence], layout: Layout, context: int) -> list[Row]:
        pairs = [(sentence.context, sentence.completion) for sentence in sentences]
        return pack_rows(self.model, pairs, self.paths(layout), context)

    def coverage(self, layout: Layout, questions: Sequence[Problem]) -> np.ndarray:
        """Share of the sentences with the answer that was trained into the block which the question
        fetches, by level: [questions, levels]; NaN where no sentence has it."""
        goes = self.tree(layout).assign(self.embedder.embed([p.question for p in questions]))
        paths: dict[str, list[tuple[int, ...]]] = {}
        for sentence, path in zip(self.sentences, self.paths(layout), strict=True):
            paths.setdefault(facts.name(sentence.fact), []).append(path)
        no_path = [(-1,) * goes.shape[1]]
        shares = [
            (np.array(paths.get(p.id, no_path)) == path).mean(0) for p, path in zip(questions, goes)
        ]
        return np.where([[p.id in paths] for p in questions], shares, np.nan)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all sentences; every trained arm reads them once an epoch."""
        return sum(len(ids) for ids in self._ids)

    @cached_property
    def _ids(self) -> list[tuple[int, ...]]:
        once = {(s.context, s.completion): () for s in self.sentences}
        once = {pair: tuple(encode_sentence(self.model, *pair)[0]) for pair in once}
        return [once[s.context, s.completion] for s in self.sentences]

    def bank(
        self, layout: Layout, recipe: MemoryTrainConfig, only: Sequence[int] | None = None
    ) -> Path | None:
        """The folder of a bank trained with the model frozen; for `only` see `train.train_bank`."""
        tree, rows = self.tree(layout), self.rows(layout, recipe.context)
        shape, name = layout.shape(self.model), self.embedder.fingerprint
        recipe = dataclasses.replace(recipe, anchor_rate=0.0)
        how = self.model, tree, shape, rows, recipe, self.folder, name, self.report, only
        return train_bank(*how, self.prefix_activations(shape))

    def refuse_equal(self, names: Sequence[str], layout: Layout) -> None:
        """ValueError where two of these arms would be the same model: same layers, sizes, routing
        and blocks."""
        first_names: dict[tuple, str] = {}
        for name in names:
            if name in MODELS:
                continue
            of = layout.arm(name)
            shape = of.shape(self.model)
            if (same := first_names.setdefault((shape, of.routing, name == "wrong"), name)) != name:
                raise ValueError(
                    f"{name} and {same} are one arm: both have {sum(shape.sizes)} units in layers "
                    f"{[*shape.layers]}; lower layers of the layout, or leave one of them out."
                )

    def arm(
        self, name: str, layout: Layout, recipe: MemoryTrainConfig
    ) -> tuple[Model, ParametricBank | None]:
        """The model and the bank of one arm, all trained on the same facts equally often.

        "fetched": a bank fetched by question. Controls: "wrong", the blocks of the next subtree;
        "shared", one block for all questions, with equal parameters fetched; "shared-bank", one
        with equal parameters stored. A kind of `ffn_memory.KINDS` is a bank of that kind, "shared-"
        before it one such block for everybody. "fetched-oracle": sentences routed by their subject,
        which no text names. "fetched-early", "-middle", "-uniform": other layers; "-quarter",
        "-half", "-double", "-fourfold": other sizes; "flat" and "deep": one level, one more.
        "continued": the model itself trained; "co-trained": model and bank, "co-trained generic"
        the same model with its generic block.
        """
        if name in MODELS:
            return self._with_model(name, layout, recipe)
        self.refuse_equal(("fetched", *({name} - {"fetched"})), layout)
        folder = self.bank(layout.arm(name), recipe)
        return self.model, ParametricBank(
            folder, self.model, self.embedder, turn=int(name == "wrong")
        )

    def _with_model(self, name: str, layout: Layout, recipe: MemoryTrainConfig):
        blocks, shape = name != "continued", layout.shape(self.model)
        rows = self.rows(layout, recipe.context)
        recipe = dataclasses.replace(
            recipe,
            anchor_rate=recipe.anchor_rate or CO_TRAINED,
            generic=blocks / (layout.branching + 1),
        )
        nodes = range(layout.branching) if blocks else ()
        job = BankTraining(self.model, shape, nodes, rows, recipe, self.folder)
        place = job.run(self.report)
        base = self.model
        model = load(str(place / "model"), base.dtype_name, str(base.device))
        if not blocks:
            return model, None
        files, folder = job.files, place / "bank"
        if name == "co-trained generic":
            layout, files = layout.one(), [place / "generic.safetensors"]
            shape, folder = layout.shape(self.model), place / "generic"
        assemble_bank(folder, model, self.tree(layout), shape, files, self.embedder.fingerprint)
        return model, ParametricBank(folder, model, self.embedder)

    def edited(
        self, layout: Layout, recipe: MemoryTrainConfig, node: int, altered: Sequence[Sentence]
    ) -> ParametricBank:
        """The bank of "fetched" with subtree `node` trained on the `altered` sentences instead,
        each on the path of the one that it replaces."""
        tree, shape = self.tree(layout), layout.shape(self.model)
        before, name = self.bank(layout, recipe), self.embedder.fingerprint
        rows = self._packed(altered, layout, recipe.context)
        job = BankTraining(self.model, shape, [node], rows, recipe, self.folder)
        job.run(self.report)
        files = [before / shards.name(number) for number in range(layout.branching)]
        files[node] = job.files[0]
        folder = assemble_bank(job.folder / "bank", self.model, tree, shape, files, name)
        return ParametricBank(folder, self.model, self.embedder)
