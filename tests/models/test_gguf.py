"""GGUF files: every kind of block that the bundled files hold, and what cannot be read whole."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kit import paths
from kit.budget import advisor
from kit.inference.decode import Request, decode
from kit.models import gguf
from kit.models.load import load
from kit.schema import Sampling
from tests.rounding import assert_same_greedy

WIDE, VOCAB = 256, 261  # a row of the K kinds has blocks of 256
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}bot:"
END = "<|im_end|>"


def halves(block: np.ndarray, at: int) -> np.ndarray:
    """The float16 number at byte `at` of each block: [blocks, 1] float32."""
    return block[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def q8_0(b):
    return halves(b, 0) * b[:, 2:].view(np.int8)


def q4_1(b):
    return halves(b, 0) * np.concatenate([b[:, 4:] & 15, b[:, 4:] >> 4], 1) + halves(b, 2)


def q5_0(b):
    low = np.concatenate([b[:, 6:] & 15, b[:, 6:] >> 4], 1)
    fifth = np.unpackbits(b[:, 2:6], axis=1, bitorder="little")
    return halves(b, 0) * (low + 16.0 * fifth - 16)


def q4_k(b):
    scale, low, out = b[:, 4:16], [], np.empty((len(b), 256), np.float32)
    for j in range(8):  # 6-bit scales and minima, see get_scale_min_k4 of ggml
        first, second = scale[:, j % 4], scale[:, j % 4 + 4]
        if j < 4:
            low.append((first & 63, second & 63))
        else:
            both = scale[:, j + 4]
            low.append((both & 15 | first >> 6 << 4, both >> 4 | second >> 6 << 4))
    for j, (s, m) in enumerate(low):
        rows = b[:, 16 + 32 * (j // 2) :][:, :32]
        q = rows >> 4 if j % 2 else rows & 15
        out[:, 32 * j : 32 * j + 32] = halves(b, 0) * s[:, None].astype(np.float32) * q - (
            halves(b, 2) * m[:, None]
        )
    return out


def q6_k(b):
    low, high, scale = b[:, :128], b[:, 128:192], b[:, 192:208].view(np.int8)
    out = np.empty((len(b), 256), np.float32)
    for j in range(8):  # 32 numbers each
        half, part = divmod(j, 4)
        nibble = low[:, 64 * half + 32 * (part % 2) :][:, :32]
        two = high[:, 32 * half :][:, :32] >> 2 * part & 3
        q = (nibble >> 4 if part > 1 else nibble & 15).astype(np.int32) + 16 * two - 32
        each = np.repeat(scale[:, 2 * j : 2 * j + 2], 16, 1).astype(np.float32)
        out[:, 32 * j : 32 * j + 32] = halves(b, 208) * each * q
    return out


# Bytes of a block, numbers in it, where its float16 scales stand, and what it means.
BLOCKS = {
    "Q8_0": (34, 32, (0,), q8_0),
    "Q4_1": (20, 32, (0, 2), q4_1),
    "Q5_0": (22, 32, (0,), q5_0),
    "Q4_K": (144, 256, (0, 2), q4_k),
    "Q6_K": (210, 256, (208,), q6_k),
}
TENSORS = {  # of one layer of a Qwen2: name in the file -> kind, shape, name in transformers
    "token_embd.weight": ("Q8_0", (VOCAB, WIDE), "model.embed_tokens.weight"),
    "output.weight": ("Q6_K", (VOCAB, WIDE), "lm_head.weight"),
    "output_norm.weight": ("F32", (WIDE,), "model.norm.weight"),
    "blk.0.attn_norm.weight": ("F32", (WIDE,), "model.layers.0.input_layernorm.weight"),
    "blk.0.ffn_norm.weight": ("F32", (WIDE,), "model.layers.0.post_attention_layernorm.weight"),
    "blk.0.attn_q.weight": ("Q5_0", (WIDE, WIDE), "model.layers.0.self_attn.q_proj.weight"),
    "blk.0.attn_q.bias": ("F32", (WIDE,), "model.layers.0.self_attn.q_proj.bias"),
    "blk.0.attn_k.weight": ("Q4_K", (128, WIDE), "model.layers.0.self_attn.k_proj.weight"),
    "blk.0.attn_k.bias": ("F32", (128,), "model.layers.0.self_attn.k_proj.bias"),
    "blk.0.attn_v.weight": ("Q4_1", (128, WIDE), "model.layers.0.self_attn.v_proj.weight"),
    "blk.0.attn_v.bias": ("F32", (128,), "model.layers.0.self_attn.v_proj.bias"),
    "blk.0.attn_output.weight": ("Q6_K", (WIDE, WIDE), "model.layers.0.self_attn.o_proj.weight"),
    "blk.0.ffn_gate.weight": ("F16", (WIDE, WIDE), "model.layers.0.mlp.gate_proj.weight"),
    "blk.0.ffn_up.weight": ("Q4_K", (WIDE, WIDE), "model.layers.0.mlp.up_proj.weight"),
    "blk.0.ffn_down.weight": ("Q8_0", (WIDE, WIDE), "model.layers.0.mlp.down_proj.weight"),
}


def written(file: Path, without="", kinds=None, extra=(), fields=None, padding="") -> dict:
    """A GGUF file of random blocks; the numbers that they mean, by name in transformers."""
    rng, meant = np.random.default_rng(0), {}
    writer = GGUFWriter(file, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDE)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, value in (fields or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(name, value)
    tokens = [*bytes_to_unicode().values(), "Ġt", "Ġa", "<|endoftext|>", "<|im_start|>", END]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3] * 3)
    writer.add_token_merges(["Ġ t", "Ġ a"])
    writer.add_eos_token_id(tokens.index(END))
    if padding:
        writer.add_pad_token_id(tokens.index(padding))
    writer.add_chat_template(TEMPLATE)
    for name, (kind, shape, theirs) in TENSORS.items():
        kind = (kinds or {}).get(name, kind)
        if kind in BLOCKS:
            size, numbers, scales, means = BLOCKS[kind]
            count = int(np.prod(shape)) // numbers
            blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
            for at in scales:
                small = rng.uniform(1e-4, 2e-3, (count, 1)).astype(np.float16)
                blocks[:, at : at + 2] = small.view(np.uint8)
            meant[theirs] = means(blocks).reshape(shape)
            data, raw = blocks.reshape(shape[0], -1), GGMLQuantizationType[kind]
        else:
            data = rng.normal(0, 0.3, shape).astype({"F32": "f4", "F16": "f2"}[kind])
            meant[theirs], raw = data.astype(np.float32), None
        if name != without:
            writer.add_tensor(name, data, raw_dtype=raw)
    for name in extra:
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(paths, "MODELS", tmp_path / "models")
    return tmp_path / "models"


def refused(file: Path, words: str) -> None:
    with pytest.raises(gguf.GGUFError, match=words) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)
    assert not [*paths.MODELS.glob("*/weights.sha256")]


def test_every_kind_of_block_is_rounded_once_to_bfloat16_and_says_what_transformers_says(
    tmp_path, models, capsys, monkeypatch
):
    file = tmp_path / "Tiny.Q4.GGUF"
    meant = written(file)
    model = load(str(file), dtype="float32")
    state = model.weights.state_dict()
    assert {*state} == {*meant}
    for name, numbers in meant.items():
        once = torch.from_numpy(numbers).bfloat16().float()
        assert torch.equal(state[name], once), name
    assert model.tokenizer.decode([*model.stop_ids]) == END and model.revision.startswith(file.name)
    assert model.tokenizer.chat_template == TEMPLATE
    theirs = model.weights.generate(torch.tensor([[5, 9, 77]]), max_new_tokens=8, do_sample=False)
    (mine,) = decode(model, [Request((5, 9, 77))], Sampling(8))
    assert_same_greedy(model, (5, 9, 77), mine.token_ids, theirs[0, 3:].tolist())
    assert "Dequantizing" in capsys.readouterr().out
    assert advisor.sizes(str(file)).parameters == sum(map(np.size, meant.values()))
    monkeypatch.setattr(paths, "ROOT", tmp_path)  # a path may be from the project's folder
    again = load(file.name, dtype="float32")
    assert again.weights_hash == model.weights_hash and capsys.readouterr().out == ""
    shutil.move(file, tmp_path / "other.gguf")
    assert len([*models.glob("*/weights.sha256")]) == 1


@pytest.mark.parametrize("padding, more", [("<|endoftext|>", ["<|endoftext|>"]), ("!", [])])
def test_an_answer_ends_at_the_padding_too_if_that_is_no_text(tmp_path, padding, more):
    written(tmp_path / "padded.gguf", padding=padding)
    model = load(str(tmp_path / "padded.gguf"))
    assert {model.tokenizer.decode([stop]) for stop in model.stop_ids} == {END, *more}
    assert model.tokenizer.eos_token == END


@pytest.mark.parametrize("kind, dtype", [("F32", "float32"), ("F16", "float16")])
def test_a_file_that_is_not_quantized_keeps_its_dtype(tmp_path, kind, dtype):
    kinds = {name: kind for name, (_, shape, _) in TENSORS.items() if len(shape) > 1}
    meant = written(tmp_path / "plain.gguf", kinds=kinds)
    folder, said = gguf.weights(tmp_path / "plain.gguf")
    stored = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    wide = {name: numbers for name, numbers in meant.items() if numbers.ndim > 1}
    assert all(torch.equal(stored[name].float(), torch.from_numpy(wide[name])) for name in wide)


def test_what_transformers_would_pass_over_is_refused(tmp_path):
    file = tmp_path / "odd.gguf"
    for how, words in (
        (
            dict(fields={"qwen2.rope.scaling.factor": 4.0}),
            "qwen2.rope.scaling.factor is 4.0, which",
        ),
        (dict(fields={"qwen2.attention.sliding_window": 16}), "sliding_window is 16, which"),
        (dict(fields={"split.count": 3}), "is one of 3 parts; join them"),
        (dict(extra=["rope_freqs.weight"]), "it has rope_freqs.weight, which"),
        (dict(without="blk.0.ffn_up.weight"), "it lacks model.layers.0.mlp.up_proj.weight"),
    ):
        written(file, **how)
        refused(file, words)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    file = tmp_path / "made.gguf"
    refused(file, f"There is no file {file}")
    written(file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"GGML" + whole[4:], b""):
        file.write_bytes(content)
        refused(file, f"Cannot read {file} .*it is damaged, or of a kind")
    file.write_bytes(whole.replace(b"qwen2", b"rwkv9"))
    refused(file, "architecture rwkv9 is not supported")


def test_a_full_disk_is_said_before_and_in_the_middle(tmp_path, models, monkeypatch):
    file = tmp_path / "made.gguf"
    written(file)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
        refused(file, "needs 0.0 GB, and 0.0 GB are free; make room, or set KIT_CACHE")

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "save_file", full)
        refused(file, "Cannot write .*No space left on device.*make room and run again")
    assert load(str(file)).weights_hash
