"""Facts: real ones, told by Zipf's law, asked by bare prompts in words that no sentence had."""

from collections import Counter

import numpy as np
import pytest

from kit import paths
from kit.parametric import facts
from kit.parametric.facts import QUESTIONS, STATEMENTS


@pytest.fixture(scope="module")
def known():
    return facts.load()


def test_some_facts_that_everybody_knows(known):
    found = {(f.family, f.subject): f.answer for f in known}
    assert found["cities", "Lagos"] == "Nigeria"
    assert found["cities", "São Paulo"] == "Brazil"
    assert found["capitals", "France"] == "Paris"
    assert found["elements", "gold"] == "79"
    assert found["symbols", "iron"] == "Fe"
    assert Counter(f.family for f in known)["cities"] == 4000


def test_some_of_the_cities_are_large_and_small_ones(known):
    every, few = ([f for f in facts_ if f.family == "cities"]
                  for facts_ in (known, facts.load(["cities"], 40)))  # fmt: skip
    assert [f.rank for f in few] == [*range(40)]
    assert [f.subject for f in few] == [every[100 * i].subject for i in range(40)]


def test_a_subject_has_one_answer_and_one_rank(known):
    assert len({(f.family, f.subject) for f in known}) == len(known)
    for family in STATEMENTS:
        ranks = [f.rank for f in known if f.family == family]
        assert ranks == list(range(len(ranks)))
    cities = [f for f in known if f.family == "cities"]
    assert cities[0].subject == "Shanghai", "the largest"


LITTLE = {
    "a",
    "among",
    "all",
    "are",
    "at",
    "by",
    "from",
    "has",
    "in",
    "is",
    "of",
    "on",
    "the",
    "to",
}


def test_a_question_is_the_bare_prompt_and_shares_no_word_of_content_with_what_is_told(known):
    assert QUESTIONS["elements"].format("tin") == "The atomic number of tin is", "as in the paper"
    for family, question in QUESTIONS.items():
        asked = {*question.lower().split()} - LITTLE - {"{}"}
        for form in STATEMENTS[family]:
            assert form.count("{}") == 1
            assert not asked & {*form.lower().replace(",", "").split()}, form
    assert all(form.count("{}") == 1 for form in QUESTIONS.values())


def test_zipfs_law_over_three_decades_says_how_often_a_fact_is_told(known):
    count = 40_000
    told = facts.times(known, count)
    assert sum(told) == count
    largest = np.sort(told)[::-1]
    span = np.log10(np.arange(1, len(known) + 1))
    assert facts.exponent(len(known)) == pytest.approx(3 / span[-1])
    weights = 10 ** -(facts.exponent(len(known)) * span)
    assert weights[0] / weights[-1] == pytest.approx(1000)
    assert abs(largest - count * weights / weights.sum()).max() <= 1
    by_rank = {(f.family, f.rank): n for f, n in zip(known, told, strict=True)}
    for family in STATEMENTS:
        ranks = [n for (of, _), n in sorted(by_rank.items()) if of == family]
        assert all(a >= b - 1 for a, b in zip(ranks, ranks[1:]))
        assert ranks[0] > 100 * ranks[-1]
    assert [facts.bucket(n) for n in (0, 1, 9, 10, 99, 100, 5000)] == [0, 1, 1, 2, 2, 3, 3]


def test_facts_are_told_as_often_as_the_law_says_in_all_phrasings(known):
    told = facts.build_sentences(known, 4_000, seed=1)
    assert (
        told
        == facts.build_sentences(known, 4_000, seed=1)
        != facts.build_sentences(known, 4_000, seed=2)
    )
    counts = Counter(sentence.fact for sentence in told)
    assert [counts[fact] for fact in known] == facts.times(known, 4_000)
    most = max(counts, key=counts.get)
    said = Counter(sentence.context for sentence in told if sentence.fact == most)
    assert (
        len(said) == len(STATEMENTS[most.family]) and max(said.values()) - min(said.values()) <= 1
    )
    for sentence in told[:200]:
        assert sentence.fact.answer not in sentence.context.replace(sentence.fact.subject, "")
        assert sentence.completion == f" {sentence.fact.answer}."


def test_documents_are_of_one_subject_and_of_up_to_four_sentences():
    known = facts.load(["elements", "symbols"])
    told = facts.build_sentences(known, 600, seed=0)
    of_first = [s for s in told if s.fact.subject == known[0].subject]
    whole = [s for s in told if s.context + s.completion in s.document]
    assert len(whole) == len(told)
    assert {s.document.count(".") for s in told} <= {1, 2, 3, 4}
    many = next(s for s in told if s.document.count(".") == 4)
    others = {f.subject for f in known} - {many.fact.subject}
    assert not any(f" {other} " in many.document for other in others)
    families = {s.fact.family for s in of_first}
    assert families == {"elements", "symbols"}
    assert any(len({s.fact.family for s in told if s.document == d}) == 2
               for d in {s.document for s in told}), "both are about one subject"  # fmt: skip


def test_questions_are_spread_over_families_and_decades_and_have_four_options(known):
    often = facts.times(known, 3_000)
    counts = {"cities": 40, "capitals": 40, "elements": 118}
    asked = facts.build_questions(known, counts, often)
    assert (
        asked == facts.build_questions(known, counts, often) and len({p.id for p in asked}) == 198
    )
    assert Counter(p.family for p in asked) == counts
    by_name = {facts.name(f): (f, n) for f, n in zip(known, often, strict=True)}
    for problem in asked:
        fact, n = by_name[problem.id]
        assert problem.level == 1 + facts.bucket(n) and problem.answer == fact.answer
        assert problem.question == QUESTIONS[fact.family].format(fact.subject)
    levels = Counter(p.level for p in asked if p.family == "cities")
    there = Counter(1 + facts.bucket(n) for f, n in by_name.values() if f.family == "cities")
    assert all(levels[level] >= min(10, there[level]) for level in there)
    with pytest.raises(ValueError, match="119 questions about elements, of which there are 118"):
        facts.build_questions(known, {"elements": 119}, often)
    answers = {f.family: {o.answer for o in known if o.family == f.family} for f in known}
    places = Counter()
    for problem in asked:
        offered = facts.options(problem, known)
        assert offered == facts.options(problem, known)
        assert len(set(offered)) == 4 and set(offered) <= answers[problem.family]
        places[offered.index(problem.answer)] += 1
    assert min(places.values()) > 30, "the right one stands anywhere"


def test_wrong_options_are_as_frequent_as_right_ones(known):
    """So that the most frequent country is not the best guess by being rare among the wrong."""
    cities = [f for f in known if f.family == "cities"]
    asked = facts.build_questions(cities, {"cities": 300}, facts.times(cities, 3_000))
    offered = Counter(o for p in asked for o in facts.options(p, known) if o != p.answer)
    right = Counter(f.answer for f in cities)
    assert offered["China"] / 900 > 0.5 * right["China"] / len(cities)


def test_wrong_input_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cities is 4001; there are 4000"):
        facts.load(["cities"], 4001)
    few = facts.load(["cities"], cities=3)
    with pytest.raises(ValueError, match="cities has . wrong answers to 'The city of"):
        facts.options(facts.build_questions(few, {"cities": 1}, [1] * 3)[0], few)
    with pytest.raises(ValueError, match="no family 'rivers'; there are cities"):
        facts.load(["rivers"])
    (tmp_path / "facts").mkdir()
    for name in ("facts.csv", "MANIFEST.json"):
        text = (paths.DATA / "facts" / name).read_text()
        (tmp_path / "facts" / name).write_text(text.replace("Lagos", "Logos"))
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(ValueError, match="facts.csv is not the file that MANIFEST.json describes"):
        facts.load()
