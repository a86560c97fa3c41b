"""The report: one self-contained HTML page about one profile's run.

Turns what notebook 07 has at hand into plain texts and pictures; the words and the looks of the
page are in report.html.j2. The page loads nothing, runs one script, which sorts and filters
(report.js), and names no person, host or folder of this machine; it links to papers and their code.
No statistics here: every number comes from `kit.analysis.tables` or the verdicts.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import jinja2
import pandas as pd
from markupsafe import Markup

from kit.analysis import plots, tables
from kit.analysis.claims import NOTEBOOKS
from kit.analysis.verdicts import CLASSES, NEEDS, RULES, UNMEASURED, VERDICTS, counted, headline
from kit.paths import ROOT, run_dir
from kit.pipeline import provenance, stages
from kit.pipeline.provenance import GIB
from kit.report import exhibits, guide, samples
from kit.report.exhibits import Table

TEMPLATE = "report.html.j2"
SCRIPT = Path(__file__).with_name("report.js")  # allowed by its hash alone
CONTROL, ARM = "plain", "format"  # the baseline's two prompts, in the order of the columns
ORDER = [*CLASSES, UNMEASURED]
PICTURE = re.compile(r'(src="data:[^"]*")')


def write(
    profile: str,
    records: Mapping[str, pd.DataFrame],
    verdicts: pd.DataFrame,
    audits: pd.DataFrame,
    results: dict[str, dict],
    *,
    folder: Path | None = None,
    made_by: dict | None = None,
    again: tuple[list[str], list[str]] | None = None,
) -> Path:
    """Write outputs/<profile>/report.html, whole or not at all, and return its path.

    `records` are those of each stage, by its name; `verdicts` is `measured_table` and `audits` is
    `tables.audits` of the same claims; `results` is `exhibits.load_results`.
    Of another run, by `kit.report.verify`: `folder` is where it lies, `made_by` its provenance;
    where it was judged again, `again` is what differs and what was taken as it is.
    """
    folder, tour = folder or run_dir(profile), stages.load_stages(stages.TOUR)
    stage_list = [replace(each, profile=profile, folder=folder) for each in tour]
    rows = _verdict_rows(verdicts, audits, stage_list, results)
    baseline = records.get("01_baseline", pd.DataFrame())
    baselines = [_baseline(name, of_model) for name, of_model in _by_model(baseline)]
    script = SCRIPT.read_text(encoding="utf-8")
    measured = [row for row in rows if row["measured"] and row["verdict"]]
    others = {}
    for row in rows:
        if row not in measured:
            others.setdefault(row["on"], []).append(row)
    page = _template().render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        filters={key: sorted({row[key] for row in rows}) for key in ("system", "on", "verdict")},
        glance=guide.glance(rows, results, baselines),
        samples=_samples(records, folder),
        profile=profile,
        again=again,
        elsewhere=made_by is not None,
        left=stages.incomplete([each for each in stage_list if _is_missing(each)]),
        total=len(rows),
        headline=headline(rows, audits, tables.models(pd.concat([baseline, *records.values()]))),
        classes=_legend_rows(CLASSES, rows, "on"),
        words=_legend_rows(VERDICTS, rows, "verdict"),
        measured=measured,
        others=others,
        baselines=baselines,
        reading=guide.READING,
        baseline_of=next(
            guide.introduction(each.notebook) for each in stage_list if each.number == "01"
        ),
        systems=_systems(folder, stage_list, rows),
        audit=_audit(audits),
        effects=_picture(plots.published_effects(audits)),
        facts=_facts(made_by or provenance.collect(), baseline, results),
        stages=_stages(stage_list, results),
        commands=[(stage.name, _command(stage)) for stage in stage_list],
    )
    path = folder / "report.html"
    provenance.write_text(path, _outside_pictures(page, provenance.scrubber(ROOT, folder.parent)))
    return path


def _template() -> jinja2.Template:
    """The template of the page; it escapes its inputs."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(TEMPLATE)


def _legend_rows(meanings: dict[str, str], rows: list[dict], key: str) -> list[tuple[str, str]]:
    """The words, with their meanings, that some row has under `key`."""
    return [(word, means) for word, means in meanings.items() if word in {r[key] for r in rows}]


def _outside_pictures(page: str, scrub: Callable[[str], str]) -> str:
    """`scrub` the page; a stray match inside base64 would spoil a picture."""
    parts = PICTURE.split(page)
    parts[::2] = map(scrub, parts[::2])
    return "".join(parts)


def _by_model(records: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [] if records.empty else [*records.groupby("model", sort=True)]


def _is_missing(stage: stages.Stage) -> bool:
    """Whether the page lacks something for it: it failed, or measures claims and has not run."""
    return stage.state == "failed" or (stage.state == "not run yet" and stage.name in NOTEBOOKS)


def _command(stage: stages.Stage) -> str:
    return f"make reproduce PROFILE={stage.profile} ONLY={stage.number}"


def _verdict_rows(
    verdicts: pd.DataFrame, audits: pd.DataFrame, stage_list: list, results: dict[str, dict]
) -> list[dict]:
    """Every claim with what a reader may ask about it, ordered by its verdict."""
    commands = {stage.name: _command(stage) for stage in stage_list}
    executed = {stage.name for stage in stage_list if stage.executed.is_file()}
    failures = {stage.name: f"{stage.name} failed: {stage.failure}" for stage in stage_list
              if stage.state == "failed"}  # fmt: skip
    about = audits[["claim", "statement", "source", "link", "grade", "rule", "notebook"]]
    rows = verdicts.merge(about, on="claim", validate="one_to_one").to_dict("records")
    for row in rows:
        row["word"] = row["verdict"] or row["on"]
        row["slug"] = row["word"].replace(" ", "-")
        if row["on"] == UNMEASURED:
            row["reason"] = failures.get(row["notebook"], row["reason"])
        row["sentence"] = RULES[row["rule"]]
        row["command"] = commands.get(row["notebook"])  # None for a notebook yet to be written
        row["n"] = tables.cell_text("n", row["n"])
        row["records"] = None  # where links to them would not resolve
        if row["measured"] and row["notebook"] in executed & results.keys():
            row["records"] = f"{len(results[row['notebook']].get('keys', [])):,}"
    words = [*VERDICTS, ""]
    return sorted(rows, key=lambda row: (_place(row["on"]), words.index(row["verdict"])))


def _place(on: str) -> int:
    """The rank of a class among the others; those that need a profile stand together."""
    return ORDER.index(on) if on in ORDER else list(CLASSES).index(NEEDS.format("workstation"))


def _baseline(model: str, records: pd.DataFrame) -> dict:
    """Texts, tables and the figure of one model."""
    present = {*records["arm"]}
    arms = [arm for arm in (CONTROL, ARM) if arm in present]
    arms += sorted(present.difference(arms))
    families = {arm: tables.by_family(records, arm) for arm in arms}
    by_arm = tables.arms(records).set_index("arm").loc[arms]
    control = by_arm.iloc[0]
    return {
        "name": _name(model),
        "arm": arms[0],
        "accuracy": dict(zip(("estimate", "low", "high"), control["accuracy"], strict=True)),
        "problems": int(control["problems"]),
        "samples": int(control["samples"]),
        "arms": _arms(_name(model), by_arm, tables.difference(records, ARM, CONTROL)),
        "figure": _picture(plots.accuracy_by_family(families)),
        "families": [_family_table(arm, table) for arm, table in families.items()],
    }


def _arms(model: str, by_arm: pd.DataFrame, change: pd.DataFrame) -> Table:
    """One column per arm, which a phone can show, and the paired difference beside them."""
    pairs = zip(change["measure"], change["difference"], strict=True)
    texts = {measure: tables.cell_text("difference", cell) for measure, cell in pairs}
    columns = ["measure", *by_arm.index] + [f"{ARM} − {CONTROL}, points"] * bool(texts)
    rows = []
    for name in by_arm.columns.drop("model"):
        cells = [tables.cell_text(name, cell) for cell in by_arm[name]]
        rows.append([tables.LABELS.get(name, name), *cells] + [texts.get(name, "")] * bool(texts))
    return Table(f"{model}: one column per prompt, 95% intervals in brackets", columns, rows)


def _family_table(arm: str, table: pd.DataFrame) -> Table:
    texts = tables.text(table.drop(columns="model"))
    caption = f"Prompt {arm}, by family and level, 95% intervals in brackets"
    return Table(caption, [*texts.columns], texts.to_numpy().tolist())


def _systems(folder: Path, stage_list: list[stages.Stage], rows: list[dict]) -> list[dict]:
    """The text and exhibits of each notebook but the baseline; of one that failed, why."""
    systems = []
    for stage in stage_list:
        contents = exhibits.load(folder / "exhibits" / stage.name)
        if (contents or stage.state == "failed") and stage.number != "01":
            figures = [each for each in contents if isinstance(each, exhibits.Figure)]
            stage_rows = [row for row in rows if row["notebook"] == stage.name]
            systems.append(guide.introduction(stage.notebook) | {
                "id": stage.name, "links": sorted({row["link"] for row in stage_rows}),
                "judged": counted(stage_rows) if stage_rows else "",
                "figures": [(each, plots.image(each.file, each.alt)) for each in figures],
                "tables": [each for each in contents if isinstance(each, Table)],
                "command": _command(stage), "failure": stage.failure,
            })  # fmt: skip
    return systems


def _samples(records: Mapping[str, pd.DataFrame], folder: Path) -> list[dict]:
    """Some answers, with the strategies in their prompts where the run kept its banks."""
    listings = [each for each in exhibits.load(folder / "exhibits" / "02_strategies")
               if each.caption == samples.BANKS]  # fmt: skip
    banks = pd.DataFrame(listings[0].rows, columns=listings[0].columns) if listings else None
    return samples.choose(records, banks)


def _audit(audits: pd.DataFrame) -> Table:
    """The published numbers whose counts are known."""
    subset = audits.dropna(subset=["low"])
    intervals = [*zip(subset["estimate"], subset["low"], subset["high"], strict=True)]
    sources = subset["source"] + " (" + subset["grade"] + ")"
    texts = tables.text(subset.assign(interval=intervals, source=sources))
    columns = ["claim", "published", "interval", "p", tables.LABELS["n_needed"], "reading"]
    rows = texts[[*columns, "source"]].to_numpy().tolist()
    columns[2] = "its 95% interval"
    caption = f"{len(subset)} published numbers with the 95% interval that their counts allow"
    return Table(caption, [*columns, "source"], rows, words=(0, 1, 5, 6))


def _stages(stage_list: list[stages.Stage], results: dict[str, dict]) -> Table:
    """Time and memory of each stage that has run."""
    rows = []
    for stage in stage_list:
        state, status = stage.state, stage.status()
        row = [stage.name, f"failed: {stage.failure}" if state == "failed" else state]
        row.append(f"{len(results.get(stage.name, {}).get('keys', [])):,}")
        if status and state == "done":  # else its status is that of the run before
            peak = status["peak_memory_bytes"] / GIB
            row += [f"{status['wall_seconds']:.1f} s", f"{peak:.2f} GiB", status["finished"]]
        rows.append(row + ["–"] * (6 - len(row)))
    columns = ["stage", "state", "records", "wall time", "peak memory", "finished (UTC)"]
    return Table("Time and memory per stage", columns, rows, words=(0, 1))


def _facts(stamp: dict, records: pd.DataFrame, results: dict[str, dict]) -> dict[str, str]:
    """The origin of the numbers: code, machine, models, problems."""
    hardware = stamp["hardware"]
    devices = [f"{gpu['name']} (driver {gpu['driver']})" for gpu in hardware["gpus"]]
    facts = {
        "commit": stamp["commit"] + (" with uncommitted changes" if stamp["dirty"] else ""),
        "lock": stamp["lock_sha256"],
        "kit source": stamp["kit_sha256"],
        "hardware": f"{hardware['cpu']}, {provenance.cores(hardware['cores'])}, "
        f"{hardware['ram_gib']} GiB; {'; '.join(devices) or 'no GPU'}",
        "system": stamp["system"],
        "versions": ", ".join(f"{name} {version}" for name, version in stamp["versions"].items()),
    }
    for name, of_model in _by_model(records):
        facts[f"weights of {_name(name)}"] = _values(of_model["weights_hash"])
    if not records.empty:
        for column in ("source", "seed", "temperature", "policy"):
            facts[{"source": "problem set"}.get(column, column)] = _values(records[column])
    for stage, result in results.items():
        if "problems" in result:
            facts[f"problems of {stage}"] = str(result["problems"])
    return facts


def _values(column: pd.Series) -> str:
    return ", ".join(map(str, sorted(column.unique())))


def _name(model: str) -> str:
    """A model's name; of a local folder only its own name."""
    for path in (PurePosixPath(model), PureWindowsPath(model)):
        if path.is_absolute():
            return path.name
    return model


def _picture(picture: plots.Picture) -> Markup:
    return Markup(plots.svg(picture))
