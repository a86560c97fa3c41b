"""Trains a bank of parametric memory: blocks learn the sentences of their cluster.

Blocks are float32, and so is the anchor (the model) where it is trained: bfloat16 would lose the
steps of AdamW. With a frozen anchor each subtree of the first level is an independent job for any
process or machine, and the bank is assembled from their results. Co-trained with the anchor, all
subtrees are one job, in which a generic block replaces the fetched one at random. Sentences of one
path are packed into rows of `context` tokens. Positions restart with each sentence, which
transformers reads as a boundary for attention; the loss is on completions only.

Source: https://arxiv.org/abs/2510.02375, section 3.3: AdamW (0.9, 0.95), cosine, clipped at 1.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kit.models.checkpoint import ResumableTraining
from kit.models.load import Model, check_head, save, twin
from kit.parametric import activation_cache, cluster_tree, ffn_memory, shards
from kit.parametric.activation_cache import ActivationCache
from kit.parametric.bank import assemble_bank
from kit.parametric.ffn_memory import Shape
from kit.schema import digest

IGNORED = -100  # targets without a loss


@dataclass(frozen=True)
class Row:
    """Packed sentences of one path: token ids, next-token targets, positions, [context] each."""

    path: tuple[int, ...]
    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor


def pack_rows(
    model: Model,
    sentences: Sequence[tuple[str, str]],
    paths: Sequence[tuple[int, ...]],
    context: int,
) -> list[Row]:
    """Rows of (context, completion) texts, packed within a path in their order."""
    by_path: dict[tuple[int, ...], list] = {}
    for pair, path in zip(sentences, paths, strict=True):
        by_path.setdefault(tuple(path), []).append(pair)
    rows = []
    for path, pairs in sorted(by_path.items()):
        open_row: list[tuple[list[int], int]] = []
        for before, after in pairs:
            ids, read = encode_sentence(model, before, after)
            if len(ids) > context:
                raise ValueError(
                    f"{before[:60]!r} has {len(ids)} tokens, a row {context}; use a longer context."
                )
            if sum(len(other) for other, _ in open_row) + len(ids) > context:
                rows.append(_row(path, open_row, context, ids[-1]))
                open_row = []
            open_row.append((ids, read))
        rows.append(_row(path, open_row, context, model.tokenizer.eos_token_id))
    return rows


def encode_sentence(model: Model, before: str, after: str) -> tuple[list[int], int]:
    """Token ids of a sentence with its end token, and how many of them are context: the first at
    least, before which there is nothing to predict it from."""
    context, completion = (
        model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)
    )
    return [*context, *completion, model.tokenizer.eos_token_id], max(1, len(context))


def _row(path, sentences, context: int, end: int) -> Row:
    ids, targets, positions = [], [], []
    for tokens, read in sentences:
        ids += tokens
        targets += [IGNORED] * (read - 1) + tokens[read:] + [IGNORED]
        positions += range(len(tokens))
    rest = context - len(ids)
    ids, targets = ids + [end] * rest, targets + [IGNORED] * rest
    positions += range(rest)
    return Row(path, *(torch.tensor(values) for values in (ids, targets, positions)))


@dataclass(frozen=True)
class MemoryTrainConfig:
    """Hyperparameters of a training; the defaults are those of the laptop profile."""

    batch: int = 2  # rows per step
    context: int = 128  # tokens per row
    epochs: int = 1
    learning_rate: float = 3e-3  # of the blocks
    anchor_rate: float = 0.0  # learning rate of the model itself; 0 leaves it frozen
    generic: float = 0.0  # probability that a row uses the generic block instead of its own
    least: float = 0.1  # final learning rate over the peak
    weight_decay: float = 1e-3
    clip: float = 1.0
    seed: int = 0


def completion_loss(
    model: Model, batch: Sequence[Row], prefix: ActivationCache | None = None
) -> torch.Tensor:
    """Mean over rows of the mean cross-entropy of their completions, in nats per token; `prefix`
    supplies the activations below the memory layers."""
    ids, targets, positions = (
        torch.stack([getattr(row, name) for row in batch]).to(model.device)
        for name in ("ids", "targets", "positions")
    )
    inputs = {"input_ids": ids}
    if prefix:
        inputs = {"inputs_embeds": prefix.states(ids, positions).to(model.dtype)}
    with activation_cache.restrict_layers(model.weights, prefix.first) if prefix else nullcontext():
        out = model.weights.base_model(**inputs, position_ids=positions, use_cache=False)
    states = out.last_hidden_state
    check_head(model.weights)
    spoken = targets != IGNORED  # the head is a third of the model: only where there is a loss
    logits = model.weights.lm_head(states[spoken]).float()
    each = torch.nn.functional.cross_entropy(logits, targets[spoken], reduction="none")
    share = 1 / spoken.sum(1).clamp_min(1)
    return (each * share[spoken.nonzero()[:, 0]]).sum() / len(batch)


class BankTraining(ResumableTraining):
    """One job: trains the blocks of the subtrees `nodes` on the rows whose paths go through them,
    and the model too where `recipe.anchor_rate` is positive; without `nodes` the model alone.

    `run` resumes a killed job. Its folder then has a shard per subtree, the generic block as
    generic.safetensors, and the trained model as `model`.
    """

    def __init__(
        self, model: Model, shape: Shape, nodes: Sequence[int], data: Sequence[Row],
        recipe: MemoryTrainConfig, folder: Path, prefix: ActivationCache | None = None,
    ):  # fmt: skip
        self.shape, self.nodes, self.recipe = shape, tuple(nodes), recipe
        self.data = [row for row in data if row.path[0] in nodes or not nodes]
        content = hashlib.sha256()
        for row in self.data:
            content.update(f"{row.path}".encode() + row.ids.numpy().tobytes())
            content.update(row.targets.numpy().tobytes())
        identity = [model.weights_hash, str(model.dtype), asdict(shape), nodes and [*nodes]]
        steps = recipe.epochs * math.ceil(len(self.data) / recipe.batch)
        super().__init__(folder, [*identity, asdict(recipe), content.hexdigest()], steps)
        self.files = [self.folder / shards.name(node) for node in self.nodes]
        self.base, self.model, self.prefix = model, model, prefix
        if recipe.anchor_rate or model.dtype == torch.float16:  # too small for gradients
            weights = twin(model.weights, torch.float32).train(bool(recipe.anchor_rate))
            self.model = replace(model, weights=weights)
        self.model.weights.requires_grad_(bool(recipe.anchor_rate))
        for node in self.nodes:
            self._begin(f"{node}", int(digest([recipe.seed, node], 7), 16))
        if recipe.generic:
            self._begin("generic", recipe.seed)
        self.optimizer = self._optimizer()

    def _begin(self, name: str, seed: int) -> None:
        shape = self.shape
        if name == "generic":  # one block as large as a path's
            shape = replace(shape, sizes=(sum(shape.sizes),))
        for level, blocks in enumerate(ffn_memory.initial(self.model.weights, shape, seed)):
            self.parameters[f"{name}|{level}"] = torch.nn.Parameter(blocks.to(self.model.device))

    def _optimizer(self) -> torch.optim.AdamW:
        groups = [{"params": [*self.parameters.values()], "peak": self.recipe.learning_rate}]
        if self.recipe.anchor_rate:
            anchor = dict(self.model.weights.named_parameters())
            groups.append({"params": [*anchor.values()], "peak": self.recipe.anchor_rate})
            self.parameters |= {f"model.{name}": value for name, value in anchor.items()}
        groups = [group for group in groups if group["params"]]
        kind = dict(betas=(0.9, 0.95), weight_decay=self.recipe.weight_decay)
        return torch.optim.AdamW(groups, lr=0.0, fused=True, **kind)

    def batch(self, step: int) -> list[int]:
        """Rows of one step: the data in a new order in each epoch."""
        epoch, place = divmod(step, math.ceil(len(self.data) / self.recipe.batch))
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.data))
        return order[place * self.recipe.batch : (place + 1) * self.recipe.batch].tolist()

    def step(self) -> dict:
        """One optimizer step: its loss, gradient norm, completion tokens and seconds."""
        started, number, recipe = time.perf_counter(), len(self.history), self.recipe
        batch = [self.data[i] for i in self.batch(number)]
        part = 0.5 * (1 + math.cos(math.pi * number / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * (recipe.least + (1 - recipe.least) * part)
        with ExitStack() as stack:
            if self.nodes:
                chance = np.random.default_rng([recipe.seed, number, 1]).random(len(batch))
                generic = (chance < recipe.generic).tolist()
                fetched = torch.stack([self._fetched(r.path, g) for r, g in zip(batch, generic)])
                fetched = fetched.to(self.model.dtype)
                wider = ffn_memory.MemoryLayers(self.model.weights, self.shape, fetched)
                stack.enter_context(wider.attached())
            loss = completion_loss(self.model, batch, self.prefix)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"The loss is {loss.item()} at step {number + 1} of subtrees {self.nodes}; lower "
                f"learning_rate."
            )
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip)
        self.optimizer.step()
        tokens = sum(int((row.targets != IGNORED).sum()) for row in batch)
        figures = dict(nodes=self.nodes, step=number + 1, loss=loss.item(), tokens=tokens)
        figures |= dict(gradient_norm=float(norm), seconds=time.perf_counter() - started)
        self.history.append(figures)
        return figures

    def _fetched(self, path: tuple[int, ...], generic: bool) -> torch.Tensor:
        """Blocks of a path, concatenated over levels: [layers, units, row]."""
        if generic:
            return self.parameters["generic|0"][0]
        levels = range(len(self.shape.sizes))
        path_blocks = [self.parameters[f"{path[0]}|{level}"] for level in levels]
        places = [path[level] % self.shape.branching**level for level in levels]
        return torch.cat([blocks[place] for blocks, place in zip(path_blocks, places)], dim=1)

    def run(self, report: Callable[[dict], None] = lambda figures: None) -> Path:
        """Train to the end, unless that was done before; returns the folder of the results."""
        if (self.folder / "history.json").is_file():
            return self.folder
        self.resume()
        self.train(report)
        self.folder.mkdir(parents=True, exist_ok=True)
        for node, file in zip(self.nodes, self.files):
            shards.write(file, self._blocks(f"{node}"))
        if self.recipe.generic:
            shards.write(self.folder / "generic.safetensors", self._blocks("generic"))
        if self.recipe.anchor_rate:
            card = {"base": self.base.name, "recipe": asdict(self.recipe), "rows": len(self.data)}
            save(self.model.weights, self.base, self.folder / "model", card)
        (self.folder / "history.json").write_text(json.dumps(self.history))  # says that it is done
        self.state.unlink(missing_ok=True)
        return self.folder

    def _blocks(self, name: str) -> list[torch.Tensor]:
        tensors = [value for key, value in self.parameters.items() if key.split("|")[0] == name]
        return [blocks.detach().half() for blocks in tensors]


def train_bank(
    model: Model,
    tree: cluster_tree.Tree,
    shape: Shape,
    data: Sequence[Row],
    recipe: MemoryTrainConfig,
    folder: Path,
    embedder: str = "",
    report: Callable[[dict], None] = lambda figures: None,
    only: Iterable[int] | None = None,
    prefix: ActivationCache | None = None,
) -> Path | None:
    """Train a bank on `data` with the model frozen; returns its folder, for `bank.ParametricBank`.

    With `only` some subtrees are trained here, the others by processes or machines that share
    `folder`. Whoever finishes last assembles the bank; the others return None.
    """
    nodes, places = range(shape.branching) if only is None else set(only), []
    for node in range(shape.branching):
        job = BankTraining(model, shape, [node], data, recipe, folder, prefix)
        if node in nodes:
            job.run(report)
        places.append(job.folder)
    if not all((place / "history.json").is_file() for place in places):
        return None
    place = Path(folder) / digest([[one.name for one in places], embedder], 12)
    if not (place / "bank.json").is_file():
        files = [one / shards.name(node) for node, one in enumerate(places)]
        assemble_bank(place, model, tree, shape, files, embedder)
    return place
