"""Held-out text of kinds that an evictor was not trained on, for `kit.dms.fidelity`.

Needles and chains of variables are generated as in RULER, https://arxiv.org/abs/2404.06654, with
its repeated sentences as haystack. What policies keep is compared on the answer alone.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from kit import paths
from kit.dms.train import pack_documents
from kit.models.load import Model

HAYSTACK = (
    " The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.",
    " There and back again.",
)  # fmt: skip
WORDS = ("anchor", "basket", "candle", "dragon", "engine", "forest", "garden", "hammer", "island")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = 92  # tokens of a single chat or of a piece of prose
LEAST = 256  # tokens of a needle's or a chain's text, with its haystack and question


class Text(NamedTuple):
    """Sequences of equally many tokens."""

    ids: torch.Tensor  # [N, T]
    prompt: int  # tokens that are prefilled; those after them are compared


def kinds(model: Model, documents: Sequence[str], context: int, count: int) -> dict[str, Text]:
    """Other text by kind, at most `count` sequences of each; `documents` are chats, of which an
    evictor was trained on others, packed into sequences of `context` tokens.

    A single chat is what decoding meets, and what packed chats with block-diagonal attention are. A
    longer text is compared beyond the length trained on. A kind without a sequence is left out.
    """
    short, tall = min(SHORT, context), max(LEAST, context)
    ids = [model.tokenizer(each, add_special_tokens=False)["input_ids"] for each in documents]
    single = [each[:short] for each in ids if len(each) >= short][:count]
    made = {"single chats": Text(torch.tensor(single).view(-1, short), min(32, short // 2))}
    licence = (paths.ROOT / "LICENSE").read_text()
    prose = pack_documents(model, [licence], short)[:count]
    made["prose"] = Text(prose, made["single chats"].prompt)
    if sum(map(len, ids)) >= 2 * context:
        longer = pack_documents(model, [*documents], 2 * context)[:count]
        made["longer than trained"] = Text(longer, context)
    made |= {"needles": needles(model, tall, count), "variables": variables(model, tall, count)}
    return {name: text for name, text in made.items() if len(text.ids)}


def needles(model: Model, length: int, count: int, seed: int = 0) -> Text:
    """A number of seven digits, told once, and asked for at the end."""
    rng, tasks = np.random.default_rng(seed), []
    for _ in range(count):
        word, number = rng.choice(WORDS), rng.integers(10**6, 10**7)
        tasks.append((
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards.\n",
            [f" One of the special magic numbers for {word} is: {number}."],
            f"\nWhat is the special magic number for {word} mentioned in the provided text? "
            f"The special magic number for {word} mentioned in the provided text is", f" {number}",
        ))  # fmt: skip
    return _hidden(model, tasks, length, rng)


def variables(model: Model, length: int, count: int, seed: int = 0, hops: int = 2) -> Text:
    """Two chains of `hops` assignments each, mixed; asked for is the value at the end of one, where
    RULER asks for all variables of a value, so that all answers have equally many tokens."""
    rng, tasks = np.random.default_rng(seed), []
    for _ in range(count):
        drawn = ["".join(rng.choice([*LETTERS], 5)) for _ in range(2 * hops + 2)]
        chains, numbers = (drawn[: hops + 1], drawn[hops + 1 :]), rng.integers(10**4, 10**5, 2)
        told: list[str] = []
        for step in range(hops + 1):
            for names, number in zip(chains, numbers, strict=True):
                value = f"VAR {names[step - 1]}" if step else number
                told.append(f" VAR {names[step]} = {value}.")
        tasks.append((
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            "\n",
            told,
            f"\nQuestion: Which value has VAR {chains[0][-1]} in the text above? Answer: According "
            f"to the chain(s) of variable assignment in the text above, the value of VAR "
            f"{chains[0][-1]} is", f" {numbers[0]}",
        ))  # fmt: skip
    return _hidden(model, tasks, length, rng)


def _hidden(model: Model, tasks: Sequence, length: int, rng: np.random.Generator) -> Text:
    """Sequences of `length` tokens, or as many as the longest task has without a haystack: an
    instruction, sentences hidden in the haystack in their order, a question and its answer, which
    alone is compared."""

    def encode(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    hay, rows = [encode(each) for each in HAYSTACK], []
    encoded = [(encode(a), [encode(each) for each in told], encode(b), encode(c))
               for a, told, b, c in tasks]  # fmt: skip
    bare = [len(a) + sum(map(len, told)) + len(b) + len(c) for a, told, b, c in encoded]
    length = max([length, *bare])
    for (instruction, told, question, answer), least in zip(encoded, bare, strict=True):
        sentences, room = [], length - least
        while sum(map(len, sentences)) < room:
            sentences.insert(0, hay[-1 - len(sentences) % len(hay)])
        if sentences:
            sentences[0] = sentences[0][sum(map(len, sentences)) - room :]
        for place in sorted(rng.integers(0, len(sentences) + 1, len(told)), reverse=True):
            sentences.insert(place, told.pop())
        rows.append([*instruction, *chain.from_iterable(sentences), *question, *answer])
    longest = max((len(answer) for *_, answer in encoded), default=0)
    return Text(torch.tensor(rows).view(-1, length), length - longest - 1)
