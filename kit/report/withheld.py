"""Texts of data sets that may not be redistributed, which a bundle and a report leave out.

In place of the question and the gold answer of such a record stand their hashes, by which whoever
has the data set can tell what was asked; its grade stays and cannot be made again from a bundle.
What a model answered is no text of the data set and stays, too.
"""

import hashlib
import html
import json
from collections.abc import Iterable

import pandas as pd

from kit.data.sources import SOURCES

HASH = "sha256:"
LENGTH = 40  # letters and digits by which a text is told
NOTE = "Left out: this output quotes problems of a data set that may not be redistributed.\n"


def rows(records: pd.DataFrame) -> pd.Series:
    """Which of `records` are of a data set that may not be redistributed."""
    return records["source"].isin([name for name in SOURCES if not SOURCES[name].redistributable])


def hashed(records: pd.DataFrame) -> pd.Series:
    """Which of `records` have hashes in place of texts."""
    return rows(records) & records["question"].str.startswith(HASH)


def without_texts(records: pd.DataFrame) -> pd.DataFrame:
    """`records` with hashes in place of the texts that may not be redistributed; the hash of a gold
    answer is that of question and answer, since a letter alone could be guessed."""
    unhashed = rows(records) & ~hashed(records)
    texts = records.loc[unhashed, ["question", "answer"]]
    both = (texts["question"] + "\n" + texts["answer"]).map(_hash)
    records = records.copy()
    records.loc[unhashed, "question"] = texts["question"].map(_hash)
    records.loc[unhashed, "answer"] = both
    return records


def without_quotes(notebook: dict, questions: Iterable[str]) -> dict:
    """An executed notebook, as JSON, with NOTE in place of each output that quotes one of
    `questions`: the beginning of its longest line."""
    begins = {_letters(max(question.splitlines(), key=len))[:LENGTH] for question in questions}

    def clean(output: dict) -> dict:
        text = _letters(json.dumps(output, ensure_ascii=False))
        quotes = any(begin in text for begin in begins)
        return {"output_type": "stream", "name": "stdout", "text": NOTE} if quotes else output

    cells = [cell | {"outputs": [*map(clean, cell["outputs"])]} if "outputs" in cell else cell
             for cell in notebook["cells"]]  # fmt: skip
    return notebook | {"cells": cells}


def _hash(text: str) -> str:
    return HASH + hashlib.sha256(text.encode()).hexdigest()


def _letters(text: str) -> str:
    """Without blanks and signs, which JSON, HTML and `repr` escape."""
    return "".join(filter(str.isalnum, html.unescape(text)))
