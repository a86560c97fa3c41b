"""Peak memory of a training of evictors: computed beforehand, against what torch allocates."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from kit.dms import evictor, memory
from kit.dms.train import EvictorTraining
from kit.models.load import load
from tests.toys import toy
from tests.training.test_memory import allocated

LENGTH = 1024
SHAPE = LlamaConfig(
    hidden_size=128, intermediate_size=384, num_hidden_layers=6, head_dim=32, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, vocab_size=1000,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
QWEN3 = Qwen3Config(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "recipe, dtype, checkpointing",
    [
        (evictor.OFFICIAL, "float32", False),
        (evictor.OFFICIAL, "bfloat16", True),
        (evictor.PAPER, "bfloat16", True),
    ],
)
def test_the_peak_is_as_computed(tmp_path, recipe, dtype, checkpointing):
    SHAPE.save_pretrained(tmp_path / "shape")
    model = load(f"random:{tmp_path / 'shape'}", dtype=dtype)
    recipe = dataclasses.replace(
        recipe, context=LENGTH, window=4, batch=2, compression_x=2, ramp_steps=2, fade_steps=0
    )
    data = torch.randint(0, 1000, (6, LENGTH), generator=torch.Generator().manual_seed(0))

    def run():
        training = EvictorTraining(model, data, recipe, tmp_path, 0, 1, checkpointing)
        training.step()
        training.step()  # with AdamW's moments

    held = sum(p.nbytes for p in model.weights.parameters())
    need = memory.peak(SHAPE, recipe, model.dtype, 1, checkpointing)
    assert allocated(run) + held == pytest.approx(need, rel=0.1)


def test_the_official_recipe_fits_a_card_of_24_gb_with_a_model_of_1_7b():
    """One sequence of 32,768 tokens at a time, its layers computed again; the eight together, or
    one with all that its layers compute, do not."""
    job = QWEN3, evictor.OFFICIAL, torch.bfloat16
    assert memory.peak(*job, 1, True) < 24e9 < memory.peak(*job, 1, False)
    assert memory.peak(*job, 8, True) > 24e9


def test_what_fits_is_chosen_or_the_bytes_are_said(monkeypatch):
    model, recipe = toy(), dataclasses.replace(evictor.OFFICIAL, context=256)
    config, held = model.weights.config, sum(p.nbytes for p in model.weights.parameters())
    for wanted in ((8, False), (2, False), (1, True)):
        need = memory.peak(config, recipe, model.dtype, *wanted)
        monkeypatch.setattr(memory, "free_bytes", lambda device, need=need: need - held)
        assert memory.choose(model, recipe) == wanted
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1.0)
    with pytest.raises(MemoryError, match="Training evictors takes .* context shorter than 256"):
        memory.choose(model, recipe)
