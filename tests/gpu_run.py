"""The study of `make gpu-study` on a machine with one CUDA GPU and no network: one command, any
Python 3.12 with torch and transformers, no import but of the standard library.

    python3 -m tests.gpu_run PIECES OUT     at the root of the repository

joins the pieces in the folder PIECES, checks their hashes, installs the wheels without their
dependencies into a folder of their own, and runs notebooks 01, 06, 02 and 04, then 07, which
judges them, until the time is used up. What came out lies under OUT while it runs, in files of at
most MOST bytes, so that a run that is ended early keeps what it had. Exit status: 0, 1 where a
stage failed, 2 where pieces are missing or damaged.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 16 * 2**20  # bytes of a file that comes back
MANIFEST = "manifest.json"
KEPT = ("store", "results", "exhibits", "notebooks", "status", "report.html")  # of a run's folder
PART = ".part"  # between the name of a file that was cut and the number of a piece
LIMIT = 480  # seconds, installing included
EVERY = 15  # seconds between copies to OUT
JUDGE = 30  # seconds kept for 07
GRACE = 10  # seconds that a stage has to end after each signal


class Damaged(ValueError):
    """Pieces are missing or not those of the manifest; the message names them."""


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def join(pieces: Path, work: Path) -> dict:
    """The pack in `pieces`, whose hashes are checked, unpacked into `work`: its manifest."""
    if not (pieces / MANIFEST).is_file():
        raise Damaged(f"{pieces} has no {MANIFEST}; carry it with the pieces")
    manifest = json.loads((pieces / MANIFEST).read_text())
    missing = [name for name in manifest["pieces"] if not (pieces / name).is_file()]
    if missing:
        raise Damaged(f"missing in {pieces}: {', '.join(missing)}")
    wrong = [name for name, known in manifest["pieces"].items() if sha256(pieces / name) != known]
    if wrong:
        raise Damaged(f"not the piece that was packed: {', '.join(wrong)}; carry it again")
    work.mkdir(parents=True, exist_ok=True)
    whole = work / "pack.tar"
    with whole.open("wb") as joined:
        for name in manifest["pieces"]:
            with (pieces / name).open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    with tarfile.open(whole) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.0 to .3
        archive.extractall(work, **safe)
    whole.unlink()
    return manifest


def install(work: Path) -> None:
    """The wheels of a pack into `work`/site, without dependencies and without an index."""
    wheels = sorted(str(file) for file in (work / "wheels").glob("*.whl"))
    if wheels:
        how = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        command = [sys.executable, "-m", "pip", *how, "--target", str(work / "site"), *wheels]
        subprocess.run(command, check=True)


def environment(work: Path, manifest: dict) -> dict[str, str]:
    """Variables with which the kit finds what was unpacked and asks no network."""
    path = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "KIT_CACHE": str(work / "cache"),
           "KIT_OUTPUTS": str(work / "outputs"), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    return os.environ | own | manifest["environment"]


def bring(source: Path, out: Path, known: dict[Path, tuple]) -> None:
    """Copy what is new or changed of a run's folder to `out`, larger files in parts; `known` holds
    what has been copied."""
    for top in KEPT:
        for file in sorted([source / top, *(source / top).rglob("*")]):
            if not file.is_file() or file.name.startswith("."):
                continue
            said = file.stat()
            if known.get(file) == (said.st_size, said.st_mtime_ns):
                continue
            target = out / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in target.parent.glob(f"{target.name}{PART}*"):
                old.unlink()
            if said.st_size <= MOST:
                shutil.copyfile(file, target)
            else:
                target.unlink(missing_ok=True)
                with file.open("rb") as opened:
                    for number in range(-(-said.st_size // MOST)):
                        piece = target.with_name(f"{target.name}{PART}{number:03}")
                        piece.write_bytes(opened.read(MOST))
            known[file] = said.st_size, said.st_mtime_ns


def run(work: Path, out: Path, manifest: dict, end: float) -> bool:
    """The stages of the pack, one after the other until `end` (of time.monotonic): whether none
    failed. A stage that is cut is resumed by the next run, and 07 judges what there is."""
    source, known, well = work / "outputs" / manifest["profile"], {}, True
    for number, values in manifest["stages"].items():
        command = [sys.executable, "-m", "kit", "reproduce", "--profile", manifest["profile"]]
        command += ["--only", number, *(f"--set={name}={value}" for name, value in values.items())]
        left = end - time.monotonic() - (0 if number == "07" else JUDGE)
        if left <= 0:
            print(f"{number}: no time left", flush=True)
            continue
        process = subprocess.Popen(command, cwd=ROOT, env=environment(work, manifest))
        until, state = time.monotonic() + left, None
        while state is None:
            try:
                state = process.wait(min(EVERY, max(0.1, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                state = stop(process) if time.monotonic() >= until else None
            bring(source, out, known)
        print(f"{number}: exit status {state}", flush=True)
        well &= state == 0
    return well


def stop(process: subprocess.Popen) -> int:
    """End a stage, as Ctrl-C does if it hears that: its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        try:
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    return process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu_run")
    parser.add_argument("pieces", type=Path, help="the folder with the pieces and manifest.json")
    parser.add_argument("out", type=Path, help="where records and results go")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "kit-gpu-study")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.limit
    try:
        manifest = join(args.pieces, args.work)
    except Damaged as error:
        print(error)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / MANIFEST).write_text(json.dumps(manifest, indent=1))
    install(args.work)
    return 0 if run(args.work, args.out, manifest, end) else 1


if __name__ == "__main__":
    sys.exit(main())
