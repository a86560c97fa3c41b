"""The positive control: where memory is read, and whether it is read at all."""

import pandas as pd
import pytest

from kit.data import problems
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.reasoning_bank import ladder
from kit.reasoning_bank.dspy_backend import PLACES, RECALL
from kit.report import recompute
from kit.schema import Sampling


@pytest.fixture(scope="module")
def some():
    return problems.load("laptop", "validation", n=20).problems


def records(some, right: dict[str, int]) -> pd.DataFrame:
    """Records of `ladder.hints` in which each arm is right on its first problems."""
    rows = [
        {"arm": p.arm, "problem_id": p.problem.id, "correct": some.index(p.problem) < right[p.arm]}
        for p in ladder.hints(some)
    ]
    fixed = dict(
        model="m", weights_hash="w", policy="full", source="laptop", family="gcd", level=1,
        seed=0, sample=0, temperature=0.2, finish="stop", prompt_tokens=5, new_tokens=5,
        compliant=False, method="none", extracted="",
    )  # fmt: skip
    return pd.DataFrame(rows).assign(**fixed)


def test_only_the_place_of_the_answer_differs(some):
    by_arm = {}
    for prompt in ladder.hints(some):
        by_arm.setdefault(prompt.arm, []).append(prompt)
    assert list(by_arm) == ["no-hint", *(f"hint-{place}" for place in PLACES)]
    for bare, *hinted in zip(*by_arm.values(), strict=True):
        note, question = (
            f"A note says that the answer is {bare.problem.answer}.",
            bare.messages[1][1],
        )
        system, before, after, turns = (each.messages for each in hinted)
        assert system == (("system", f"{bare.messages[0][1]}\n\n{note}"), bare.messages[1])
        assert before == (bare.messages[0], ("user", f"{note}\n\n{question}"))
        assert after == (bare.messages[0], ("user", f"{question}\n\n{note}"))
        told = (("user", RECALL), ("assistant", note))
        assert turns == (bare.messages[0], *told, bare.messages[1])


def test_memory_stands_where_the_answer_helped_most(some):
    right = {"no-hint": 2, "hint-system": 4, "hint-before": 6, "hint-after": 16, "hint-turns": 9}
    found = records(some, right)
    chosen = ladder.choose(found)
    assert chosen.place == "after" and chosen.used and chosen.gain.estimate == pytest.approx(70)
    assert "this model uses memory given in this way." in str(chosen)
    table = ladder.placements(found).set_index("place")
    assert table["difference"].map(lambda d: round(d[0])).to_dict() == {
        "system": 10, "before": 20, "after": 70, "turns": 35,
    }  # fmt: skip
    assert table["accuracy"]["after"][0] == pytest.approx(80)


def test_a_model_that_reads_no_memory_is_said_not_to(some):
    right = {"no-hint": 3} | {f"hint-{place}": 3 for place in PLACES}
    chosen = ladder.choose(records(some, right))
    assert chosen.place == PLACES[0] and not chosen.used
    assert "this model does not use memory given in this way" in str(chosen)
    right |= {"hint-turns": 7}
    chosen = ladder.choose(records(some, right))
    assert chosen.place == "turns" and not chosen.used
    assert "20 problems do not show whether this is above 20" in str(chosen)


def test_a_gain_that_answers_cut_off_may_explain_is_shown_at_equal_finish(some):
    right = {"no-hint": 2} | {f"hint-{place}": 16 for place in PLACES}
    found = records(some, right)
    assert ladder.choose(found).ended is None and "ended" not in str(ladder.choose(found))
    cut = (found["arm"] == "no-hint") & ~found["correct"]
    chosen = ladder.choose(found.assign(finish=["length" if c else "stop" for c in cut]))
    assert chosen.gain.estimate == pytest.approx(70) and chosen.used
    assert chosen.ended[0] == pytest.approx(0), "where both ended, both are right"
    assert "over the answers that ended 0.0 (" in str(chosen)


def test_controls_are_kept_out_of_the_arms_of_the_study(tiny, some, tmp_path):
    hinted = evaluate(tiny, ladder.hints(some[:2]), Sampling(2), Store(tmp_path))
    assert {*hinted["arm"]} == {"no-hint", *(f"hint-{place}" for place in PLACES)}
    other = hinted[hinted["arm"] == "no-hint"].assign(arm="format-only")
    planted = other.assign(arm=ladder.PLANTED.format("retrieved"))
    again = other.assign(arm="streaming")  # asked the same
    left = recompute.strategies(pd.concat([hinted, other, planted, again]))
    assert {*left["arm"]} == {"format-only"}


def test_what_the_right_lesson_is_worth(some):
    right = {"retrieved": 18, "shuffled": 2, "random": 4, "format-only": 0}
    fixed = dict(
        model="m", weights_hash="w", policy="full", source="planted", family="f", level=1, seed=0,
        sample=0, temperature=0.2, finish="stop", prompt_tokens=5, new_tokens=5, compliant=False,
        method="none", extracted="",
    )  # fmt: skip
    rows = [{"arm": ladder.PLANTED.format(arm), "problem_id": p.id, "correct": i < n}
            for arm, n in right.items() for i, p in enumerate(some)]  # fmt: skip
    found = pd.DataFrame(rows).assign(**fixed)
    table = ladder.planted_gains(found)
    assert table["control"].tolist()[0] == "planted-shuffled"
    assert (
        table["difference"].iloc[0][0] == pytest.approx(80) and table["of_control"].iloc[0][0] == 10
    )
    made = recompute.table("02_strategies", recompute.PLANTED_GAINS, {}, found)
    pd.testing.assert_frame_equal(made, table)
