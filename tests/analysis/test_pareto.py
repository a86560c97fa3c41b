"""kit.analysis.pareto against brute force, hand-computed areas, and simulations with a known
truth."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import log

import numpy as np
import pandas as pd
import pytest

from kit.analysis import pareto


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def dominated(i: int, budget, accuracy) -> bool:
    """The definition, one pair at a time."""
    return any(
        budget[j] <= budget[i]
        and accuracy[j] >= accuracy[i]
        and (budget[j] < budget[i] or accuracy[j] > accuracy[i])
        for j in range(len(budget))
    )


def family(budgets, chances, problems: int, draw: np.random.Generator):
    """Configurations that solve problems of differing difficulty with these mean chances."""
    ease = draw.beta(2, 2, problems)  # mean 1/2
    chance = np.clip(np.multiply.outer(chances, 2 * ease), 0, 1)
    return np.asarray(budgets, float), (draw.random(chance.shape) < chance).astype(float)


def expected(chances, draw: np.random.Generator) -> np.ndarray:
    """What `family` solves on average."""
    ease = draw.beta(2, 2, 200_000)
    return np.array([np.clip(chance * 2 * ease, 0, 1).mean() for chance in chances])


# ------------------------------------------------------------------ the frontier


def test_pareto_is_what_its_definition_says():
    draw = rng(1)
    for _ in range(300):
        size = int(draw.integers(1, 9))
        budget, accuracy = draw.integers(1, 5, size), draw.integers(0, 5, size) / 4  # many ties
        wanted = [not dominated(i, budget, accuracy) for i in range(size)]
        assert pareto.pareto(budget, accuracy).tolist() == wanted


def test_pareto_by_hand():
    budget, accuracy = [1, 2, 2, 4, 8, 8], [0.2, 0.5, 0.4, 0.5, 0.7, 0.7]
    assert pareto.pareto(budget, accuracy).tolist() == [True, True, False, False, True, True]


def test_equal_accuracies_are_equal_in_whatever_order_they_were_summed():
    third = 0.1 + 0.2  # 0.30000000000000004
    assert pareto.pareto([1, 2], [0.3, third]).tolist() == [True, False]


# ------------------------------------------------------------------ membership


def test_membership_is_the_exact_bootstrap_probability():
    # three problems: all 27 resamples are enumerated
    budgets = np.array([1.0, 2.0, 3.0, 3.0])
    outcomes = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1]], dtype=float)
    wanted = np.zeros(4)
    for sample in np.ndindex(3, 3, 3):
        accuracy = outcomes[:, list(sample)].mean(axis=1)
        wanted += [not dominated(i, budgets, accuracy) for i in range(4)]
    found = pareto.membership(budgets, outcomes, rng(), draws=20_000)
    np.testing.assert_allclose(found, wanted / 27, atol=0.015)
    assert found[0] == 1  # nothing is cheaper


def test_membership_draws_budgets_with_their_problems():
    budgets = np.array([[1.0, 9.0, 1.0], [4.0, 4.0, 4.0], [2.0, 2.0, 9.0]])
    outcomes = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=float)
    wanted = np.zeros(3)
    for sample in np.ndindex(3, 3, 3):
        budget, accuracy = (m[:, list(sample)].mean(axis=1) for m in (budgets, outcomes))
        wanted += [not dominated(i, budget, accuracy) for i in range(3)]
    found = pareto.membership(budgets, outcomes, rng(), draws=20_000)
    np.testing.assert_allclose(found, wanted / 27, atol=0.015)


def test_membership_is_sure_where_the_truth_is_and_torn_where_it_is_not():
    chances = [0.1, 0.3, 0.2, 0.5, 0.5]
    budgets, outcomes = family([1, 2, 4, 8, 16], chances, 2_000, rng(3))
    found = pareto.membership(budgets, outcomes, rng())
    assert (found[[0, 1, 3]] > 0.99).all() and found[2] < 0.01
    # the last costs more for nothing; over many worlds it is on the frontier half of the time
    shares = []
    for seed in range(60):
        budgets, outcomes = family([1, 2], [0.5, 0.5], 200, rng(seed))
        shares.append(pareto.membership(budgets, outcomes, rng(), draws=200)[1])
    assert np.mean(shares) == pytest.approx(0.5, abs=0.12)


def test_the_same_generator_gives_the_same_shares_and_gap():
    one, two = family([1, 2, 4], [0.2, 0.4, 0.5], 40, rng()), family([1, 3], [0.3, 0.4], 40, rng(1))
    for call in (
        lambda seed: pareto.membership(*one, rng(seed), 100).tolist(),
        lambda seed: pareto.mean_gap(one, two, rng(seed), draws=100),
    ):
        assert call(5) == call(5) != call(6)


def test_table_keeps_rows_and_outcomes_together():
    frame = pd.DataFrame({"name": ["dear", "cheap", "waste"], "reads": [40.0, 10.0, 50.0]})
    outcomes = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=float)
    found = pareto.table(frame, "reads", outcomes, rng()).set_index("name")
    assert found.index.tolist() == ["cheap", "dear", "waste"]
    assert found["accuracy"].tolist() == [25.0, 75.0, 0.0]
    assert found["on_frontier"].tolist() == [True, True, False]
    assert found.loc["cheap", "membership"] == 1 and found.loc["waste", "membership"] == 0


def test_costs_that_differ_by_the_order_of_their_sums_are_equal():
    """Results are stored without these digits, and must show the same frontier."""
    noisy = pd.DataFrame({"reads": [0.1 + 0.2, 0.3]})
    for frame in (noisy, noisy.round(12)):
        found = pareto.table(frame, "reads", np.zeros((2, 4)), rng())
        assert found["reads"].nunique() == 1 and found["on_frontier"].all()
        assert found["membership"].tolist() == [1, 1]


# ------------------------------------------------------------------ the gap


def area(budget, accuracy, low, high, log_scale: bool) -> float:
    """Mean of the step function by a fine midpoint rule."""
    edges = np.linspace(log(low), log(high), 4_001) if log_scale else np.linspace(low, high, 4_001)
    middle = (edges[1:] + edges[:-1]) / 2
    at = np.exp(middle) if log_scale else middle
    return float(np.mean([max(a for b, a in zip(budget, accuracy) if b <= x) for x in at]))


@pytest.mark.parametrize("log_scale", (True, False))
def test_gap_is_the_area_between_the_steps(log_scale):
    draw = rng(7)
    for _ in range(8):
        sides = [
            (draw.uniform(1, 20, size), (draw.random((size, 30)) < 0.5).astype(float))
            for size in draw.integers(3, 7, 2)
        ]
        low = max(budget.min() for budget, _ in sides)
        high = min(budget.max() for budget, _ in sides)
        if low >= high:
            continue
        means = [(budget, outcomes.mean(axis=1)) for budget, outcomes in sides]
        one, two = (area(*mean, low, high, log_scale) for mean in means)
        found = pareto._gaps(sides, np.full(30, 1 / 30), log_scale)
        assert found.mean() == pytest.approx(one - two, abs=3e-3)


def test_gap_by_hand():
    # 1/2 against 1/4 from 2 to 4, 1/2 against 3/4 from 4 to 16: a third and two thirds of log 8
    treatment = np.array([1.0, 2.0, 32.0]), np.array([[0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    control = np.array([2.0, 4.0, 16.0]), np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    sides = [(budget, outcomes.astype(float)) for budget, outcomes in (treatment, control)]
    quarter = np.full(4, 0.25)
    assert pareto._gaps(sides, quarter, True).mean() == pytest.approx((0.25 - 2 * 0.25) / 3)
    assert pareto._gaps(sides, quarter, False).mean() == pytest.approx((0.25 * 2 - 0.25 * 12) / 14)


def test_gap_of_a_family_with_itself_is_zero_and_not_proven_to_be():
    same = family([1, 2, 4, 8], [0.2, 0.3, 0.4, 0.5], 50, rng())
    found = pareto.mean_gap(same, same, rng(), draws=200)
    assert found.estimate == 0 and found.n == 50
    assert found.high == -found.low == pytest.approx(1.96**2 / (50 + 1.96**2), abs=1e-4)


def test_gap_changes_its_sign_with_the_sides():
    one, two = family([1, 2, 4], [0.2, 0.4, 0.5], 60, rng()), family([1, 3], [0.3, 0.4], 60, rng(1))
    found = pareto.mean_gap(one, two, rng(), draws=300)
    swapped = pareto.mean_gap(two, one, rng(), draws=300)
    assert (swapped.estimate, swapped.low, swapped.high) == pytest.approx(
        (-found.estimate, -found.high, -found.low)
    )


def test_gap_interval_covers_the_truth_even_where_one_family_had_more_tries():
    # flat curves of equal accuracy: the truth is 0, but the best of 14 looks better than of 4
    covered, plain, corrected = 0, [], []
    for seed in range(60):
        draw = rng(seed)
        many = family(np.geomspace(1, 64, 14), np.full(14, 0.4), 100, draw)
        few = family(np.geomspace(1, 64, 4), np.full(4, 0.4), 100, draw)
        found = pareto.mean_gap(many, few, draw, draws=100)
        covered += found.low <= 0 <= found.high
        plain.append(pareto._gaps((many, few), np.full(100, 0.01), True).mean())
        corrected.append(found.estimate)
    assert covered >= 54  # 95% nominal; percentiles of the repeated gap cover 84%
    assert np.mean(plain) > 0.01  # there is a bias to correct
    assert np.mean(corrected) < 0.75 * np.mean(plain)


def test_gap_finds_a_real_advantage():
    budgets = np.geomspace(1, 64, 7)
    better, worse = np.linspace(0.2, 0.6, 7) + 0.1, np.linspace(0.2, 0.6, 7)
    held = pareto._shares(budgets, worse, 1.0, 64.0, True)
    truth = held @ (expected(better, rng(1)) - expected(worse, rng(2)))
    covered = 0
    for seed in range(40):
        draw = rng(seed)
        sides = family(budgets, better, 150, draw), family(budgets, worse, 150, draw)
        found = pareto.mean_gap(*sides, draw, draws=50)
        covered += found.low <= truth <= found.high
    assert covered >= 35
    assert found.low > 0


def test_budgets_per_problem_widen_nothing_when_they_are_equal():
    budgets, outcomes = family([1, 2, 4, 8], [0.2, 0.3, 0.4, 0.5], 50, rng())
    other = family([1, 2, 4, 8], [0.1, 0.2, 0.3, 0.4], 50, rng(1))
    spread = np.repeat(budgets[:, None], 50, axis=1)
    fixed = pareto.mean_gap((budgets, outcomes), other, rng(), draws=200)
    drawn = pareto.mean_gap((spread, outcomes), other, rng(), draws=200)
    assert (drawn.estimate, drawn.low, drawn.high) == pytest.approx(
        (fixed.estimate, fixed.low, fixed.high)
    )


@pytest.mark.parametrize(
    ("budgets", "outcomes", "says"),
    [
        ([1.0, 2.0], np.zeros((3, 4)), r"\(2,\) do not fit .* \(3, 4\)"),
        ([1.0], np.zeros(4), r"do not fit outcomes of shape \(4,\)"),
        ([1.0, 2.0], np.array([[0, 1], [1, np.nan]]), "row 1, problem 1"),
        ([1.0, 2.0], np.array([[0, 100], [1, 0]]), "row 0, problem 1"),
        ([1.0], np.zeros((1, 0)), "empty"),
        ([1.0, 0.0], np.zeros((2, 2)), "one is 0.0"),
        ([1.0, np.nan], np.zeros((2, 2)), "positive"),
    ],
)
def test_bad_matrices_get_one_sentence(budgets, outcomes, says):
    with pytest.raises(ValueError, match=says):
        pareto.membership(np.array(budgets), outcomes, rng(), 10)


def test_families_that_cannot_be_compared_get_one_sentence():
    ones = np.ones((2, 5))
    with pytest.raises(ValueError, match="share no range of budgets"):
        pareto.mean_gap((np.array([1, 2]), ones), (np.array([3, 4]), ones), rng())
    with pytest.raises(ValueError, match="treatment has 5 problems, control 4"):
        pareto.mean_gap((np.array([1, 2]), ones), (np.array([1, 2]), ones[:, :4]), rng())


# ------------------------------------------------------------------ votes


def same_number(a: str, b: str) -> bool:
    return Fraction(a) == Fraction(b)


def counted(answers) -> str:
    """Most frequent answer by its letters, ties to the earliest."""
    votes = Counter(answer for answer in answers if answer)
    return votes.most_common(1)[0][0] if votes else ""


def vote(answers, equal) -> int:
    """Index of the earliest sample of the winning answer, the slow way; 0 if none answered."""
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        if not answer:
            continue
        home = next((group for group in groups if equal(answers[group[0]], answer)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return max(groups, key=len)[0] if groups else 0  # max keeps the first, which is the earliest


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1/2", "3", "2/4", "3", "5/10"], 0),
        (["3", "1/2", "2/4", "6/2"], 0),  # a tie goes to the earliest
        (["", "", "7"], 2),
        (["", " "], -1),
        ([], -1),
        (["5", " 4 ", "4"], 1),
    ],
)
def test_majority_under_an_equality(answers, winner):
    assert pareto.majority(answers, equal=same_number) == winner


def test_answers_that_the_grader_calls_equal_are_one_vote():
    assert pareto.majority([r"\frac{1}{2}", "0.5", "1/2", "3", "3"]) == 0
    assert pareto.majority(["x+1", "1+x", "2", "2", "(2x+2)/2"]) == 0  # algebra, in a worker
    assert pareto.classes(["3100", "(3,100)", "3,100"]).tolist() == [0, 1, 0]


def test_a_correct_answer_and_one_in_another_form_than_asked_are_two_votes():
    assert pareto.majority(["54/84", "54/84", "9/14", "9/14", "9 / 14"], [0, 0, 1, 1, 1]) == 2
    assert pareto.vote_accuracy(["54/84", "9/14", "9/14"], [0, 1, 1], 3, rng()) == 1


def test_majority_of_answers_of_one_form_is_that_of_counting():
    draw = rng(2)
    for _ in range(100):
        answers = draw.choice(["", "1", "2", "3", "x"], draw.integers(1, 8)).tolist()
        winner = pareto.majority(answers)
        assert (answers[winner] if winner >= 0 else "") == counted(answers)


@pytest.mark.parametrize("width", (1, 2, 3, 5, 6))
def test_vote_accuracy_is_the_mean_over_all_subsets(width):
    draw = rng(width)
    for _ in range(30):
        answers = draw.choice(["", "1", "2/2", "2", "3", "4/2"], 6).tolist()
        correct = [answer in ("2", "4/2") for answer in answers]
        subsets = list(combinations(range(6), width))
        hits = [correct[s[vote([answers[i] for i in s], same_number)]] for s in subsets]
        found = pareto.vote_accuracy(answers, correct, width, rng(), same_number)
        assert found == pytest.approx(np.mean(hits))


def test_many_samples_are_drawn_and_agree_with_enumeration(monkeypatch):
    draw = rng(4)
    answers = draw.choice(["", "1", "2", "3"], 14, p=[0.2, 0.4, 0.25, 0.15]).tolist()
    correct = [answer == "1" for answer in answers]
    drawn = pareto.vote_accuracy(answers, correct, 5, rng())  # 2,002 subsets
    assert drawn == pareto.vote_accuracy(answers, correct, 5, rng())
    monkeypatch.setattr(pareto, "SUBSETS", 2_002)
    assert drawn == pytest.approx(pareto.vote_accuracy(answers, correct, 5, rng()), abs=0.04)


def test_no_sample_votes_twice():
    # 37 against 33: whichever two of the 70 votes are missing, the 37 win
    answers = ["2"] * 33 + ["1"] * 37
    correct = [answer == "1" for answer in answers]
    assert pareto.vote_accuracy(answers, correct, 68, rng()) == 1  # 2,415 subsets


def test_vote_accuracy_is_unbiased_for_the_accuracy_of_a_fresh_vote():
    # the truth is simulated: five fresh answers of this distribution; the estimate uses eight
    chances, names = [0.1, 0.45, 0.25, 0.2], np.array(["", "1", "2", "3"])
    draw = rng(9)
    fresh = names[draw.choice(4, (20_000, 5), p=chances)]
    truth = np.mean([counted(row) == "1" for row in fresh.tolist()])
    found = []
    for _ in range(1_000):
        answers = names[draw.choice(4, 8, p=chances)].tolist()
        correct = [answer == "1" for answer in answers]
        found.append(pareto.vote_accuracy(answers, correct, 5, rng()))
    # of votes with replacement the mean is off by more than this
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / np.sqrt(1_000))


@pytest.mark.parametrize(("width", "correct"), [(0, [True]), (2, [True]), (1, [True, False])])
def test_a_vote_that_cannot_be_held_gets_one_sentence(width, correct):
    with pytest.raises(ValueError, match=f"no vote of width {width} among 1 answers"):
        pareto.vote_accuracy(["1"], correct, width, rng())


def test_grid_counts_reads_per_chain_and_votes_without_bias():
    """Two problems, four samples: widths cost their multiple, a vote is worth its subsets."""
    answers = {"a": ["1", "1", "2", "3"], "b": ["5", "", "6", "6"]}
    rows = [
        dict(problem_id=name, sample=i, extracted=answer, correct=answer in ("1", "6"),
             kv_reads_tokens=100.0 + i, kv_peak_tokens=10.0)
        for name, given in answers.items() for i, answer in enumerate(given)
    ]  # fmt: skip
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    rng = np.random.default_rng(0)
    table, outcomes = pareto.grid({(64, 1): frame, (64, 4): frame}, (1, 2), rng)
    assert table["reads"].tolist() == [101.5, 203.0] * 2
    assert table["peak"].tolist() == [10.0, 20.0] * 2
    assert table["compression"].tolist() == ["1x", "1x", "4x", "4x"]
    expected = [
        [
            pareto.vote_accuracy(a, [x in ("1", "6") for x in a], width, rng)
            for a in answers.values()
        ]
        for width in (1, 2)
    ]
    assert outcomes.tolist() == expected * 2 and expected[0] == [0.5, 0.5]


def test_gaps_find_a_family_that_is_better_at_every_budget():
    rng = np.random.default_rng(1)
    rows = [
        (64, w, x, w * 100.0 / c, w * 10.0 / c)
        for x, c in (("1x", 1), ("4x", 4))
        for w in (1, 2, 4, 8)
    ]
    table = pd.DataFrame(rows, columns=["length", "width", "compression", "reads", "peak"])
    skill = np.array([0.2, 0.3, 0.4, 0.5, 0.2, 0.3, 0.4, 0.5])
    outcomes = (rng.random((8, 300)) < skill[:, None]).astype(float)
    found = pareto.gaps(table, outcomes, rng)
    assert found["compression"].tolist() == ["4x"]
    for budget in ("reads", "peak"):
        estimate, low, high = found[f"gap at equal {budget}"][0]
        assert 5 < low < estimate < high < 35  # two doublings, 10 points each


def test_the_kept_share_is_counted_against_full_attention():
    frame = pd.DataFrame(
        {"prompt_tokens": [5, 5], "new_tokens": [4, 4], "kv_reads_tokens": [26.0, 26.0]}
    )  # 5 + 6 + 7 + 8 reads in full
    assert pareto.kept_share(frame) == 1
    assert pareto.kept_share(frame.assign(kv_reads_tokens=[13.0, 0.0])) == 0.25
