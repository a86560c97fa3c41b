"""LaTeX of a run: every number by its name with its source, and a minimal paper that uses them.

outputs/<profile>/paper/ has macros.tex and paper.tex, which reads tables and figures from exhibits/
beside it: `cd outputs/laptop/paper && pdflatex paper`. A number is named by where it stands, stage,
row and column: \\kit{baseline/plain/accuracy}, its interval by /interval behind that. Each links
to the cell of the notebook that saved it, as a bundle has it as a page.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from kit.paths import NOTEBOOKS, run_dir
from kit.pipeline.provenance import write_text
from kit.report import exhibits
from kit.report.exhibits import Figure, Table, escaped, numeric

VERDICTS = "07_verdicts"
NUMBER, INTERVAL = re.compile(r"[<>]?\s*[+-]?\d"), re.compile(r"\s*(\[[^\]]+\])")
HEADLINE = ("published", "stand-in", "audit", "recomputed")  # four sentences
MACROS = r"""% \kit{NAME} is a number of this run, linked to its cell. Needs hyperref and siunitx.
\makeatletter
\newcommand{\kit}[1]{\@ifundefined{kit@#1}%
  {\PackageError{kit}{This run has no number #1}{macros.tex lists them.}}{\@nameuse{kit@#1}}}
\newcommand{\kitset}[3]{\@namedef{kit@#1}{\href{#2}{#3}}}
\makeatother
"""
HEAD = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=2.5cm]{geometry}
\usepackage{booktabs,caption,graphicx,longtable,textcomp,siunitx}
\usepackage[hidelinks]{hyperref}
\sisetup{group-separator={,},group-minimum-digits=4,retain-explicit-plus}
\input{macros}
\title{What does memory buy a small language model, per byte?}
\author{A run of the %s profile}
\date{}
\begin{document}
\maketitle
"""
JUDGED = r"""\section{Verdicts}
{\footnotesize\setlength{\LTleft}{0pt}
\begin{longtable}{@{}p{0.28\linewidth}p{0.14\linewidth}p{0.22\linewidth}p{0.12\linewidth}l@{}}
\caption{Claims that this run measured, with 95\%% intervals.}\\
\toprule claim & published & measured & on & verdict \\ \midrule \endfirsthead
\toprule claim & published & measured & on & verdict \\ \midrule \endhead
\bottomrule \endfoot
%s\end{longtable}}
"""


def write(profile: str) -> list[Path]:
    """Write macros.tex and paper.tex of what the notebooks have saved: the files."""
    folder, results = run_dir(profile), exhibits.load_results(profile)
    exhibits_of = {stage: exhibits.load(folder / "exhibits" / stage) for stage in results}
    texts = files(profile, results, exhibits_of)
    for name, text in texts.items():
        write_text(folder / "paper" / name, text)
    return [folder / "paper" / name for name in texts]


def files(
    profile: str, results: Mapping[str, dict], exhibits_of: Mapping[str, Sequence[Table | Figure]]
) -> dict[str, str]:
    """macros.tex and paper.tex of a run: its results and what it shows, by stage."""
    lines, defined = [MACROS], set()
    for names, stage, value, source in macros(results, exhibits_of):
        if free := [name for name in names if name not in defined]:
            lines.append(f"\\kitset{{{free[0]}}}{{{_link(stage)}}}{{{value}}}% {source}\n")
            defined.add(free[0])
    body = [HEAD % profile]
    body += [f"\\kit{{headline/{name}}}\n\n" for name in HEADLINE if f"headline/{name}" in defined]
    if "baseline/plain/accuracy" in defined:
        body.append("Without memory \\kit{baseline/plain/accuracy}\\% of the problems are solved, "
                    "95\\% interval \\kit{baseline/plain/accuracy/interval}.\n\n")  # fmt: skip
    body += _judged(results.get(VERDICTS, {}).get("verdicts", []))
    for stage in sorted(results):
        body += [f"\\section{{{escaped(stage)}}}\n"] * bool(exhibits_of[stage])
        body += [_placed(stage, exhibit) for exhibit in exhibits_of[stage]]
    return {"macros.tex": "".join(lines), "paper.tex": "".join([*body, "\\end{document}\n"])}


def _placed(stage: str, exhibit: Table | Figure) -> str:
    """A figure or table where it stands, so that a long one may go over pages."""
    place = f"../exhibits/{stage}/{exhibits.slug(exhibit.caption)}"
    kind, inside = "table", f"{{\\footnotesize\\setlength{{\\tabcolsep}}{{4pt}}\\input{{{place}}}}}"
    if isinstance(exhibit, Figure):
        kind, inside = "figure", f"\\includegraphics[width=0.7\\linewidth]{{{place}.pdf}}"
    cell = _cell(stage, ", cell ")
    origin = f"\\href{{{_link(stage)}}}{{Notebook {escaped(stage)}{cell}}}"
    caption = f"\\captionof{{{kind}}}{{{escaped(exhibit.caption)}. {origin}.}}"
    return (f"\\begin{{center}}\n{caption}\n\\nopagebreak\\smallskip\\nopagebreak\n{inside}\n"
            f"\\end{{center}}\n")  # fmt: skip


def _judged(rows: Sequence[Mapping]) -> list[str]:
    """The table of the claims that were measured, and how many were not."""
    lines = [
        f"{escaped(row['claim'])} & {numeric(row['published'])} & "
        f"\\kit{{claim/{row['claim']}}} {_ends(row)} & {escaped(row['on'])} & "
        f"{escaped(row['verdict'])} \\\\\n"
        for row in rows if row["measured"]
    ]  # fmt: skip
    unmeasured = Counter(row["on"] for row in rows if not row["measured"])
    summary = ", ".join(f"{n} {escaped(on)}" for on, n in unmeasured.most_common())
    return [JUDGED % "".join(lines)] * bool(lines) + [f"Not measured: {summary}.\n\n"] * bool(
        summary
    )


def _ends(row: Mapping) -> str:
    return f"\\kit{{claim/{row['claim']}/interval}}" if row["interval"] else ""


def macros(
    results: Mapping[str, dict], exhibits_of: Mapping[str, Sequence[Table | Figure]]
) -> Iterator[tuple[list[str], str, str, str]]:
    """(names, stage, LaTeX, source) of every number in the key tables and of every verdict; it gets
    the first of its names that is free."""
    for stage in results:
        for exhibit in exhibits_of[stage]:
            if isinstance(exhibit, Table):
                yield from _of_table(stage, exhibit)
    saved = results.get(VERDICTS, {})
    for name, line in zip(HEADLINE, saved.get("headline", [])):
        yield [f"headline/{name}"], VERDICTS, escaped(line), "07_verdicts: headline"
    for row in saved.get("verdicts", []):
        name, source = f"claim/{row['claim']}", f"verdict on {row['claim']}"
        yield [f"{name}/verdict"], VERDICTS, escaped(row["verdict"] or row["on"]), source
        yield [f"{name}/on"], VERDICTS, escaped(row["on"]), source
        if row["measured"]:
            yield [name], VERDICTS, numeric(row["measured"]), source
        if row["interval"]:
            ends = row["interval"].replace(" to ", ", ")
            yield [f"{name}/interval"], VERDICTS, f"[{numeric(ends)}]", source


def _of_table(stage: str, table: Table) -> Iterator[tuple[list[str], str, str, str]]:
    constant = {i for i in table.words if len({row[i] for row in table.rows}) == 1}
    labels = [i for i in table.words if i not in constant] or [*table.words]
    for row in table.rows:
        label = " ".join(row[i] for i in labels)
        for i, cell in enumerate(row):
            if i in table.words or not NUMBER.match(cell):
                continue
            column = table.columns[i]
            source = f"{stage}: {table.caption}; {label}; {column}".replace("\n", " ")
            ends = f"{_name(label)}/{_name(column.partition(', %')[0])}"
            first = _name(re.sub(r"^\d\d_", "", stage))
            names = [f"{first}/{ends}", f"{first}/{exhibits.slug(table.caption)}/{ends}"]
            yield names, stage, numeric(INTERVAL.sub("", cell)), source
            if interval := INTERVAL.search(cell):
                yield [f"{name}/interval" for name in names], stage, numeric(interval[1]), source


def _name(text: str) -> str:
    """Part of a name: what LaTeX takes as it is."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")


def _link(stage: str) -> str:
    """The page of a notebook in a bundle, at the cell that saves its numbers."""
    cell = _cell(stage, r"\#cell-id=")
    return f"../notebooks/{stage}.html{cell}"


@cache
def _cell(stage: str, before: str = "") -> str:
    """The id of that cell behind `before`; "" where there is no such notebook."""
    file = NOTEBOOKS / f"{stage}.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []
    ids = [cell["id"] for cell in cells if "save_results(" in "".join(cell["source"])]
    return f"{before}{ids[-1]}" if ids else ""
