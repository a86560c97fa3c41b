"""Problem sets with disjoint splits: generated suites, published benchmarks, the reader's own.

`load(name, split)` reads a frozen suite in data/problems, laptop or school, or a published set from
the folder KIT_DATA or from the hub at an enforced commit, or a file of the reader's own (see
`own`). Training rows that nearly duplicate a held-out row are dropped and counted; malformed rows
are listed with file, line and reason. `generated` makes the files of the suites.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kit import hub, paths
from kit.data import own
from kit.data.dedup import near_duplicates
from kit.data.rows import Reject
from kit.data.sources import SOURCES, local_files, read_rows, same_gold
from kit.schema import Problem, digest

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.1  # of a published training file, split off by hash of the id
# Generated suites, and by family the required form of the answer, one of schema.ASKS; else "any".
SUITES = {
    "laptop": {
        "chain_sum": "evaluated",
        "products": "evaluated",
        "fraction_simplification": "simplified",
    },
    "school": {"equations": "evaluated", "fractions": "simplified"},
}


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one split, sorted by id, with their source and the rows that were left out."""

    name: str
    split: str
    problems: tuple[Problem, ...]
    rejects: tuple[Reject, ...]  # malformed rows of the files of this split
    dropped: int  # training rows that nearly duplicate held-out ones
    revision: str  # repository and commit, or file and hash

    @property
    def fingerprint(self) -> str:
        """Hash of all ids, questions, answers, families and levels, in any order."""
        return digest(
            sorted([p.id, p.question, p.answer, p.family, p.level] for p in self.problems)
        )

    def __len__(self) -> int:
        return len(self.problems)

    def describe(self) -> str:
        """Counts by family and level, rejects and provenance, as text."""
        levels = sorted({p.level for p in self.problems})
        counts = Counter((p.family, p.level) for p in self.problems)
        families = sorted({p.family for p in self.problems})
        width = max(len(family) for family in (*families, "family"))
        lines = [
            f"{self.name} {self.split}: {len(self):,} problems from {self.revision}",
            f"{len(self.rejects)} rows rejected, {self.dropped} near-duplicates dropped",
            f"{'family':{width}}" + "".join(f"{f'level {k}':>9}" for k in levels),
        ]
        for family in families:
            lines.append(f"{family:{width}}" + "".join(f"{counts[family, k]:9}" for k in levels))
        lines += [f"rejected: {r.file}, line {r.line}: {r.reason}" for r in self.rejects[:5]]
        if len(self.rejects) > 5:
            lines.append(f"rejected: {len(self.rejects) - 5} more")
        return "\n".join(lines)


def load(
    name: str,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    levels: Iterable[int] | None = None,
    families: Iterable[str] | None = None,
    path: Path | str | None = None,
    test_path: Path | str | None = None,
) -> ProblemSet:
    """One split of a set, cut down to `levels`, `families` and at most `n` problems.

    `name` is a built-in one or the path of the reader's own: a file, a folder or a TOML, see `own`.
    Empty `levels` or `families` take all. `path` is a local file (see `rows`) in the published
    layout, read instead of the hub; for train and validation it is the training file, and
    `test_path` the file whose rows it must not repeat. The `n` problems are a sample stratified by
    family and level; it depends on `seed`, not on file order, and a smaller `n` gives a subset of a
    larger one.
    ValueError for an unknown name, split, level or family, or if no row is usable.
    """
    own_set = None if name in SUITES or name in SOURCES else own.find(name, split, path, test_path)
    _check_names(name, split, path, own_set)
    if own_set:
        problems, rejects, dropped, revision = _read_own(own_set, split)
        name = own_set.name
    elif name in SUITES:
        problems, rejects, dropped, revision = *_read_suite(name, split), 0, _suite_revision(name)
    else:
        problems, rejects, dropped, revision = _read_published(name, split, path, test_path)
    if not problems:
        first = f"; line {rejects[0].line}: {rejects[0].reason}" if rejects else ""
        raise ValueError(f"{name} {split}: not one usable row in {revision}{first}")
    problems = _only(problems, "level", levels, name)
    problems = _only(problems, "family", families, name)
    sample = tuple(sorted(_sample(problems, n, seed), key=lambda p: p.id))
    return ProblemSet(name, split, sample, tuple(rejects), dropped, revision)


def _check_names(name: str, split: str, path, own_set: own.Own | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if own_set is None and name not in SUITES and name not in SOURCES:
        raise ValueError(
            f"no problem set {name!r}; there are {', '.join([*SUITES, *SOURCES])}, and files of "
            "your own by their path (docs/problems.md)"
        )
    if name in SUITES and path is not None:
        raise ValueError(f"{name} is read from data/problems; path is for published sets")
    if name in SOURCES and split != "test" and "train" not in SOURCES[name].files:
        raise ValueError(f"{name} is published for testing only: ask for split 'test'")
    if name in SOURCES and split == "test" and "test" not in SOURCES[name].files:
        raise ValueError(f"{name} is published for training only: ask for split 'train'")


# ---- reading --------------------------------------------------------------------------------


def _suite_files(suite: str) -> tuple[Path, Path]:
    folder = paths.DATA / "problems"
    return folder / f"{suite}.jsonl", folder / f"{suite}.manifest.json"


def _suite_revision(suite: str) -> str:
    manifest = json.loads(_suite_files(suite)[1].read_text())
    return f"{manifest['generator']}, seed {manifest['seed']}, sha256 {manifest['sha256'][:12]}"


def _read_suite(suite: str, split: str) -> tuple[list[Problem], list[Reject]]:
    """A frozen suite, whose hash must match the manifest."""
    (file, manifest_file), again = _suite_files(suite), f"python -m kit freeze-problems {suite}"
    for needed in (file, manifest_file):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: run `{again}`")
    raw = file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != json.loads(manifest_file.read_text())["sha256"]:
        raise ValueError(
            f"{file} is not the file {manifest_file.name} describes: restore both from git, or "
            f"freeze anew with `{again}`"
        )
    rows = [json.loads(line) for line in raw.decode().rstrip("\n").split("\n")]
    fields = ("id", "question", "answer", "family", "level")
    problems = [
        Problem(
            **{field: row[field] for field in fields},
            source=suite,
            asks=SUITES[suite].get(row["family"], "any"),
        )
        for row in rows
        if row["split"] == split
    ]
    return problems, []


def _read_own(own_set: own.Own, split: str) -> tuple[list[Problem], list[Reject], int, str]:
    """As `_read_published`. Without validation rows, those of train are split as there."""
    problems, rejects = own.read(own_set, split)
    if split != "test" and not (validation := own.read(own_set, "validation")[0]):
        train, rejects = own.read(own_set, "train")
        validation = {line: p for line, p in train.items() if _is_validation(p)}
        problems = {line: p for line, p in train.items() if _is_validation(p) == (split != "train")}
    file = own_set.files.get(split) or own_set.files.get("file") or own_set.files.get("train")
    complete = problems or rejects or not own_set.whole
    if (
        file is None
        or not complete
        or (split == "test" and not {"test", "file"} & {*own_set.files})
    ):
        files = ", ".join(f"{of} in {file.name}" for of, file in own_set.files.items())
        raise ValueError(
            f"{own_set.name} has no {split} rows, only {files}; write a TOML that names the file "
            "of each split, or one file to be shared out (docs/problems.md)"
        )
    revision = f"{file.name} sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    if split == "test":
        return [*problems.values()], rejects, 0, revision
    held_out = [*own.read(own_set, "test")[0].values()]
    if not held_out:
        revision += ", not checked against a test split"
    held_out += validation.values() if split == "train" else ()
    lines, repeated = {p.id: line for line, p in problems.items()}, set()
    for one, other, score in near_duplicates([*problems.values()], held_out):
        repeated.add(one.id)
        if score == 1 and not same_gold(one.answer, other.answer):
            reason = f"another gold than a held-out row: {one.answer!r}, not {other.answer!r}"
            rejects.append(Reject(file.name, lines[one.id], reason))
    return [p for p in problems.values() if p.id not in repeated], rejects, len(repeated), revision


def _read_published(
    name: str, split: str, path: Path | str | None, test_path: Path | str | None
) -> tuple[list[Problem], list[Reject], int, str]:
    """Problems, rejects, number of near-duplicates dropped, revision of one split."""
    half = "test" if split == "test" else "train"
    problems, rejects, revision = _read_half(name, half, path)
    if split == "test":
        return problems, rejects, 0, revision
    held_out = [p for p in problems if _is_validation(p)]
    problems = held_out if split == "validation" else [p for p in problems if not _is_validation(p)]
    against = held_out if split == "train" else []
    if test_path is None and (path is not None or "test" not in SOURCES[name].files):
        revision += ", not checked against a test split (no test_path)"
    else:
        against = against + _read_half(name, "test", test_path)[0]
    repeated = {problem.id for problem, _, _ in near_duplicates(problems, against)}
    return [p for p in problems if p.id not in repeated], rejects, len(repeated), revision


def _is_validation(problem: Problem) -> bool:
    return int(digest(problem.id, 8), 16) < VALIDATION_SHARE * 16**8


def _read_half(
    name: str, half: str, path: Path | str | None
) -> tuple[list[Problem], list[Reject], str]:
    """All problems of a published split, from a local file or from the hub."""
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: path= takes one file of {name} {half}")
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        return *read_rows(path, name), f"{path.name} sha256 {checksum[:12]}"
    source, problems, rejects, commit = SOURCES[name], [], [], ""
    if local := local_files(name, half):
        for file in local:
            rows, malformed = read_rows(file, name)
            problems, rejects = problems + rows, rejects + malformed
        return problems, rejects, f"{local[0].name} sha256 {hub.hash_files(local)[:12]} (KIT_DATA)"
    for file in source.files[half]:
        try:
            local, commit = hub.fetch(source.repo, file, "dataset")
        except hub.HubError as error:
            gate = f"https://huggingface.co/datasets/{source.repo}"
            hint = f" ({name} is gated: accept its terms at {gate} and run `hf auth login`)"
            other = f"; or put {name}_{half}.jsonl into the folder KIT_DATA, see docs/problems.md"
            raise hub.HubError(f"{error}{hint if source.gated else ''}{other}") from error
        rows, malformed = read_rows(local, name)
        problems += rows
        rejects += [Reject(file, r.line, r.reason) for r in malformed]
    return problems, rejects, f"{source.repo}@{commit[:12]}"


# ---- choosing -------------------------------------------------------------------------------


def _only(problems: list[Problem], field: str, values: Iterable | None, name: str) -> list[Problem]:
    """Problems whose `field` is among `values`; each value must occur."""
    if not values:
        return problems
    values, available = set(values), {getattr(p, field) for p in problems}
    if unknown := sorted(values - available):
        raise ValueError(
            f"{name} has no {field} {unknown}; it has {sorted(available)}, [] takes all"
        )
    return [p for p in problems if getattr(p, field) in values]


def _sample(problems: list[Problem], n: int | None, seed: int) -> list[Problem]:
    """At most `n` problems, in proportion over (family, level).

    Within a stratum of m problems, shuffled by hash, the k-th lies at (k + 1/2) / m; the n
    lowest of all strata together are a proportional sample, and nested in n.
    """
    if n is None or n >= len(problems):
        return problems
    if n < 1:
        raise ValueError(f"n={n}: ask for at least one problem")
    strata = defaultdict(list)
    for problem in problems:
        strata[problem.family, problem.level].append((digest([seed, problem.id]), problem))
    placed = []
    for members in strata.values():
        members.sort(key=lambda pair: pair[0])
        placed += [((k + 0.5) / len(members), *pair) for k, pair in enumerate(members)]
    return [problem for _, _, problem in sorted(placed, key=lambda item: item[:2])[:n]]
