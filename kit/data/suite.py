"""The generated laptop suite: problems of the task families, made once and frozen to a file.

    python -m kit freeze-problems                               writes data/problems/
    python -m kit freeze-problems --families chain_sum --show   prints examples of every level

Generators change between versions, so runs read the frozen file (`problems.load("laptop")`) and
this module is needed only to make a new one. Each question is asked in one plain sentence,
without the generator's format instructions: prompts are the business of `prompts`.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import reasoning_gym

from kit import paths
from kit.data.dedup import NEAR, ShingleSignature, check_disjoint, signature, similarity
from kit.data.generators import FAMILIES, Family
from kit.data.problems import SPLITS, ProblemSet
from kit.schema import Problem, digest

PER_LEVEL = {"train": 30, "validation": 10, "test": 25}  # problems per family and level
DRAWS_PER_PROBLEM = 200  # drawn before a family counts as exhausted


class Seen:
    """Questions taken so far, over all splits, families and levels."""

    def __init__(self) -> None:
        self.bags: set[tuple[str, ...]] = set()
        self.blocks: dict[tuple[str, ...], list[ShingleSignature]] = defaultdict(list)

    def admit(self, question: str) -> bool:
        """Take the question unless it is like one already taken.

        Alike is: the same words in any order, so that 3 + 5 and 5 + 3 count once, or nearly the
        same words around the same numbers.
        """
        mark = signature(question)
        bag, block = tuple(sorted(mark.tokens)), self.blocks[mark.numbers]
        if bag in self.bags or any(similarity(mark, other) >= NEAR for other in block):
            return False
        self.bags.add(bag)
        block.append(mark)
        return True


def generate(family: str, level: int, n: int, seed: int, seen: Seen | None = None) -> list[Problem]:
    """`n` problems of one family and level, no two alike nor like one in `seen`.

    ValueError where the family has too few.
    """
    maker, seen = _maker(family), seen or Seen()
    if not 1 <= level <= len(maker.levels):
        raise ValueError(f"{family} has levels 1 to {len(maker.levels)}, not {level}")
    # Item i of a dataset is drawn with seed + i: neighbouring seeds share nearly all items.
    start, size = int(digest([family, level, seed], 7), 16), DRAWS_PER_PROBLEM * n
    settings = maker.levels[level - 1]
    made = []
    for entry in reasoning_gym.create_dataset(family, size=size, seed=start, **settings):
        if len(made) == n:
            break
        question = maker.ask(entry)
        if maker.keep(entry, level) and seen.admit(question):
            own = f"{family}-{level}-{digest(question, 8)}"
            made.append(
                Problem(own, question, entry["answer"], family, level, "laptop", maker.asks)
            )
    if len(made) < n:
        raise ValueError(
            f"{family} level {level} has {len(made)} distinct problems in {size} draws, not {n}: "
            "ask for fewer, or widen its level"
        )
    return made


def _maker(family: str) -> Family:
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[family]


def make(families: Sequence[str], n_per_level: dict[str, int], seed: int) -> list[ProblemSet]:
    """Train, validation and test sets of these families, checked to be disjoint."""
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    seen = Seen()
    for family in families:
        for level in range(1, len(_maker(family).levels) + 1):
            for k, split in enumerate(SPLITS):
                own_seed = len(SPLITS) * seed + k
                splits[split] += generate(family, level, n_per_level[split], own_seed, seen)
    sets = [ProblemSet("laptop", k, tuple(v), (), 0, "generated") for k, v in splits.items()]
    for one, other in combinations(sets, 2):
        check_disjoint(one, other)
    return sets


def freeze(
    families: Sequence[str],
    n_per_level: dict[str, int] = PER_LEVEL,
    folder: Path = paths.DATA / "problems",
    seed: int = 0,
) -> dict:
    """Write laptop.jsonl and its MANIFEST.json; returns the manifest."""
    sets = make(families, n_per_level, seed)
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
    manifest = {
        "generator": f"reasoning-gym {version('reasoning_gym')}",
        "licence": "Apache-2.0",
        "seed": seed,
        "per_level": dict(n_per_level),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "counts": {one.split: len(one) for one in sets},
        "fingerprints": {one.split: one.fingerprint for one in sets},
        "families": {family: list(FAMILIES[family].levels) for family in families},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "laptop.jsonl").write_text(text)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def guess_share(problems: Sequence[Problem]) -> float:
    """Accuracy of always giving the commonest answer, the floor that thoughtless answers reach."""
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


def show(families: Sequence[str], n: int, seed: int) -> None:
    """Print three of `n` problems of every level, and what guessing scores on all of them."""
    for family in families:
        for level in range(1, len(_maker(family).levels) + 1):
            some = generate(family, level, n, seed)
            print(f"{family} level {level}: one constant answer scores {guess_share(some):.0%}")
            for problem in some[:3]:
                print(f"    {problem.question}  ->  {problem.answer}")
