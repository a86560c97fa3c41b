"""Explanations in the report for a reader who knows none of the papers: the question of each
notebook, its result with the uncertainty, and how each figure is read.

The description of a system and its question are the text of its notebook, so that both agree. The
result follows from stored results and verdicts.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from kit.analysis import claims, tables
from kit.analysis.verdicts import ON_MODELS

QUESTIONS = {
    "01_baseline": "How many problems does the small model solve with no memory at all?",
    "02_strategies": "Do strategies, learnt from solved problems and retrieved into the prompt, "
    "raise accuracy?",
    "03_dms": "How much of its key-value cache may a model forget before it says something else?",
    "04_phase2": "Does training a model on its own correct answers make it solve more?",
    "05_parametric": "Does a model know more when it fetches weights that fit the question?",
    "06_memory_budget": "Which way to spend the next byte of memory buys the most accuracy?",
}
ARMS = {  # of the contrasts that stages declare
    "retrieved": "with strategies retrieved into the prompt",
    "format-only": "with a prompt that asks for the form alone",
    "internalised": "trained on its own correct answers",
    "base": "untrained",
    "fetched": "with fetched weights",
    "plain": "with no memory",
}
READING = {  # how a figure is read, by its caption
    "Accuracy without memory, by family and level": "Each row is a kind of problem at one "
    "difficulty, each colour a prompt; the bar is the 95% interval of the share solved. Where two "
    "bars of a row overlap widely, the prompts are not told apart.",
    "Retrieved strategies minus each control": "Each row is another way to fill the prompt. A "
    "point right of zero says that retrieved strategies solved more than it; an interval that "
    "crosses zero says that the difference may be chance.",
    "KL to full attention against what is kept": "Lower is better: KL is how far the model's next "
    "words move when part of its cache is forgotten. Every policy keeps the share of tokens at "
    "which its point stands, so points one above the other had equal memory.",
    "Accuracy against KV reads": "Reads are how often entries of the cache were looked at, which "
    "stands for time and memory traffic. A point on the black line solves more than every "
    "cheaper one.",
    "Compounding, with and without the bank": "Each round trains on what was solved in the one "
    "before. A line that rises says that what was learnt helped to learn more.",
    "By how often a fact was told": "Facts are grouped by how often they stood in the text that "
    "the memory was trained on. If memory helps where knowledge is rare, its lead grows to the "
    "side of rare facts.",
    "Recall by how often a fact was told": "Facts are grouped by how often they stood in the text "
    "that the memory was trained on; the first group was never told. If memory helps where "
    "knowledge is rare, its lead is largest among facts told a few times.",
    "Accuracy against bytes read": "How many bytes of memory a question reads, and what that buys. "
    "Up and to the left is better.",
    "Accuracy against bytes, weights shared": "Each point is one way to spend memory: bits of "
    "weights, the cache, tokens of an answer, votes. The line joins those that nothing smaller "
    "beats; faint points are on it only by chance, for these problems.",
    "Published differences with the 95% interval that their own counts allow": "Each row is a "
    "difference that a paper reports; the bar is how far its own number of problems lets it vary. "
    "Where the bar crosses zero, the paper's own counts cannot tell the gain from none.",
    "Five memories on one axis of bytes": "The same solved problems, kept in five places. The line "
    "joins the best accuracy for its bytes; faint points are on it by chance.",
}
HELD, NOT_HELD = (
    "The interval excludes zero: a difference is shown",
    ("Zero lies in the interval: no difference is shown"),
)


def glance(rows: Sequence[Mapping], results: Mapping[str, Mapping], baselines: list) -> list[dict]:
    """One row per notebook that left results: its question, its result and the uncertainty.

    `rows` are verdicts with their `statement` and `notebook`, the most definite first; `baselines`
    what the report says of the model without memory.
    """
    table_rows = []
    for stage in [stage for stage in QUESTIONS if stage in results or stage == "01_baseline"]:
        finding, certainty = _contrast(stage, results) or _claimed(stage, rows)
        if stage == "01_baseline" and baselines:
            base = baselines[0]
            finding = f"{base['name']} solves {{estimate:.1f}}% [{{low:.1f}}, {{high:.1f}}]".format(
                **base["accuracy"]
            )
            certainty = f"{base['problems']:,} problems; other problems would give another share"
        if finding:
            table_rows.append(
                dict(stage=stage, question=QUESTIONS[stage], finding=finding, certainty=certainty)
            )
    return table_rows


def _contrast(stage: str, results: Mapping[str, Mapping]) -> tuple[str, str] | None:
    """The difference that the stage declared beforehand."""
    primary = claims.primary().get(stage)
    for row in results.get(stage, {}).get("contrasts", ()):
        if primary and row["arm"] == primary["arm"] and row["control"] == primary["control"]:
            difference = tables.cell_text("difference", tuple(row["difference"]))
            arms = [f"{ARMS[row[key]]} ({row[key]})" for key in ("arm", "control")]
            finding = f"Points of accuracy {arms[0]} minus {arms[1]}: {difference}"
            low, high = row["difference"][1:]
            certainty = f"{NOT_HELD if low <= 0 <= high else HELD}, on {row['problems']:,} problems"
            if row.get("equal finish"):
                gap = tables.cell_text("difference", tuple(row["equal finish"]))
                certainty += f"; on problems where both ended their answers by themselves, {gap}"
            return finding, certainty
    return None


def _claimed(stage: str, rows: Sequence[Mapping]) -> tuple[str, str]:
    """The most definite of its claims that a model was measured for."""
    for row in rows:
        if row["notebook"] == stage and row["measured"] and row["on"] in ON_MODELS:
            text = f"{row['measured']} [{row['interval']}]" if row["interval"] else row["measured"]
            return f"{row['statement']} Measured: {text}", f"{row['verdict']}: {row['reason']}"
    return "", ""


def introduction(notebook: Path) -> dict[str, str | Markup]:
    """The title of a notebook, its `idea` and its `question`, the last two as HTML."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    head, _, idea = texts[0].partition("\n")
    question = next((text for text in texts if text.startswith("## Question")), "")
    return {"title": head.partition("· ")[2], "idea": _html(idea),
            "question": _html(question.partition("\n")[2])}  # fmt: skip


def _html(markdown: str) -> Markup:
    from nbconvert.filters.markdown import markdown2html  # half a second

    return Markup(re.sub(r"<(/?)h\d[^>]*>", r"<\1p>", markdown2html(markdown)))
