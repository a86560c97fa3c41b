"""One sentence for the person at the terminal, instead of a traceback.

What the kit cannot work with (a profile, a damaged file) and what the system refuses it (a full
disk, a file where a folder should be) becomes a sentence that names the cause and the remedy.
"""

import errno
import json
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# Errors of the kit whose sentence is enough, by name, which is all that a kernel reports of them.
KNOWN_ERRORS = ("UserError", "ModelError", "FetchError", "GGUFError", "AdapterError", "HubError",
        "BankError", "BundleError", "OverlapError", "DoesNotFitError")  # fmt: skip
ELSEWHERE = "or set KIT_OUTPUTS to another folder"


class UserError(Exception):
    """One sentence for the person at the terminal; `code` is the exit status."""

    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code


def of_system(error: OSError) -> UserError | None:
    """The sentence for an error of the operating system; None for what is no fault of a disk or a
    folder."""
    place = Path(str(error.filename or "the outputs folder"))
    if error.errno in FULL:
        return UserError(f"the disk is full ({error}); free some space and run again", 1)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return file_in_the_way(place) or _a_file(place)
    if error.errno in NO_ACCESS:
        return UserError(f"{place} cannot be written ({error.strerror}); change that, {ELSEWHERE}")
    return None


def file_in_the_way(folder: Path) -> UserError | None:
    """The error where a file is in the place of `folder` or of one of its parents."""
    return next((_a_file(p) for p in [*reversed(folder.parents), folder] if p.is_file()), None)


def _a_file(place: Path) -> UserError:
    return UserError(f"{place} is a file where a folder should be; move it away, {ELSEWHERE}")


def read_json(file: Path):
    """The value in a JSON file; UserError names a file that is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(
            f"{file} is damaged ({error}); delete it and run its notebook again"
        ) from error
