"""Compares where the same facts can be stored: fetched blocks, other layouts of them, the model.

An arm is a model with or without a bank. All arms are trained on the same sentences, and a context
fetches equally many parameters in each. `kit.parametric.train` does the training.

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
from kit.schema import Prompt

CO_TRAINED = 1e-4  # learning rate of the model where it is trained too


@dataclass(frozen=True)
class Layout:
    """Placement and size of memory."""

    branching: int = 4
    sizes: tuple[int, ...] = (32, 16)  # feed-forward units per layer, by level
    where: str = "late"  # see ffn_memory.choose_layers
    layers: int = 10
    kind: str = "ffn"  # see ffn_memory.KINDS

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
        return dataclasses.replace(self, branching=1, sizes=(sum(self.sizes),))

    def flat(self) -> "Layout":
        """One level with as many leaves, each with all parameters that a context fetches."""
        leaves = self.branching ** len(self.sizes)
        return dataclasses.replace(self, branching=leaves, sizes=(sum(self.sizes),))


def solved_as_facts(model: Model, prompts: Sequence[Prompt]) -> list[Sentence]:
    """Training sentences from solved problems: the answer after the question's prompt."""
    sentences = []
    for rank, prompt in enumerate(prompts):
        p, how = prompt.problem, {"add_generation_prompt": True, "enable_thinking": prompt.thinking}
        asked = model.tokenizer.apply_chat_template(prompt.chat, tokenize=False, **how)
        fact = Fact("worked", p.question, p.answer, rank)
        sentences.append(Sentence(asked, f"Answer: {p.answer}", fact))
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
            pairs = {(s.context, s.completion) for s in self.sentences}
            ids = [tuple(encode_sentence(self.model, *pair)[0]) for pair in pairs]
            fits = ActivationCache.fits(self.model, first, sum(map(len, ids)))
            self._prefixes[first] = ActivationCache(self.model, first, ids) if fits else None
        return self._prefixes[first]

    @cached_property
    def _cached(self) -> dict[tuple, cluster_tree.Tree | list[Row]]:
        return {}

    @cached_property
    def documents(self) -> np.ndarray:
        """Embeddings to cluster, in the order of `facts`: [N, dimension]."""
        return facts.documents(self.facts, self.embedder)

    def tree(self, layout: Layout) -> cluster_tree.Tree:
        """Clusters of the documents, fitted once."""
        key = layout.branching, len(layout.sizes)
        if key not in self._cached:
            self._cached[key] = cluster_tree.fit(self.documents, *key)
        return self._cached[key]

    def paths(self, tree: cluster_tree.Tree) -> dict[Fact, tuple[int, ...]]:
        """The path of each fact, by its document."""
        found = tree.assign(self.documents).tolist()
        return {fact: tuple(path) for fact, path in zip(self.facts, found, strict=True)}

    def rows(self, tree: cluster_tree.Tree, context: int) -> list[Row]:
        """The sentences packed along the paths of their facts, tokenized once."""
        key = tree.branching, len(tree.levels), context
        if key not in self._cached:
            paths = self.paths(tree)
            pairs = [(sentence.context, sentence.completion) for sentence in self.sentences]
            along = [paths[sentence.fact] for sentence in self.sentences]
            self._cached[key] = pack_rows(self.model, pairs, along, context)
        return self._cached[key]

    def bank(
        self,
        layout: Layout,
        recipe: MemoryTrainConfig,
        share: float = 1.0,
        only: Sequence[int] | None = None,
    ) -> Path | None:
        """The folder of a bank trained with the model frozen, on every 1/`share`-th row; for `only`
        see `train.train_bank`."""
        tree = self.tree(layout)
        rows = self.rows(tree, recipe.context)[:: round(1 / share)]
        shape, name = layout.shape(self.model), self.embedder.fingerprint
        how = self.model, tree, shape, rows, recipe, self.folder, name, self.report, only
        return train_bank(*how, self.prefix_activations(shape))

    def arm(
        self, name: str, layout: Layout, recipe: MemoryTrainConfig
    ) -> tuple[Model, ParametricBank | None]:
        """The model and the bank of one arm.

        "fetched": a bank fetched by question. Controls: "wrong", the blocks of the next subtree;
        "generic", one block for all questions, trained on as many rows as a subtree; "shared", one
        block trained on all rows. Variants: "flat", one level; a kind of `ffn_memory.KINDS`;
        "fetched-early", "fetched-middle", "fetched-uniform", other layers. "continued": the model
        itself trained on the same rows; "co-trained": model and bank.
        """
        turn = 0
        if name in ("continued", "co-trained"):
            return self._with_model(name == "co-trained", layout, recipe)
        if name == "generic":
            folder = self.bank(layout.one(), recipe, 1 / (layout.branching + 1))
        elif name in ("fetched", "wrong"):
            folder, turn = self.bank(layout, recipe), int(name == "wrong")
        else:
            if name in ("shared", "flat"):
                changed = layout.one() if name == "shared" else layout.flat()
            elif name in ffn_memory.KINDS:
                changed = dataclasses.replace(layout, kind=name)
            else:
                changed = dataclasses.replace(layout, where=name.removeprefix("fetched-"))
                if changed.shape(self.model) == layout.shape(self.model):
                    raise ValueError(
                        f"{name} has the layers of fetched, {layout.shape(self.model).layers}, so "
                        f"that it is no other arm; lower layers of the layout."
                    )
            folder = self.bank(changed, recipe)
        return self.model, ParametricBank(folder, self.model, self.embedder, turn=turn)

    def _with_model(self, blocks: bool, layout: Layout, recipe: MemoryTrainConfig):
        tree, shape = self.tree(layout), layout.shape(self.model)
        rows = self.rows(tree, recipe.context)
        recipe = dataclasses.replace(
            recipe, anchor_rate=CO_TRAINED, generic=blocks / (layout.branching + 1)
        )
        nodes = range(layout.branching) if blocks else ()
        job = BankTraining(self.model, shape, nodes, rows, recipe, self.folder)
        place = job.run(self.report)
        base = self.model
        model = load(str(place / "model"), base.dtype_name, str(base.device))
        if not blocks:
            return model, None
        name = self.embedder.fingerprint
        folder = assemble_bank(place / "bank", model, tree, shape, job.files, name)
        return model, ParametricBank(folder, model, self.embedder)

    def edited(
        self, layout: Layout, recipe: MemoryTrainConfig, node: int, altered: Sequence[Sentence]
    ) -> ParametricBank:
        """The bank of "fetched" with subtree `node` trained on the `altered` sentences instead."""
        tree, shape = self.tree(layout), layout.shape(self.model)
        before, name = self.bank(layout, recipe), self.embedder.fingerprint
        other = dataclasses.replace(self, sentences=tuple(altered))
        job = BankTraining(
            self.model, shape, [node], other.rows(tree, recipe.context), recipe, self.folder
        )
        job.run(self.report)
        files = [before / shards.name(number) for number in range(layout.branching)]
        files[node] = job.files[0]
        folder = assemble_bank(job.folder / "bank", self.model, tree, shape, files, name)
        return ParametricBank(folder, self.model, self.embedder)
