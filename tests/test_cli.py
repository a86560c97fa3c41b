"""The terminal: exit statuses, one-sentence errors, verdicts, and a second run that is quick."""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import typer
from nbformat.v4 import new_code_cell, new_notebook

from kit import cli
from kit.models import load as models
from kit.pipeline import provenance
from kit.pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ENV = {key: value for key, value in os.environ.items() if key != "KIT_OUTPUTS"}
VERDICTS = [
    (
        "accuracy rises with memory",
        "ReasoningBank",
        "+8.3",
        "+1.2 [-2, 4]",
        "stand-in model",
        "undecided",
    ),
    ("eight times less cache", "DMS", "8x", None, "beyond this kit", ""),
    ("two times less cache", "DMS", "2x", None, "beyond this kit", ""),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project of one notebook, which saves verdicts; run once as a user would."""
    root = tmp_path_factory.mktemp("cli")
    shutil.copytree(ROOT / "kit", root / "kit", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks" / "profiles").mkdir(parents=True)
    keys = ("claim", "system", "published", "measured", "on", "verdict")
    rows = [dict(zip(keys, row, strict=True), reason="because") for row in VERDICTS]
    saved = {"verdicts": rows, "headline": ["Nothing yet."]}
    code = f"load_results(PROFILE)\nsave_results('07_verdicts', {saved}, PROFILE)"
    cells = [new_code_cell("PROFILE = 'tour'\nSECONDS = 0")]
    imports = "from kit.report.exhibits import load_results\n"
    imports += "from kit.notebook import save_results\n"
    cells.append(new_code_cell(imports + code))
    cells.append(new_code_cell("import time\ntime.sleep(SECONDS)"))
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / "07_verdicts.ipynb")
    (root / "notebooks/profiles/slow.toml").write_text('["07_verdicts"]\nSECONDS = 60\n')
    (root / "notebooks/profiles/broken.toml").write_text("= 1\n")
    return root


def kit(
    root: Path, *flags: str, python: tuple[str, ...] = (), env: dict | None = None
) -> subprocess.CompletedProcess:
    command, how = [sys.executable, *python, "-m", "kit", *flags], dict(cwd=root, env=env or ENV)
    return subprocess.run(command, check=False, capture_output=True, text=True, **how)


def test_reproduce_ends_with_verdicts_and_paths_and_repeats_nothing(project):
    first = kit(project, "reproduce", "--profile", "tour", "--from", "", "--only", "")
    assert (first.returncode, first.stderr) == (0, "")
    assert "[1/1] 07_verdicts  started" in first.stdout
    table = first.stdout[first.stdout.index("claim ") :]
    assert "+1.2 [-2, 4]" in table and "undecided" in table
    assert "Not measured here: 2 beyond this kit" in table
    assert "Verdicts:\n  Nothing yet." in table
    assert "Notebooks: outputs/tour/notebooks" in table
    assert "Report:" not in table

    (project / "outputs/tour/report.html").write_text("<p>")
    second = kit(project, "reproduce", "--profile", "tour", python=("-X", "importtime"))
    assert second.returncode == 0
    assert "up to date" in second.stdout
    assert "Report:    outputs/tour/report.html" in second.stdout
    imported = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines()}
    assert "kit.pipeline.run" in imported
    assert not imported & {"torch", "papermill", "nbformat", "lancedb", "numpy", "transformers"}

    status = kit(project, "status", "--profile", "tour")
    assert "07_verdicts" in status.stdout
    assert "fresh" in status.stdout
    assert "missing" in kit(project, "status", "--profile", "slow").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["reproduce", "--profile", "nope"], ["no profile 'nope'", "slow"]),
        (["reproduce", "--profile", "broken"], ["broken.toml is not valid TOML"]),
        (["status", "--profile", "broken"], ["broken.toml is not valid TOML"]),
        (["reproduce", "--profile", "tour", "--only", "03"], ["no stage 03", "07_verdicts"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(project, flags, words):
    done = kit(project, *flags)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_a_time_limit_is_like_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["status", "--profile", "nope"]) == 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupted_run_says_so_and_is_not_done(project):
    code = (  # a shell that starts pytest in the background has Python ignore Ctrl-C
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from kit.cli import main; sys.exit(main(['reproduce', '--profile', 'slow']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=project, env=ENV, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    results = project / "outputs/slow/results/07_verdicts.json"
    results.unlink(missing_ok=True)
    for _ in range(1200):
        if results.exists():  # so the sleeping cell is next
            break
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the kernel as well
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 130
    assert said.strip().splitlines()[-1].startswith("[1/1] 07_verdicts  interrupted")
    assert "missing" in kit(project, "status", "--profile", "slow").stdout
    assert not list((project / "outputs/slow/notebooks").iterdir())


@pytest.mark.parametrize("command", ["reproduce", "status"])
@pytest.mark.parametrize("place", ["outputs", "outputs/deep"])
def test_a_file_where_the_outputs_should_be_is_named(project, tmp_path, place, command):
    (tmp_path / "outputs").write_text("a file")
    env = ENV | {"KIT_OUTPUTS": str(tmp_path / place)}
    done = kit(project, command, "--profile", "slow", env=env)
    assert done.returncode == 2
    assert done.stderr == (f"{tmp_path / 'outputs'} is a file where a folder should be; move it "
                           "away, or set KIT_OUTPUTS to another folder\n")  # fmt: skip
    assert (tmp_path / "outputs").read_text() == "a file"


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 1, "the disk is full"),
        (errno.EDQUOT, 1, "the disk is full"),
        (errno.EROFS, 2, "outputs/tour cannot be written (Read-only file system); change that"),
        (errno.EACCES, 2, "outputs/tour cannot be written (Permission denied)"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, number, code, words):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "outputs/tour")

    monkeypatch.setattr(cli.pipeline, "run", refuse)
    monkeypatch.setattr(cli.stages, "load_stages", lambda _: [])
    assert cli.main(["reproduce", "--profile", "tour"]) == code
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_a_fault_of_the_kit_is_not_taken_for_one_of_the_system(monkeypatch):
    monkeypatch.setattr(cli.stages, "load_stages", lambda _: open("/nowhere"))
    with pytest.raises(FileNotFoundError):
        cli.main(["status", "--profile", "tour"])


def test_a_reader_that_has_read_enough_is_no_error(project):
    command = f"{sys.executable} -m kit status --profile tour | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=project, env=ENV, capture_output=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_run_goes_on_when_its_reader_has_gone(project):
    shutil.rmtree(project / "outputs/tour/status", ignore_errors=True)
    flags = "reproduce --profile tour"
    command = f"{sys.executable} -m kit {flags} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=project, env=ENV, capture_output=True)
    assert done.stderr == b""
    assert "fresh" in kit(project, "status", "--profile", "tour").stdout


def test_help_documents_the_exit_statuses(capsys):
    assert cli.main(["reproduce", "--help"]) == 0
    said = capsys.readouterr().out
    assert "Exit status" in said
    assert all(f"\n     {code} " in said for code in (0, 1, 2, 3, 130))


def test_a_wrong_option_is_one_sentence(capsys):
    for arguments, words in [
        ([], ["Missing command", "python -m kit --help"]),
        (["stats"], ["No such command 'stats'", "status"]),
        (["reproduce", "--nly", "02"], ["No such option: --nly", "reproduce --help"]),
        (["grpo", "folder", "--steps", "many"], ["--steps", "grpo --help"]),
        (["advise", "--memory", "2GB", "--context", "32k"], ["Missing option '--model'"]),
        (["grpo", "folder", "--recipe", "nope"], ["no recipe 'nope'", "open-rs-1"]),
    ]:
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert all(word in said for word in words) and len(said.splitlines()) == 1, said


def test_each_command_has_an_example_that_it_understands(subtests):
    commands = typer.main.get_command(cli.app).commands
    assert {"reproduce", "verify", "grpo", "train-evictor", "train-bank", "fetch"} <= {*commands}
    for name, command in commands.items():
        with subtests.test(name):
            example = re.search(r"^    python -m kit ((.+\\\n)*.+)$", command.epilog, re.M)
            first, *arguments = shlex.split(example[1].replace("\\\n", ""))
            assert first == name and command.make_context(name, arguments)


def test_the_page_on_the_command_line_is_what_the_commands_say():
    renew = ["-m", "typer", "kit.cli", "utils", "docs", "--name", "python -m kit"]
    page = subprocess.run([sys.executable, *renew], cwd=ROOT, capture_output=True, text=True)
    stale = f"stale: run `python {shlex.join(renew)} --output docs/cli.md`"
    assert page.stdout.strip() == (ROOT / "docs" / "cli.md").read_text().strip(), stale


def test_the_model_of_the_command_line_is_the_bundled_one():
    assert cli.BUNDLED == models.BUNDLED


def test_the_default_profile_is_quick_with_a_gpu_and_without(monkeypatch):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert cli.default_profile() == "quick"
    card = {"name": "NVIDIA A40", "driver": "535.1", "memory_mib": 46_000}
    monkeypatch.setattr(provenance, "gpus", lambda: [card])
    assert cli.default_profile() == "quick"


@pytest.mark.parametrize(
    ("cuda", "words"),
    [("13.0", "is built for CUDA 13.0 and cannot use it: update its driver, or go on without"),
     (None, "torch has no CUDA and cannot use it: install a build of torch with CUDA, or")],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch, capsys, needs, cuda, words):
    unused = SimpleNamespace(is_available=lambda: False)
    version = SimpleNamespace(cuda=cuda)
    torch = SimpleNamespace(cuda=unused, version=version, __version__="2.13.0")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    card = {"name": "NVIDIA A40", "driver": "535.1", "memory_mib": 46_000}
    monkeypatch.setattr(provenance, "gpus", lambda: [card])
    assert cli.main(["status"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("NVIDIA A40 (driver 535.1) is here, but torch") and words in said
    assert len(said.splitlines()) == 1
    with pytest.raises(UserError, match="cannot use it"):
        cli.preflight("big", notebooks_dir=needs(PREFLIGHT.format(disk=0.001)))
    unused.is_available = lambda: True
    assert provenance.unusable_gpu() == ""
    unused.is_available = lambda: False
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert provenance.unusable_gpu() == "", "hidden on purpose"


PREFLIGHT = """[preflight]
downloads = [["Qwen/Qwen3-1.7B", 4.1], ["org/data", 0.5]]
disk_gb = {disk}
gpu_memory_gb = 16
hours = 3.5
note = "thinking is on"
"""


@pytest.fixture
def needs(tmp_path, monkeypatch):
    """Write a [preflight] table and return the folder to look in."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "profiles").mkdir()

    def write(text: str) -> Path:
        (tmp_path / "profiles" / "big.toml").write_text(text)
        return tmp_path

    return write


def test_preflight_lists_what_a_profile_needs(needs, capsys):
    cli.preflight("big", notebooks_dir=needs(PREFLIGHT.format(disk=0.001)))
    said = capsys.readouterr().out
    for text in ("Qwen/Qwen3-1.7B, 4.1 GB", "4.6 GB, to", "16 GB", "3.5 hours", "thinking is on"):
        assert text in said
    assert "warning" not in said


def test_preflight_refuses_a_full_disk_unless_forced(needs, capsys):
    folder = needs(PREFLIGHT.format(disk=10**9))
    with pytest.raises(UserError, match="FORCE=1") as refusal:
        cli.preflight("big", notebooks_dir=folder)
    assert refusal.value.code == 1
    cli.preflight("big", force=True, notebooks_dir=folder)
    assert capsys.readouterr().out.count("warning") == 2


def test_preflight_counts_what_is_already_downloaded(needs, capsys, tmp_path):
    blob = tmp_path / "hub/models--Qwen--Qwen3-1.7B/blobs/abc"
    blob.parent.mkdir(parents=True)
    with open(blob, "wb") as file:
        file.truncate(3 * 10**9)  # sparse
    snapshot = tmp_path / "hub/models--Qwen--Qwen3-1.7B/snapshots/main/model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(blob)
    cli.preflight("big", force=True, notebooks_dir=needs(PREFLIGHT.format(disk=10)))
    said = capsys.readouterr().out
    assert "Qwen/Qwen3-1.7B, 4.1 GB, 3.0 here" in said
    assert "10 GB, 7.0 still to fill" in said


@pytest.mark.parametrize(
    ("text", "word"),
    [("disk = 3", "disk"), ("hours = 'two'", "hours"), ("downloads = [['x']]", "name, GB")],
)
def test_a_wrong_preflight_table_is_refused(needs, text, word):
    with pytest.raises(UserError, match=word) as refusal:
        cli.preflight("big", notebooks_dir=needs(f"[preflight]\n{text}\n"))
    assert "big.toml" in str(refusal.value)


def test_a_profile_without_needs_prints_none(needs, capsys):
    cli.preflight("big", notebooks_dir=needs(""))
    assert capsys.readouterr().out == ""
