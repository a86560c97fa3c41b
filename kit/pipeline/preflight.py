"""Prints the downloads and needs of a profile before it starts."""

import shutil
from pathlib import Path

from kit.paths import NOTEBOOKS, OUTPUTS
from kit.pipeline import stages
from kit.pipeline.provenance import gpus, unusable_gpu
from kit.pipeline.stages import PREFLIGHT, UserError

GB = 10**9


def preflight(profile: str, *, force: bool = False, notebooks_dir: Path = NOTEBOOKS) -> None:
    """Print what a profile downloads and needs; refuse when the disk is too small.

    Reads the [preflight] table: downloads = [[name, GB], ...], disk_gb, gpu_memory_gb, hours,
    note. What already lies in the hub cache is not counted again, so that a resumed run passes.
    """
    needs = _needs(profile, notebooks_dir)
    if not needs:
        return
    from kit.hub import cache_dir

    cache = Path(cache_dir())
    cached = {name: min(gb, _cached_gb(cache, name)) for name, gb in needs["downloads"]}
    print(f"profile {profile} needs")
    for name, gb in needs["downloads"]:
        print(
            f"  download    {name}, {gb:g} GB" + f", {cached[name]:.1f} here" * (cached[name] > 0)
        )
    total, free = sum(gb for _, gb in needs["downloads"]), min(_free_gb(cache), _free_gb(OUTPUTS))
    missing = max(0.0, needs["disk_gb"] - sum(cached.values()))
    print(f"  in total    {total:g} GB, to {cache}")
    print(f"  disk        {needs['disk_gb']:g} GB, {missing:.1f} still to fill, {free:.1f} free")
    memory = [gpu["memory_mib"] * 2**20 / GB for gpu in gpus() if gpu["memory_mib"]]
    largest = f"the largest here has {max(memory):.0f} GB" if memory else "there is none here"
    print(f"  GPU memory  {needs['gpu_memory_gb']:g} GB; {largest}")
    print(f"  time        about {needs['hours']:g} hours")
    if needs["note"]:
        print(f"  {needs['note']}")
    if needs["gpu_memory_gb"] and (why := unusable_gpu()) and not force:
        raise UserError(why, 2)
    if free < missing:
        print(f"warning: {missing:.1f} GB still to fill and {free:.1f} GB free", flush=True)
        if not force:
            raise UserError("too little room on the disk: free some, or start all the same with "
                          "FORCE=1", 1)  # fmt: skip


def _needs(profile: str, notebooks_dir: Path) -> dict:
    """The checked [preflight] table with its defaults; empty where a profile has none."""
    table = stages.read_profile(profile, notebooks_dir).get(PREFLIGHT)
    if table is None:
        return {}
    numbers = {"disk_gb": 0, "gpu_memory_gb": 0, "hours": 0}
    entries = {"downloads": [], "note": "", **numbers}
    where = f"{profile}.toml, table {PREFLIGHT}"
    for key in table:
        if key not in entries:
            raise UserError(f"{where}: there is no key {key}; there are: {', '.join(entries)}")
    needs = entries | table
    if not all(isinstance(needs[key], int | float) for key in numbers):
        raise UserError(f"{where}: {', '.join(numbers)} must be numbers")
    for entry in needs["downloads"]:
        match entry:
            case [str(), int() | float()]:
                continue
        raise UserError(f"{where}: downloads must hold pairs [name, GB], not {entry!r}")
    return needs


def _cached_gb(cache: Path, name: str) -> float:
    """Gigabytes of a model or data set that the hub cache already holds."""
    label = name.replace("/", "--")
    folders = [cache / f"{kind}--{label}" for kind in ("models", "datasets")]
    files = [file for folder in folders for file in folder.rglob("*")]
    return (
        sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink()) / GB
    )


def _free_gb(folder: Path) -> float:
    """Free space on the disk where `folder` is or will be."""
    parent = next(place for place in [folder, *folder.parents] if place.exists())
    return shutil.disk_usage(parent).free / GB
