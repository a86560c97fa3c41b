"""Faults that people reported of other graders, runners, stores and decoders, tried on the kit.

tests/field_cases.jsonl has a case a line: `call` names the function below that runs it, `source`
the thread, `why` where the kit decides otherwise than was asked, or where a file of others is not
shipped.
"""

import asyncio
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import dspy
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from nbformat.v4 import new_code_cell, new_notebook

from kit.analysis import pareto, stats
from kit.budget import ledger
from kit.data import problems
from kit.data.problems import SUITES
from kit.evaluation.grader import grade, grade_many
from kit.inference import decode, policies
from kit.inference.kv_cache import layer_windows
from kit.models import quantization
from kit.models.load import Model, check_head, load
from kit.parametric import qa
from kit.paths import ROOT
from kit.pipeline import kernel, stages
from kit.reasoning_bank import dspy_backend, strategy
from kit.reasoning_bank.bank import ReasoningBank
from kit.schema import Problem, Prompt, Sampling
from kit.training import rewards
from tests.reasoning_bank.hash_embedder import HashEmbedder

FILE = ROOT / "tests" / "field_cases.jsonl"
CASES = [json.loads(line) for line in FILE.read_text().split("\n")[:-1]]
GRADED = [case for case in CASES if case["call"] == "graded"]
LENGTHS = (60, 11, 37)  # tokens of prompts
SHAPE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_case(case, tmp_path, request):
    run = functools.partial(globals()[case["call"]], case, tmp_path, request)
    if "refused" in case:
        with pytest.raises(Exception, match=".") as found:
            run()
        said = str(found.value)
        assert case["refused"] in said and said.count("\n") == 0
    else:
        run()


def test_every_case_is_there_once():
    assert len({case["id"] for case in CASES}) == len(CASES) == 259


# ------------------------------------------------------------------ grading and voting


@pytest.fixture(scope="module")
def grades():
    """Verdict of each graded case, made together: workers start once."""
    texts, golds = ([case[field] for case in GRADED] for field in ("text", "gold"))
    asks = [case.get("asks", "any") for case in GRADED]
    verdicts = grade_many(texts, golds, "any", asks)
    return {case["id"]: verdict for case, verdict in zip(GRADED, verdicts, strict=True)}


def graded(case, _, request):
    verdict = request.getfixturevalue("grades")[case["id"]]
    assert verdict.correct == case["correct"], verdict


def vote(case, *_):
    assert pareto.majority(case["answers"], case.get("correct")) == case["winner"]


def published(case, *_):
    """Accuracy of plain answers in 06 where the question said again earns nothing, in percent."""
    records = pd.read_parquet(ROOT / "outputs" / "published" / "laptop" / "records.parquet")
    for tokens, percent in case["accuracy"].items():
        rows = records[records["arm"] == f"plain at {tokens}"]
        asks = [SUITES["laptop"].get(family, "any") for family in rows["family"]]
        verdicts = grade_many([*rows["text"]], [*rows["answer"]], "any", asks)
        assert 100 * np.mean([v.correct for v in verdicts]) == pytest.approx(percent, abs=0.05)


# ------------------------------------------------------------------ problems


def problem(case, folder, _):
    file = folder / case["file"]
    file.write_text(case["text"])
    path = {"path": file} if "set" in case else {}
    found = problems.load(case.get("set", str(file)), "test", levels=[], **path)
    (made,) = found.problems
    assert (made.question, made.answer) == (case["question"], case["answer"])
    for text in (rf"\boxed{{{made.answer}}}", f"Answer: {made.answer}"):
        assert grade(text, made.answer, "any").correct


def reward(case, *_):
    said = [[{"role": "assistant", "content": case["content"]}]]
    assert rewards.accuracy(said, ["5"]) == [case["reward"]]


# ------------------------------------------------------------------ models


class Bytes:
    """A tokenizer: a byte is a token."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode()]}


def tiny(case) -> Model:
    """A model of random weights by the name of its configuration in transformers."""
    kind = getattr(transformers, f"{case['model']}Config")
    shape = {name: value for name, value in SHAPE.items() if hasattr(kind(), name)}
    config = kind(**shape | case["config"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights.generation_config = transformers.GenerationConfig(eos_token_id=None)
    return Model(case["model"], weights, None, "hash", "seed 0")


def same_tokens(model: Model) -> None:
    """Greedy tokens of prompts of unequal length are those of transformers; policies run."""
    draw, vocabulary = torch.Generator().manual_seed(1), model.weights.config.vocab_size
    prompts = [tuple(torch.randint(3, vocabulary, (n,), generator=draw).tolist()) for n in LENGTHS]
    asked = [decode.Request(ids, str(number)) for number, ids in enumerate(prompts)]
    done = decode.decode(model, asked, Sampling(12))
    for generation, ids in zip(done, prompts, strict=True):
        said = model.weights.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        stop = [generation.stop_id] if generation.stop_id is not None else []
        assert [*generation.token_ids, *stop] == said[0, len(ids) :].tolist()
    for policy in (policies.Window, policies.H2O, policies.TOVA, policies.Knorm, policies.Random):
        if not any(layer_windows(model.weights.config)):
            kept = policy(kept_tokens=16)  # more than the shortest prompt has
            assert len(decode.decode(model, asked, Sampling(4), policy=kept)) == len(asked)


def tokens(case, *_):
    same_tokens(tiny(case))


def folder(case, place, request):
    """A folder written by save_pretrained, changed as the case says."""
    made = place / case.get("rename", "model")
    shutil.copytree(request.getfixturevalue("tiny_folder"), made)
    for file in made.glob(case.get("without", "")) if "without" in case else ():
        file.unlink()
    for part, name in (("config", "config.json"), ("generation", "generation_config.json")):
        if part in case:
            old = json.loads((made / name).read_text())
            (made / name).write_text(json.dumps(old | case[part]))
    if "template" in case:
        (made / "chat_template.jinja").write_text(case["template"])
    model = load(str(made), dtype="float32")
    messages = (("system", "Be brief."), ("user", "What is 1 plus 2?"))
    ids = decode.tokenize(model, Prompt(Problem("", "", "", "", 0, ""), "plain", messages))
    said = model.tokenizer.decode(ids)
    assert "Be brief." in said and "What is 1 plus 2?" in said
    same_tokens(model)


def likelihoods(case, *_):
    """Options after prompts of unequal length are as likely as after each alone."""
    model = dataclasses.replace(tiny(case), tokenizer=Bytes())
    check_head(model.weights)
    prompts = ["Q: a\nA:", "Question: which of the two is the larger one?\nA:"]
    options = [["Lagos", "Lima"]] * 2
    each = [qa.likelihoods(model, [text], options[:1])[0] for text in prompts]
    assert qa.likelihoods(model, prompts, options) == pytest.approx(np.array(each), abs=1e-3)


def quantized(case, *_):
    quantization.quantize(tiny(case), 4)


def advised(case, *_):
    ledger.architecture(getattr(transformers, f"{case['model']}Config")(**SHAPE))


# ------------------------------------------------------------------ DSPy


def asked_of(tiny_model, **settings):
    return dspy_backend.language_model(
        dspy_backend.Engine(tiny_model, max_new_tokens=8), temperature=1.0, **settings
    )


def drawn(case, _, request):
    """Equal requests at a temperature draw anew."""
    lm = asked_of(request.getfixturevalue("tiny"))
    with dspy.context(adapter=dspy_backend.Lines(), lm=lm):
        if "n" in case:
            ask = dspy.Predict("question -> answer", n=case["n"], temperature=1.0)
            said = ask(question="2+2?").completions.answer
        else:
            ask = dspy.Predict("question -> answer")
            lms = [lm.copy(rollout_id=number) for number in case["rollouts"]]
            said = [ask(question="2+2?", lm=each).answer for each in lms]
    assert len(said) == len({*said}) == 3


def awaited(case, _, request):
    ask = dspy.Predict("question -> answer")
    with dspy.context(adapter=dspy_backend.Lines(), lm=asked_of(request.getfixturevalue("tiny"))):
        assert isinstance(asyncio.run(ask.acall(question="2+2?")).answer, str | None)


def read(case, *_):
    kind = {"bool": bool | None, "int": int | None}[case["kind"]]
    assert dspy_backend._read(case["reply"], kind) == case["value"]


# ------------------------------------------------------------------ banks and strategies


def lessons(count: int) -> list[strategy.Strategy]:
    return [
        strategy.Strategy(f"title {i}", "For groups.", f"Count the groups, {i}.", "success",
                          f"p{i}", "family", 1, f"How many are {i} groups?", "model", "tests")
        for i in range(count)
    ]  # fmt: skip


def searched(case, place, _):
    bank = ReasoningBank(place, HashEmbedder())
    about = Problem("q", case["question"], "", "", 0, "")
    bank.add(lessons(5))
    for method in ("text", "hybrid"):
        assert len(bank.retrieve(about, 2, method=method).strategies) <= 2


def empty_bank(case, place, _):
    bank = ReasoningBank(place, HashEmbedder())
    assert not bank.retrieve(Problem("q", "How many?", "", "", 0, ""), method="hybrid").strategies
    assert bank.merge() == []
    bank.tag("empty")
    assert len(bank.checkout("empty")) == 0


def fresh_bank(case, place, _):
    """A search by text sees what was added and what was removed just before."""
    bank, (first, second) = ReasoningBank(place, HashEmbedder()), lessons(2)
    about = Problem("q", "Count the groups", "", "", 0, "")
    for change, left in ((lambda: bank.add([first]), {first.id}),
                         (lambda: bank.add([second]), {first.id, second.id}),
                         (lambda: bank.delete([first.id]), {second.id})):  # fmt: skip
        change()
        assert {found.id for found in bank.retrieve(about, 5, method="text").strategies} == left


ADD = """
import sys
from kit.reasoning_bank import strategy
from kit.reasoning_bank.bank import ReasoningBank
from tests.reasoning_bank.hash_embedder import HashEmbedder
ReasoningBank(sys.argv[1], HashEmbedder()).add(strategy.read(sys.argv[2]))
"""


def writers(case, place, _):
    """Several processes add the same strategies at once."""
    file, bank = place / "twenty.jsonl", place / "bank"
    file.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in lessons(20)))
    how = [sys.executable, "-c", ADD, str(bank), str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    each = [subprocess.Popen(how, env=env) for _ in range(case["processes"])]
    assert [process.wait() for process in each] == [0] * len(each)
    assert len(ReasoningBank(bank, HashEmbedder())) == 20


def strategies(case, place, _):
    (item,) = lessons(1)
    item = dataclasses.replace(item, content=case["content"])
    row = json.dumps(dataclasses.asdict(item), ensure_ascii=False)
    (place / "own.jsonl").write_text(f"{row}\n\n")
    assert strategy.read(place / "own.jsonl") == [item]


def leaks(case, *_):
    assert strategy.leaks_answer(case["text"], case["answer"])


# ------------------------------------------------------------------ notebooks and profiles


def notebook(place: Path, cells: list[str], tag: str = "") -> Path:
    """A notebook, its first cell tagged "parameters" and its second `tag`."""
    made = [new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    made[1].metadata["tags"] = [tag] if tag else []
    file = place / "notebooks" / "01_first.ipynb"
    (file.parent / "profiles").mkdir(parents=True)
    nbformat.write(new_notebook(cells=made), file)
    return file


def profile(case, place, _):
    file = notebook(place, [case["cell"], case.get("other", "pass")])
    (file.parent / "profiles" / "mine.toml").write_text(f"[01_first]\n{case['toml']}\n")
    (stage,) = stages.load_stages("mine", file.parent, place / "outputs")
    assert stage.parameters == tomllib.loads(case["toml"])


def run_notebook(case, place, _):
    file = notebook(place, case["cells"], case.get("tag", ""))
    values = tomllib.loads(case.get("toml", ""))
    ended = kernel.execute(file, place / "out.ipynb", values, place, {}, lambda cell: None)
    assert ended.problem.startswith(case.get("failure", "")) and bool(ended.problem) == (
        "failure" in case
    )
    if "sleep" in "".join(case["cells"]):  # the run ended before it did
        said = nbformat.read(place / "out.ipynb", 4).cells[-1].outputs[0].text
        os.kill(int(said), signal.SIGKILL)


# ------------------------------------------------------------------ statistics


def statistic(case, *_):
    more = [np.random.default_rng(0)] if case["name"] == "mean_interval" else []
    arguments = [np.array(x) if more else x for x in case["arguments"]]
    found = getattr(stats, case["name"])(*arguments, *more)
    if "value" in case:
        assert found == case["value"]
    else:
        assert [found.low, found.high] == pytest.approx(case["interval"], abs=5e-4)
