"""How long the stages of a profile take on this machine: tokens counted, times rates measured.

What a stage generates and trains follows from its parameters, as `WORK` counts it; how fast this
machine does either is measured, on the bundled model in a second or two, and on others that are
here; of those that are not it follows from their sizes. What is not counted
(long prompts, answers that end early, figures) is in one factor per stage, see `FACTORS`.

    python -m kit estimate quick laptop     what `measure` returns, as JSON
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import log2
from types import SimpleNamespace

from kit.hub import HubError
from kit.paths import ROOT
from kit.pipeline.provenance import gpus, memory_limit_bytes
from kit.pipeline.stages import LARGER, Stage, larger_tables, load_stages, read_profile

BILLIONS = 0.135  # parameters of the bundled model, on which the rates are measured
# Of notebook 04 beside its model and its training: modules, the embedder, and what the allocator
# keeps (log book, 2026-11-27: 13.6 GB in all on the 0.5B model).
PROCESS_BYTES = 4e9
PROMPT = 256  # tokens of a long prompt, before the answer that is trained on
# Times its hours by size, a profile does not fit on a model: those of 0.5B and 1.5B decode 2.1 and
# 2.8 times as fast as their sizes say (log book, 2026-11-27).
SURELY = 3
# Seconds that a stage of the laptop profile took, over what its tokens make at the rates of that
# machine; see the log book of 2026-11-26 for how well they fit another machine and profile. That of
# 05 is by the times of its steps and questions, see 2026-11-27.
FACTORS = {"00_tour": 1.0, "01_baseline": 0.95, "02_strategies": 1.35, "03_dms": 1.8,
           "04_phase2": 1.1, "05_parametric": 1.05, "06_memory_budget": 0.8}  # fmt: skip
# What a stage takes beside its model's work, in `start`s: imports, loading, statistics, figures.
# Fitted to a whole run of quick on idle cores (log book, 2026-11-27, weights packed), where steps
# of a few sequences, which take half as long as those of many, are much of 02, 03, 04 and 06.
FIXED = {"00_tour": 1.4, "01_baseline": 1.7, "02_strategies": 3.2, "03_dms": 4.3, "04_phase2": 4.5,
         "05_parametric": 2.4, "06_memory_budget": 2.4, "07_verdicts": 1.0}  # fmt: skip


def measure(*profiles: str) -> dict:
    """`rates` of this machine, and by profile and stage its `seconds` and the claims that it
    `decides` of `all`, with those for which it is `weak`; from a process of its own, which leaves
    neither torch nor a model behind. {} where that fails: no run waits for its estimate."""
    command = [sys.executable, "-m", "kit", "estimate", *profiles]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return json.loads(process.stdout.splitlines()[-1]) if process.returncode == 0 else {}


def rates(models: Iterable[str] = (), began: float | None = None) -> dict:
    """`start`, seconds until the bundled model is loaded, all imports in it, since `began` (of
    `time.perf_counter`; now where it is not given); its tokens per second `decoded` in a batch and
    `trained` (forward and backward); both of `models` by name; `device` and `dtype`."""
    began = time.perf_counter() if began is None else began
    from kit.models.load import BUNDLED, load
    from kit.parametric import train  # noqa: F401 (the imports of a notebook)

    model = load(BUNDLED)
    start = time.perf_counter() - began
    what = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    return {"start": start, **_rates(model), "models": {n: _rates(load(n)) for n in models}, **what}


def _rates(model) -> dict[str, float]:
    import torch

    from kit.inference import decode
    from kit.schema import Sampling

    requests = [decode.Request(tuple(range(100, 164)), f"{i}") for i in range(32)]
    decode.decode(model, requests[:2], Sampling(2))  # warms up; on a GPU each job makes its graph
    began = time.perf_counter()
    steps = 12 if model.device.type == "cpu" else 128
    generations = decode.decode(model, requests, Sampling(steps))
    decoded = sum(each.new_tokens for each in generations) / (time.perf_counter() - began)
    ids = torch.arange(100, 100 + 4 * 64, device=model.device).view(4, 64)
    for part in (ids[:1], ids):  # the first one warms up
        began = time.perf_counter()
        model.weights(input_ids=part, labels=part).loss.backward()
    return {"decoded": decoded, "trained": ids.numel() / (time.perf_counter() - began)}


def seconds(stage: Stage, speed: dict) -> float:
    """About how long a stage takes, all of it, at the `rates` of a machine."""
    fixed = FIXED.get(stage.name, 1.5) * speed["start"]
    if stage.name not in WORK:
        return fixed
    parameters = SimpleNamespace(**stage.parameters)
    decoded, trained = WORK[stage.name](parameters)
    work_seconds = 0
    for model in stage.models:
        rate = rate_of(model, speed)
        work_seconds += decoded / rate["decoded"] + trained / rate["trained"]
    return fixed + FACTORS[stage.name] * work_seconds


def rate_of(model: str, speed: dict) -> dict[str, float]:
    """Tokens per second `decoded` and `trained` by a model: measured, or by its size."""
    if rate := speed.get("models", {}).get(model):
        return rate
    return {kind: speed[kind] * BILLIONS / billions(model) for kind in ("decoded", "trained")}


def billions(model: str) -> float:
    """Parameters of a model by its name: 1.7 of "hub:Qwen/Qwen3-1.7B"."""
    match = re.search(r"(\d+(?:\.\d+)?)([bm])\b", model, re.IGNORECASE)
    return float(match[1]) / (1000 if match[2] in "mM" else 1) if match else BILLIONS


def choose(profile: str, report: Callable[[str], None] = print) -> dict:
    """The first `model` of the profile's table [larger] on which all of the profile fits into its
    hours here, "" where none does; `why`, a sentence for each that was considered; the `rates`.

    A model that would not fit by its size is neither fetched nor measured.
    """
    larger, speed, why = read_profile(profile)[LARGER], rates(), []
    for name in [*larger_tables(larger), ""]:
        fits, reason = _consider(profile, name, larger["hours"], speed)
        why.append(f"{name or 'the models of the notebooks'}: {reason}{': taken' * fits}")
        report(why[-1])
        if fits:
            return {"model": name, "why": why, "rates": speed}


def _consider(profile: str, model: str, hours: float, speed: dict) -> tuple[bool, str]:
    """Whether a profile fits on a model, and the arithmetic; its rates are put into `speed` where
    it may fit. It always fits on "", the models of the notebooks."""
    if model and (lack := _memory_shortage(profile, model, speed)):
        return False, lack
    if model and _hours(profile, model, speed) <= SURELY * hours:
        try:
            speed["models"] |= rates([model])["models"]
        except (ValueError, HubError) as error:  # it cannot be fetched, or not be loaded
            return False, str(error)
    total, rate = _hours(profile, model, speed), rate_of(model, speed)
    source = "measured" if model in ("", *speed["models"]) else "by its size"
    return total <= hours or not model, (
        f"{total:.1f} hours for all notebooks, of {hours:g} ({rate['decoded']:.0f} tokens a second "
        f"decoded, {rate['trained']:.0f} trained, {source})"
    )


def _memory_shortage(profile: str, model: str, speed: dict) -> str:
    """What the trainings of 04 on a bundled model take, where that is more memory than there is
    here; "" where they fit."""
    import torch
    from transformers import Qwen2Config

    from kit.models.bundled import MODELS
    from kit.training import memory

    config, dtype = Qwen2Config(**MODELS[model].shape), getattr(torch, speed["dtype"])
    stage = next(s for s in load_stages(profile, model=model) if s.name == "04_phase2")
    plan, *recipes = _recipes(SimpleNamespace(**stage.parameters))
    available = memory_limit_bytes()
    if cards := [gpu["memory_mib"] for gpu in gpus()] if speed["device"] == "cuda" else []:
        available = max(cards) * 2**20
    # The notebook's own model has decoded before it is trained.
    available -= PROCESS_BYTES + memory.decoding(config, speed["device"], dtype)
    for recipe in recipes:
        tokens = PROMPT + getattr(recipe, "max_new_tokens", plan.max_new_tokens)
        how = tokens, available, speed["device"], dtype, True
        if lack := memory.shortage(config, recipe, *how):
            return f"04 {lack}"
    return ""


def _hours(profile: str, model: str, speed: dict) -> float:
    return sum(seconds(stage, speed) for stage in load_stages(profile, model=model)) / 3600


def answer(limit: int) -> float:
    """Tokens of a mean answer that may have `limit`."""
    return limit / 2 + 16


def _baseline(parameters) -> tuple[float, float]:
    return parameters.PROBLEMS * 2 * parameters.SAMPLES * answer(parameters.MAX_NEW_TOKENS), 0


def _strategies(parameters) -> tuple[float, float]:
    each, lesson = answer(parameters.MAX_NEW_TOKENS), 160
    train, further, controls = parameters.TRAIN, parameters.FURTHER, parameters.CONTROLS
    decoded = train * (each + lesson) + parameters.TEST * 10 * each
    decoded += (controls[0] + 2 * controls[1]) * 5 * each  # the controls before
    if further:  # 14 more arms, checks and samples, a loop; banks and a solver of their own
        decoded += further * (21 * each + lesson) + train * (6 * each + lesson)
        decoded += 2 * (train * (each + lesson) + further * each)  # two further draws
    if parameters.TEACHER[2]:  # trials of two optimizers, and what they found on both splits
        decoded += (2 * 7 * controls[0] + 3 * (controls[0] + parameters.TEST)) * each
    return decoded, 0


def _dms(parameters) -> tuple[float, float]:
    kinds, longest = 1 + len(parameters.COMPRESSIONS), max(parameters.MAX_NEW_TOKENS)
    rivals = 2 * len(parameters.RIVALS)  # with a constant number of tokens, and a constant share
    train, held_out, other = parameters.TEXTS
    decoded = 2 * train * answer(longest)
    decoded += 4 * parameters.PROBLEMS * kinds * sum(map(answer, parameters.MAX_NEW_TOKENS))
    decoded += 4 * parameters.PROBLEMS * rivals * answer(longest)
    compared = 1 + (1 + rivals) * len(parameters.COMPRESSIONS)
    decoded += compared * held_out * parameters.CONTEXT
    # Chats and prose of 60 tokens after their prompts; longer text, needles and variables.
    decoded += other * ((2 + rivals) * 2 * 60 + (3 + rivals / 2) * (parameters.CONTEXT + 16))
    steps = log2(max(parameters.COMPRESSIONS)) * parameters.RAMP_STEPS + 2
    return decoded, len(parameters.VARIANTS) * steps * parameters.CONTEXT


def _recipes(parameters) -> tuple:
    """The plan of 04, its recipe of supervised training, and that of GRPO."""
    from kit.training.expert_iteration import Plan
    from kit.training.grpo import RECIPES, with_available_rollouts
    from kit.training.sft import SFTConfig

    tables = parameters.SFT, parameters.GRPO
    sft, grpo = ({name: value for name, value in table.items() if name not in ("arms", "seeds")}
                 for table in tables)  # fmt: skip
    reinforced = replace(RECIPES[parameters.GRPO_ON[0]], **grpo)
    return Plan(**parameters.PLAN), SFTConfig(**sft), with_available_rollouts(reinforced)


def _phase2(parameters) -> tuple[float, float]:
    plan, sft, reinforced = _recipes(parameters)
    train, validation, test = parameters.PROBLEMS
    each = answer(plan.max_new_tokens)
    exam_answer = answer(min(plan.exam_tokens, plan.max_new_tokens))  # few go on beyond that
    arms, seeds = len(parameters.SFT["arms"]), parameters.SFT["seeds"]
    rollouts = parameters.GRPO["seeds"] * reinforced.completions
    exams = 2 + arms * seeds + parameters.GRPO["seeds"]
    decoded = train * plan.samples * (1 + parameters.ROUNDS) * each
    decoded += ((1.5 * test + validation) * exams + 2 * parameters.ROUNDS * test) * exam_answer
    decoded += rollouts * answer(reinforced.max_new_tokens)
    trainings = arms * seeds + parameters.ROUNDS - 1
    return decoded, trainings * sft.steps * sft.batch * 2 * each + rollouts * 2 * each


def _parametric(parameters) -> tuple[float, float]:
    arms = {"fetched": parameters.SEEDS} | parameters.ARMS
    cost = {"wrong": 0, "co-trained generic": 0}  # which read the blocks of other arms
    cost |= {"fetched-early": 2.7, "continued": 5, "co-trained": 5}  # more is read, or trained
    trainings = sum(seeds * cost.get(name, 1) for name, seeds in arms.items())
    training_tokens = 12 * parameters.TOLD[0] + 150 * parameters.TOLD[1]
    trained = (trainings + 1 / parameters.LAYOUT["branching"]) * training_tokens
    questions = sum(parameters.QUESTIONS.values()) * (
        6 + sum(arms.values()) + 2 * len(parameters.PASSAGES)
    )
    return questions * 20 + parameters.ELSEWHERE[1] * 2 * answer(96), trained


def _budget(parameters) -> tuple[float, float]:
    from kit.budget.sweep import Grid

    runs, tokens = len(Grid(**parameters.GRID).runs) + 2, parameters.GRID["tokens"]
    each = answer(max(tokens)) + 8 * len(tokens)  # forced answers
    sentences = 40 * parameters.EXAMPLES[1] * parameters.RECIPE.get("epochs", 1) * 2
    return runs * parameters.PROBLEMS[1] * parameters.SAMPLES * each, sentences * 60


WORK: dict[str, Callable[[SimpleNamespace], tuple[float, float]]] = {  # decoded, trained by a model
    "00_tour": lambda parameters: (3 * answer(parameters.MAX_NEW_TOKENS) * 4, 0),  # three at a time
    "01_baseline": _baseline,
    "02_strategies": _strategies,
    "03_dms": _dms,
    "04_phase2": _phase2,
    "05_parametric": _parametric,
    "06_memory_budget": _budget,
}


ITEMS = {"aime24": 30, "amc23": 40, "minerva": 272, "math500": 500, "olympiad": 675}  # benchmarks
WHOLE = {"plain", "format", "format-only", "retrieved"}  # arms of 02 on all problems


def problems(stage: Stage, claim) -> int | None:
    """How many problems of a stage the contrast of a claim (`kit.analysis.claims.Claim`) is over;
    None where no arms are compared by their answers, or the parameters do not say."""
    if "measure" not in claim.contrast:
        return None
    parameters, control = SimpleNamespace(**stage.parameters), claim.contrast.get("control", [])
    arms = {claim.contrast["arm"], *([control] if isinstance(control, str) else control)}
    if stage.name == "02_strategies":
        return (parameters.TEST if arms <= WHOLE else parameters.FURTHER) or None
    if stage.name == "04_phase2":
        return ITEMS.get(claim.contrast.get("source"), parameters.PROBLEMS[2])
    if stage.name == "05_parametric":
        family = claim.contrast.get("family")
        return parameters.QUESTIONS.get(family) if family else sum(parameters.QUESTIONS.values())
    return parameters.PROBLEMS[1] if stage.name == "06_memory_budget" else parameters.PROBLEMS


def _weak(stage: Stage, claims: Iterable) -> list[tuple[str, int, float]]:
    """Claims that this many problems can hardly bear out though they were true: id, problems,
    percent of power."""
    from kit.analysis import calibration

    sized = ((claim, problems(stage, claim)) for claim in claims)
    powers = [(claim.id, n, calibration.power(claim, n)) for claim, n in sized if n]
    return [row for row in powers if row[2] is not None and row[2] < calibration.WEAK]


def estimates(profiles: Iterable[str]) -> dict:
    """The result of `measure`, measured in this process, which has not imported torch yet."""
    began = time.perf_counter()
    from kit.analysis import claims
    from kit.models import gguf
    from kit.models.bundled import MODELS
    from kit.models.load import BUNDLED

    names = {name for profile in profiles for stage in load_stages(profile)
           for name in stage.models if name in MODELS and name != BUNDLED}  # fmt: skip
    local_models = [name for name in sorted(names) if gguf.is_whole(MODELS[name].folder)]
    speed, published, by_profile = rates(local_models, began), claims.load(), {}
    for profile in profiles:
        by_profile[profile] = {}
        for stage in load_stages(profile):
            stage_claims = [claim for claim in published if claim.notebook == stage.name]
            decided = [claim for claim in stage_claims if claim.decided_by(profile)]
            row = {
                "seconds": seconds(stage, speed),
                "decides": len(decided),
                "all": len(stage_claims),
            }
            by_profile[profile][stage.name] = row | {"weak": _weak(stage, decided)}
    return {"rates": speed, "profiles": by_profile}
