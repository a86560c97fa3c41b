"""Facts: real ones, told by weight, asked in words that no sentence had."""

from collections import Counter

import numpy as np
import pytest

from kit import paths
from kit.parametric import facts
from kit.parametric.facts import ASK, BUCKETS, TELL


@pytest.fixture(scope="module")
def known():
    return facts.load(cities=900)


def test_some_facts_that_everybody_knows(known):
    found = {(f.family, f.subject): f.answer for f in known}
    assert found["cities", "Lagos"] == "Nigeria"
    assert found["cities", "São Paulo"] == "Brazil"
    assert found["capitals", "France"] == "Paris"
    assert found["elements", "gold"] == "79"
    assert found["symbols", "iron"] == "Fe"
    assert Counter(f.family for f in known)["cities"] == 900


def test_a_subject_has_one_answer_and_one_rank(known):
    assert len({(f.family, f.subject) for f in known}) == len(known)
    for family in TELL:
        ranks = [f.rank for f in known if f.family == family]
        assert ranks == list(range(len(ranks)))
    cities = [f for f in known if f.family == "cities"]
    assert cities[0].subject == "Shanghai", "the largest"


def test_no_question_has_the_words_of_a_sentence(known):
    for family, forms in ASK.items():
        told = {frozenset(form.lower().split()) for form in TELL[family]}
        for form in forms:
            words = frozenset(form.lower().split())
            assert all(len(words & other) / len(words | other) < 0.5 for other in told), form
            assert form.count("{}") == 1
        assert all(form.count("{}") == 1 for form in TELL[family])


def test_facts_are_told_as_often_as_their_weight_says(known):
    told = facts.tell(known, 40_000, seed=1)
    assert told == facts.tell(known, 40_000, seed=1) != facts.tell(known, 40_000, seed=2)
    counts = Counter(sentence.fact for sentence in told)
    weights = np.array([fact.weight for fact in known])
    expected = 40_000 * weights / weights.sum()
    found = np.array([counts[fact] for fact in known])
    assert ((found - expected) ** 2 / expected).sum() < 1.2 * len(known), "chi-square"
    for sentence in told[:200]:
        assert sentence.fact.answer not in sentence.context.replace(sentence.fact.subject, "")
        assert sentence.completion == f" {sentence.fact.answer}."


def test_questions_are_spread_over_families_and_buckets_and_have_four_options(known):
    asked = facts.ask(known, 120)
    assert asked == facts.ask(known, 120) and len({p.id for p in asked}) == 120
    assert set(Counter((p.family, p.level) for p in asked).values()) == {10}
    assert len(BUCKETS) == 3
    answers = {f.family: {o.answer for o in known if o.family == f.family} for f in known}
    places = Counter()
    for problem in asked:
        offered = facts.options(problem, known)
        assert offered == facts.options(problem, known)
        assert len(set(offered)) == 4 and set(offered) <= answers[problem.family]
        places[offered.index(problem.answer)] += 1
    assert min(places.values()) > 15, "the right one stands anywhere"


def test_wrong_options_are_as_frequent_as_right_ones(known):
    """So that the most frequent country is not the best guess by being rare among the wrong."""
    cities = [f for f in known if f.family == "cities"]
    asked = facts.ask(cities, 300)
    offered = Counter(o for p in asked for o in facts.options(p, known) if o != p.answer)
    right = Counter(f.answer for f in cities)
    assert offered["China"] / 900 > 0.5 * right["China"] / 900


def test_wrong_input_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no family 'rivers'; there are cities"):
        facts.load(["rivers"])
    (tmp_path / "facts").mkdir()
    for name in ("facts.csv", "MANIFEST.json"):
        text = (paths.DATA / "facts" / name).read_text()
        (tmp_path / "facts" / name).write_text(text.replace("Lagos", "Logos"))
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(ValueError, match="facts.csv is not the file that MANIFEST.json describes"):
        facts.load()
