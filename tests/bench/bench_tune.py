"""Seconds of a supervised step, and of a GRPO step with rollouts by `kit.inference.decode` or
transformers.

The bundled model, all weights; 8 sequences a supervised step, answers of one short line; 4 problems
x 8 completions of at most 48 tokens a GRPO step, KL to the start included. Each is trained for a
few steps after one that warms up. KIT_BENCH_STEPS makes it other than 4.
"""

import dataclasses
import os
import statistics
import tempfile
from pathlib import Path

import pandas

from kit.data import problems, prompts
from kit.models.load import BUNDLED, load
from kit.training import grpo, rejection_sampling, sft

STEPS = int(os.environ.get("KIT_BENCH_STEPS", 4))


def run() -> dict:
    """`sft_s_per_step`, `grpo_s_per_step`, and what our rollouts make of the latter."""
    suite = problems.load("laptop", "train", n=64).problems
    asked = prompts.build(prompts.plain, suite)
    with tempfile.TemporaryDirectory() as folder:
        supervised = _seconds(_sft(suite, asked, Path(folder)))
        made = {
            rollouts: _seconds(_grpo(asked, rollouts, Path(folder)))
            for rollouts in ("kit", "transformers")
        }
    ratio = statistics.median(made["transformers"]) / statistics.median(made["kit"])
    against = "rollouts by transformers generate"
    return {
        "sft_s_per_step": _figure(supervised, "s", "nothing"),
        "grpo_s_per_step": _figure(made["kit"], "s", "nothing"),
        "grpo_kit_vs_transformers": _figure([ratio], "x", against),
    }


def _sft(suite, asked, folder: Path) -> Path:
    rows = pandas.DataFrame(
        [{"problem_id": p.id, "text": f"Answer: {p.answer}", "key": p.id} for p in suite]
    )
    examples = rejection_sampling.training_sequences(load(BUNDLED), rows, asked)
    return sft.sft(BUNDLED, examples, sft.SFTConfig(steps=STEPS + 1), folder)


def _grpo(asked, rollouts: str, folder: Path) -> Path:
    recipe = grpo.GRPOConfig(steps=STEPS + 1, max_new_tokens=48, rollouts=rollouts, save_every=99)
    return grpo.grpo(BUNDLED, asked, dataclasses.replace(recipe, keep_every=0), folder)


def _seconds(place: Path) -> list[float]:
    return [row["seconds"] for row in sft.history(place)][1:]


def _figure(values: list[float], unit: str, against: str) -> dict:
    spread = [min(values), max(values)]
    value = statistics.median(values)
    return {"value": value, "unit": unit, "against": against, "n": len(values), "spread": spread}
