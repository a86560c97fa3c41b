"""Decontamination: near-duplicates between training and test questions.

Two questions are duplicates if, after LaTeX spacing, punctuation and case are stripped, they have
the same numbers in the same order and nearly the same words: the Jaccard index of their three-word
shingles is at least 0.8. Different numbers make a different problem. Only words are compared, so a
paraphrase is not detected.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kit.schema import Problem

SHINGLE_WORDS = 3
NEAR = 0.8  # Jaccard index from which two questions count as the same

_SPACING = re.compile(
    r"\\(?:[,;:!> ]|quad\b|qquad\b|left\b|right\b|displaystyle\b|limits\b|(?:text|mathrm|mbox)\b)"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|,\\!)(?=\d{3}(?!\d))")
_BARE_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")  # \frac12 is 1/2, not twelve
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>]")


class OverlapError(ValueError):
    """Two problem sets that must be disjoint share problems."""


@dataclass(frozen=True)
class ShingleSignature:
    """The features of a question that are compared."""

    tokens: tuple[str, ...]
    numbers: tuple[str, ...]
    shingles: frozenset[tuple[str, ...]]


def signature(question: str) -> ShingleSignature:
    """Normalized words, numbers in order, and word shingles of one question."""
    text = unicodedata.normalize("NFKC", question).casefold()
    text = _BARE_FRACTION.sub(r" frac \1 \2 ", _THOUSANDS.sub("", text))
    text = _SPACING.sub(" ", text).replace("dfrac", "frac").replace("tfrac", "frac")
    tokens = tuple(_TOKEN.findall(text))
    width = min(SHINGLE_WORDS, len(tokens))
    shingles = frozenset(tokens[i : i + width] for i in range(len(tokens) - width + 1))
    return ShingleSignature(tokens, tuple(t for t in tokens if t[0].isdigit()), shingles)


def similarity(a: ShingleSignature, b: ShingleSignature) -> float:
    """Jaccard index of the shingles of two questions with the same numbers."""
    common = len(a.shingles & b.shingles)
    return common / (len(a.shingles) + len(b.shingles) - common)


def near_duplicates(
    a: Sequence[Problem], b: Sequence[Problem]
) -> Iterator[tuple[Problem, Problem, float]]:
    """Pairs of near-duplicate problems of `a` and `b`, with their similarity.

    Only pairs with equal numbers and similar shingle counts are compared: well under a million of
    the 37 million pairs of MATH train and test.
    """
    blocks: dict[tuple[str, ...], list[tuple[ShingleSignature, Problem]]] = defaultdict(list)
    for problem in b:
        mark = signature(problem.question)
        blocks[mark.numbers].append((mark, problem))
    for problem in a:
        mark = signature(problem.question)
        size = len(mark.shingles)
        for other_mark, other in blocks.get(mark.numbers, ()):
            if NEAR * size <= len(other_mark.shingles) <= size / NEAR:
                score = similarity(mark, other_mark)
                if score >= NEAR:
                    yield problem, other, score


def check_disjoint(a, b) -> None:
    """Raise OverlapError, listing pairs, if problem sets `a` and `b` share near-duplicates."""
    pairs = list(near_duplicates(a.problems, b.problems))
    if not pairs:
        return
    examples = "; ".join(
        f"{problem.id} = {other.id} ({score:.2f}: {problem.question[:60]!r})"
        for problem, other, score in pairs[:5]
    )
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    raise OverlapError(
        f"{a.name} {a.split} and {b.name} {b.split} share {len(pairs)} problems: {examples}{more}; "
        "remove them from the training side"
    )
