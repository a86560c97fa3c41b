"""LaTeX of a run: every number as a macro with its source, and a minimal paper that uses them.

outputs/<profile>/paper/ has macros.tex and paper.tex, which reads tables and figures from exhibits/
beside it: `cd outputs/laptop/paper && pdflatex paper`. A macro is named by where its number stands:
\\kit, the stage, the row and the column; the interval of a number has `Interval` behind its name.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kit.paths import run_dir
from kit.pipeline.provenance import write_text
from kit.report import exhibits
from kit.report.exhibits import BASELINE, Figure, Table

DIGITS = dict(zip("0123456789", "Zero One Two Three Four Five Six Seven Eight Nine".split()))
NUMBER, INTERVAL = re.compile(r"[+-]?\d"), re.compile(r"\s*(\[[^\]]+\])")
HEADLINE = ("kitOnPublished", "kitOnStandIn", "kitAudit", "kitRecomputed")  # four sentences
HEAD = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{booktabs,graphicx,textcomp}
\input{macros}
\title{What does memory buy a small language model, per byte?}
\author{A run of the %s profile}
\begin{document}
\maketitle
"""


def write(profile: str) -> list[Path]:
    """Write macros.tex and paper.tex of what the notebooks have saved: the files."""
    folder, results = run_dir(profile), exhibits.load_results(profile)
    shown = {stage: exhibits.load(folder / "exhibits" / stage) for stage in results}
    made = files(profile, results, shown)
    for name, text in made.items():
        write_text(folder / "paper" / name, text)
    return [folder / "paper" / name for name in made]


def files(
    profile: str, results: Mapping[str, dict], shown: Mapping[str, Sequence[Table | Figure]]
) -> dict[str, str]:
    """macros.tex and paper.tex of a run: its results and what it shows, by stage."""
    lines, seen = [], set()
    for name, value, source in macros(results, shown):
        if name not in seen:  # rows of one name: the first is said
            lines.append(f"\\newcommand{{\\{name}}}{{{value}}}% {source}\n")
            seen.add(name)
    body = [HEAD % profile, *(f"\\{name}\n\n" for name in HEADLINE if name in seen)]
    if "kitBaselineAcc" in seen:
        body.append("Without memory \\kitBaselineAcc\\% of the problems are solved, 95\\% interval "
                    "\\kitBaselineAccInterval.\n\n")  # fmt: skip
    for stage in sorted(results):
        for each in shown[stage]:
            place = f"../exhibits/{stage}/{exhibits.slug(each.caption)}"
            if isinstance(each, Figure):
                inside = f"\\includegraphics[width=\\columnwidth]{{{place}.pdf}}"
                kind = "figure"
            else:
                inside, kind = f"\\resizebox{{\\columnwidth}}{{!}}{{\\input{{{place}}}}}", "table"
            caption = exhibits.escaped(each.caption)
            body.append(f"\\begin{{{kind}}}\n\\centering\n\\caption{{{caption}.}}\n{inside}\n"
                        f"\\end{{{kind}}}\n\\clearpage\n")  # fmt: skip
    body.append("\\end{document}\n")
    return {"macros.tex": "".join(lines), "paper.tex": "".join(body)}


def macros(
    results: Mapping[str, dict], shown: Mapping[str, Sequence[Table | Figure]]
) -> Iterator[tuple[str, str, str]]:
    """(name, LaTeX, source) of every number in the key tables and of every verdict."""
    for stage in results:
        for each in shown[stage]:
            if isinstance(each, Table):
                yield from _of_table(stage, each)
    said = results.get("07_verdicts", {})
    for name, line in zip(HEADLINE, said.get("headline", [])):
        yield name, exhibits.escaped(line), "07_verdicts: headline"
    for row in said.get("verdicts", []):
        name, source = f"kit{_letters(row['claim'])}", f"verdict on {row['claim']}"
        yield f"{name}Verdict", row["verdict"] or row["on"], source
        yield f"{name}On", row["on"], source
        if row["measured"]:
            yield name, exhibits.escaped(row["measured"]), source
        if row["interval"]:
            yield f"{name}Interval", exhibits.escaped(row["interval"]), source


def _of_table(stage: str, table: Table) -> Iterator[tuple[str, str, str]]:
    for row in table.rows:
        label, plain = " ".join(row[i] for i in table.words), "plain" in row
        for i, cell in enumerate(row):
            if i in table.words or not NUMBER.match(cell):
                continue
            column = table.columns[i]
            source = f"{stage}: {table.caption}; {label}; {column}".replace("\n", " ")
            names = [f"kit{_letters(stage)}{_letters(label)}{_letters(column)}"]
            if table.caption == BASELINE and plain and column.startswith("accuracy"):
                names.insert(0, "kitBaselineAcc")
            for name in names:
                yield name, exhibits.escaped(INTERVAL.sub("", cell)), source
                if found := INTERVAL.search(cell):
                    yield f"{name}Interval", found[1], source


def _letters(text: str) -> str:
    """CamelCase of letters alone: digits are spelled, all else parts words."""
    text = re.sub(r"^\d\d_", "", text)
    spelled = re.sub(r"\d", lambda digit: f" {DIGITS[digit[0]]} ", text)
    words = re.findall(r"[A-Za-z]+", spelled)
    return "".join(word[0].upper() + word[1:] for word in words)
