"""Grades of a run made again from its stored texts, without decoding.

The gold answer is that of the record; the required form is that of the problem in data/, since
records of older kits have none. Imports no torch and no store.
"""

from functools import cache

import pandas as pd

from kit.data import problems
from kit.data.prompts import FORM
from kit.evaluation import grader
from kit.parametric import facts
from kit.report import withheld

GRADES = ["correct", "extracted", "reason", "method", "compliant"]  # columns of records
UNDECIDED = ("timeout", "memory", "incomparable", "no worker")  # reasons that hang on the machine


@cache
def gold_answers() -> dict[tuple[str, str], tuple[str, str]]:
    """Gold answer and required form of every problem in data/, by its source and id."""
    suite = [p for split in problems.SPLITS for p in problems.load("laptop", split).problems]
    golds = {(p.source, p.id): (p.answer, p.asks) for p in suite}
    return golds | {("facts", facts.name(fact)): (fact.answer, "any") for fact in facts.load()}


def graded(records: pd.DataFrame) -> pd.DataFrame:
    """`records`, one or more, with the grades of this kit; equal answers are graded once. What has
    hashes in place of its texts keeps its grades."""
    answers = records.reindex(columns=["text", "answer", "asks"])
    own = [gold_answers().get(problem) for problem in _problems(records)]
    stored = answers["asks"].astype(object).where(answers["asks"].notna(), "any")
    answers["asks"] = [entry[1] if entry else old for entry, old in zip(own, stored, strict=True)]
    distinct = answers.drop_duplicates()
    grades = grader.grade_many(
        [*distinct["text"]], [*distinct["answer"]], FORM, [*distinct["asks"]]
    )
    by_answer = pd.DataFrame(grades, index=pd.MultiIndex.from_frame(distinct))
    by_answer = by_answer.loc[pd.MultiIndex.from_frame(answers)].set_index(records.index)
    grades = {name: by_answer[name] for name in by_answer}
    if (hashed := withheld.hashed(records)).any():
        grades = {name: grades[name].mask(hashed, records[name]) for name in grades}
    return records.assign(asks=answers["asks"], **grades)


def differing(records: pd.DataFrame, again: pd.DataFrame) -> pd.Series:
    """Which of `records` have another grade in `again`, those left out that are `undecided`."""
    return (records[GRADES] != again[GRADES]).any(axis=1) & ~undecided(records, again)


def undecided(records: pd.DataFrame, again: pd.DataFrame) -> pd.Series:
    """Which of the records came out of time or memory, here or there."""
    return records["reason"].isin(UNDECIDED) | again["reason"].isin(UNDECIDED)


def versions(records: pd.DataFrame) -> pd.Series:
    """The version of the grader behind each record; 0 for those of a kit that kept none."""
    return records.reindex(columns=["grade_version"])["grade_version"].fillna(0).astype(int)


def check(records: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The errors in the grades of `records`, and the undecided ones: sentences.

    A grade that differs is wrong where the same version of the grader gave it. Where an earlier one
    did, the difference says what changed between the two.
    """
    wrong, unclear = [], []
    if (hashed := withheld.hashed(records)).any():
        sources = ", ".join(sorted(set(records[hashed]["source"])))
        unclear.append(f"grades of {hashed.sum():,} answers to {sources}: its texts may not be "
                       f"redistributed, hashes stand in their place")  # fmt: skip
        records = records[~hashed]
    if records.empty:
        return wrong, unclear
    again, newest = graded(records), grader.GRADE_VERSION
    golds = [gold_answers().get(problem, (None,))[0] for problem in _problems(records)]
    golds = pd.Series(golds, index=records.index, dtype=object)
    altered = golds.notna() & (golds != records["answer"])
    changed, graders = differing(records, again), versions(records)
    if altered.any():
        first = records[altered].iloc[0]
        wrong.append(f"the gold answer of {altered.sum():,} records is not that of data/, such as "
                     f"{first['answer']!r} of {first['problem_id']}")  # fmt: skip
    if (bad := changed & (graders == newest)).any():
        first, regraded = records[bad].iloc[0], again[bad].iloc[0]
        wrong.append(
            f"{bad.sum():,} of {len(records):,} answers are graded otherwise from their texts, "
            f"such as {first['extracted'][:40]!r} to {first['problem_id']} of {first['arm']}: "
            f"{first['reason']} in the records, {regraded['reason']} from its text"
        )
    for version in sorted(set(graders) - {newest}):
        of_it = changed & (graders == version)
        author = f"version {version} of the grader" if version else "the grader of an earlier kit"
        gained = of_it & again["correct"] & ~records["correct"]
        losses = of_it & ~again["correct"] & records["correct"]
        unclear.append(
            f"grades of {(graders == version).sum():,} answers by {author}: version {newest}, of "
            f"this kit, grades {of_it.sum():,} otherwise ({gained.sum():,} right, {losses.sum():,} "
            f"wrong instead); `python -m kit publish PROFILE --again` renews a published run"
        )
    if (open_ := undecided(records, again)).any():
        unclear.append(f"{open_.sum():,} answers could not be graded again: the time or memory of "
                       f"the grader ran out")  # fmt: skip
    if golds.isna().any():
        sources = ", ".join(sorted(set(records[golds.isna()]["source"])))
        unclear.append(f"gold answers of {golds.isna().sum():,} records: data/ does not have these "
                       f"problems ({sources})")  # fmt: skip
    return wrong, unclear


def _problems(records: pd.DataFrame):
    return zip(records["source"], records["problem_id"], strict=True)
