"""The same facts kept in many ways: in fetched blocks, in other shapes of them, in the model.

An arm is a model with a bank or without; all are trained on the same sentences, and what a context
fetches has as many parameters in each. See `kit.parametric.train` for the training.

    python -m kit train-bank FOLDER --only 0 --only 1     trains two subtrees of a bank; other
                                                          processes, or machines that share
                                                          FOLDER, the others

Source: arXiv 2510.02375, sections 4 and 5.
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

CO_TRAINED = 1e-4  # learning rate of a model that is trained as well


@dataclass(frozen=True)
class Layout:
    """Where memory is, and how much."""

    branching: int = 4
    sizes: tuple[int, ...] = (32, 16)  # feed-forward units per layer, by level
    where: str = "late"  # see ffn_memory.choose_layers
    layers: int = 10
    kind: str = "ffn"  # see ffn_memory.KINDS

    def shape(self, model: Model) -> Shape:
        """The Shape on `model`; of other kinds as many units as have the parameters."""
        depth = model.weights.config.get_text_config().num_hidden_layers
        layers = ffn_memory.choose_layers(min(self.layers, depth), depth, self.where)
        made = ffn_memory.shape(model.weights, self.kind, layers, self.sizes, self.branching)
        plain = ffn_memory.shape(model.weights, "ffn", layers, self.sizes, self.branching)
        sizes = tuple(max(1, round(size * plain.row / made.row)) for size in self.sizes)
        return dataclasses.replace(made, sizes=sizes)

    def one(self) -> "Layout":
        """All that a context fetches as one block for everybody."""
        return dataclasses.replace(self, branching=1, sizes=(sum(self.sizes),))

    def flat(self) -> "Layout":
        """As many leaves, one level, all that a context fetches in each."""
        leaves = self.branching ** len(self.sizes)
        return dataclasses.replace(self, branching=leaves, sizes=(sum(self.sizes),))


def solved_as_facts(model: Model, prompts: Sequence[Prompt]) -> list[Sentence]:
    """Solved problems to be told as facts are: the answer after the question as it is asked."""
    told = []
    for rank, prompt in enumerate(prompts):
        p, how = prompt.problem, {"add_generation_prompt": True, "enable_thinking": prompt.thinking}
        asked = model.tokenizer.apply_chat_template(prompt.chat, tokenize=False, **how)
        fact = Fact("worked", p.question, p.answer, rank)
        told.append(Sentence(asked, f"Answer: {p.answer}", fact))
    return told


@dataclass(frozen=True)
class FactStudy:
    """Facts told in sentences to a model, and where all trainings on them are kept."""

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
        """What the layers below the first with memory say, shared by all trainings."""
        first = min(shape.layers)
        if first not in self._prefixes:
            said = {(s.context, s.completion) for s in self.sentences}
            ids = [tuple(encode_sentence(self.model, *pair)[0]) for pair in said]
            fits = ActivationCache.fits(self.model, first, sum(map(len, ids)))
            self._prefixes[first] = ActivationCache(self.model, first, ids) if fits else None
        return self._prefixes[first]

    @cached_property
    def _made(self) -> dict[tuple, cluster_tree.Tree | list[Row]]:
        return {}

    @cached_property
    def documents(self) -> np.ndarray:
        """What is clustered, in the order of `facts`: [N, dimension]."""
        return facts.documents(self.facts, self.embedder)

    def tree(self, layout: Layout) -> cluster_tree.Tree:
        """Clusters of the documents, fitted once."""
        key = layout.branching, len(layout.sizes)
        if key not in self._made:
            self._made[key] = cluster_tree.fit(self.documents, *key)
        return self._made[key]

    def paths(self, tree: cluster_tree.Tree) -> dict[Fact, tuple[int, ...]]:
        """The path of each fact, by its document."""
        found = tree.assign(self.documents).tolist()
        return {fact: tuple(path) for fact, path in zip(self.facts, found, strict=True)}

    def rows(self, tree: cluster_tree.Tree, context: int) -> list[Row]:
        """The sentences packed along the paths of their facts, tokenised once."""
        key = tree.branching, len(tree.levels), context
        if key not in self._made:
            paths = self.paths(tree)
            said = [(sentence.context, sentence.completion) for sentence in self.sentences]
            along = [paths[sentence.fact] for sentence in self.sentences]
            self._made[key] = pack_rows(self.model, said, along, context)
        return self._made[key]

    def bank(
        self,
        layout: Layout,
        recipe: MemoryTrainConfig,
        share: float = 1.0,
        only: Sequence[int] | None = None,
    ) -> Path | None:
        """A bank trained with the model frozen, on every 1/`share`-th row: its folder. `only` some
        subtrees: see `train.train_bank`."""
        tree = self.tree(layout)
        rows = self.rows(tree, recipe.context)[:: round(1 / share)]
        shape, name = layout.shape(self.model), self.embedder.fingerprint
        how = self.model, tree, shape, rows, recipe, self.folder, name, self.report, only
        return train_bank(*how, self.prefix_activations(shape))

    def arm(
        self, name: str, layout: Layout, recipe: MemoryTrainConfig
    ) -> tuple[Model, ParametricBank | None]:
        """The model and the bank of one arm.

        "fetched"; "wrong": the blocks of the next subtree; "generic": one block for everybody,
        trained on as much as one subtree is; "shared": the same, trained on everything; "flat": one
        level; a kind of `ffn_memory.KINDS`; "fetched-early", "fetched-middle", "fetched-uniform":
        other layers; "continued": the model itself trained on the same rows; "co-trained": both.
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
        """The bank of "fetched" with the blocks of subtree `node` trained on other sentences."""
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
