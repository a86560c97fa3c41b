"""`dspy_batching`: 100 DSPy calls decoded as one queue against 100 calls one after the other.

The same program (`programs.Solver`), problems, sampling and engine; the bundled model, at most 24
new tokens. KIT_BENCH_CALLS makes it fewer.
"""

import os
import time
from functools import partial

import dspy

from kit.data import problems
from kit.models.load import BUNDLED, load
from kit.reasoning_bank.dspy_backend import Engine, Lines, language_model
from kit.reasoning_bank.programs import Solver

CALLS = int(os.environ.get("KIT_BENCH_CALLS", 100))


def run() -> dict:
    """One pair, after a call to warm up."""
    engine = Engine(load(BUNDLED), max_new_tokens=24)
    asked = [p.question for p in problems.load("laptop", "test", n=CALLS).problems]
    solver = Solver()
    with dspy.context(lm=language_model(engine, temperature=0.2), adapter=Lines()):
        solver(question=asked[0])
        began = time.perf_counter()
        engine.run_batched([partial(solver, question=question) for question in asked])
        together = time.perf_counter() - began
        began = time.perf_counter()
        for question in asked:
            solver(question=question)
        alone = time.perf_counter() - began
    print(f"  {len(asked)} calls: {together:.1f} s as one queue, {alone:.1f} s one by one")
    value = alone / together
    against = f"{len(asked)} single calls"
    return {
        "dspy_batching": dict(value=value, unit="x", against=against, n=1, spread=[value, value])
    }
