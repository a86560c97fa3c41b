"""The terminal: `python -m kit reproduce` and `python -m kit status`.

Turns flags into calls and results into plain text. `make reproduce` hands PROFILE, FROM, ONLY
and FORCE on as flags. Decides nothing about results: verdicts come from
results/07_verdicts.json as notebook 07 left them.
"""

import argparse
import errno
import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from kit import pipeline, stages
from kit.paths import NOTEBOOKS, OUTPUTS, run_dir
from kit.provenance import gpus
from kit.stages import PREFLIGHT, Refused

GB = 10**9
UNMEASURED = "not measured yet"
EXIT_CODES = """exit status:
  0    everything asked for is up to date
  1    a stage failed, the disk is full, or preflight found too little disk
  2    a flag, profile or notebook is wrong; the sentence says what to change
  3    another run works in the same outputs folder
  130  interrupted; the same command goes on from there"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status that --help documents."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit is like Ctrl-C
    try:
        profile = args.profile or default_profile()
        return args.command(profile, args)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return refusal.code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"the disk is full ({error}); free some space and run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def default_profile() -> str:
    """workstation where torch sees a CUDA GPU, otherwise laptop."""
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        import torch  # 1.5 s, so only where a driver is

        if torch.cuda.is_available():
            return "workstation"
    return "laptop"


def preflight(profile: str, *, force: bool = False, notebooks_dir: Path = NOTEBOOKS) -> None:
    """Print what a profile downloads and needs; refuse when the disk has too little room.

    Reads the [preflight] table: downloads = [[name, GB], ...], disk_gb, gpu_memory_gb, hours,
    note. What already lies in the hub cache is not counted again, so that a resumed run passes.
    """
    needs = _needs(profile, notebooks_dir)
    if not needs:
        return
    from kit.hub import cache_dir

    cache = Path(cache_dir())
    here = {name: min(gb, _cached_gb(cache, name)) for name, gb in needs["downloads"]}
    print(f"profile {profile} needs")
    for name, gb in needs["downloads"]:
        print(f"  download    {name}, {gb:g} GB" + f", {here[name]:.1f} here" * (here[name] > 0))
    total, room = sum(gb for _, gb in needs["downloads"]), min(_free_gb(cache), _free_gb(OUTPUTS))
    missing = max(0.0, needs["disk_gb"] - sum(here.values()))
    print(f"  in total    {total:g} GB, to {cache}")
    print(f"  disk        {needs['disk_gb']:g} GB, {missing:.1f} still to fill, {room:.1f} free")
    memory = [gpu["memory_mib"] * 2**20 / GB for gpu in gpus() if gpu["memory_mib"]]
    seen = f"the largest here has {max(memory):.0f} GB" if memory else "there is none here"
    print(f"  GPU memory  {needs['gpu_memory_gb']:g} GB; {seen}")
    print(f"  time        about {needs['hours']:g} hours")
    if needs["note"]:
        print(f"  {needs['note']}")
    if room < missing:
        print(f"warning: {missing:.1f} GB still to fill and {room:.1f} GB free", flush=True)
        if not force:
            raise Refused("too little room on the disk: free some, or start all the same with "
                          "FORCE=1", 1)  # fmt: skip


def _needs(profile: str, notebooks_dir: Path) -> dict:
    """The checked [preflight] table with its defaults; empty where a profile has none."""
    table = stages.read_profile(profile, notebooks_dir).get(PREFLIGHT)
    if table is None:
        return {}
    numbers = {"disk_gb": 0, "gpu_memory_gb": 0, "hours": 0}
    known = {"downloads": [], "note": "", **numbers}
    where = f"{profile}.toml, table {PREFLIGHT}"
    for key in table:
        if key not in known:
            raise Refused(f"{where}: there is no key {key}; there are: {', '.join(known)}")
    needs = known | table
    if not all(isinstance(needs[key], int | float) for key in numbers):
        raise Refused(f"{where}: {', '.join(numbers)} must be numbers")
    for entry in needs["downloads"]:
        match entry:
            case [str(), int() | float()]:
                continue
        raise Refused(f"{where}: downloads must hold pairs [name, GB], not {entry!r}")
    return needs


def _cached_gb(cache: Path, name: str) -> float:
    """What the hub cache already holds of a model or data set."""
    label = name.replace("/", "--")
    folders = [cache / f"{kind}--{label}" for kind in ("models", "datasets")]
    files = [file for folder in folders for file in folder.rglob("*")]
    return (
        sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink()) / GB
    )


def _free_gb(folder: Path) -> float:
    """Free space on the disk where `folder` is or will be."""
    there = next(place for place in [folder, *folder.parents] if place.exists())
    return shutil.disk_usage(there).free / GB


def _reproduce(profile: str, args: argparse.Namespace) -> int:
    print(f"profile {profile}", flush=True)
    every = stages.load_stages(profile)
    states = [stages.freshness(stage, every[:i])[0] for i, stage in enumerate(every)]
    if args.force or args.from_ or set(states) != {"fresh"}:
        preflight(profile, force=args.force)
    code = pipeline.run(profile, from_=args.from_, only=args.only, force=args.force)
    if code == 0:
        print_verdicts(profile)
        print_paths(profile)
    return code


def _status(profile: str, _: argparse.Namespace) -> int:
    from tabulate import tabulate

    rows, earlier = [], []
    for stage in stages.load_stages(profile):
        word, why = stages.freshness(stage, earlier)
        done = stage.status() or {}
        wall = pipeline.clock(done["wall_seconds"]) if done else ""
        rows.append([stage.name, word, why, wall, done.get("finished", "")])
        earlier.append(stage)
    print(f"profile {profile}")
    print(tabulate(rows, ["stage", "state", "why", "wall time", "finished (UTC)"]))
    return 0


def print_verdicts(profile: str) -> None:
    """The measured claims in full, the others counted, from what notebook 07 saved."""
    file = run_dir(profile) / "results" / "07_verdicts.json"
    if not file.is_file():
        return
    from tabulate import tabulate

    verdicts = json.loads(file.read_text(encoding="utf-8"))["verdicts"]
    columns = ["claim", "system", "published", "measured", "verdict", "reason"]
    measured = [row for row in verdicts if row["measured"] not in (None, "")]
    others = [row for row in verdicts if row["measured"] in (None, "")]
    counts = Counter(row["verdict"] or UNMEASURED for row in verdicts)
    print("\nVerdicts: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    rows = [[row[column] for column in columns] for row in measured]
    if rows:
        print(tabulate(rows, columns, maxcolwidths=[30, 16, 16, 16, 16, 36], disable_numparse=True))
    for verdict, n in Counter(row["verdict"] or UNMEASURED for row in others).most_common():
        alike = [row["system"] for row in others if (row["verdict"] or UNMEASURED) == verdict]
        each = ", ".join(f"{system} {k}" for system, k in sorted(Counter(alike).items()))
        print(f"{verdict}: {n} ({each})")


def print_paths(profile: str) -> None:
    """Where the report and the executed notebooks lie."""
    report = run_dir(profile) / "report.html"
    print()
    if report.is_file():
        print(f"Report:    {pipeline.short(report)}")
    print(f"Notebooks: {pipeline.short(run_dir(profile) / 'notebooks')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kit",
        description="What does memory buy a small language model, per byte?",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    reproduce = commands.add_parser(
        "reproduce",
        help="run every notebook whose result is not up to date, then print the verdicts",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reproduce.set_defaults(command=_reproduce)
    status = commands.add_parser("status", help="say which notebooks are up to date, and why not")
    status.set_defaults(command=_status)
    for command in (reproduce, status):
        command.add_argument("--profile", help="laptop, workstation, tour, ... (default: by GPU)")
    reproduce.add_argument("--from", dest="from_", metavar="NN", help="run again from here on")
    reproduce.add_argument("--only", metavar="NN", help="bring only this notebook up to date")
    reproduce.add_argument("--force", action="store_true", help="run again what is up to date")
    return parser
