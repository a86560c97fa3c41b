"""Which kinds of model the slot cache serves, found by a step of each."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from kit.inference.decode import Request, decode
from kit.models.attention import unserved
from kit.models.load import Model
from kit.schema import Sampling

TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT = dict(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128)
EXPERTS = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)  # fmt: skip
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    first_k_dense_replace=2,
)  # fmt: skip

SERVED = [
    ("Llama", {}), ("Mistral", dict(sliding_window=4)), ("Mixtral", EXPERTS), ("Qwen2", {}),
    ("Qwen2Moe", EXPERTS), ("Qwen3", {}), ("Qwen3Moe", EXPERTS), ("Phi", {}), ("Phi3", {}),
    ("Gemma", {}), ("Gemma3Text", SLIDING), ("Olmo2", {}), ("Olmo3", SLIDING), ("Granite", {}),
    ("Cohere", {}), ("Cohere2", SLIDING), ("SmolLM3", {}), ("Starcoder2", {}), ("Glm4", {}),
    ("Exaone4", SLIDING), ("Ernie4_5", {}), ("BitNet", {}), ("Helium", {}),
]  # fmt: skip
REFUSED = [
    ("GPT2", GPT, "names no key-value heads"),
    ("GPTNeoX", {}, "names no key-value heads"),
    ("OPT", dict(ffn_dim=64, word_embed_proj_dim=64), "names no key-value heads"),
    ("Falcon", {}, "names no key-value heads"),
    ("Falcon", dict(alibi=True), "names no key-value heads"),
    ("Bloom", GPT, "names no key-value heads"),
    ("Mamba", dict(state_size=4), "names no key-value heads"),
    ("Gemma2", {}, "caps the scores of its attention"),
    ("GptOss", EXPERTS, "attention has sinks"),
    ("Doge", {}, "adds to the scores of its attention"),
    ("StableLm", {}, "fails on packed prompts"),
    ("DiffLlama", {}, "4 attentions stand in its 2 layers"),
    ("Lfm2", dict(layer_types=["conv", "full_attention"]), r"layers of kind \['conv'\]"),
    ("Qwen3Next", EXPERTS, r"layers of kind \['linear_attention'\]"),
    ("Llama4Text", EXPERTS | dict(intermediate_size_mlp=64), r"kind \['chunked_attention'\]"),
    ("DeepseekV2", LATENT, "its keys and values differ in shape, or from its config, at layer 0"),
]


def made(kind: str, changed: dict) -> transformers.PreTrainedModel:
    configuration = getattr(transformers, f"{kind}Config")
    known = {*configuration().to_dict(), *configuration.attribute_map}
    shape = {name: value for name, value in TINY.items() if name in known}
    config = configuration(**shape | changed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind, changed", SERVED, ids=lambda value: value if value else "")
def test_a_kind_that_is_served_says_what_it_says_in_transformers(kind, changed):
    weights = made(kind, changed)
    before = weights.config._attn_implementation
    assert unserved(weights) == "" and weights.config._attn_implementation == before
    weights.generation_config = transformers.GenerationConfig(eos_token_id=None)
    prompts = [tuple(range(3, 20)), (9, 8, 7)]
    asked = [Request(ids, str(number)) for number, ids in enumerate(prompts)]
    for ids, done in zip(prompts, decode(Model(kind, weights, None, "", ""), asked, Sampling(3))):
        with torch.inference_mode():
            logits = weights(torch.tensor([[*ids, *done.token_ids]]), use_cache=False).logits[0]
        assert tuple(logits[len(ids) - 1 : -1].argmax(-1).tolist()) == done.token_ids


@pytest.mark.parametrize("kind, changed, why", REFUSED, ids=lambda value: str(value)[:12])
def test_a_kind_that_is_not_served_is_known_by_a_step(kind, changed, why):
    assert re.search(why, unserved(made(kind, changed)))


def test_the_table_of_the_docs_has_these_kinds():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    table = page.split("| kind |")[1].split("\n\n")[0].splitlines()[2:]
    told = {
        kind: row.endswith("| served |") for row in table for kind in re.findall("`(.+?)`", row)
    }
    assert told == {kind: True for kind, _ in SERVED} | {kind: False for kind, *_ in REFUSED}


def test_tokens_that_meet_outside_of_attention_and_positions_of_their_own_are_noticed(monkeypatch):
    weights = made("Llama", {})
    norm = weights.model.norm
    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", lambda x: x + torch.nn.functional.pad(x, (0, 0, 1, -1)))
        assert "tokens meet outside of attention" in unserved(weights)
    rotary = weights.model.rotary_emb
    plain = rotary.forward
    with monkeypatch.context() as patch:  # counted from the start of the row
        patch.setattr(rotary, "forward", lambda x, position_ids: plain(x, torch.arange(4)[None]))
        assert "other positions than they are given" in unserved(weights)
    assert unserved(weights) == ""
