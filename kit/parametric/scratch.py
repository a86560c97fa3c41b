"""An anchor trained from random weights on the sentences, alone or together with a bank.

Only this tests the paper's claim that memory helps in pretraining: a frozen anchor was pretrained
on the web. With `anchor_rate` in the recipe, `FactStudy.arm` gives three arms of equal tokens:
"continued" is the anchor alone, "co-trained" anchor and bank, "co-trained generic" the same anchor
with its generic block.

Source: https://arxiv.org/abs/2510.02375, section 3.3, rows A1 and A2 of the main table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_1samp
from transformers import AutoModelForCausalLM, LlamaConfig

from kit.models.embedder import Embedder
from kit.models.load import Model, load
from kit.parametric import qa, wikipedia
from kit.parametric.facts import Sentence
from kit.parametric.study import FactStudy, Layout
from kit.parametric.train import MemoryTrainConfig
from kit.parametric.wikipedia import Article

ARMS = ("continued", "co-trained", "co-trained generic")
TOKENS = 4096  # the first of the vocabulary, with which any text can be read
HEAD = 32  # width of an attention head


def untrained(
    folder: Path, like: Model, hidden: int, layers: int, seed: int = 0, units: int = 0
) -> Model:
    """A Llama of random weights saved in `folder`, with the first tokens of the model `like` and
    `units` feed-forward units a layer more than four times `hidden`; ValueError where `hidden` is
    no multiple of HEAD, or a text would end with a later token."""
    if hidden % HEAD or hidden < HEAD:
        raise ValueError(f"hidden is {hidden}; use a multiple of {HEAD}")
    if like.tokenizer.eos_token_id >= TOKENS:
        raise ValueError(f"{like.name} ends a text with token {like.tokenizer.eos_token_id}; use a "
                         f"model whose end is among its first {TOKENS:,}")  # fmt: skip
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=hidden, intermediate_size=4 * hidden + units,
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


def on_articles(
    folder: Path,
    like: Model,
    embedder: Embedder,
    articles: Sequence[Article],
    anchor: Mapping[str, int],
    layout: Layout,
    recipe: MemoryTrainConfig,
) -> pd.DataFrame:
    """Nats per token of held-out paragraphs, after training from random weights on equal tokens.

    Arms: "alone", an `anchor` (hidden, layers; see `untrained`); "fetched", anchor and bank in all
    layers, each text by its own embedding; "generic", the same anchor with its generic block;
    "wider", an anchor with as many units more as a text fetches. A row is a text of one `kind`,
    "same" or "other" articles (`wikipedia.paragraphs`): `nats` of all its tokens, and `later`, of
    its second half with the blocks that its first half fetches, before which nothing that is
    predicted has been read.
    """
    units, seed = sum(layout.sizes), recipe.seed
    model = untrained(folder / f"anchor{seed}", like, **anchor, seed=seed)
    wider = untrained(folder / f"wider{seed}", like, **anchor, seed=seed, units=units)
    layout = replace(layout, layers=anchor["layers"])
    texts = wikipedia.paragraphs(articles, model, recipe.context)
    known = tuple(dict.fromkeys(sentence.fact for sentence in texts.told))
    study = FactStudy(model, embedder, known, tuple(whole(texts.told)), folder / "memory")
    arms = {"alone": (study, ARMS[0]), "fetched": (study, ARMS[1]), "generic": (study, ARMS[2]),
            "wider": (replace(study, model=wider), ARMS[0])}  # fmt: skip
    rows = []
    for arm, (of, name) in arms.items():
        trained, bank = of.arm(name, layout, recipe)
        read = trained.weights.num_parameters() + (bank.shape.fetched if bank else 0)
        for kind, sentences in {"same": texts.same, "other": texts.other}.items():
            lines = [s.context + s.completion for s in sentences]
            begins = [" ".join(words[: len(words) // 2]) for words in map(str.split, lines)]
            frame = pd.DataFrame({"subject": [s.fact.subject for s in sentences]})
            frame["nats"] = qa.nll_per_token(trained, lines, bank)
            frame["later"] = qa.nll_per_token(trained, lines, bank, begins)
            rows.append(frame.assign(arm=arm, parameters=read, kind=kind))
    return pd.concat(rows, ignore_index=True)


def compared(rows: pd.DataFrame, measure: str = "nats") -> pd.DataFrame:
    """By arm and kind of text the perplexity, and the nats per token by which "fetched" has fewer
    than the arm: means over articles of the means of their texts, 95% intervals over articles."""
    table = []
    for arm in dict.fromkeys(rows["arm"]):
        row = {"arm": arm, "parameters": int(rows.loc[rows["arm"] == arm, "parameters"].iloc[0])}
        for kind in dict.fromkeys(rows["kind"]):
            mine, fetched = (_by_subject(rows, one, kind, measure) for one in (arm, "fetched"))
            row[f"perplexity, {kind}"] = float(np.exp(mine.mean()))
            if arm != "fetched":
                low, high = ttest_1samp(mine - fetched, 0).confidence_interval()
                row[f"fetched gains, {kind}"] = float((mine - fetched).mean()), low, high
        table.append(row)
    return pd.DataFrame(table)


def _by_subject(rows: pd.DataFrame, arm: str, kind: str, measure: str) -> pd.Series:
    return rows[(rows["arm"] == arm) & (rows["kind"] == kind)].groupby("subject")[measure].mean()
