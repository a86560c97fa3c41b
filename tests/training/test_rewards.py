"""Rewards on good and bad strings, against values worked out by hand."""

import math

import pytest

from kit.data import problems
from kit.schema import Problem
from kit.training import rewards

GOOD, BAD = "2 + 2 is four.\nAnswer: 4", "It is five.\nAnswer: 5"


@pytest.mark.parametrize(
    "text, gold, accuracy, compliance",
    [
        (GOOD, "4", 1, 1),
        (BAD, "4", 0, 1),
        ("so 4", "4", 1, 0),  # right without the form
        (r"\boxed{\frac{1}{2}}", "0.5", 1, 0),
        (r"\boxed{\frac{1}{2}", "1/2", 1, 0),  # never closed, yet its last number is right
        ("", "4", 0, 0),
        ("Answer: 4 or 5", "4", 0, 1),
        ("Answer: 4\nAnswer: 5", "4", 0, 1),  # the last one counts
        ("Answer: __import__('os')", "4", 0, 1),
        ("4" * 10_000, "4", 0, 0),
        ("Answer: 4", "", 0, 1),  # no gold is no reward
    ],
)
def test_accuracy_and_compliance(text, gold, accuracy, compliance):
    assert rewards.accuracy([text], [gold]) == [accuracy]
    assert rewards.compliance([text]) == [compliance]
    chat = [[{"role": "assistant", "content": text}]]
    assert rewards.accuracy(chat, [gold]) == [accuracy], "chat messages are texts"


@pytest.mark.parametrize(
    "text, value",
    [
        (GOOD, 1),
        (BAD, 0),
        ("<think>4 4 4</think>\n\\boxed{4}", 1),
        ("The answer is $4$.", 1),
        ("so 4", 0),
        ("1 2 3 4", 0),
        ("4 4 4 4", 0),
    ],
)
def test_open_rs_pays_for_an_anchored_answer_alone(text, value):
    assert rewards.anchored([text], ["4"]) == [value]
    (cosine,) = rewards.cosine_published([text], ["4"], longest=10**6)
    assert cosine == pytest.approx(1.0 if value else 0.0, abs=1e-6)


@pytest.mark.parametrize(
    "text, value",
    [
        ("a\n</think>\nb", 1),
        ("a</think>b", 0),
        ("a\n</think>\nb\n</think>\nc", 0),
        ("\n</think>", 0),
        ("", 0),
    ],
)
def test_the_published_format_is_one_closing_line(text, value):
    assert rewards.think([text]) == [value]


def padded(length: int, right: bool = True) -> str:
    said = GOOD if right else BAD
    return "x" * (length - len(said) - 1) + "\n" + said


@pytest.mark.parametrize("ratio, right, wrong", [(1, 0.5, -0.5), (2, 1.0, 0.0), (3, 0.5, -0.5)])
def test_the_published_cosine_is_periodic(ratio, right, wrong):
    """At 0, 1, 2, 3 times the limit a correct answer earns 1, .5, 1, .5: nothing is clipped."""
    texts = [padded(1000 * ratio), padded(1000 * ratio, right=False)]
    assert rewards.cosine_published(texts, ["4", "4"]) == pytest.approx([right, wrong])


def test_the_intended_cosine_falls_and_then_stays():
    lengths = [0, 250, 500, 1000, 2500]
    ids = [[0] * n for n in lengths]
    right = rewards.cosine([GOOD] * 5, ids, ["4"] * 5)
    wrong = rewards.cosine([BAD] * 5, ids, ["4"] * 5)
    middle = 0.25 * (1 + math.cos(math.pi / 4))
    assert right == pytest.approx([1.0, 0.5 + middle, 0.75, 0.5, 0.5])
    assert wrong == pytest.approx([-0.5, -middle, -0.25, 0.0, 0.0]), "shorter is punished more"


@pytest.mark.parametrize(
    "text, value",
    [
        ("so the angle is π/2 = 90°", 0),
        ("所以答案是四", -1),
        ("ab 答案", -0.5),
        ("12 + 30 = 42", 0),
        ("ответ abc", -5 / 8),
    ],
)
def test_drift_is_the_share_of_letters_in_another_script(text, value):
    assert rewards.drift(["What is 2 + 2?"], [text]) == [value]
    chinese = [[{"role": "user", "content": "二加二是多少 or so?"}]]
    assert rewards.drift(chinese, ["ab 答案"]) == [0]


def test_a_gold_that_cannot_be_read_is_an_error_at_load_time():
    rewards.check_golds(problems.load("laptop", "train").problems)
    for gold in ("", " "):
        bad = Problem("p7", "What?", gold, "f", 1, "mine")
        with pytest.raises(ValueError, match="Problem p7 of mine has the gold answer"):
            rewards.check_golds([bad])


def test_repetition_and_overlong_are_small_negative_numbers():
    """By hand: of the 4 triples in 1 2 1 2 1 2 two are new; the last fifth of 100 is a slope."""
    assert rewards.repetition([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4], [1]]) == [-0.5, 0, 0]
    lengths = [[0] * n for n in (10, 80, 90, 100, 300)]
    assert rewards.overlong(lengths, longest=100) == [0, 0, -0.5, -1, -1]


def test_advantages_sum_to_zero_and_are_none_where_all_rewards_are_equal():
    made = rewards.advantages([1, 0, 0, 1])  # mean 1/2, standard deviation 1/sqrt(3)
    assert made == pytest.approx([0.5 / (3**-0.5 + 1e-4) * s for s in (1, -1, -1, 1)])
    assert rewards.advantages([0.3] * 4) == pytest.approx([0.0] * 4, abs=1e-9)
