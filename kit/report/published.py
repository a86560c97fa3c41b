"""Published runs, which README.md and docs/results.md quote, and in what two runs differ.

They lie under outputs/published by profile. Whoever has run some stages publishes these alone,
since a whole profile takes hours: those that others published stay, and all verdicts are made
again from the records and measurements of both.

    python -m kit publish laptop             publish what has run of a profile, and renew both
    python -m kit publish laptop --again     renew what is published of it, see kit.report.renewal
"""

import io
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from kit import paths
from kit.paths import PUBLISHED_RUNS, ROOT, run_dir
from kit.pipeline.provenance import cores, write_text
from kit.report import bundle, crate, readme, renewal
from kit.report.bundle import RECORDS, VERDICTS, Run

BEGIN, END = (
    "<!-- published runs, made by kit.report.published: begin -->",
    "<!-- published runs: end -->",
)
RESULTS = ROOT / "docs" / "results.md"
KEPT = ("results/", "exhibits/", "notebooks/", "status/")
MOST = 8  # columns of a table in docs/results.md
MAIN = ["Every arm of the strategy study"]  # tables shown there instead of the first of a stage
HEADS = ["claim", "published", "measured", "on", "verdict", "command"]


def publish(profile: str, into: Path = PUBLISHED_RUNS) -> Path:
    """Take what has run of `profile` over into `into`/`profile`: the folder, whole or as it was.

    ValueError where nothing has run, see `bundle.write`.
    """
    new, place = bundle.read(bundle.write(profile)), into / profile
    _back(place)
    old = bundle.read(place) if place.is_dir() else Run({})
    files = {name: data for name, data in old.files.items()
             if not any(crate.of_stage(name, stage) for stage in new.results)}  # fmt: skip
    suffixes = (".html", ".failed.ipynb")
    files |= {name: data for name, data in new.files.items()
              if name.startswith(KEPT) and not name.endswith(suffixes)}  # fmt: skip
    frames = [run.all_records for run in (new, old) if RECORDS in run.files]
    keys = {key for results in Run(files).results.values() for key in results.get("keys", [])}
    records = pd.concat(frames).drop_duplicates("key").sort_values("key", ignore_index=True)
    buffer = io.BytesIO()
    records[records["key"].isin(keys)].to_parquet(buffer, index=False)
    files[RECORDS] = buffer.getvalue()
    with _replaced(place) as fresh:
        for name, data in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        renewal.judge(fresh)
    return place


def again(profile: str, into: Path = PUBLISHED_RUNS) -> list[str]:
    """Renew the published run of `profile` by `kit.report.renewal`: lines about what changed.

    ValueError where there is none.
    """
    place = into / profile
    _back(place)
    if not (place / VERDICTS).is_file():
        raise ValueError(f"{place} is no published run; `python -m kit publish {profile}` makes it")
    with _replaced(place) as fresh:
        shutil.copytree(place, fresh)
        old, changes = bundle.read(place), renewal.renew(fresh)
    parts = diff(old, bundle.read(place))
    heads = {"numbers": ["claim", "before", "now", "moved"], "verdicts": ["claim", "before", "now"]}
    grades = changes.grades["graded otherwise"].sum()
    lines = [f"{grades:,} of {len(old.all_records):,} answers are graded otherwise"]
    lines += [tabulate(changes.grades, [*changes.grades], showindex=False)] if grades else []
    for part, columns in heads.items():
        lines.append(f"{part} of claims: {len(parts[part])} differ")
        lines += [tabulate(parts[part], columns, disable_numparse=True)] if parts[part] else []
    lines += [f"reads otherwise: {name}" for name in changes.tables]
    return lines + [f"stays as it was: {name}" for name in changes.unchanged]


def _back(place: Path) -> None:
    """Put the former folder back where a kill fell between the two renames of `_replaced`."""
    former = place.with_name(f".{place.name}.former")
    if former.is_dir() and not place.is_dir():
        former.rename(place)


@contextmanager
def _replaced(place: Path) -> Iterator[Path]:
    """A folder to be made, which takes that of `place` once it is whole."""
    fresh, former = (place.with_name(f".{place.name}.{word}") for word in ("new", "former"))
    shutil.rmtree(fresh, ignore_errors=True)
    yield fresh
    shutil.rmtree(former, ignore_errors=True)
    if place.is_dir():
        place.rename(former)
    fresh.rename(place)
    shutil.rmtree(former, ignore_errors=True)


def place(name: str) -> Path:
    """The folder of a run by its name: a bundle or folder, what has run here of a profile,
    or else what is published of it."""
    local_run, published_run = paths.OUTPUTS / name, PUBLISHED_RUNS / name
    if Path(name).exists():
        return Path(name)
    if published_run.is_dir() and not [*local_run.glob("results/*.json")]:
        return published_run
    return run_dir(name)


def diff(first: Run, second: Run) -> dict[str, list[list[str]]]:
    """The differences of two runs: `numbers` of claims, `verdicts`, `environment`.

    A number moved beyond noise where the two 95% intervals, taken as normal and independent, differ
    by more than 1.96 standard errors of the difference.
    """
    numbers, words = [], []
    for claim in [claim for claim in first.verdicts if claim in second.verdicts]:
        pair = first.verdicts[claim], second.verdicts[claim]
        if pair[0]["verdict"] != pair[1]["verdict"]:
            words.append([claim, *(row["verdict"] or row.get("on", "") for row in pair)])
        if all(row["measured"] for row in pair) and pair[0]["measured"] != pair[1]["measured"]:
            numbers.append(
                [
                    claim,
                    *map(_value_text, pair),
                    "beyond noise" if _beyond_noise(*pair) else "within noise",
                ]
            )
    before, after = first.environment, second.environment
    changed = [
        [key, before.get(key, "absent"), after.get(key, "absent")]
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    return {"numbers": numbers, "verdicts": words, "environment": changed}


def compare(runs: Mapping[str, Run]) -> list[list[str]]:
    """A row for each claim that one of `runs`, by name, measured: the claim, and of each run what
    it measured, with its interval and verdict, or why it did not."""
    claims = dict.fromkeys(claim for run in runs.values() for claim, row in run.verdicts.items()
                           if row["measured"])  # fmt: skip
    return [
        [claim, *(_outcome(run.verdicts.get(claim)) for run in runs.values())] for claim in claims
    ]


def _outcome(row: dict | None) -> str:
    if row is None:
        return "no such claim"
    word = row["verdict"] or row.get("on", "")
    return f"{_value_text(row)}: {word}" if row["measured"] else word


def _value_text(row: dict) -> str:
    """The measured value with its interval."""
    interval = row["interval"].replace(" to ", ", ")
    return f"{row['measured']} [{interval}]" if interval else row["measured"]


def _beyond_noise(first: dict, second: dict) -> bool:
    at, error = [], 0.0
    for row in (first, second):
        at.append(float(row["measured"].split()[0]))
        if row["interval"]:
            low, high = (float(end) for end in row["interval"].split(" to "))
            error += ((high - low) / 2) ** 2  # in units of 1.96 standard errors
    return abs(at[0] - at[1]) > error**0.5


def against(published_run: Run, own_run: Run) -> list[str]:
    """How `own_run` differs from `published_run` in what both measured: lines."""
    differences = diff(published_run, own_run)
    common = [claim for claim, row in published_run.verdicts.items()
              if row["measured"] and own_run.verdicts.get(claim, {}).get("measured")]  # fmt: skip
    beyond = [row for row in differences["numbers"] if row[3] == "beyond noise"]
    changed = [row for row in differences["verdicts"] if row[0] in common]
    head = (f"Against the published run of this profile: of {len(common)} claims measured in both, "
            f"{len(beyond)} moved beyond noise, {len(changed)} verdicts differ")  # fmt: skip
    lines = [f"  {claim}: {before} there, {after} here"
             for claim, before, after, *_ in beyond + changed]  # fmt: skip
    dtype, own_dtype = (run.environment.get("dtype", "unknown") for run in (published_run, own_run))
    if dtype != own_dtype:
        lines.append(f"  the models were {dtype} there and {own_dtype} here, so tokens differ "
                     f"from the first rounding on; DTYPE={dtype} runs as published")  # fmt: skip
    return [head, *lines]


def text(published: Path = PUBLISHED_RUNS) -> str:
    """The text of docs/results.md on all published runs, in Markdown."""
    return "\n".join(
        _section(file.parent.parent) for file in sorted(published.glob(f"[!.]*/{VERDICTS}"))
    )


def _section(place: Path) -> str:
    from kit.analysis import claims
    from kit.report import exhibits

    run, claims_by_id = bundle.read(place), {claim.id: claim for claim in claims.load()}
    stages = [stage for stage in run.results if stage in claims.NOTEBOOKS]
    machine = run.environment
    lines = [f"Profile {place.name}: {', '.join(f'`{stage}`' for stage in stages)}, on "
             f"{machine.get('hardware: cpu')}, {cores(machine.get('hardware: cores'))}, torch "
             f"{machine.get('version of torch')}. Every claim that its records decide, with 95% "
             f"intervals ([its report]({_url(place)}/report.html), a page to download and open):",
             ""]  # fmt: skip
    lines[:0] = _renewed(run)
    rows = []
    for row in run.verdicts.values():
        if row["measured"]:
            claim = claims_by_id[row["claim"]]
            command = f"`make reproduce PROFILE={place.name} ONLY={claim.notebook[:2]}`"
            word = f"*{row['verdict']}*" if row["verdict"] else "–"
            rows.append(
                [claim.statement, row["published"], _value_text(row), row["on"], word, command]
            )
    counts = Counter(row["on"] for row in run.verdicts.values())
    summary = ", ".join(f"{n} {on}" for on, n in counts.most_common())
    lines += [*_markdown(HEADS, rows), "", f"All {len(run.verdicts)} claims: {summary}.", ""]
    for stage in stages:
        tables = [each for each in exhibits.load(place / "exhibits" / stage)
                  if isinstance(each, exhibits.Table)]  # fmt: skip
        main = [each for each in tables if each.caption in MAIN] or tables
        for table in main[:1]:
            url = f"{_url(place)}/exhibits/{stage}"
            more = ", its first columns" if len(table.columns) > MOST else ""
            lines += [f"`{stage}`: {table.caption}{more} ([all tables and figures]({url}))", ""]
            rows = [row[:MOST] for row in table.rows]
            lines += [*_markdown(table.columns[:MOST], rows), ""]
    return "\n".join(lines)


def _url(place: Path) -> str:
    """The folder of a published run, seen from docs/."""
    return f"../outputs/published/{place.name}"


def _renewed(run: Run) -> list[str]:
    """A sentence where grades, tables and verdicts are newer than the notebooks that lie beside."""
    marks = {name: stage["renewed"] for name, stage in run.results.items() if "renewed" in stage}
    if not marks:
        return []
    versions = sorted({mark["grade_version"] for mark in marks.values()})
    unchanged = [f"{name} (`{stage}`)" for stage, mark in marks.items() for name in mark["kept"]]
    return [
        f"**Made again from the stored texts**, by version {', '.join(map(str, versions))} of the "
        f"grader and the claims and rules of this kit: the grades, tables, figures and verdicts of "
        f"{', '.join(f'`{stage}`' for stage in marks)}. The executed notebooks beside them show "
        f"what the run itself printed, which may be another verdict; what was trained or retrieved "
        f"by the grades of that day is as it was, and so is: "
        f"{', '.join(unchanged) or 'nothing else'}.",
        "",
    ]


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def renewed(page: str, section: str) -> str:
    """The Markdown `page` with `section` between its two marks; ValueError where it lacks them."""
    head, begin, remainder = page.partition(BEGIN)
    _, end, tail = remainder.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md or docs/results.md lacks the lines {BEGIN} and {END}; "
                         f"put them back")  # fmt: skip
    return f"{head}{BEGIN}\n\n{section}\n{END}{tail}"


def pages(published: Path = PUBLISHED_RUNS) -> dict[Path, str]:
    """The generated part of each page that quotes published runs, by file."""
    return {ROOT / "README.md": readme.text(published), RESULTS: text(published)}


def renew() -> None:
    """Write what the published runs say into README.md and docs/results.md, and the figure."""
    for file, section in pages().items():
        write_text(file, renewed(file.read_text(encoding="utf-8"), section))
    readme.save_figure(ROOT / readme.FIGURE)
