"""Planted rules: only the lesson tells them, and the guard lets it pass."""

import re

import pytest

from kit.evaluation import grader
from kit.models import embedder
from kit.reasoning_bank import arms, build, planted
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.strategy import leak_reason


@pytest.fixture(scope="module")
def rules():
    return planted.rules(24)


def solved(problem, rule) -> str:
    """The answer by what the lesson of the rule says, read from its text."""
    text = planted.lessons([rule])[0].content
    if rule.kind == "operator":
        a, b = map(int, re.findall(r"\d+", problem.question))
        tens, twice, shift = (
            "ten times" in text,
            "a plus a" in text,
            int(re.findall(r"\d+", text)[-1]),
        )
        return str((10 * a if tens else a + a if twice else a) + b + shift)
    table = dict(re.findall(r"(\w+) as (\d+)", text))
    if rule.kind == "code":
        return "".join(
            table[letter] for letter in re.search(r"Write (\w+) in", problem.question)[1]
        )
    (word,) = [word for word in table if f" {word} " in f" {problem.question.rstrip('?')} "]
    return table[word]


def test_a_lesson_solves_its_problems_and_only_these(rules):
    by_name = {rule.name: rule for rule in rules}
    assert len(by_name) == 24 and {rule.kind for rule in rules} == {*planted.KINDS}
    problems = planted.problems(rules, 3)
    assert len({problem.question for problem in problems}) == 72
    for problem in problems:
        assert solved(problem, by_name[problem.family]) == problem.answer
        assert grader.grade(f"Answer: {problem.answer}", problem.answer).correct


def test_the_guard_keeps_back_no_rule(rules):
    lessons = planted.lessons(rules)
    for problem in planted.problems(rules, 3):
        assert [leak_reason(lesson, problem) for lesson in lessons] == [""] * 24


def test_the_same_seed_plants_the_same(rules):
    assert rules == planted.rules(24) and rules[:6] != planted.rules(24, seed=1)[:6]
    assert planted.problems(rules, 2) == planted.problems(rules, 2) != planted.problems(rules, 2, 1)
    with pytest.raises(ValueError, match="names for rules, not 10000; ask for fewer"):
        planted.rules(10_000)


def test_retrieval_finds_the_rule_and_the_controls_do_not(tmp_path, rules):
    bank = ReasoningBank(tmp_path, embedder.load())
    bank.add(planted.lessons(rules))
    of = {item.id: item.family for item in bank.strategies()}
    problems = planted.problems(rules, 2)

    def right(prompts):
        return sum(of[p.retrieved[0]] == p.problem.family for p in prompts) / len(prompts)

    assert right(build.retrieved(bank, problems, 1)) > 0.9
    assert right(arms.shuffled(bank, problems, 1)) < 0.1
    assert right(arms.random_retrieval(bank, problems, 1)) < 0.2
