"""An anchor trained from random weights on the sentences, alone or together with a bank.

Only this tests the paper's claim that memory helps in pretraining: a frozen anchor was pretrained
on the web. With `anchor_rate` in the recipe, `FactStudy.arm` gives three arms of equal tokens:
"continued" is the anchor alone, "co-trained" anchor and bank, "co-trained generic" the same anchor
with its generic block.

Source: https://arxiv.org/abs/2510.02375, section 3.3, rows A1 and A2 of the main table.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kit.models.load import Model, load
from kit.parametric.facts import Sentence

ARMS = ("continued", "co-trained", "co-trained generic")
TOKENS = 4096  # the first of the vocabulary, with which any text can be read
HEAD = 32  # width of an attention head


def untrained(folder: Path, like: Model, hidden: int, layers: int, seed: int = 0) -> Model:
    """A Llama of random weights saved in `folder`, with the first tokens of the model `like`;
    ValueError where `hidden` is no multiple of HEAD, or a text would end with a later token."""
    if hidden % HEAD or hidden < HEAD:
        raise ValueError(f"hidden is {hidden}; use a multiple of {HEAD}")
    if like.tokenizer.eos_token_id >= TOKENS:
        raise ValueError(f"{like.name} ends a text with token {like.tokenizer.eos_token_id}; use a "
                         f"model whose end is among its first {TOKENS:,}")  # fmt: skip
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // HEAD, head_dim=HEAD,
        num_key_value_heads=hidden // HEAD, tie_word_embeddings=True,
        max_position_embeddings=1024, eos_token_id=like.tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    like.tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    text = json.loads(file.read_text())
    pairs = text["model"]
    pairs["vocab"] = {token: at for token, at in pairs["vocab"].items() if at < TOKENS}
    pairs["merges"] = [pair for pair in pairs["merges"] if "".join(pair) in pairs["vocab"]]
    file.write_text(json.dumps(text))
    return load(str(folder), "float32", str(like.device))


def whole(sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences with a loss on all of their tokens, as in pretraining."""
    return [replace(s, context="", completion=s.context + s.completion) for s in sentences]
