"""Blocks of parametric memory in safetensors files, one per subtree, read through a memory map.

A shard holds the blocks of each level, `levelN` [nodes, layers, units, row], and a checksum of each
block, `sumsN`. Reading a block maps its own pages only, and releases them.
"""

import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kit.paths import atomic

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # of safetensors
SUM = 8  # bytes of a block's checksum


def name(node: int) -> str:
    """File name of a subtree."""
    return f"subtree-{node:03}.safetensors"


def write(file: Path, blocks: Sequence[torch.Tensor]) -> Path:
    """One shard: the blocks of each level [nodes, layers, units, row], and a checksum of each."""
    tensors, file = {}, Path(file)
    for level, values in enumerate(blocks):
        values = values.detach().cpu().contiguous()
        tensors[f"level{level}"] = values
        tensors[f"sums{level}"] = torch.stack([checksum(block) for block in values])
    try:
        with atomic(file) as part:
            save_file(tensors, part)
    except (OSError, SafetensorError) as error:
        raise OSError(f"Cannot write {file} ({error}); make room and run again.") from error
    return file


class Shard:
    """One safetensors file under a memory map."""

    def __init__(self, file: Path):
        self.file, self.bytes = file, file.stat().st_size
        with file.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)  # reading ahead would read blocks of other paths
        size = int.from_bytes(self._map[:8], "little")
        self._head, self._start = json.loads(self._map[8 : 8 + size]), 8 + size
        self.dtype = DTYPES[self._head["level0"]["dtype"]]

    def block(self, level: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of one block [layers, units, row], and its checksum."""
        expected = self._row(f"sums{level}", place, torch.uint8)
        return self._row(f"level{level}", place, self.dtype), expected

    def _row(self, name: str, place: int, dtype: torch.dtype) -> torch.Tensor:
        """A copy of row `place` of a tensor; its pages are released."""
        entry = self._head[name]
        copy = torch.empty(entry["shape"][1:], dtype=dtype)
        if not copy.nbytes:
            return copy
        first = self._start + entry["data_offsets"][0] + place * copy.nbytes
        raw = copy.view(torch.uint8).numpy()
        raw.reshape(-1)[:] = np.frombuffer(self._map, np.uint8, copy.nbytes, first)
        page = first - first % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, page, first + copy.nbytes - page)
        return copy


def checksum(block: torch.Tensor) -> torch.Tensor:
    """Checksum of a block's bytes: uint8 [SUM]."""
    raw = block.contiguous().view(torch.uint8).numpy() if block.numel() else b""
    return torch.tensor(list(hashlib.blake2b(raw, digest_size=SUM).digest()), dtype=torch.uint8)


def fingerprint(file: Path) -> str:
    """Hash of a shard's header and of its blocks' checksums, without reading the blocks."""
    with Path(file).open("rb") as handle:
        size = handle.read(8)
        head = handle.read(int.from_bytes(size, "little"))
        digest = hashlib.sha256(size + head)
        for name, entry in sorted(json.loads(head).items()):
            if name.startswith("sums"):
                first, last = entry["data_offsets"]
                handle.seek(8 + len(head) + first)
                digest.update(handle.read(last - first))
    return digest.hexdigest()
