"""The README's section on published runs: how many claims were measured on what, and a figure.

Every number is computed from outputs/published and data/claims.toml. `kit.report.published` writes
the text between two marks of README.md, and the figure to docs/findings.svg.
"""

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from kit.analysis import claims, plots, tables
from kit.analysis.verdicts import PLURAL, headline
from kit.paths import PUBLISHED_RUNS
from kit.report import bundle
from kit.report.bundle import VERDICTS, Run
from kit.report.exhibits import gathered, slug

FIGURE = Path("docs", "findings.svg")
STRATEGIES = ("02_strategies", "Retrieved strategies against each control")
DMS = ("03_dms", "Quality at equal live tokens")
FACTS = ("05_parametric", "Fetched against every other arm")
HOLDERS = ["plain", "wrong", "generic", "shared", "shared-bank", "rag", "shared-lora-ffn",
           "lora-ffn", "continued"]  # of facts, those that a run has  # fmt: skip


def text(published: Path = PUBLISHED_RUNS) -> str:
    """The counts of verdicts, in Markdown, and the figure with its alternative text."""
    folders = sorted(file.parent.parent for file in published.glob(f"[!.]*/{VERDICTS}"))
    lines = [line for place in folders for line in _measured(bundle.read(place), place.name)]
    image = f"![{figure(published).alt}]({FIGURE.as_posix()})"
    return "\n".join([*lines, "", image, ""])


def _measured(run: Run, profile: str) -> list[str]:
    """The headline of one run, and what of all claims it leaves open: Markdown."""
    audits = tables.audits(claims.load())
    rows = [row for row in run.verdicts.values() if row["claim"] in {*audits["claim"]}]
    sentences = headline(rows, audits, f"`{tables.models(run.all_records)}`, profile {profile}")
    counts = Counter(row["on"] for row in rows if not row["verdict"])
    others = ", ".join(
        f"{n} {PLURAL.get(on, on) if n > 1 else on}" for on, n in counts.most_common()
    )
    parts = [line.partition(": ") for line in sentences[:2]]
    ends = [f"**{start}:** {text}" for start, _, text in parts]
    ends += [f"**{sentences[2]}**", sentences[3], f"Not judged, of {len(rows)} claims: {others}."]
    return [f"- {line}" for line in ends]


def save_figure(file: Path, published: Path = PUBLISHED_RUNS) -> None:
    """`figure` as SVG, which carries its alternative text."""
    picture = figure(published)
    with matplotlib.rc_context(plots.STYLE):
        picture.savefig(file, metadata={"Date": None, "Description": picture.alt})


def figure(published: Path = PUBLISHED_RUNS) -> plots.Picture:
    """Three findings: KL by policy, fetched blocks and retrieved strategies against controls."""
    quality, facts, strategies = (table(published, *which) for which in (DMS, FACTS, STRATEGIES))
    facts = facts.set_index("control").reindex(HOLDERS).dropna(how="all").reset_index()
    strategies = strategies[strategies["problems"] == strategies["problems"].max()]
    with matplotlib.rc_context(plots.STYLE):
        picture = plots.Picture(figsize=(2 * plots.WIDTH, 3.4), layout="constrained")
        left, middle, right = picture.subplots(1, 3)
        groups = dict([*quality[quality["policy"] != "full"].groupby("policy", sort=False)])
        for series, name in zip(plots.places(groups), groups):
            rows = groups[name]
            plots.line(left, rows["kept_fraction"], [*rows["kl"]], series, name)
        left.set(title="KV-cache eviction", xlabel="kept fraction of the tokens", ylim=(0, None),
                 ylabel="KL to full attention, nats per token")  # fmt: skip
        left.legend(frameon=False)
        _controls(middle, facts, "Parametric memory")
        _controls(right, strategies, "Retrieved strategies")
    rivals = quality[~quality["policy"].isin(["full", "dms"])]
    picture.alt = (
        f"Left: KL to full attention at equal live tokens, in nats per token: {_lowest(quality)}; "
        f"of the rivals the lowest are {_lowest(rivals)}. Middle: points of accuracy that fetched "
        f"blocks gain over {_gains(facts)}. Right: points that retrieved strategies gain over "
        f"{_gains(strategies.head(1))}, the declared control, and over "
        f"{len(strategies) - 1} others."
    )
    return picture


def table(published: Path, stage: str, caption: str) -> pd.DataFrame:
    """A published exhibit, with (estimate, low, high) as tuples; ValueError where there is none."""
    files = sorted(published.glob(f"[!.]*/exhibits/{stage}/{slug(caption)}.csv"))
    if not files:
        raise ValueError(
            f"no published run of {stage} has the table {caption!r}, which the figure of README.md "
            f"shows; publish one, or change kit/report/readme.py"
        )
    return gathered(pd.read_csv(files[0]))


def _controls(axes, frame: pd.DataFrame, title: str) -> None:
    at, numbers = np.arange(len(frame))[::-1], np.array([*frame["difference"]])
    plots.intervals(axes, at, numbers, 0, "")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(at, [*frame["control"]], fontsize=8)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=f"{frame['arm'].iloc[0]} minus this arm, points")


def _lowest(quality: pd.DataFrame) -> str:
    """The policy of the lowest KL at each compression, with its KL."""
    rows = quality[quality["policy"] != "full"].assign(mean=lambda frame: frame["kl"].str[0])
    rows = rows.loc[rows.groupby("compression_x")["mean"].idxmin()]
    entries = [
        f"{row.policy} {row.mean:.2f} at {row.compression_x:g}x" for row in rows.itertuples()
    ]
    return ", ".join(entries)


def _gains(frame: pd.DataFrame) -> str:
    pairs = zip(frame["control"], frame["difference"])
    return ", ".join(f"{name} {value:z.1f} [{low:z.1f}, {high:z.1f}]"
                     for name, (value, low, high) in pairs)  # fmt: skip
