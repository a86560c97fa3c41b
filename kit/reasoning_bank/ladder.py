"""The ladder of controls that gates the strategy study.

The first rung is a positive control on validation problems: the gold answer as memory, at each of
the places where memory can stand, against the same prompt without it. The place where it helps most
is where the study puts memory; if it helps by no more than MARGIN points there, the model does not
use memory given in this way, and no arm with memory can say anything about memory. The second rung
is `planted`, the third the problems that the study is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas

from kit.analysis import contrasts, tables
from kit.reasoning_bank.arms import oracle_hint
from kit.reasoning_bank.build import solve_prompt
from kit.reasoning_bank.dspy_backend import PLACES
from kit.schema import Problem, Prompt

MARGIN = 20.0  # points that the gold answer must be worth, at the low end of its interval
NO_HINT, HINT = "no-hint", "hint-{}"
PLANTED = "planted-{}"


@dataclass(frozen=True)
class Placement:
    """Where the prompt has memory, and the gain from the gold answer there."""

    place: str
    gain: contrasts.Measurement  # points over the same prompt without it
    ended: tuple[float, float, float] | None = None  # at equal finish, where the arms differ in it

    @property
    def used(self) -> bool:
        """Whether the positive control passed."""
        return self.gain.low > MARGIN

    def __str__(self) -> str:
        gain, interval = self.gain.texts()
        worth = (
            f'The gold answer as memory is worth {gain} ({interval}) in the place "{self.place}"'
        )
        if self.ended:
            worth += ", over the answers that ended {:.1f} ({:.1f} to {:.1f})".format(*self.ended)
        if self.used:
            return f"{worth}: this model uses memory given in this way."
        if self.gain.high > MARGIN:
            return (
                f"{worth}: {self.gain.n} problems do not show whether this is above {MARGIN:g}, so "
                f"nothing below says what memory does."
            )
        return (
            f"{worth}, not above {MARGIN:g}: this model does not use memory given in this way, and "
            f"nothing below says what memory does."
        )


def hints(problems: Sequence[Problem]) -> list[Prompt]:
    """The positive control: no memory, and the gold answer as memory at each place."""
    prompts = [solve_prompt(problem, NO_HINT) for problem in problems]
    for place in PLACES:
        prompts += oracle_hint(problems, place, HINT.format(place))
    return prompts


def placements(records: pandas.DataFrame) -> pandas.DataFrame:
    """The gain from the gold answer by place, from the records of `hints`: accuracy and share
    finished, percent, and the difference from no memory, points."""
    rows = []
    for place in PLACES:
        own = records[records["arm"] == HINT.format(place)]
        row = {"place": place} | {
            name: tables.share(own, name) for name in ("accuracy", "finished")
        }
        gain = _gain(records, place)
        row |= {"difference": (gain.estimate, gain.low, gain.high), "problems": gain.n}
        rows.append(row)
    return pandas.DataFrame(rows)


def choose(records: pandas.DataFrame, places: Sequence[str] = PLACES) -> Placement:
    """The one of `places` where the gold answer gains most; of equals the first."""
    best = max(places, key=lambda place: _gain(records, place).estimate)
    ended = tables.at_equal_finish(_contrast(best), records)
    return Placement(best, _gain(records, best), ended)


def planted(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The second rung: the same prompts under arms of their own, "planted-retrieved" and so on."""
    return [replace(each, arm=PLANTED.format(each.arm)) for each in prompts]


def planted_gains(records: pandas.DataFrame) -> pandas.DataFrame:
    """The gain from the right lesson, from the records of `planted`: accuracy with retrieved
    lessons minus that of each control, points, the lesson of another problem first."""
    arm, other = PLANTED.format("retrieved"), PLANTED.format("shuffled")
    table = tables.against(records, arm, sorted({*records["arm"]} - {arm}), other)
    share = {name: tables.share(records[records["arm"] == name]) for name in {*records["arm"]}}
    return table.drop(columns="primary").assign(
        accuracy=[share[arm]] * len(table), of_control=[share[c] for c in table["control"]]
    )


def _gain(records: pandas.DataFrame, place: str) -> contrasts.Measurement:
    return contrasts.compute(_contrast(place), records)


def _contrast(place: str) -> dict[str, str]:
    return {"measure": "accuracy", "arm": HINT.format(place), "control": NO_HINT}
