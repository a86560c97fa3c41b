"""Answers for the report: which are chosen, and what is shown of each."""

import pandas as pd

from kit.data import problems, prompts
from kit.report import samples

SUITE = problems.load("laptop", "test", n=7).problems


def answer(problem, arm: str, key: str, correct: bool, prompt_id: str = "", **more) -> dict:
    row = {"key": key, "arm": arm, "correct": correct, "question": problem.question,
           "answer": problem.answer, "problem_id": problem.id, "family": problem.family,
           "level": problem.level, "source": problem.source, "prompt_id": prompt_id,
           "text": f"so {problem.answer}", "extracted": problem.answer, "method": "last number",
           "reason": "equal", "finish": "stop", "prompt_tokens": 9, "new_tokens": 1234,
           "retrieved": ""}  # fmt: skip
    return row | more


def test_a_few_right_and_wrong_answers_of_each_arm_whatever_their_order():
    rows = [answer(problem, arm, f"{arm}{number}{correct}", correct)
            for arm in ("plain", "format") for number, problem in enumerate(SUITE)
            for correct in (True, False)]  # fmt: skip
    frame = pd.DataFrame(rows)
    shown = samples.choose({"01_baseline": frame, "04_phase2": frame})
    assert len(shown) == 2 * 2 * samples.EACH  # an answer that two stages read is shown once
    marks = pd.DataFrame(shown).groupby(["arm", "mark"]).size()
    assert (marks == samples.EACH).all() and len(marks) == 4
    assert samples.choose({"01_baseline": frame.sample(frac=1, random_state=0)}) == shown
    assert samples.choose({"03_dms": frame.iloc[:0], "06_memory_budget": pd.DataFrame()}) == []


def test_the_prompt_is_shown_where_its_hash_says_that_it_is_the_one():
    problem, other = SUITE[:2]
    made = prompts.format_only(problem)
    rows = [answer(problem, "format", "a", True, made.id), answer(other, "format", "b", True, "x")]
    first, second = samples.choose({"01_baseline": pd.DataFrame(rows)})
    assert first["prompt"] == f"[user] {made.messages[0][1]}" and second["prompt"] == ""
    assert first["cost"] == "9 prompt and 1,234 new tokens"


def test_retrieved_strategies_are_shown_by_their_texts_and_long_texts_are_cut():
    banks = pd.DataFrame({"id": ["s1"], "title": ["Borrow"], "content": ["Borrow a ten."]})
    row = answer(SUITE[0], "retrieved", "a", False, retrieved="s1 s2", text="x" * 5000)
    (shown,) = samples.choose({"02_strategies": pd.DataFrame([row])}, banks)
    assert shown["memory"] == "Borrow: Borrow a ten.\n\nstrategy s2"
    assert shown["text"].endswith("(3,800 more characters)") and shown["mark"] == "wrong"
