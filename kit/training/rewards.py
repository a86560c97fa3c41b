r"""Rewards of GRPO: pure functions of texts, one number per completion.

    accuracy           1 where the grader finds the answer correct
    anchored           the same, and the answer stands in a box or after "answer", as in Open-RS
    compliance, think  1 where the answer has the format of the kit, or of Open-RS
    cosine_published   cosine of the length as coded in Open-RS: characters, unclipped, so periodic
    cosine             the same as its docstring describes it: tokens, clipped
    drift              minus the fraction of letters in another script than the prompt's
    repetition         TRL's penalty: minus the fraction of repeated 3-token sequences
    overlong           TRL's penalty: from 0 to -1 over the last fifth of the length limit

Each takes the arguments that TRL passes to a reward function (`completions`, `completion_ids`, and
the columns of the data set, of which `gold` is the answer) and ignores those that it does not need.
Sources: Open-RS, https://arxiv.org/abs/2503.16219, and https://github.com/knoveleng/open-rs,
src/open_r1/rewards.py at 2889c47.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from kit.data.prompts import FORM
from kit.evaluation import grader
from kit.schema import Grade, Problem

CORRECT, WRONG = (0.5, 1.0), (-0.5, 0.0)  # range of the cosine reward, as published
SYMBOLS = {"GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "PLANCK", "OHM", "MICRO"}


def advantages(rewards: Sequence[float]) -> np.ndarray:
    """The advantages of GRPO from the rewards of one group: how much better each answer is than the
    group, in standard deviations (https://arxiv.org/abs/2402.03300, Section 4.1; 1e-4 as in
    TRL)."""
    rewards = np.asarray(rewards, dtype=float)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)


def accuracy(completions: Sequence, gold: Sequence[str], asks=None, **_) -> list[float]:
    """1.0 where the grader finds `gold` in the form `asks`, see schema.ASKS, else 0.0."""
    return [float(verdict.correct) for verdict in _graded(completions, gold, asks)]


def anchored(completions: Sequence, gold: Sequence[str], asks=None, **_) -> list[float]:
    """1.0 where the grader finds `gold` in a box or after an answer phrase: the last number of a
    text is not enough. Open-RS requires the same (`try_extract_without_anchor=False`)."""
    return [float(_anchored(verdict)) for verdict in _graded(completions, gold, asks)]


def compliance(completions: Sequence, **_) -> list[float]:
    """1.0 where the answer has the format that the kit's prompts request, correct or not."""
    texts = _texts(completions)
    return [float(g.compliant) for g in grader.grade_many(texts, [""] * len(texts), FORM)]


def think(completions: Sequence, **_) -> list[float]:
    """Open-RS's format reward: 1.0 with exactly one line that is </think>, else 0.0."""
    return [float(text.count("\n</think>\n") == 1) for text in _texts(completions)]


def cosine_published(
    completions: Sequence, gold: Sequence[str], longest: int = 1000, asks=None, **_
) -> list[float]:
    """The cosine reward as coded: L / `longest` counts characters and is not clipped, and what is
    right is `anchored`.

    It has period 2 x `longest` characters, and up to `longest` a longer wrong answer costs more.
    """
    graded, texts = _graded(completions, gold, asks), _texts(completions)
    return [
        _between(CORRECT if _anchored(verdict) else WRONG, len(text) / longest)
        for verdict, text in zip(graded, texts, strict=True)
    ]


def cosine(
    completions: Sequence,
    completion_ids: Sequence[Sequence[int]],
    gold: Sequence[str],
    longest: int = 1000,
    asks=None,
    **_,
) -> list[float]:
    """The cosine reward as described: in tokens, clipped at `longest`; a correct answer earns less
    the longer it is (1.0 to 0.5), a wrong one is punished less (-0.5 to 0.0)."""
    values = []
    for verdict, ids in zip(_graded(completions, gold, asks), completion_ids, strict=True):
        part = min(1.0, len(ids) / longest)
        values.append(_between(CORRECT, part) if verdict.correct else _between(WRONG, 1 - part))
    return values


def drift(prompts: Sequence, completions: Sequence, **_) -> list[float]:
    """Minus the fraction of letters in scripts that the prompt does not use; Greek is exempt.

    0.0 for a completion without letters. Open-RS requests English in the prompt instead.
    """
    return [
        0.0 - _foreign(text, _scripts(prompt))  # not -0.0
        for text, prompt in zip(_texts(completions), map(_text, prompts), strict=True)
    ]


def repetition(completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
    """Minus the fraction of 3-token sequences that occurred before in the completion
    (https://arxiv.org/abs/2502.03373, Appendix C.2)."""
    from trl.rewards import get_repetition_penalty_reward  # importing TRL takes seconds

    return get_repetition_penalty_reward()(completion_ids)


def overlong(completion_ids: Sequence[Sequence[int]], longest: int = 1000, **_) -> list[float]:
    """0.0 up to four fifths of `longest` tokens, falling to -1.0 at `longest` and beyond (DAPO,
    https://arxiv.org/abs/2503.14476, Section 3.4)."""
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(longest, longest // 5)(completion_ids)


def check_golds(problems: Sequence[Problem]) -> None:
    """ValueError naming the first problem whose gold answer the grader cannot read.

    In Open-RS as published, any answer to such a problem earned 1.0.
    """
    golds, asks = [p.answer for p in problems], [p.asks for p in problems]
    boxed = [f"\\boxed{{{gold}}}" for gold in golds]
    for problem, verdict in zip(problems, grader.grade_many(boxed, golds, asks=asks), strict=True):
        if not verdict.correct:
            raise ValueError(
                f"Problem {problem.id} of {problem.source} has the gold answer "
                f"{problem.answer[:60]!r}, which the grader does not find in itself "
                f"({verdict.reason}); correct it or leave the problem out."
            )


def _between(ends: tuple[float, float], part: float) -> float:
    """The upper end at 0, the lower end at 1, along half a cosine."""
    least, most = ends
    return least + 0.5 * (most - least) * (1 + math.cos(math.pi * part))


def _anchored(verdict: Grade) -> bool:
    return verdict.correct and verdict.method in ("boxed", "answer line")


def _graded(completions, gold, asks):
    return grader.grade_many(_texts(completions), list(gold), FORM, asks)


def _texts(completions) -> list[str]:
    return [_text(completion) for completion in completions]


def _text(messages) -> str:
    """A string as it is, chat messages joined by line breaks."""
    return (
        messages if isinstance(messages, str) else "\n".join(m["content"] or "" for m in messages)
    )


def _scripts(text: str) -> set[str]:
    return {_script(letter) for letter in text if letter.isalpha()}


def _script(letter: str) -> str:
    """LATIN, CYRILLIC, CJK and so on: the first word of the letter's Unicode name."""
    return re.split(r"[ -]", unicodedata.name(letter, "UNKNOWN"), maxsplit=1)[0]


def _foreign(text: str, scripts_of_prompt: set[str]) -> float:
    scripts = [_script(letter) for letter in text if letter.isalpha()]
    scripts = [script for script in scripts if script not in SYMBOLS]
    return sum(script not in scripts_of_prompt for script in scripts) / max(1, len(scripts))
