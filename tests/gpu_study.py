"""`make gpu-study`: a study of eight minutes of an H100 or H200, for a machine without network.

    python -m tests.gpu_study                here: packs .gpu-study, prints the command to run there
    python -m tests.gpu_study --publish OUT  here: publishes what came back, by the card's name

For a machine with one CUDA GPU, Python 3.12, torch and transformers: all other packages that
notebooks 01, 02, 04, 06 and 07 need, as wheels at the versions of requirements.lock; the embedder
and a model; in pieces of at most PIECE bytes with their hashes. There `tests.gpu_run` does all.
"""

import argparse
import json
import re
import shutil
import sys
import tarfile
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kit import paths
from kit.models import bundled
from kit.models.bundled import CODER, CODER_SMALL, MINILM, Bundled
from tests import gpu_pack, gpu_run

PACK = paths.ROOT / ".gpu-study"
PIECE = 60 * 2**20  # bytes of a piece
THERE = ("torch", "transformers")  # what the machine has, with all that these require
HERE = ("jupyterlab", "ipywidgets", "rocrate", "reasoning_gym")  # no notebook run there needs it
PLACE = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux"}
PLACE |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
PLACE |= {"platform_python_implementation": "CPython", "implementation_name": "cpython"}
PROFILE = "laptop"  # whose claims these stages decide; the values below are larger
# In the order in which they run until the time is used up: thousands of answers, most in 01 and 06.
STAGES: dict[str, dict[str, object]] = {
    "01": {"PROBLEMS": 240, "SAMPLES": 4, "BATCH_SIZE": 256},
    "06": {"PROBLEMS": '["school", 60]', "SAMPLES": 4, "BATCH": 256},
    "02": {"TEST": 120},
    "04": {},
    "07": {},
}


def required(names: list[str]) -> set[str]:
    """Packages that these require on the machine, by what is installed here; themselves too."""
    found, queue = set(), [Requirement(name) for name in names]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        try:
            further = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for text in further if name not in found or requirement.extras else ():
            child = Requirement(text)
            extras = ("", *requirement.extras)
            if not child.marker or any(child.marker.evaluate(PLACE | {"extra": e}) for e in extras):
                queue.append(child)
        found.add(name)
    return found


def lacking() -> list[str]:
    """Packages of requirements.lock that such a machine lacks."""
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    own = [
        name for name in project["dependencies"] if Requirement(name).name not in (*THERE, *HERE)
    ]
    return sorted(required(own) - required([*THERE]))


def pack(
    model: Bundled | None, names: list[str], stages: dict, profile: str, folder: Path = PACK
) -> list[Path]:
    """Pieces of a tar of the wheels of `names`, of `model` and of the embedder in `folder`, with a
    manifest of their hashes and of the `stages` to run; without `model` that of the profile."""
    own = {"KIT_MODEL": model.name} if model else {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu-") as work:
        whole, wheels = Path(work) / "pack.tar", Path(work) / "wheels"
        wheels.mkdir()
        gpu_pack.fetch(tuple(names), wheels)
        with tarfile.open(whole, "w") as archive:
            archive.add(wheels, "wheels")
            models = [(MINILM, MINILM.folder), (model or bundled.SMOLLM2, paths.MODELS)]
            for each, place in models:
                for file in bundled.fetch(each, place):
                    archive.add(file, f"cache/models/{file.relative_to(paths.MODELS)}")
        made = Path(work) / "pieces"
        made.mkdir()
        with whole.open("rb") as opened:
            while data := opened.read(PIECE):
                (made / f"piece.{len(list(made.iterdir())):03}").write_bytes(data)
        pieces = {file.name: gpu_run.sha256(file) for file in sorted(made.iterdir())}
        manifest = {"pieces": pieces, "profile": profile, "stages": stages, "environment": own}
        (made / gpu_run.MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return [folder / name for name in pieces]


def publish(out: Path, into: Path = paths.PUBLISHED_RUNS / "gpu-study") -> Path:
    """Put what `gpu_run` wrote to `out` together and publish it in `into` by the card's name."""
    from kit.pipeline import stages
    from kit.report import published

    profile = json.loads((out / gpu_run.MANIFEST).read_text())["profile"]
    with tempfile.TemporaryDirectory() as work:
        paths.OUTPUTS = Path(work)
        for file in sorted(file for file in out.rglob("*") if file.is_file()):
            target = Path(work) / profile / file.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            name, _, _ = target.name.partition(gpu_run.PART)
            with target.with_name(name).open("ab") as whole:
                whole.write(file.read_bytes())
        place = published.publish(profile, into)
    named = place.with_name(card(stages, place))
    shutil.rmtree(named, ignore_errors=True)
    return place.rename(named)


def card(stages, place: Path) -> str:
    """The GPU on which a published run was made, or else the processor, as a name of a folder."""
    book = next(iter(sorted(place.glob("notebooks/*.ipynb"))))
    hardware = json.loads(book.read_text())["metadata"]["kit"]["hardware"]
    name = hardware["gpus"][0]["name"] if hardware["gpus"] else hardware["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_study")
    parser.add_argument("--small", action="store_true", help="the model of 0.5B instead of 1.5B")
    parser.add_argument("--publish", type=Path, metavar="OUT", help="what came back")
    args = parser.parse_args(argv)
    if args.publish:
        print(publish(args.publish))
        return 0
    stages = STAGES | ({"06": STAGES["06"] | {"PROBLEMS": '["laptop", 84]'}} if args.small else {})
    pieces = pack(CODER_SMALL if args.small else CODER, lacking(), stages, PROFILE)
    total = sum(file.stat().st_size for file in pieces)
    print(f"{PACK.name} has {len(pieces)} pieces, {total / 1e6:.0f} MB, and {gpu_run.MANIFEST}.")
    print("Carry them, together or one by one, into one folder of the machine with the GPU; then,")
    print("at the root of this repository there:\n")
    print("python3 -m tests.gpu_run PIECES OUT\n")
    print("`python -m tests.gpu_study --publish OUT` publishes what came back in OUT.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
