"""Functions that only notebooks need: show a function, print where we are, hand results on.

A notebook records the fingerprints of what it read (`record_fingerprint`) and saves the
numbers that later notebooks, the verdicts and the report use (`save_results`); the pipeline
picks both up. Nothing here computes a result.
"""

import inspect
import time
from collections.abc import Callable, Mapping

import pandas as pd

from kit.analysis.plots import Picture
from kit.paths import run_dir
from kit.pipeline import declared
from kit.pipeline.provenance import FINGERPRINT_MIME, collect, cores, write_json
from kit.report import exhibits


def show(function: Callable) -> None:
    """Display the source of a kit function, highlighted where the front end can."""
    from IPython.display import display

    display(highlighted(function), raw=True)


def highlighted(function: Callable) -> dict[str, str]:
    """The source of a function by MIME type: as HTML and as it stands."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    source = inspect.getsource(function)
    formatter = HtmlFormatter(noclasses=True, prestyles="font-family: monospace")
    html = highlight(source, PythonLexer(), formatter)
    return {"text/html": html, "text/plain": source}


def banner() -> None:
    """Print one line saying which code runs on what. Differs between machines."""
    stamp = collect()
    suffix = " with uncommitted changes" if stamp["dirty"] else ""
    packages = [f"{name} {stamp['versions'].get(name, 'absent')}"
                for name in ("python", "torch", "transformers")]  # fmt: skip
    devices = [gpu["name"] for gpu in stamp["hardware"]["gpus"]] or [stamp["hardware"]["cpu"]]
    size = f"{cores(stamp['hardware']['cores'])}, {stamp['hardware']['ram_gib']} GiB"
    print(f"commit {stamp['commit'][:10]}{suffix} | {', '.join(packages)} | {devices[0]}, {size}")


def follow(total: int, draw: Callable[[list[dict]], object], every: int = 5) -> Callable:
    """A `report` for a training of `total` steps: a line of progress, and every few steps the
    figure that `draw` makes of the steps so far, each redrawn in its place."""
    from IPython.display import DisplayHandle

    rows, began, bar, figure = [], time.perf_counter(), DisplayHandle(), DisplayHandle()

    def report(row: dict) -> None:
        rows.append(row)
        seconds = (time.perf_counter() - began) / len(rows)
        filled = 20 * row["step"] // total
        line = f"{'█' * filled}{'░' * (20 - filled)} step {row['step']} of {total}, "
        line += f"{seconds:.1f} s each, {seconds * (total - row['step']):.0f} s left"
        if len(rows) == 1:
            bar.display({"text/plain": line}, raw=True)
            figure.display(draw(rows))
        bar.update({"text/plain": line}, raw=True)
        if row["step"] % every == 0 or row["step"] == total:
            figure.update(draw(rows))

    return report


def record_fingerprint(name: str, value: str) -> None:
    """Say which model or data this run used; the pipeline puts it into the provenance."""
    from IPython.display import display

    mark = {"name": name, "value": value}
    display({FINGERPRINT_MIME: mark, "text/plain": f"{name}: {value}"}, raw=True)


def record_model(model) -> None:
    """Say which weights this run used, and in which dtype. `model` is a kit.models.load.Model."""
    record_fingerprint("model", f"{model.name} {model.weights_hash} {model.dtype}")
    record_fingerprint("dtype", model.dtype_name)


def save_results(
    stage: str,
    results: dict,
    profile: str,
    tables: Mapping[str, pd.DataFrame] | None = None,
    figures: Mapping[str, Picture] | None = None,
    verdicts: pd.DataFrame | None = None,
) -> None:
    """Write the numbers of one notebook to results/<stage>.json, whole or not at all, and its key
    tables and figures, by caption, to exhibits/<stage>; with them `verdicts`, a
    `measured_table`, for the terminal.

    `stage` is the notebook's name without .ipynb. Floats keep 12 significant digits; a NaN
    or an infinity (the mean of nothing) becomes null. Unserialisable values raise TypeError.
    """
    if verdicts is not None:
        results = results | {"verdicts": verdicts.drop(columns="n").to_dict("records")}
    if claimed := declared.first(run_dir(profile), stage):
        results = results | {"declared": claimed}
    exhibits.save(run_dir(profile) / "exhibits" / stage, tables or {}, figures or {})
    write_json(run_dir(profile) / "results" / f"{stage}.json", exhibits.plain(results, stage))
