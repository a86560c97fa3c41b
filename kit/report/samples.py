"""Single answers for the report: a few right and a few wrong ones of every arm, with all that led
to their grades."""

import textwrap
from collections.abc import Mapping

import pandas as pd

from kit.data import prompts
from kit.report import withheld
from kit.schema import Problem

EACH = 3  # right ones, and as many wrong ones, of an arm; all others are in records.parquet
MOST = 1200  # characters of a text, then it is cut
BANKS = "Every bank in full"  # the caption of the table with the texts of strategies


def choose(
    records: Mapping[str, pd.DataFrame], banks: pd.DataFrame | None = None
) -> list[dict[str, str | bool]]:
    """Texts of EACH right and EACH wrong answers per stage and arm: those of the smallest keys,
    which are hashes; none of data sets whose texts may not be redistributed. `banks` holds
    strategies by their `id`."""
    samples, keys = [], set()
    for stage, frame in records.items():
        if frame.empty:
            continue
        frame = frame[~withheld.rows(frame)]
        frame_by_key = frame[~frame["key"].isin(keys)].sort_values("key")
        keys |= {*frame["key"]}
        for _, group in frame_by_key.groupby(["arm", "correct"], sort=True):
            samples += [_shown(stage, row, banks) for row in group.head(EACH).to_dict("records")]
    return samples


def _shown(stage: str, row: Mapping, banks: pd.DataFrame | None) -> dict[str, str | bool]:
    mark = "right" if row["correct"] else "wrong"
    extraction = f"{row['extracted']!r}, by {row['method']}" if row["extracted"] else "nothing"
    return {
        "stage": stage, "arm": row["arm"], "mark": mark, "question": _cut(row["question"]),
        "head": textwrap.shorten(row["question"], 90, placeholder=" …"),
        "prompt": _cut(_prompt(row)), "memory": _cut(_memory(row.get("retrieved") or "", banks)),
        "text": _cut(row["text"].strip()) or "(nothing)", "read": _cut(extraction),
        "gold": _cut(row["answer"]), "reason": row["reason"],
        "finish": {"stop": "ended by itself", "length": "was cut off at the token limit"}.get(
            row["finish"], row["finish"]),
        "cost": f"{row['prompt_tokens']:,} prompt and {row['new_tokens']:,} new tokens",
    }  # fmt: skip


def _prompt(row: Mapping) -> str:
    """The messages, where those of a plain arm have the stored hash; "" where they have not."""
    problem = Problem(row["problem_id"], row["question"], row["answer"], row["family"],
                      row["level"], row["source"])  # fmt: skip
    for arm in (prompts.plain, prompts.format_only):
        for thinking in (False, True):
            prompt = arm(problem, thinking)
            if prompt.id == row["prompt_id"]:
                return "\n".join(f"[{role}] {text}" for role, text in prompt.messages)
    return ""


def _memory(retrieved: str, banks: pd.DataFrame | None) -> str:
    """The strategies that stood in the prompt, by their texts where a bank has them."""
    items = {} if banks is None else banks.drop_duplicates("id").set_index("id").to_dict("index")
    lines = []
    for name in retrieved.split():
        item = items.get(name)
        lines.append(f"{item['title']}: {item['content']}" if item else f"strategy {name}")
    return "\n\n".join(lines)


def _cut(text: str) -> str:
    excess = len(text) - MOST
    return text if excess <= 0 else f"{text[:MOST]} … ({excess:,} more characters)"
