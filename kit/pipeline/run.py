"""Run the notebooks in order: skip what is fresh, stamp what ran, stop at a failure or go on.

`run` is `make reproduce`. Each stage goes through `kit.pipeline.kernel` into
outputs/<profile>/notebooks/, opens with its provenance, and counts as done only once its
status file stands; killed at any instant, the next run repeats that stage and no other.
What makes a stage fresh is decided in `kit.pipeline.stages`.
"""

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kit.paths import NOTEBOOKS, OUTPUTS
from kit.pipeline import declared, provenance
from kit.pipeline.errors import FULL, KNOWN_ERRORS, UserError, file_in_the_way, read_json
from kit.pipeline.provenance import GIB
from kit.pipeline.stages import (
    LARGER,
    TOUR,
    Stage,
    freshness,
    inputs,
    load_stages,
    read_profile,
    select,
    store_files,
    with_values,
)  # fmt: skip
from kit.schema import digest

SOURCE_LINES = 5  # of a failing cell
QUIET, QUIET_NEW_CELL = 30, 10  # seconds between progress lines where no terminal is
FAILED = 1  # exit status: a stage failed
WRITTEN = ("notebooks", "status", "store", "results", "exhibits")  # folders of a run
LOCKED = 3  # exit status: another run works in the same folder


def run(
    profile: str,
    *,
    notebooks_dir: Path = NOTEBOOKS,
    outputs_dir: Path = OUTPUTS,
    from_: str | None = None,
    only: str | None = None,
    force: bool = False,
    keep_going: bool = False,
    values: Mapping[str, str] | None = None,
    start: Callable[[list[Stage], list[Stage]], tuple[Mapping, Callable]] = (
        lambda queue, todo: ({}, lambda stage: None)
    ),
) -> int:
    """Bring the stages of a profile up to date and return the exit status.

    0 when all asked for is fresh, 1 when a stage failed, 130 after Ctrl-C. With `keep_going` the
    stages after a failed one run too: they stand alone, but for the one that judges what there is
    (`Stage.judges`). `values` are values of parameters for this run alone, see
    `stages.with_values`; the next run without them finds these stages stale. `start` is called
    once, with the chosen stages and those of them that are to run, and returns what a stage may
    take, in seconds by name, and a function to call with each stage that is done, and where `only`
    some are asked for also if it was. Raises UserError for what the caller must change (profile,
    stage, a second run), OSError where the disk is full or a folder cannot be written.
    """
    stages, chosen, why = _select_stages(
        profile, notebooks_dir.resolve(), outputs_dir.resolve(), from_, only, force, values or {}
    )
    failed = []
    with _alone(outputs_dir.resolve() / profile) as folder:
        _refuse_unwritable(folder)
        todo = [stage for stage in chosen if why(stage)]
        expected, after = start(chosen, todo)
        for stage in chosen:
            earlier = stages[: stages.index(stage)]
            label = f"[{stages.index(stage) + 1}/{len(stages)}] {stage.name}"
            if fresh := not why(stage):  # again: one that ran since changes what 07 reads
                echo(f"{label}  up to date")
            elif code := _run_stage(stage, earlier, label, expected.get(stage.name)):
                failed.append(stage.name)
                if code != FAILED or not keep_going:
                    return code
                continue
            if only or not fresh:
                after(stage)
    if failed:
        echo(f"failed: {', '.join(failed)}; the others went on without")
    return FAILED if failed else 0


def plan(
    profile: str,
    *,
    notebooks_dir: Path = NOTEBOOKS,
    outputs_dir: Path = OUTPUTS,
    from_: str | None = None,
    only: str | None = None,
    force: bool = False,
    values: Mapping[str, str] | None = None,
) -> list[tuple[Stage, str]]:
    """The stages that `run` would look at, with why it would run them, "" where they are up to
    date. Writes nothing; UserError as there."""
    _, chosen, why = _select_stages(
        profile, notebooks_dir.resolve(), outputs_dir.resolve(), from_, only, force, values or {}
    )
    planned: list[tuple[Stage, str]] = []
    for stage in chosen:
        after = stage.judges and any(reason for _, reason in planned)
        planned.append((stage, why(stage) or "an earlier stage runs" * after))
    return planned


def _check_model(model: str, profile: str, notebooks_dir: Path) -> None:
    """Refuse a MODEL that no notebook would read, or that no bundled model has for its name."""
    from kit.models.bundled import MODELS  # its imports take a second

    if LARGER not in read_profile(profile, notebooks_dir):
        raise UserError(f"MODEL is for profiles with a table [{LARGER}], which {profile} has not; "
                      f"write the model into a profile of your own")  # fmt: skip
    if model.startswith("bundled:") and model not in MODELS:
        raise UserError(f"MODEL is {model!r}; the kit bundles {', '.join(MODELS)}")


def _select_stages(
    profile: str, notebooks_dir: Path, outputs_dir: Path, from_, only, force, values
) -> tuple[list[Stage], list[Stage], Callable[[Stage], str]]:
    """All stages, the requested ones, and a function: why a stage is to run, "" if it is not."""
    stages = load_stages(profile, notebooks_dir, outputs_dir)
    if model := os.environ.get("KIT_MODEL"):
        _check_model(model, profile, notebooks_dir)
    stages = with_values(stages, select(stages, from_, only), values)
    chosen = select(stages, from_, only)
    forced = chosen if force else chosen[:1] if from_ else []

    def why(stage: Stage) -> str:
        word, reason = freshness(stage, stages[: stages.index(stage)])
        return "asked for again" if stage in forced else "" if word == "fresh" else reason

    return stages, chosen, why


def _refuse_unwritable(folder: Path) -> None:
    """UserError or OSError for what stands in the way of a run, told before its hours."""
    for name in WRITTEN:
        if refusal := file_in_the_way(folder / name):
            raise refusal
        if (folder / name).exists() and not os.access(folder / name, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / name))


def _run_stage(
    stage: Stage, earlier: list[Stage], label: str, expected: float | None = None
) -> int:
    """Exit status of one stage; says on the terminal how it goes and how it ended."""
    status = stage.status()
    line = Line(label, len(stage.cells), status["wall_seconds"] if status else expected)
    try:
        return _execute(stage, earlier, line)
    except KeyboardInterrupt:
        stage.running.unlink(missing_ok=True)
        line.end("interrupted; what it stored is kept, and the same command goes on from here")
        return 130
    except OSError:
        line.end("stopped")
        raise


def _execute(stage: Stage, earlier: list[Stage], line: "Line") -> int:
    from kit.pipeline import kernel  # papermill: 1.5 s that a run with nothing to do saves

    before, started = inputs(stage, earlier), _now()
    declared.first(stage.folder, stage.name)
    for file in (stage.executed, stage.status_file):  # what cannot be is told before the hours
        file.parent.mkdir(parents=True, exist_ok=True)
    env = {"KIT_OUTPUTS": str(stage.folder.parent)}
    overrides = stage.overrides
    outcome = kernel.execute(stage.notebook, stage.running, overrides, stage.root, env, line.tick)
    stamp = provenance.collect(stage.root) | {
        "stage": stage.name,
        "profile": stage.profile,
        "parameters": stage.parameters,
        "why this model": stage.why,
        "seed": stage.parameters.get("SEED"),
        "wall_seconds": round(outcome.seconds, 2),
        "peak_memory_bytes": outcome.peak_bytes,
        "started": started,
        "finished": _now(),
        "failure": outcome.problem,
    }
    _write_notebook(stage, stamp)
    if outcome.problem:
        line.end("failed")
        echo(_failure(stage, outcome))
        return FAILED
    _write_status(stage, stamp, before)
    stage.failed.unlink(missing_ok=True)
    peak = f"{outcome.peak_bytes / GIB:.1f} GiB"
    line.end(f"done in {clock(outcome.seconds)}, peak memory {peak}")
    return 0


def _write_notebook(stage: Stage, stamp: dict) -> None:
    """Stamp and scrub what papermill left; whole or failed decides the name."""
    import nbformat

    notebook = nbformat.read(stage.running, as_version=4)
    stamp["fingerprints"] = provenance.fingerprints(notebook)
    scrub = provenance.scrubber(stage.root, stage.folder.parent)
    clean = nbformat.from_dict(provenance.scrub_tree(notebook, scrub))
    clean.metadata["kit"] = provenance.scrub_tree(stamp, scrub)
    top = nbformat.v4.new_markdown_cell(scrub(provenance.as_markdown(stamp)))
    top.metadata["tags"] = ["provenance"]
    clean.cells.insert(0, top)
    target = stage.failed if stamp["failure"] else stage.executed
    provenance.write_text(target, nbformat.writes(clean))
    stage.running.unlink()


def _write_status(stage: Stage, stamp: dict, before: dict[str, str]) -> None:
    """From here on the stage counts as done."""
    status = {
        "ok": True,
        "fingerprint": digest(before),
        "inputs": before,
        "notebook_sha256": provenance.file_hash(stage.executed),
        "results_sha256": provenance.file_hash(stage.results_file),
        "store": store_files(stage),
    }
    keys = ("stage", "wall_seconds", "peak_memory_bytes", "started", "finished")
    provenance.write_json(stage.status_file, status | {key: stamp[key] for key in keys})


def _failure(stage: Stage, outcome) -> str:
    """The failure, its place, and how to continue. `outcome` is a kit.pipeline.kernel.Outcome."""
    lines = [f"{stage.name}: {outcome.problem}"]
    if outcome.killed:
        where = "its parameters cell" if stage.profile == TOUR else f"{stage.profile}.toml"
        sizes = [name for name in stage.parameters if "BATCH" in name] or ["the sizes"]
        most = f"{provenance.memory_limit_bytes() / GIB:.1f} GiB"
        lines[0] += (f": peak {outcome.peak_bytes / GIB:.1f} GiB of {most}; "
                     f"lower {' or '.join(sizes)} in {where}")  # fmt: skip
    if any(os.strerror(number) in outcome.problem for number in FULL):
        lines.append("The disk is full: free some space first.")
    elif not any(f" raised {name}: " in outcome.problem for name in KNOWN_ERRORS):
        source = outcome.source.strip().splitlines()
        excerpt = source[:SOURCE_LINES] + ["..."] * (len(source) > SOURCE_LINES)
        lines += [f"cell {outcome.cell} of {len(stage.cells)} in {stage.notebook.name}:"]
        lines += [f"    {text}" for text in excerpt]
        lines += [outcome.detail] if outcome.detail else []
    lines.append(f"As far as it came: {short(stage.failed)}")
    lines.append(f"Then go on with: make reproduce PROFILE={stage.profile} FROM={stage.number}")
    return "\n".join(lines)


class Line:
    """The progress of one stage: one line kept up to date, or a few where no terminal is."""

    def __init__(self, label: str, cells: int, last_seconds: float | None):
        self.label, self.cells, self.last_seconds = label, cells, last_seconds
        self.began = self.printed = time.monotonic()
        self.cell = 0
        self.terminal = sys.stdout.isatty()
        if not self.terminal:
            before = f" (about {clock(last_seconds)})" if last_seconds else ""
            echo(f"{label}  started{before}")

    def tick(self, cell: int) -> None:
        """Show that `cell` runs. Called several times a second from another thread."""
        now = time.monotonic()
        text = f"{self.label}  cell {cell}/{self.cells}  {clock(now - self.began)}"
        remaining = (self.last_seconds or 0) - (now - self.began)
        text += f", about {clock(remaining)} left" if remaining > 0 else ""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            echo(f"\r{text[:width]}\x1b[K", end="")
        elif now - self.printed >= (QUIET if cell == self.cell else QUIET_NEW_CELL):
            echo(text)
            self.printed, self.cell = now, cell

    def end(self, text: str) -> None:
        """The last word on this stage."""
        erase = "\r\x1b[K" if self.terminal else ""
        echo(f"{erase}{self.label}  {text}")


def echo(text: str, end: str = "\n") -> None:
    """Print at once. A run goes on when who read along has gone (`| head`)."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def clock(seconds: float) -> str:
    """0:07, 12:30, 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Hold the lock of one outputs folder; the system drops it when this process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"another run (process {file.read()}) works in {short(folder)}; "
                          "wait for it or stop it", LOCKED) from error  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield folder


def running(stage: Stage) -> str:
    """ "cell 15 of 40" while a run works on this stage, "" otherwise."""
    if not stage.running.is_file():
        return ""
    with open(stage.folder / "run.lock", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return ""  # what a killed run left
        except BlockingIOError:
            pass
    try:
        cells = [cell["metadata"] for cell in read_json(stage.running)["cells"]]
    except (UserError, FileNotFoundError):  # just being written, or just done
        return "a cell"
    own = [cell for cell in cells if "injected-parameters" not in cell.get("tags", [])]
    has_started = [cell.get("papermill", {}).get("status") != "pending" for cell in own]
    return f"cell {sum(has_started)} of {len(own)}"


def short(path: Path) -> str:
    """A path as a person at the terminal would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
