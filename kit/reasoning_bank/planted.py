"""Planted rules: problems that nobody can solve without the one lesson that explains their rule.

Lists name a number for a colour, codes write letters as digits, operators compute an expression,
all of them invented: to be looked up, put together, or worked out. Nothing in a question tells its
rule, so what an arm solves beyond guessing it has from memory. The right lesson retrieved, against
a random, another problem's or an irrelevant one, shows what retrieval is worth whatever the model
knows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kit.reasoning_bank.strategy import Strategy
from kit.schema import Problem, digest

KINDS = ("list", "code", "operator")  # easiest first
COLOURS = ("red", "blue", "green", "black", "white", "gold", "pink", "grey", "brown", "violet")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without those that look like digits
FORMS: tuple[tuple[str, Callable[[int, int, int], int]], ...] = (
    ("a plus b, plus {}", lambda a, b, c: a + b + c),
    ("a plus a plus b, plus {}", lambda a, b, c: a + a + b + c),
    ("ten times a, plus b, plus {}", lambda a, b, c: 10 * a + b + c),
)


@dataclass(frozen=True)
class Rule:
    """An invented rule: its name, what it says, and what comes of an input."""

    name: str
    kind: str  # one of KINDS
    text: str
    table: tuple[tuple[str, str], ...] = ()  # of a list or code: colour or letter, and number
    form: int = 0  # of an operator: index in FORMS
    shift: int = 0  # of an operator: what it adds

    def sample_question(self, draw: random.Random) -> tuple[str, str]:
        """A question and its answer."""
        if self.kind == "list":
            colour, answer = draw.choice(self.table)
            return f"Which number does the {self.name} list have for {colour}?", answer
        if self.kind == "code":
            sample = draw.sample(self.table, 3)
            word, answer = ("".join(part) for part in zip(*sample, strict=True))
            return f"Write {word} in the {self.name} code.", answer
        a, b = draw.sample(range(2, 10), 2)
        question = f"What is {a} {self.name} {b}?"
        return question, str(FORMS[self.form][1](a, b, self.shift))


def rules(count: int, seed: int = 0) -> list[Rule]:
    """`count` rules with different names, the kinds in turn."""
    draw = random.Random(f"rules {seed}")
    names = [first + second for first in ("bri", "cla", "dro", "fen", "glu", "kor", "mip", "nav",
             "pel", "quo", "rud", "sil", "tam", "vex", "wom", "zan")
             for second in ("dle", "fik", "gan", "lop", "mur", "nesh", "pod", "stir")]  # fmt: skip
    if count > len(names):
        raise ValueError(f"There are {len(names)} names for rules, not {count}; ask for fewer.")
    return [_rule(name, KINDS[i % 3], draw) for i, name in enumerate(draw.sample(names, count))]


def _rule(name: str, kind: str, draw: random.Random) -> Rule:
    if kind != "operator":
        name = name.capitalize()
    if kind == "list":
        numbers = map(str, draw.sample(range(11, 100), 4))
        table = tuple(zip(draw.sample(COLOURS, 4), numbers, strict=True))
        pairs = ", ".join(f"{colour} as {number}" for colour, number in table)
        return Rule(name, kind, f"The {name} list has {pairs}.", table=table)
    if kind == "code":
        table = tuple(zip(draw.sample(LETTERS, 5), draw.sample("123456789", 5), strict=True))
        pairs = ", ".join(f"{letter} as {digit}" for letter, digit in table)
        text = f"The {name} code writes {pairs}. Write the digits side by side, in order."
        return Rule(name, kind, text, table=table)
    form, shift = draw.randrange(len(FORMS)), draw.randint(1, 9)
    text = f"a {name} b means {FORMS[form][0].format(shift)}."
    return Rule(name, kind, text, form=form, shift=shift)


def problems(of: Sequence[Rule], each: int, seed: int = 0) -> list[Problem]:
    """`each` different problems per rule, whose `family` is its name."""
    problems = []
    for rule in of:
        draw, questions = random.Random(f"problems {rule.name} {seed}"), {}
        while len(questions) < each:
            questions |= [rule.sample_question(draw)]
        for question, answer in questions.items():
            own = f"{rule.kind}-{rule.name}-{digest(question, 8)}"
            problems.append(Problem(own, question, answer, rule.name, 1, "planted"))
    return sorted(problems, key=lambda problem: problem.id)


def lessons(of: Sequence[Rule]) -> list[Strategy]:
    """One strategy per rule, which says it and gives no answer."""
    return [
        Strategy(
            title=f"The {rule.name} {rule.kind}",
            description=f"When {rule.name} is asked for.",
            content=rule.text,
            kind="success",
            problem_id=f"rule-{rule.name}",
            family=rule.name,
            level=1,
            question=f"What does {rule.name} mean?",
            model="planted",
            extractor="planted",
        )
        for rule in of
    ]
