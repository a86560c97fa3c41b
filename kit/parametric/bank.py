"""The bank of hierarchical parametric memory: feed-forward blocks on disk, fetched by context.

Every node of a tree of clusters (`kit.parametric.cluster_tree`) owns a block: in each chosen layer
`sizes[level]` further units of the SwiGLU. A context fetches one block per level, those on its path
through the tree, and runs with the model extended by them (`kit.parametric.ffn_memory`).

On disk a bank has one safetensors file per subtree of the first level, read through a memory map,
so that a fetch reads the blocks of its path only, and `bank.json`, which names base and tree.

Source: https://arxiv.org/abs/2510.02375, sections 3.1 and 3.3; there is no public code.
"""

import hashlib
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from kit.models.embedder import Embedder
from kit.models.load import Model
from kit.parametric import cluster_tree, shards
from kit.parametric.ffn_memory import MemoryLayers, Shape
from kit.paths import atomic
from kit.schema import digest


class BankError(ValueError):
    """A bank cannot be used; the message says what to do. The base model works without it."""


def assemble_bank(
    folder: Path,
    model: Model,
    tree: cluster_tree.Tree,
    shape: Shape,
    files: Sequence[Path],
    embedder: str = "",
) -> Path:
    """Assemble a bank in `folder` from `files` of `shards.write`, one per subtree in order, and
    their tree. `bank.json` is written last, so that a bank is complete or does not exist.
    """
    if tree.branching != shape.branching or len(tree.levels) != len(shape.sizes):
        raise BankError(
            f"The tree has {len(tree.levels)} levels of {tree.branching}, the bank "
            f"{len(shape.sizes)} of {shape.branching}; give one size per level of the tree."
        )
    folder, entries = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    tree.save(folder / "tree.npz")
    for node, file in enumerate(files):
        if file != (target := folder / shards.name(node)):
            target.unlink(missing_ok=True)
            shutil.copyfile(file, target)
        entries.append({"bytes": target.stat().st_size, "sha256": shards.fingerprint(target)})
    card = {"base": model.name, "base_hash": model.weights_hash, "shape": asdict(shape)}
    card |= {"embedder": embedder, "tree": _hash(folder / "tree.npz"), "shards": entries}
    with atomic(folder / "bank.json") as part:
        part.write_text(json.dumps(card, indent=1))
    return folder


class ParametricBank:
    """The bank in `folder`, opened for `model`; `embedder` embeds its contexts. `cache_bytes` of
    blocks stay in memory, the least recently used are dropped.

    For controls, `turn` shifts each path by so many subtrees, and the blocks under the nodes in
    `without`, each given by its path, and those of the levels in `off`, from 0, are zero. BankError
    where the bank belongs to another base or embedder, or a file is missing, truncated or altered.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        embedder: Embedder | None = None,
        cache_bytes: int = 2**28,
        turn: int = 0,
        without: Sequence[Sequence[int]] = (),
        off: Sequence[int] = (),
    ):
        self.folder, self.cache_bytes = Path(folder), cache_bytes
        self.turn, self.without = turn, [tuple(start) for start in without]
        self.off = tuple(off)
        card = self._card()
        if card["base_hash"] != model.weights_hash:
            raise BankError(
                f"The bank in {folder} is for {card['base']} {card['base_hash']}, not for "
                f"{model.name} {model.weights_hash}; load that base, or train a bank for this one."
            )
        self.shape = Shape(**{k: tuple(v) if isinstance(v, list) else v
                              for k, v in card["shape"].items()})  # fmt: skip
        self.tree = cluster_tree.load(self.folder / "tree.npz")
        if embedder and embedder.fingerprint != card["embedder"]:
            raise BankError(
                f"The tree of {folder} was made with another embedder ({card['embedder']}) than "
                f"{embedder.name} ({embedder.fingerprint}); use that one."
            )
        self.embedder, self.key = embedder, digest([card, turn, self.without, *self.off], 12)
        self.dtype, self.device = model.dtype, model.device
        self._shards = [self._open(node, entry) for node, entry in enumerate(card["shards"])]
        self._cache: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()
        self._checked: set[tuple[int, int]] = set()
        self._coming: dict = {}
        self._lock, self._reader = threading.Lock(), ThreadPoolExecutor(1, "bank")

    def _card(self) -> dict:
        file = self.folder / "bank.json"
        try:
            card = json.loads(file.read_text())
            tree = _hash(self.folder / "tree.npz")
        except (OSError, ValueError) as error:
            raise BankError(
                f"No bank in {self.folder} ({error}); train one with kit.parametric.train, or "
                f"correct the path."
            ) from error
        if tree != card["tree"]:
            raise BankError(f"{self.folder / 'tree.npz'} is not the tree of this bank; restore it.")
        return card

    def _open(self, node: int, entry: dict) -> shards.Shard:
        file = self.folder / shards.name(node)
        if not file.is_file():
            raise BankError(f"{file} is missing; copy it again, or train that subtree anew.")
        size = file.stat().st_size
        if size != entry["bytes"] or shards.fingerprint(file) != entry["sha256"]:
            raise BankError(
                f"{file} is not the file that bank.json describes ({size:,} bytes, not "
                f"{entry['bytes']:,}, or altered); copy it again, or train that subtree anew."
            )
        return shards.Shard(file)

    def paths(self, questions: Sequence[str]) -> list[tuple[int, ...]]:
        """The path of each question, from its text alone; BankError for an empty one."""
        for number, question in enumerate(questions):
            if not question.strip():
                raise BankError(f"Context {number} is empty; give its question, or no memory.")
        nodes = self.tree.assign(self.embedder.embed(list(questions)))
        count = np.array(self.shape.nodes)
        further = self.turn * count // self.shape.branching
        return [tuple(row) for row in ((nodes + further) % count).tolist()]

    def fetch(self, path: Sequence[int]) -> list[torch.Tensor]:
        """The block of each level on `path`, [layers, units, row], in the model's dtype."""
        blocks = [self._block(level, node) for level, node in enumerate(path)]
        blocked = [len(node) for node in self.without if tuple(path[: len(node)]) == node]
        depth = min(blocked, default=len(blocks) + 1) - 1
        return [
            torch.zeros_like(block) if level >= depth or level in self.off else block
            for level, block in enumerate(blocks)
        ]

    def prefetch(self, path: Sequence[int]) -> None:
        """Start reading the blocks of this path in the background."""
        for key in enumerate(path):
            with self._lock:
                if key not in self._cache and key not in self._coming:
                    self._coming[key] = self._reader.submit(self._load, *key)

    def _block(self, level: int, node: int) -> torch.Tensor:
        with self._lock:
            blocks, coming = self._cache.get((level, node)), self._coming.get((level, node))
            if blocks is not None:
                self._cache.move_to_end((level, node))
                return blocks
        return coming.result() if coming else self._load(level, node)

    def _load(self, level: int, node: int) -> torch.Tensor:
        """Read a block into the cache, which then evicts the least recently used ones."""
        block = self._read(level, node)
        with self._lock:
            self._cache[level, node] = block
            resident = self._resident()
            while resident > self.cache_bytes and len(self._cache) > 1:
                resident -= self._cache.popitem(last=False)[1].nbytes
            self._coming.pop((level, node), None)
        return block

    def _read(self, level: int, node: int) -> torch.Tensor:
        """A block from disk, its checksum verified the first time."""
        per_subtree = self.shape.branching**level
        subtree, place = divmod(node, per_subtree)
        block, expected = self._shards[subtree].block(level, place)
        if (level, node) not in self._checked:
            if not torch.equal(shards.checksum(block), expected):
                raise BankError(
                    f"Block {place} of level {level} in {self._shards[subtree].file} is damaged; "
                    f"copy the file again, or train that subtree anew."
                )
            self._checked.add((level, node))
        return block.to(self.device, self.dtype)

    def widened(self, weights: PreTrainedModel, sequences: int) -> MemoryLayers:
        """Memory layers of the model for so many sequences."""
        return MemoryLayers.empty(weights, self.shape, sequences)

    def nbytes(self) -> dict[str, int]:
        """`bank`: all shards on disk; `fetched`: what one context reads of them; `resident`: held
        in memory now."""
        wide = self._shards[0].dtype.itemsize
        return {
            "bank": sum(shard.bytes for shard in self._shards),
            "fetched": self.shape.fetched * wide,
            "resident": self._resident(),
        }

    def _resident(self) -> int:
        return sum(block.nbytes for block in self._cache.values())


def _hash(file: Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
