"""Peak memory of a training: computed beforehand, against what torch allocates, and against a GPU's
own count."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from kit.data import prompts
from kit.inference import packed_weights
from kit.inference.decode import tokenize
from kit.models.bundled import MODELS
from kit.models.load import load
from kit.schema import Problem
from kit.training import grpo, memory, sft
from kit.training.grpo import GRPOConfig
from kit.training.sft import SFTConfig
from tests.conftest import TOKENS, save_tokenizer

SHAPE = LlamaConfig(
    hidden_size=128, intermediate_size=384, num_hidden_layers=6, head_dim=32, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, vocab_size=TOKENS, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
SFT = SFTConfig(steps=2, batch=4, micro_batch=2, save_every=9)
GRPO = GRPOConfig(
    steps=2, groups=2, size=2, micro_batch=2, max_new_tokens=120, rewards=("accuracy",),
    weights=(1.0,), save_every=9, keep_every=0,
)  # fmt: skip
LENGTH = 240  # tokens of an example
ROWS = [{"input_ids": [5] * LENGTH, "completion_mask": [0] * 40 + [1] * (LENGTH - 40)}] * 4
ASKED = prompts.build(
    prompts.plain,
    [Problem(f"p{i}", f"What is {i} + {i}?", str(2 * i), "s", 1, "t") for i in range(4)],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundled):
    """A model large enough for its weights and activations to be seen beside its logits."""
    place = tmp_path_factory.mktemp("wide") / "model"
    AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32).save_pretrained(place)
    save_tokenizer(bundled.tokenizer, place)
    return str(place)


def allocated(run) -> int:
    """The most bytes that torch's allocator held during `run`, over what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        run()
    events = made.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.filterwarnings("ignore:In 2 steps every group")
@pytest.mark.parametrize(
    ("recipe", "dtype", "rank"),
    [(SFT, "float32", 0), (SFT, "bfloat16", 8), (GRPO, "float32", 8), (GRPO, "bfloat16", 0)],
)
def test_the_peak_is_as_computed(folder, tmp_path, monkeypatch, recipe, dtype, rank):
    monkeypatch.setenv("KIT_DTYPE", dtype)
    recipe, tokens = dataclasses.replace(recipe, lora_rank=rank), LENGTH
    if recipe.__class__ is GRPOConfig:
        tokens = len(tokenize(load(folder), ASKED[0])) + recipe.max_new_tokens
        run = lambda: grpo.grpo(folder, ASKED, recipe, tmp_path)  # noqa: E731
    else:
        run = lambda: sft.sft(folder, ROWS, recipe, tmp_path)  # noqa: E731
    how = tokens, "cpu", getattr(torch, dtype), False
    assert allocated(run) == pytest.approx(memory.peak(SHAPE, recipe, *how).total, rel=0.05)


def test_a_model_that_decodes_keeps_packed_copies(folder, dtype):
    model, copies = load(folder, dtype=dtype), []
    made = allocated(lambda: copies.append(packed_weights.pack(model.weights)))
    alone = memory.decoding(SHAPE, "cuda", model.dtype)
    assert sum(p.nbytes for p in model.weights.parameters()) == pytest.approx(alone, rel=0.01)
    copied = memory.decoding(SHAPE, "cpu", model.dtype) - alone
    assert copied <= made < 1.25 * copied  # a moment of rows by which they are checked


def test_where_memory_is_short_layers_are_computed_again_and_the_steps_are_the_same(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("KIT_DTYPE", "float32")
    losses, peaks = [], []
    for checkpointing in (False, True):
        need = memory.peak(SHAPE, SFT, LENGTH, "cpu", torch.float32, checkpointing)
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=need: n.total - n.weights)
        place = tmp_path / str(checkpointing)
        peaks.append(allocated(lambda place=place: sft.sft(folder, ROWS, SFT, place)))
        assert peaks[-1] == pytest.approx(need.total, rel=0.04)
        (trained,) = place.glob("*/model")
        losses.append([row["loss"] for row in sft.history(trained)])
    assert peaks[1] < 0.9 * peaks[0] and losses[0] == losses[1]


def test_a_training_that_does_not_fit_says_what_would(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100e6)
    with pytest.raises(
        MemoryError, match=r"The training takes 0\.\d GB .*; with micro_batch = 1 it"
    ):
        sft.sft(folder, ROWS, SFT, tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e6)
    with pytest.raises(MemoryError, match=r"LoRA and one sequence at a time are too much as well"):
        grpo.grpo(folder, ASKED, GRPO, tmp_path)
    assert not [*tmp_path.glob("*/model")]


QWEN3 = Qwen3Config(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
)  # fmt: skip
R1 = Qwen2Config(**MODELS["bundled:qwen2.5-coder-1.5b"].shape)  # as DeepSeek-R1-Distill-Qwen-1.5B
ON_A_GPU = "cuda", torch.bfloat16, True


def test_the_peaks_that_an_h200_counted():
    """Qwen3-1.7B's shape, outputs/published/gpu/nvidia-h200.json; the reference model of GRPO was
    in float32 then, two bytes a weight more."""
    tuned = memory.peak(QWEN3, SFTConfig(batch=2, micro_batch=2), 512, *ON_A_GPU)
    assert tuned.total / 1e9 == pytest.approx(30.76, rel=0.02)
    recipe = GRPOConfig(groups=1, size=8, micro_batch=8, max_new_tokens=256)
    reinforced = memory.peak(QWEN3, recipe, 256, *ON_A_GPU)
    assert (reinforced.total + reinforced.reference) / 1e9 == pytest.approx(41.3, rel=0.02)


@pytest.mark.parametrize(
    ("gigabytes", "words"),
    [(80, None), (36, "with optimizer = 'adamw-8bit' and micro_batch = 1 it"),
     (24, "with lora_rank = 16 it"), (8, "take a smaller model")],
)  # fmt: skip
def test_what_fits_a_card_for_open_rs(gigabytes, words):
    recipe = dataclasses.replace(grpo.OPEN_RS_2, rollouts="kit")
    sentence = memory.shortage(R1, recipe, 4096, gigabytes * 1e9, *ON_A_GPU)
    assert words in sentence if words else not sentence


def test_copies_cost_buckets_and_shards_share_weights():
    one, copies, shards = (
        memory.peak(R1, grpo.OPEN_RS_2, 4096, *ON_A_GPU, *how) for how in ((), (4,), (4, 4))
    )
    assert copies.optimizer - one.optimizer == pytest.approx(one.weights)
    assert copies.weights == one.weights and copies.rollouts == pytest.approx(one.rollouts / 4)
    assert 4 * shards.weights == one.weights and 4 * shards.optimizer == one.optimizer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("bundled:qwen2.5-coder-0.5b", 630_167_424), ("bundled:qwen2.5-coder-1.5b", 1_777_088_000)],
)
def test_shapes_of_models_that_are_not_here_have_their_parameters(name, parameters):
    """Those counted in the dequantized files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**MODELS[name].shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    counted = memory.peak(model.config, SFTConfig(), 64, *ON_A_GPU).weights / 4
    assert counted == pytest.approx(parameters, rel=1e-3)  # without biases and norms


def test_an_optimizer_that_is_not_here_is_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="optimizer is 'sgd'; choose one of adamw, adamw-8bit"):
        SFTConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="needs bitsandbytes .* or set lora_rank"):
        sft.sft(folder, ROWS, dataclasses.replace(SFT, optimizer="adamw-8bit"), tmp_path)


def test_an_8_bit_optimizer_is_the_one_that_trl_gets(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "find_spec", lambda name: name)
    lighter = dataclasses.replace(SFT, optimizer="adamw-8bit")
    assert sft.trainer_settings(lighter, load(folder), tmp_path)["optim"] == "adamw_bnb_8bit"
    names = [sft.identity(recipe) for recipe in (SFT, lighter)]
    assert "optimizer" not in names[0] and names[1]["optimizer"] == "adamw-8bit"
