"""Generates the suites laptop and school, and freezes them to files.

    python -m kit freeze-problems school                          writes data/problems/school.*
    python -m kit freeze-problems laptop --families gcd --show    prints examples of every level

Generators change between versions, so runs read the frozen files (`problems.load("laptop")`), and
this module is only needed to make new ones. A family of the laptop suite is a reasoning-gym
dataset: its settings from easy to hard, how an entry becomes one plain question without format
instructions, and which entries are kept. Its levels are easy on purpose: the bundled 135M model
must solve between 15% and 50% of them, or it could not show any difference (LOG.md has the table of
what was tried). Families whose gold answers an independent oracle does not confirm are left out.
The school suite, for models that can solve more, is made in `school`.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from random import Random

import reasoning_gym

from kit import paths
from kit.data import school
from kit.data.dedup import NEAR, ShingleSignature, check_disjoint, signature, similarity
from kit.data.problems import SPLITS, SUITES, ProblemSet
from kit.schema import Problem, digest

SIZES = {  # problems of each split, spread evenly over families and levels
    "laptop": {"train": 420, "validation": 140, "test": 350},
    "school": {"train": 300, "validation": 200, "test": 400},
}
DRAWS_PER_PROBLEM = 200  # entries per problem before a family counts as exhausted

Entry = dict  # of a reasoning-gym dataset: question, answer, metadata


@dataclass(frozen=True)
class Family:
    """Settings of one reasoning-gym dataset by level, and how its entries become questions."""

    levels: tuple[dict, ...]  # generator settings, easiest first
    question: Callable[[Entry], str]
    keep: Callable[[Entry, int], bool] = lambda entry, level: True


def _range(name: str, low: int, high: int) -> dict:
    return {f"min_{name}": low, f"max_{name}": high}


def _calculate(entry: Entry) -> str:
    return f"Calculate {entry['metadata']['expression']}."


def _of_numbers(what: str) -> Callable[[Entry], str]:
    def question(entry: Entry) -> str:
        numbers = ", ".join(map(str, entry["metadata"]["numbers"]))
        return f"Find the {what} of these numbers: {numbers}."

    return question


def _factors(entry: Entry, level: int) -> bool:
    """No trivial factor; level 2 has two factors from 10 to 29."""
    factors = list(map(int, entry["metadata"]["expression"].split(" * ")))
    return min(factors) >= 2 if level == 1 else max(factors) < 30


def _equation(entry: Entry) -> str:
    """The unknown is always x: a renamed equation would be the same problem."""
    variable, equation = entry["metadata"]["variable"], entry["metadata"]["equation"]
    return f"Solve for x: {equation.replace('*', '').replace(variable, 'x')}"


def _small(entry: Entry, level: int) -> bool:
    """A coefficient times the unknown; level 1: from 2 to 9, level 2: larger."""
    match = re.match(r"(\d+)\*[a-z] = ", entry["metadata"]["equation"])
    return bool(match) and (2 <= int(match[1]) <= 9) == (level == 1) and int(match[1]) > 1


_TWO_TERMS = _range("terms", 2, 2)
_EQUATIONS = _TWO_TERMS | {
    **_range("value", 1, 9),
    "operators": ("*",),
    "operators_weights": [1.0],
}

FAMILIES = {
    "chain_sum": Family(tuple(_TWO_TERMS | _range("digits", k, k) for k in (1, 2)), _calculate),
    "products": Family(
        (_range("terms", 2, 3) | _range("digits", 1, 1), _TWO_TERMS | _range("digits", 2, 2)),
        _calculate,
        _factors,
    ),
    "gcd": Family(
        tuple({"max_value": top} for top in (15, 50)),
        _of_numbers("Greatest Common Divisor (GCD)"),
    ),
    "lcm": Family(
        tuple({"max_value": top} for top in (15, 30)),
        _of_numbers("Least Common Multiple (LCM)"),
    ),
    "simple_equations": Family((_EQUATIONS, _EQUATIONS), _equation, _small),
    "fraction_simplification": Family(
        tuple(
            {"max_value": top, "styles": ("plain",)} | _range("factor", 2, factor)
            for top, factor in ((10, 5), (30, 10))
        ),
        lambda entry: entry["question"].split(" Give only")[0],
        keep=lambda entry, level: entry["metadata"]["simplified_denominator"] > 1,
    ),
    "letter_counting": Family(
        (_range("words", 5, 6), _range("words", 10, 12)), lambda entry: entry["question"]
    ),
}


class Seen:
    """Questions accepted so far, over all splits, families and levels."""

    def __init__(self) -> None:
        self.bags: set[tuple[str, ...]] = set()
        self.blocks: dict[tuple[str, ...], list[ShingleSignature]] = defaultdict(list)

    def admit(self, question: str, numbers: tuple[str, ...] = ()) -> bool:
        """Accept the question unless it duplicates an accepted one, or has its `numbers`.

        Duplicates have the same words in any order, so that 3 + 5 and 5 + 3 count once, or nearly
        the same words around the same numbers.
        """
        mark = signature(question)
        bag, block = tuple(sorted(mark.tokens)), self.blocks[mark.numbers]
        if self.bags & {bag, numbers} or any(similarity(mark, other) >= NEAR for other in block):
            return False
        self.bags |= {bag, numbers} - {()}
        block.append(mark)
        return True


def generate(family: str, level: int, n: int, seed: int, seen: Seen | None = None) -> list[Problem]:
    """`n` problems of one family and level without duplicates, also of those in `seen`.

    ValueError if the family has too few.
    """
    seen, count = seen or Seen(), levels(family)
    if not 1 <= level <= count:
        raise ValueError(f"{family} has levels 1 to {count}, not {level}")
    suite = "school" if family in school.FAMILIES else "laptop"
    asks = SUITES[suite].get(family, "any")
    # Item i of a dataset is drawn with seed + i: neighbouring seeds share nearly all items.
    start, size = int(digest([family, level, seed], 7), 16), DRAWS_PER_PROBLEM * n
    problems = []
    for question, answer, numbers in _draws(family, level, start, size):
        if len(problems) == n:
            break
        if seen.admit(question, numbers):
            own = f"{family}-{level}-{digest(question, 8)}"
            problems.append(Problem(own, question, answer, family, level, suite, asks))
    if len(problems) < n:
        raise ValueError(
            f"{family} level {level} has {len(problems)} distinct problems in {size} draws, "
            f"not {n}: ask for fewer, or widen its level"
        )
    return problems


def _draws(
    family: str, level: int, start: int, size: int
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Question, answer and, for the school suite, what no other problem may have: family, level
    and numbers, whatever the names and the wording."""
    if family in school.FAMILIES:
        for i in range(size):
            question, core, answer = school.draw(family, level, Random(start + i))
            yield question, answer, (family, str(level), *signature(core).numbers)
        return
    maker = FAMILIES[family]
    settings = maker.levels[level - 1]
    for entry in reasoning_gym.create_dataset(family, size=size, seed=start, **settings):
        if maker.keep(entry, level):
            yield maker.question(entry), entry["answer"], ()


def levels(family: str) -> int:
    """How many levels a family has; ValueError if there is none of that name."""
    if family in school.FAMILIES:
        return school.LEVELS
    if family not in FAMILIES:
        names = ", ".join([*FAMILIES, *school.FAMILIES])
        raise ValueError(f"no family {family!r}; there are {names}")
    return len(FAMILIES[family].levels)


def families_of(suite: str) -> list[str]:
    """Names of the families of a suite; ValueError if there is none of that name."""
    if suite not in SIZES:
        raise ValueError(f"no suite {suite!r}; there are {', '.join(SIZES)}")
    return [*(school.FAMILIES if suite == "school" else FAMILIES)]


def make(
    suite: str, families: Sequence[str], sizes: Mapping[str, int], seed: int
) -> list[ProblemSet]:
    """Train, validation and test sets of these families, checked to be disjoint.

    `sizes` are those of the splits; what the families and levels cannot share evenly, the first
    levels have more.
    """
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    seen = Seen()
    cells = sorted(
        ((level, family) for family in families for level in range(1, levels(family) + 1)),
        key=lambda cell: cell[0],
    )
    for at, (level, family) in enumerate(cells):
        for k, split in enumerate(SPLITS):
            n, own_seed = (sizes[split] + len(cells) - 1 - at) // len(cells), len(SPLITS) * seed + k
            splits[split] += generate(family, level, n, own_seed, seen)
    sets = [ProblemSet(suite, k, tuple(v), (), 0, "generated") for k, v in splits.items()]
    for one, other in combinations(sets, 2):
        check_disjoint(one, other)
    return sets


def freeze(
    suite: str,
    families: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    folder: Path = paths.DATA / "problems",
    seed: int = 0,
) -> dict:
    """Write the problems of a suite and its manifest; returns the manifest.

    Without `families` and `sizes` all of them, as many as in `SIZES`.
    """
    families = families or families_of(suite)
    sets = make(suite, families, sizes or SIZES[suite], seed)
    rows = [
        {
            "id": p.id,
            "split": one.split,
            "family": p.family,
            "level": p.level,
            "question": p.question,
            "answer": p.answer,
        }
        for one in sets
        for p in one.problems
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    generators = {
        "laptop": f"reasoning-gym {version('reasoning_gym')}",
        "school": "kit.data.school",
    }
    manifest = {
        "generator": generators[suite],
        "licence": "Apache-2.0",
        "seed": seed,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "counts": {one.split: len(one) for one in sets},
        "fingerprints": {one.split: one.fingerprint for one in sets},
        "families": {
            family: FAMILIES[family].levels if family in FAMILIES else school.LEVELS
            for family in families
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{suite}.jsonl").write_text(text)
    (folder / f"{suite}.manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def guess_share(problems: Sequence[Problem]) -> float:
    """Accuracy of always giving the commonest answer, the floor that thoughtless answers reach."""
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


def show(families: Sequence[str], seed: int, n: int = 25) -> None:
    """Print three of `n` problems of every level, and what guessing scores on all of them."""
    for family in families:
        for level in range(1, levels(family) + 1):
            some = generate(family, level, n, seed)
            print(f"{family} level {level}: one constant answer scores {guess_share(some):.0%}")
            for problem in some[:3]:
                print(f"    {problem.question}  ->  {problem.answer}")
