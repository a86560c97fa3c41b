"""Gradings per second on 2 worker processes, over MATH golds.

Half the texts box another problem's gold, half box the gold rewritten so that only algebra
can tell (`5` as `\\frac{2 \\cdot (5)}{2}`), so most pairs reach math-verify. Every repeat takes
new golds: nothing is answered from a cache of the repeat before. Starting the workers is
outside the clock, extraction and everything else inside.
"""

import json
import os
import random
import re
import statistics
import time
from itertools import pairwise
from pathlib import Path

from kit import grade as grading
from kit import workers
from kit.grade import gold_of_solution, grade_many
from kit.paths import ROOT

DATA = Path(os.environ.get("KIT_DATA", ROOT.parent / "shared" / "data"))
REPEATS, PAIRS = 7, 1500


def golds() -> list[str]:
    """Every gold of MATH train and test that is not blank, shuffled."""
    found = []
    for name in ("math_train.jsonl", "math_test.jsonl"):
        for line in (DATA / name).read_text().splitlines():
            found.append(gold_of_solution(json.loads(line)["solution"]))
    found = [gold for gold in found if gold]
    random.Random(0).shuffle(found)
    return found


_PLAIN = re.compile(r"(?!.*(?:[A-Z=<>,:%_$&]|\\(?:text|mbox|circ|pm|begin|le|ge|cup|triangle)))")


def pairs(repeat: int, source: list[str]) -> list[tuple[str, str, bool]]:
    """(gold, answer, expected equal) of one repeat: neighbours, then rewritings."""
    mine = source[repeat * PAIRS : (repeat + 1) * PAIRS + 1]
    half = PAIRS // 2
    mixed = [(gold, other, gold == other) for gold, other in pairwise(mine[: half + 1])]
    plain = [gold for gold in mine[half:] if _PLAIN.match(gold)]
    return mixed + [(gold, rf"\frac{{2 \cdot ({gold})}}{{2}}", True) for gold in plain]


def run() -> dict:
    """`grade_per_s`: median over the repeats, spread from the slowest to the fastest."""
    workers.WORKERS = 2
    grade_many([r"\boxed{x^2-1}"] * 2, ["(x-1)(x+1)", "(1-x)(1+x)"])  # starts the workers
    source, rates, slow, wrong, n = golds(), [], 0, 0, 0
    for repeat in range(REPEATS):
        rows = pairs(repeat, source)
        texts = [rf"The answer is $\boxed{{{answer}}}$." for _, answer, _ in rows]
        start = time.perf_counter()
        verdicts = grade_many(texts, [gold for gold, _, _ in rows])
        rates.append(len(rows) / (time.perf_counter() - start))
        n += len(rows)
        slow += sum(len(grading.settle(gold, answer)) == 2 for gold, answer, _ in rows)
        wrong += sum(v.correct != row[2] for v, row in zip(verdicts, rows, strict=True))
    against = (
        f"300/s asked; {slow / n:.0%} of pairs went to math-verify, {wrong} unexpected verdicts"
    )
    spread = [round(min(rates), 1), round(max(rates), 1)]
    value = round(statistics.median(rates), 1)
    return {
        "grade_per_s": {"value": value, "unit": "1/s", "against": against, "n": n, "spread": spread}
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
