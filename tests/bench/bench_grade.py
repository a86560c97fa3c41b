"""Gradings per second on 2 worker processes, over MATH golds.

Half the texts box the gold of another problem, half box the gold rewritten so that only algebra
can tell (`5` as `\\frac{2 \\cdot (5)}{2}`), so most pairs reach math-verify. Every repeat takes
new golds, so that no cache answers for the repeat before. Extraction, rules and transport are
inside the clock; starting the workers and one repeat that warms their parser are not.
"""

import json
import os
import random
import re
import statistics
import time
from itertools import pairwise
from pathlib import Path

from kit.data.boxed import last_boxed
from kit.evaluation import sandbox
from kit.evaluation.extract import Extraction
from kit.evaluation.grader import grade_many, settle
from kit.paths import ROOT

DATA = Path(os.environ.get("KIT_DATA", ROOT.parent / "shared" / "data"))
REPEATS, PAIRS = 7, 1500
_PLAIN = re.compile(r"(?!.*(?:[A-Z=<>,:%_$&]|\.$|\\(?:text|mbox|circ|pm|begin|le|ge|cup)))")


def golds() -> list[str]:
    """Every gold of MATH train and test that is not blank, shuffled."""
    found = []
    for name in ("math_train.jsonl", "math_test.jsonl"):
        for line in (DATA / name).read_text().splitlines():
            found.append(last_boxed(json.loads(line)["solution"]))
    found = [gold for gold in found if gold]
    random.Random(0).shuffle(found)
    return found


def pairs(repeat: int, source: list[str]) -> tuple[list, list]:
    """(gold, answer) of one repeat: golds against their neighbours, golds against rewritings."""
    mine = source[repeat * PAIRS : (repeat + 1) * PAIRS]
    plain = [gold for gold in mine[PAIRS // 2 :] if _PLAIN.match(gold)]
    rewritten = [(gold, rf"\frac{{2 \cdot ({gold})}}{{2}}") for gold in plain]
    return list(pairwise(mine[: PAIRS // 2])), rewritten


def run() -> dict:
    """`grade_per_s`: median over the repeats, spread from the slowest to the fastest."""
    if not (DATA / "math_train.jsonl").is_file():
        return {"grade_per_s": {"skipped": "KIT_DATA names no folder with math_train.jsonl"}}
    sandbox.WORKERS = 2
    source, rates, slow, missed, n = golds(), [], 0, 0, 0
    for repeat in range(REPEATS + 1):
        mismatched, rewritten = pairs(repeat, source)
        asked = [gold for gold, _ in mismatched + rewritten]
        texts = [rf"The answer is $\boxed{{{answer}}}$." for _, answer in mismatched + rewritten]
        start = time.perf_counter()
        verdicts = grade_many(texts, asked)
        if repeat == 0:
            continue
        rates.append(len(asked) / (time.perf_counter() - start))
        n += len(asked)
        slow += sum(len(settle(gold, Extraction(answer, "boxed"))) == 2
                    for gold, answer in mismatched + rewritten)  # fmt: skip
        missed += sum(not verdict.correct for verdict in verdicts[len(mismatched) :])
    against = f"300 asked; {slow / n:.0%} of pairs to math-verify, {missed} rewritings missed"
    spread = [round(min(rates), 1), round(max(rates), 1)]
    value = round(statistics.median(rates), 1)
    figure = {"value": value, "unit": "1/s", "against": against, "n": n, "spread": spread}
    return {"grade_per_s": figure}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
