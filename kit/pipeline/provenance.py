"""Provenance of a result: commit, lock, sources, hardware, versions.

Cheap on purpose (no torch import), so that a notebook can print it and the pipeline can
stamp it on every executed notebook. Also holds the two habits that make a file fit to hand
on: it is written whole or not at all, and it does not name the person or the machine.
Not a record of runs: measurements are in the store and in results/*.json.
"""

import contextlib
import getpass
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from kit.paths import ROOT, atomic

FINGERPRINT_MIME = "application/vnd.kit.fingerprint+json"  # {"name": ..., "value": ...}
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "math-verify", "sympy"),
    *("reasoning-gym", "lancedb", "pyarrow", "numpy", "scipy", "statsmodels", "pandas"),
    *("matplotlib", "papermill", "nbclient", "ipykernel"),
)
GIB = 2**30


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a half."""
    with atomic(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name survives a power cut too
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """`write_text` of sorted, indented JSON; a NaN is refused."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of one file, "absent" when there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


def files_hash(folder: Path, files: Iterable[Path]) -> str:
    """One SHA-256 over the names (relative to `folder`) and contents of several files."""
    lines = sorted(f"{file.relative_to(folder).as_posix()} {file_hash(file)}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def memory_limit_bytes() -> int:
    """RAM that this process may use: that of the machine, or of its container if less."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2, cgroup 1
        path = Path("/sys/fs/cgroup") / file
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def gpus() -> list[dict]:
    """Name, driver and memory of each NVIDIA GPU, empty where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=name,driver_version,memory.total"
    out = _output("nvidia-smi", query, "--format=csv,noheader,nounits") or ""
    rows = [line.split(", ") for line in out.splitlines() if line.count(", ") == 2]
    return [
        {"name": name, "driver": driver, "memory_mib": int(mib) if mib.isdigit() else None}
        for name, driver, mib in rows
    ]


def unusable_gpu() -> str:
    """Why torch cannot use the NVIDIA GPU of this machine, and what to do; "" where it can, where
    there is none, or where CUDA_VISIBLE_DEVICES hides it."""
    cards = gpus()
    has_gpu = cards or Path("/dev/nvidia0").exists()
    if not has_gpu or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    import torch  # 1.5 s, so only where a GPU is

    if torch.cuda.is_available():
        return ""
    name = "{name} (driver {driver})".format(**cards[0]) if cards else "An NVIDIA GPU"
    cuda = torch.version.cuda
    why = f"torch {torch.__version__} is built for CUDA {cuda}" if cuda else "torch has no CUDA"
    what = "update its driver" if cuda else "install a build of torch with CUDA"
    return (
        f"{name} is here, but {why} and cannot use it: {what}, or go on without the GPU by "
        f"`export CUDA_VISIBLE_DEVICES=`."
    )


def collect(root: Path = ROOT) -> dict:
    """Everything about code and machine that a table row should name. JSON-able."""
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return {
        "commit": commit or "unknown",
        "dirty": None if changes is None else bool(changes),
        "lock_sha256": file_hash(root / "requirements.lock"),
        "kit_sha256": files_hash(root, (root / "kit").rglob("*.py")),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "ram_gib": round(memory_limit_bytes() / GIB, 1),
            "gpus": gpus(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        },
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _output(*command: str) -> str | None:
    """The output of a command, None when it is missing, fails or hangs."""
    try:
        process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cores(count: int | str) -> str:
    """The number of cores in words: "1 core", "2 cores"."""
    return f"{count} core{'s' if str(count) != '1' else ''}"


def _cores() -> int:
    """Cores that this process may use, fewer than the machine has in many containers."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def fingerprints(notebook: dict) -> dict[str, str]:
    """The fingerprints that `kit.notebook.record_fingerprint` wrote in an executed notebook."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    entries = [output["data"][FINGERPRINT_MIME] for output in outputs
             if FINGERPRINT_MIME in output.get("data", {})]  # fmt: skip
    return {item["name"]: item["value"] for item in entries}


def as_markdown(stamp: dict) -> str:
    """The table that opens an executed notebook. `stamp` is metadata["kit"] of that notebook."""
    hardware, dirty = stamp["hardware"], stamp["dirty"]
    devices = [f"{g['name']} (driver {g['driver']})" for g in hardware["gpus"]] or ["no GPU"]
    state = {True: " with uncommitted changes", False: "", None: ""}[dirty]
    rows = {
        "stage, profile": f"{stamp['stage']}, {stamp['profile']}",
        "commit": f"`{stamp['commit']}`{state}",
        "lock": f"`{stamp['lock_sha256']}`",
        "kit source": f"`{stamp['kit_sha256']}`",
        "parameters": ", ".join(f"`{k}={v!r}`" for k, v in stamp["parameters"].items()),
        "model": stamp.get("why this model") or None,
        "seed": stamp["seed"],
        **{f"fingerprint of {k}": f"`{v}`" for k, v in stamp["fingerprints"].items()},
        "hardware": f"{hardware['cpu']}, {cores(hardware['cores'])}, {hardware['ram_gib']} GiB; "
        + "; ".join(devices),
        "threads": f"OMP_NUM_THREADS {hardware['omp_num_threads']}",
        "versions": ", ".join(f"{k} {v}" for k, v in stamp["versions"].items()),
        "wall time": f"{stamp['wall_seconds']:.1f} s",
        "peak memory": f"{stamp['peak_memory_bytes'] / GIB:.2f} GiB (kernel and its workers, RSS)",
        "started, finished": f"{stamp['started']}, {stamp['finished']}",
    }
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value is not None]
    return "\n".join(["**Provenance of this run**", "", "| what | value |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def scrubber(
    root: Path = ROOT,
    outputs: Path | None = None,
    home: Path | None = None,
    user: str | None = None,
    host: str | None = None,
) -> Callable[[str], str]:
    """A function that takes this machine's folders, user and host name out of a text.

    Names are replaced only where they read as names (a user inside an absolute path or
    before @, a host after @ or // or when it cannot be an English word), since a person
    called Max must not turn every `max` of a table into something else.
    """
    marks = {home or Path.home(): "~", outputs or root: "outputs", root: "."}
    marks |= {folder.resolve(): mark for folder, mark in marks.items()}
    inside_out = sorted(marks, key=lambda folder: -len(folder.parts))
    rules = [_folder_rule(folder, marks[folder]) for folder in inside_out if folder.parts[1:]]
    rules += _name_rules(user or getpass.getuser(), host or socket.gethostname())

    def scrub(text: str) -> str:
        for needle, pattern, mark in rules:
            if needle in text:
                text = pattern.sub(rf"\g<1>{mark}", text)
        return text

    return scrub


def _folder_rule(folder: Path, mark: str) -> tuple[str, re.Pattern, str]:
    before = r"(^|[^\w+/]|\x1b\[[\d;]*m|://)"  # a path starts here; colour codes end in a letter
    after = r"(?![\w-]|\.\w)"  # a folder kit is no prefix of kit2
    return str(folder), re.compile(before + re.escape(str(folder)) + after, re.MULTILINE), mark


def _name_rules(user: str, host: str) -> list[tuple[str, re.Pattern, str]]:
    name = re.escape(user)
    rules = [
        (user, re.compile(rf"(?<![\w.+@-])((?:/[\w.+@-]+)+/){name}(?![\w-])"), "user"),
        (f"{user}@", re.compile(rf"(?<![\w.-])(){name}(?=@)"), "user"),
    ]
    for label in sorted({host, host.split(".")[0]} - {"localhost"}, key=len, reverse=True):
        word = label.isalpha() or label.isdigit() or len(label) < 4
        before = "(@|://)" if word else r"(?<![\w.-])()"
        rules.append((label, re.compile(before + re.escape(label) + r"(?![\w-])"), "host"))
    return rules


def scrub_tree(value, scrub: Callable[[str], str]):
    """A copy of a notebook (or any JSON value) with every text scrubbed, pictures left alone."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, list):
        return [scrub_tree(item, scrub) for item in value]
    if isinstance(value, dict):
        return {key: item if _is_binary(key) else scrub_tree(item, scrub)
                for key, item in value.items()}  # fmt: skip
    return value


def _is_binary(mime: str) -> bool:
    """Base64 outputs: a stray match inside would spoil the picture."""
    return mime.startswith(("image/", "audio/", "video/", "application/pdf")) and "svg" not in mime
