"""The terminal's summary of time and verdicts of a run: before it starts, after each stage, and at
its end.

Prints what `kit.estimate` measures and what notebooks saved. Imports nothing heavy.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kit import estimate
from kit.paths import PUBLISHED_RUNS, ROOT, run_dir
from kit.pipeline.errors import read_json
from kit.pipeline.provenance import write_json
from kit.pipeline.run import clock, echo, short
from kit.pipeline.stages import LARGER, PREFLIGHT, Stage, read_profile

LARGEST = "workstation"  # the published size
SIZES = ("quick", "laptop", LARGEST)


def choose(profile: str) -> None:
    """Say and keep on which model a profile runs whose table [larger] leaves that to the machine,
    before its first run; MODEL decides otherwise. In a process of its own, see `estimate.measure`.
    """
    if LARGER not in read_profile(profile) or os.environ.get("KIT_MODEL"):
        return
    file = run_dir(profile) / "model.json"
    if file.is_file():
        echo(f"{short(file)} has the model of some notebooks: {read_json(file)['model'] or 'none'}")
        return
    command = [sys.executable, "-m", "kit", "choose-model", profile]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        echo("no model could be chosen: the notebooks run on theirs; MODEL=NAME names another")


def estimated(profile: str, todo: Sequence[Stage]) -> dict[str, float]:
    """Say what the stages that are to run take here and decide; seconds by stage, {} where none of
    them decodes or trains, or where nothing could be measured."""
    if not any(stage.name in estimate.WORK for stage in todo):
        return {}
    echo("measuring how fast this machine is ...")
    machine = estimate.measure(*dict.fromkeys([profile, *SIZES]))
    if not machine:
        echo("the time could not be estimated")
        return {}
    write_json(run_dir(profile) / "estimate.json", machine)
    speed, rows = machine["rates"], machine["profiles"][profile]
    total = longer(sum(rows[stage.name]["seconds"] for stage in todo))
    echo(f"{total} at {speed['decoded']:.0f} tokens a second decoded and "
        f"{speed['trained']:.0f} trained ({speed['dtype']}, {speed['device']})")  # fmt: skip
    for stage in todo:
        row = rows[stage.name]
        echo(f"  {stage.name:18} {clock(row['seconds']):>8}   {_decides(row)}".rstrip())
        for claim, n, power in row["weak"]:
            echo(f"      too small for {claim}: {power:.0f}% power at n = {n}")
    if speed["device"] == "cuda" and profile != LARGEST:
        echo(f"a GPU is here: PROFILE={LARGEST} is the published size, {_on_a_gpu()}")
    return {name: row["seconds"] for name, row in rows.items()}


def after(todo: Sequence[Stage], times: Mapping[str, float]) -> Callable[[Stage], None]:
    """What says, when a stage is done, the time since now and the verdicts that the stage left;
    those of notebook 07 are the table at the end."""
    began, total = time.monotonic(), sum(times.get(stage.name, 0) for stage in todo)

    def say_verdicts(stage: Stage) -> None:
        results = {}
        if stage.results_file.is_file() and not stage.judges:
            results = read_json(stage.results_file)
        rows = results.get("verdicts", [])
        of = f" of about {clock(total)}" if total else ""
        echo(f"      {clock(time.monotonic() - began)}{of}" + f", {len(rows)} claims:" * bool(rows))
        numbers = [row for row in rows if row["measured"]]
        for row in sorted(numbers, key=lambda row: not row["verdict"]):
            interval = f" [{row['interval'].replace(' to ', ', ')}]" if row["interval"] else ""
            word, on = row["verdict"] or row["on"], f" ({row['on']})" * bool(row["verdict"])
            echo(f"      {word:17} {row['claim']}: {row['measured']}{interval}, "
                f"published {row['published']}{on}")  # fmt: skip
        if len(numbers) < len(rows):
            echo(f"      {'not measured':17} {len(rows) - len(numbers)} that nothing here measures")

    return say_verdicts


def larger(profile: str) -> None:
    """Say what the larger profiles would take here and decide, as measured before this one ran."""
    file = run_dir(profile) / "estimate.json"
    estimates = read_json(file) if file.is_file() else {"profiles": {}}
    for size in [size for size in SIZES[1:] if size in estimates["profiles"] and size != profile]:
        rows = estimates["profiles"][size].values()
        duration = f"{longer(sum(row['seconds'] for row in rows))} here"
        if size == LARGEST:
            duration = (
                _on_a_gpu()
                if estimates["rates"]["device"] == "cuda"
                else f"{duration}, {_on_a_gpu()}"
            )
        counts = {key: sum(row[key] for row in rows) for key in ("decides", "all")}
        echo(f"PROFILE={size}: {duration}; {_decides(counts)}")


def saved_verdicts(profile: str) -> dict:
    """The results of notebook 07: `verdicts`, a row per claim, `headline`, and how many would hold
    `by_chance`; {} before it ran."""
    file = run_dir(profile) / "results" / "07_verdicts.json"
    return read_json(file) if file.is_file() else {}


def print_verdicts(results: Mapping) -> None:
    """The headline, the judged claims in full, the others counted; nothing where there are none."""
    verdicts = results.get("verdicts", [])
    if not verdicts:
        return
    from tabulate import tabulate

    columns = ["claim", "published", "measured", "on", "verdict", "reason"]
    judged_rows = [row for row in verdicts if row["measured"] and row["verdict"]]
    unmeasured = Counter(row["on"] for row in verdicts if row not in judged_rows)
    print()
    rows = [[row[column] for column in columns] for row in judged_rows]
    if rows:
        print(tabulate(rows, columns, maxcolwidths=[30, 14, 14, 14, 14, 40], disable_numparse=True))
    if unmeasured:
        print("Not measured here: " + ", ".join(f"{n} {on}" for on, n in unmeasured.most_common()))
    sentences = [*results.get("headline", []), results.get("by_chance", "")]
    print("\n" + "\n".join(["Verdicts:", *(f"  {line}" for line in sentences if line)]))


def print_reference(profile: str, published: Path = PUBLISHED_RUNS) -> None:
    """How this run differs from the published one of its profile, where there is one."""
    if not (published / profile).is_dir():
        return
    from kit.report import bundle
    from kit.report import published as reference

    runs = bundle.read(published / profile), bundle.read(run_dir(profile))
    print("\n" + "\n".join(reference.against(*runs)))


def print_paths(profile: str) -> None:
    """The paths of the report and the executed notebooks."""
    report = run_dir(profile) / "report.html"
    print()
    if report.is_file():
        print(f"Report:    {short(report)}")
    print(f"Notebooks: {short(run_dir(profile) / 'notebooks')}")


def longer(seconds: float) -> str:
    """about 6 minutes, about 3.5 hours, about 12 days, more than 100 days."""
    if seconds >= 100 * 86400:
        return "more than 100 days"
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.2g} {unit}"
    return "about a minute" if seconds < 90 else f"about {round(seconds / 60)} minutes"


def _decides(row: Mapping[str, int]) -> str:
    return f"decides {row['decides']} of {row['all']} claims" if row["all"] else ""


def _on_a_gpu() -> str:
    needs = read_profile(LARGEST).get(PREFLIGHT, {})
    if not {"hours", "gpu_memory_gb"} <= {*needs}:
        return "on a GPU"
    return f"about {needs['hours']:g} hours on a GPU of {needs['gpu_memory_gb']:g} GB"
