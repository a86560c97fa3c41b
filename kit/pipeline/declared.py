"""Declarations of a stage's claims before its first run: a digest of each.

A digest is of all that decides a verdict (rule, contrast, margin, published numbers, profiles) and
of none of its prose. `first` writes those of a stage into outputs/<profile>/declared.json once,
before its first run, and never again; a claim whose digest is another later was changed after the
run, and its verdict says so. Imports nothing heavy: the pipeline calls it.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from kit.paths import DATA
from kit.pipeline.errors import read_json
from kit.pipeline.provenance import write_json
from kit.schema import digest

PROSE = {"statement", "metric", "source", "grade", "scope"}
# Of a stage, declared for itself, whatever was published; by tables of data/claims.toml.
PRIMARY, SECONDARY = "primary contrast", "secondary contrast"
CHANGED = "changed after the run"


def digest_of(row: Mapping) -> str:
    """The digest of a table of data/claims.toml."""
    return digest({key: of for key, of in row.items() if key not in PROSE}, 12)


def current(stage: str, path: Path = DATA / "claims.toml") -> dict[str, str]:
    """The digests of a stage's claims as `path` has them, by claim, and of its primary and
    secondary contrast; {} where it has none."""
    if not path.is_file():  # a project of one's own without claims
        return {}
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    digests = {row["id"]: digest_of(row) for row in document.get("claim", [])
               if row["notebook"] == stage}  # fmt: skip
    own = {name: document.get(name.split()[0], {}).get(stage) for name in (PRIMARY, SECONDARY)}
    return digests | {name: digest(contrast, 12) for name, contrast in own.items() if contrast}


def first(folder: Path, stage: str) -> dict[str, str]:
    """The digests declared before the first run of `stage` in `folder`; now, where none has run."""
    file = folder / "declared.json"
    declarations = read_json(file) if file.is_file() else {}
    if stage not in declarations and (digests := current(stage)):
        declarations |= {stage: digests}
        write_json(file, declarations)
    return declarations.get(stage, {})
