"""The bank of parametric memory: arithmetic of the paper, fetching, caching, damaged files."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kit.models import embedder
from kit.parametric import cluster_tree, ffn_memory, shards
from kit.parametric.bank import BankError, ParametricBank, assemble_bank
from tests.conftest import loaded


@pytest.fixture(scope="module")
def tiny(tiny_folder, dtype):
    return loaded(tiny_folder, dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """A bank of 3 subtrees, 3 levels, with random numbers in all of it: folder, shape, blocks."""
    rng = torch.Generator().manual_seed(1)
    shape = ffn_memory.shape(tiny.weights, "ffn", (0, 1), (4, 2, 1), 3)
    folder = tmp_path_factory.mktemp("bank")
    blocks = []
    for _ in range(3):
        blocks.append([torch.randn(3**i, *shape.block(i), generator=rng).half() for i in range(3)])
    files = [shards.write(folder / shards.name(n), b) for n, b in enumerate(blocks)]
    vectors = np.random.default_rng(0).normal(size=(90, 384)).astype(np.float32)
    tree = cluster_tree.fit(vectors, 3, 3)
    assemble_bank(folder, tiny, tree, shape, files, embedder.load().fingerprint)
    return folder, shape, blocks


@pytest.mark.parametrize("width, layers, sizes, fetched, bank", [
    (512, 35, (256, 64, 16, 0), "18M", "4.6B"),  # the 160M anchor
    (1024, 24, (512, 128, 32, 0), "50M", "12.7B"),  # 410M; 49.5M
    (2048, 24, (768, 256, 16, 0), "153M", "21.1B"),  # 1.4B
])  # fmt: skip
def test_parameters_are_those_that_the_paper_prints(width, layers, sizes, fetched, bank):
    shape = ffn_memory.Shape(3 * width, tuple(range(layers)), sizes, 16)
    assert f"{shape.fetched / 1e6:.0f}M" == fetched
    assert f"{shape.parameters / 1e9:.1f}B" == bank
    assert shape.nodes == (16, 256, 4096, 65536)


def test_a_path_fetches_its_blocks_and_only_those(made, tiny):
    folder, shape, blocks = made
    bank = ParametricBank(folder, tiny)
    for path in ((0, 0, 0), (2, 7, 22), (1, 5, 17)):
        top = path[0]
        found = bank.fetch(path)
        for level, block in enumerate(found):
            expected = blocks[top][level][path[level] - top * 3**level]
            assert torch.equal(block, expected.to(tiny.dtype))
    held = sum(block.nbytes for key, block in bank._cache.items())
    assert bank.nbytes()["resident"] == held
    assert bank.nbytes()["fetched"] == 2 * shape.fetched
    assert bank.nbytes()["bank"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_the_cache_holds_what_was_used_last_within_its_bytes(made, tiny, monkeypatch):
    folder, shape, _ = made
    path = [(0, 0, 0), (1, 3, 9), (2, 6, 18)]
    room = tiny.dtype.itemsize * shape.fetched * 2  # two paths
    bank, reads = ParametricBank(folder, tiny, cache_bytes=room), []
    read = bank._read
    monkeypatch.setattr(bank, "_read", lambda *key: reads.append(key) or read(*key))
    for number in (0, 1, 0, 2, 0):
        bank.fetch(path[number])
        assert bank.nbytes()["resident"] <= room
    assert len(reads) == 9, "the first path was used last and stayed"
    bank.fetch(path[1])
    assert len(reads) == 12


def test_what_was_prefetched_is_read_once_and_is_the_same(made, tiny, monkeypatch):
    folder, _, _ = made
    bank, reads = ParametricBank(folder, tiny), []
    read = bank._read
    monkeypatch.setattr(bank, "_read", lambda *key: reads.append(key) or read(*key))
    bank.prefetch((1, 4, 13))
    bank.prefetch((1, 4, 13))
    found = bank.fetch((1, 4, 13))
    assert len(reads) == 3
    plain = ParametricBank(folder, tiny).fetch((1, 4, 13))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_paths_come_from_the_question_alone_and_controls_turn_or_block_them(made, tiny):
    folder, shape, _ = made
    minilm = embedder.load()
    questions = ["Where is Lagos?", "What is the capital of Peru?", "Who?"]
    bank = ParametricBank(folder, tiny, minilm)
    paths = bank.paths(questions)
    assert paths == [tuple(row) for row in bank.tree.assign(minilm.embed(questions)).tolist()]
    turned = ParametricBank(folder, tiny, minilm, turn=1).paths(questions)
    for path, other in zip(paths, turned, strict=True):
        assert other[0] == (path[0] + 1) % 3
        assert all(other[i + 1] // 3 == other[i] for i in range(2)), "still a path"
    blocked = ParametricBank(folder, tiny, minilm, without=[paths[0][:1]])
    assert not any(block.any() for block in blocked.fetch(paths[0]))
    *above, leaf = ParametricBank(folder, tiny, minilm, without=[paths[0]]).fetch(paths[0])
    assert all(torch.equal(a, b) for a, b in zip(above, bank.fetch(paths[0])))
    assert bank.fetch(paths[0])[-1].any() and not leaf.any(), "a leaf alone, and not its parents"
    level = ParametricBank(folder, tiny, minilm, off=[1])
    top, middle, leaf = level.fetch(paths[0])
    assert torch.equal(top, bank.fetch(paths[0])[0]) and torch.equal(leaf, bank.fetch(paths[0])[2])
    assert bank.fetch(paths[0])[1].any() and not middle.any(), "a level alone, on every path"
    assert level.key not in (bank.key, blocked.key)
    free = next(node for node in range(3) if node != paths[0][0])
    assert blocked.fetch((free, 3 * free, 9 * free))[0].any()
    assert len({bank.key, blocked.key, ParametricBank(folder, tiny, turn=1).key}) == 3
    with pytest.raises(BankError, match="Context 1 is empty; give its question"):
        bank.paths(["Where?", "  "])


def test_a_bank_of_another_base_tree_or_embedder_is_one_sentence(made, tiny, tmp_path):
    from dataclasses import replace

    folder, shape, _ = made
    with pytest.raises(BankError, match="is for tiny .*, not for other 123; load that base"):
        ParametricBank(folder, replace(tiny, name="other", weights_hash="123"))
    with pytest.raises(BankError, match="made with another embedder"):
        ParametricBank(folder, tiny, replace(embedder.load(), weights_hash="x"))
    with pytest.raises(BankError, match="No bank in .*; train one"):
        ParametricBank(tmp_path, tiny)
    flat = cluster_tree.fit(np.eye(4), 3, 1)
    with pytest.raises(BankError, match="The tree has 1 levels of 3, the bank 3 of 3"):
        assemble_bank(tmp_path, tiny, flat, shape, [])
    with pytest.raises(ValueError, match="kind is 'moe'; use ffn"):
        ffn_memory.shape(tiny.weights, "moe", (0,), (1,), 2)
    with pytest.raises(ValueError, match=r"layers are \[5\]; LlamaForCausalLM has 0 to 1"):
        ffn_memory.shape(tiny.weights, "ffn", (5,), (1,), 2)


def test_missing_cut_and_damaged_files_are_named_and_the_base_still_works(made, tiny, tmp_path):
    folder, _, blocks = made
    file = shards.name(1)

    def copy(name: str):
        return shutil.copytree(folder, tmp_path / name) / file

    copy("missing").unlink()
    with pytest.raises(BankError, match=f"{file} is missing; copy it again"):
        ParametricBank(tmp_path / "missing", tiny)
    cut = copy("cut")
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(BankError, match=f"{file} is not the file that bank.json describes"):
        ParametricBank(tmp_path / "cut", tiny)
    damaged = copy("damaged")
    raw = bytearray(damaged.read_bytes())
    at = raw.index(blocks[1][2][4].numpy().tobytes())  # node 13 of level 2
    raw[at + 3] ^= 1
    damaged.write_bytes(raw)
    bank = ParametricBank(tmp_path / "damaged", tiny)
    bank.fetch((1, 3, 9))
    with pytest.raises(BankError, match=f"Block 4 of level 2 in .*{file} is damaged"):
        bank.fetch((1, 4, 13))
    copy("tree").with_name("tree.npz").write_bytes(b"other")
    with pytest.raises(BankError, match="tree.npz is not the tree of this bank"):
        ParametricBank(tmp_path / "tree", tiny)
    assert torch.isfinite(tiny.weights(torch.tensor([[1, 2]])).logits).all()


def test_a_shard_is_an_ordinary_safetensors_file(made):
    folder, _, blocks = made
    found = load_file(folder / shards.name(2))
    assert torch.equal(found["level1"], blocks[2][1])
    assert json.loads((folder / "bank.json").read_text())["shape"]["kind"] == "ffn"


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="Cannot write .*No space left.*make room and run again"):
        shards.write(tmp_path / "a.safetensors", [torch.zeros(1, 1, 1, 3)])
    assert not [*tmp_path.iterdir()]


def test_banks_of_equal_shape_and_other_numbers_are_told_apart(made, tiny, tmp_path):
    """Their keys go into the keys of records."""
    folder, shape, blocks = made
    other = shutil.copytree(folder, tmp_path / "other")
    changed = [values.clone() for values in blocks[1]]
    changed[2][3, 0, 0, 0] += 1
    files = [other / shards.name(n) for n in range(3)]
    shards.write(files[1], changed)
    tree, name = cluster_tree.load(folder / "tree.npz"), embedder.load().fingerprint
    assemble_bank(other, tiny, tree, shape, files, name)
    assert ParametricBank(other, tiny).key != ParametricBank(folder, tiny).key
