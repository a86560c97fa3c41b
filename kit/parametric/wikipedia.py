"""Articles of Simple English Wikipedia: prose to store in weights, where a hub can be reached.

The file has 157 MB. An article is split into pieces: all but the last are trained on, each after
its title, and the perplexity of the last shows whether that helps.

Source: https://huggingface.co/datasets/wikimedia/wikipedia, 20231101.simple, CC BY-SA 4.0.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from kit import hub
from kit.models.load import Model
from kit.parametric.facts import Fact, Sentence
from kit.schema import digest

REPO, FILE = "wikimedia/wikipedia", "20231101.simple/train-00000-of-00001.parquet"
LEAST = 1200  # characters of an article that is taken
SHORTEST = 16  # tokens of a piece


@dataclass(frozen=True)
class Article:
    """A page as plain text."""

    title: str
    text: str


def load(count: int, path: Path | None = None) -> list[Article]:
    """`count` articles of at least LEAST characters, those with the lowest hash of their title;
    from the hub, or from a local file with columns title and text. None needs neither."""
    if not count:
        return []
    file = path or hub.fetch(REPO, FILE, "dataset")[0]
    lowest: list[tuple[str, str, str]] = []  # in batches: the file is larger than it looks
    try:
        for batch in parquet.ParquetFile(file).iter_batches(columns=["title", "text"]):
            rows = zip(batch["title"].to_pylist(), batch["text"].to_pylist())
            articles = ((digest(title), title, text) for title, text in rows if len(text) >= LEAST)
            lowest = heapq.nsmallest(count, [*lowest, *articles])
    except (pyarrow.ArrowException, KeyError) as error:
        raise ValueError(
            f"{file} is no table of titles and texts ({error}); fetch it again."
        ) from None
    if len(lowest) < count:
        raise ValueError(f"{file} has {len(lowest)} articles of {LEAST} characters, not {count}.")
    return [Article(title, text) for _, title, text in lowest]


def pieces(
    articles: Sequence[Article], model: Model, tokens: int
) -> tuple[list[Sentence], list[str]]:
    """Training sentences in the order of the articles, and the held-out piece of each.

    A piece with its title has at most `tokens` tokens; articles of one piece are left out. The
    fact of a sentence has the title and the first piece, by which the article is clustered.
    """
    sentences, held_out = [], []
    for rank, article in enumerate(articles):
        ids = model.tokenizer(article.text, add_special_tokens=False)["input_ids"]
        title = model.tokenizer(f"{article.title}:", add_special_tokens=False)["input_ids"]
        length = tokens - len(title) - 4  # cut text may be read in other tokens than it was
        if length < SHORTEST:
            raise ValueError(f"{tokens} tokens have no room after {article.title!r}; use more.")
        parts = [ids[at : at + length] for at in range(0, len(ids), length)]
        texts = [model.tokenizer.decode(part) for part in parts if len(part) >= SHORTEST]
        if len(texts) > 1:
            fact = Fact("articles", article.title, texts[0], rank)
            sentences += [Sentence(f"{article.title}:", f" {text}", fact) for text in texts[:-1]]
            held_out.append(texts[-1])
    return sentences, held_out
