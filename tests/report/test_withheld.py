"""Texts that may not be redistributed: a bundle holds their hashes, and says what that costs."""

import hashlib
import io
import json
from dataclasses import replace

import pandas as pd
import pytest

from kit.data import sources
from kit.report import bundle, regrading, samples, verify, withheld
from tests.runs import ran

SECRET = r"Which of $\frac{1}{2}$ and" + "\n" + "a 'third' part is larger than the other, and why?"


@pytest.fixture
def secret(monkeypatch) -> None:
    """The problems of the small run are of a set that may not be redistributed."""
    pretended = replace(sources.SOURCES["math500"], redistributable=False)
    monkeypatch.setattr(withheld, "SOURCES", sources.SOURCES | {"laptop": pretended})


def test_sets_that_forbid_it_are_named():
    withheld_ = {name for name, source in sources.SOURCES.items() if not source.redistributable}
    assert withheld_ == {"gpqa", "aime24", "aime25", "amc23"}


def test_a_bundle_has_hashes_of_them_and_verify_says_what_was_not_graded_again(secret):
    run = bundle.read(bundle.write(ran().name))
    records = run.all_records
    question = f"sha256:{hashlib.sha256(b'q').hexdigest()}"
    assert {*records["question"]} == {question} and records["answer"].str.match("sha256:").all()
    assert records["answer"].nunique() > 1 and records["correct"].nunique() == 2
    judgement = verify.check(ran() / "bundle.zip")
    assert judgement.differences == []
    (line,) = [line for line in judgement.unchecked if "redistributed" in line]
    assert line.startswith(f"grades of {len(records)} answers to laptop")
    assert judgement.verdicts is not None and judgement.whole
    assert withheld.without_texts(records).equals(records)
    assert regrading.graded(records)[records.columns].equals(records)
    assert samples.choose({"01_baseline": records}) == []


def test_other_sets_keep_their_texts():
    records = bundle.read(bundle.write(ran().name)).all_records
    assert {*records["question"]} == {"q"} and not withheld.rows(records).any()


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stdout", "text": [f"gold of {SECRET!r}\n"]},
        {"output_type": "stream", "name": "stdout", "text": SECRET},
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"text/html": [SECRET.replace("'", "&#x27;").replace("\n", "<br>\n")]},
        },
    ],
)
def test_an_output_that_quotes_them_is_left_out(output):
    other = {"output_type": "stream", "name": "stdout", "text": "12 problems\n"}
    cells = [{"cell_type": "markdown", "source": "# title"}]
    cells += [{"cell_type": "code", "source": "1", "outputs": [output, other]}]
    cleaned = withheld.without_quotes({"cells": cells, "nbformat": 4}, [SECRET])
    assert cleaned["cells"][1]["outputs"][0]["text"] == withheld.NOTE
    assert cleaned["cells"][1]["outputs"][1] == other and cleaned["cells"][0] == cells[0]
    assert "third" not in json.dumps(cleaned) and cleaned["nbformat"] == 4


def test_rows_of_both_kinds_are_told_apart(secret):
    records = pd.DataFrame({
        "source": ["laptop", "math500"], "question": ["q", "r"], "answer": ["1", "2"],
    })  # fmt: skip
    hashed = withheld.without_texts(records)
    assert hashed.loc[1].equals(records.loc[1]) and hashed.loc[0, "question"].startswith("sha256:")
    both = hashlib.sha256(b"q\n1").hexdigest()
    assert hashed.loc[0, "answer"] == f"sha256:{both}"
    buffer = io.BytesIO()
    hashed.to_parquet(buffer)  # as a bundle stores it
    assert [*withheld.hashed(pd.read_parquet(buffer))] == [True, False]
