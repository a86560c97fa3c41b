"""Rejection sampling and SFT: what is learnt from, and that a killed training ends the same."""

import dataclasses
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kit import models, prompts, traces, tune
from kit.schema import Problem
from kit.tune import Recipe

QUICK = Recipe(steps=6, batch=4, micro_batch=2, learning_rate=1e-3, save_every=2)


def record(problem: str, text: str, correct: bool = True, finish: str = "stop") -> dict:
    key = f"{problem} {text} {correct} {finish}"
    return dict(key=key, problem_id=problem, text=text, correct=correct, finish=finish)


RECORDS = pd.DataFrame(
    [
        *(record("easy", f"way {i}") for i in range(6)),
        record("easy", "way 0", finish="stop") | {"key": "again"},
        record("hard", "right"),
        record("hard", "wrong", correct=False),
        record("long", "cut", finish="length"),
        record("never", "no", correct=False),
    ]
)


def test_accepted_answers_are_correct_ended_different_and_few_per_problem():
    found = traces.accepted(RECORDS, cap=2)
    assert found["problem_id"].value_counts().to_dict() == {"easy": 2, "hard": 1}
    assert not found.duplicated(["problem_id", "text"]).any()
    assert len(traces.accepted(RECORDS, cap=99)) == 7
    assert traces.accepted(RECORDS, cap=2).equals(traces.accepted(RECORDS.iloc[::-1], cap=2))
    drawn = {tuple(traces.accepted(RECORDS, 2, seed)["text"]) for seed in range(9)}
    assert len(drawn) > 1, "another seed draws others"


def test_nothing_to_learn_from_is_one_sentence():
    with pytest.raises(ValueError, match="None of 3 answers to 3 problems is correct and ended"):
        traces.accepted(RECORDS[~RECORDS["correct"] | (RECORDS["finish"] == "length")])
    with pytest.raises(ValueError, match="cap is 0"):
        traces.accepted(RECORDS, cap=0)
    with pytest.raises(ValueError, match="10 answers ended, 99 are asked for"):
        traces.unfiltered(RECORDS, 99)
    assert not traces.unfiltered(RECORDS, 10)["correct"].all(), "right or wrong"


def problem(name: str) -> Problem:
    return Problem(name, f"What is {name}?", "4", "sums", 1, "test")


def test_loss_is_on_the_completion_and_its_end_only(bundled):
    asked = [prompts.format_only(problem("easy")), prompts.plain(problem("hard"))]
    rows = RECORDS[RECORDS["text"].isin(["way 1", "right"])]
    first, second = traces.sequences(bundled, rows, asked)
    read = bundled.tokenizer.decode
    said = [i for i, m in zip(first["input_ids"], first["completion_mask"], strict=True) if m]
    assert read(said) == "way 1<|im_end|>" and said[-1] in bundled.stop_ids
    rest = [i for i, m in zip(first["input_ids"], first["completion_mask"], strict=True) if not m]
    assert "Answer: <answer>" in read(rest) and read(rest).endswith("<|im_start|>assistant\n")
    assert "Answer: <answer>" not in read(second["input_ids"])
    with pytest.raises(ValueError, match="No prompt for problem hard"):
        traces.sequences(bundled, rows, asked[:1])


def examples(model, count: int = 12) -> list[dict]:
    names = [f"{i} + {i}" for i in range(count)]
    rows = pd.DataFrame([record(name, f"It is {name}.") for name in names])
    return traces.sequences(model, rows, [prompts.plain(problem(name)) for name in names])


def by_hand(model, batch: list[dict]) -> float:
    """Mean cross-entropy of all completion tokens of the batch."""
    total, count = 0.0, 0
    for example in batch:
        ids = torch.tensor(example["input_ids"])
        with torch.no_grad():
            logp = model.weights(ids[None]).logits[0].log_softmax(-1)
        nats = -logp[:-1].gather(-1, ids[1:, None])[:, 0]
        mask = torch.tensor(example["completion_mask"][1:]).bool()
        total, count = total + float(nats[mask].sum()), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize("rank", [0, 4])
def test_training_lowers_the_loss_that_is_computed_by_hand(tiny, tiny_folder, tmp_path, rank):
    data = examples(tiny, 4)
    recipe = dataclasses.replace(QUICK, steps=20, learning_rate=5e-3, lora_rank=rank, save_every=50)
    place = tune.sft(str(tiny_folder), data, recipe, tmp_path)
    log = tune.history(place)
    assert [row["step"] for row in log] == list(range(1, 21))
    assert log[0]["loss"] == pytest.approx(by_hand(tiny, data), rel=1e-3)
    trained = models.load(str(place), dtype="float32")
    assert by_hand(trained, data) < 0.9 * log[0]["loss"]
    assert by_hand(trained, data) == pytest.approx(log[-1]["loss"], rel=0.1), "as it was trained"
    assert json.loads((place / "card.json").read_text())["base_hash"] == tiny.weights_hash
    assert not (place.parent / "checkpoints").exists()


def test_a_killed_training_goes_on_and_ends_the_same(tiny, tiny_folder, tmp_path):
    class Killed(Exception):
        pass

    data = examples(tiny)
    whole = tune.sft(str(tiny_folder), data, QUICK, tmp_path / "whole")
    for at in (3, 5):

        def die(figures, at=at):
            if figures["step"] == at:
                raise Killed

        with pytest.raises(Killed):
            tune.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", die)
    seen = []
    cut = tune.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", seen.append)
    assert [figures["step"] for figures in seen] == [5, 6], "it went on where it was saved"
    losses = [[row["loss"] for row in tune.history(place)] for place in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ours, theirs = (load_file(place / "model.safetensors") for place in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert tune.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", lambda f: 1 / 0) == cut
    other = dataclasses.replace(QUICK, seed=1)
    assert tune.sft(str(tiny_folder), data, other, tmp_path / "cut") != cut


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tiny, tiny_folder, tmp_path):
    wild = dataclasses.replace(QUICK, learning_rate=1e38, warmup=0.5, steps=8, save_every=1)
    with pytest.raises(tune.Unstable, match=r"The loss is \S+ at step \d; .*Lower learning_rate"):
        tune.sft(str(tiny_folder), examples(tiny), wild, tmp_path)


def test_wrong_recipes_and_a_full_disk_are_one_sentence(tiny, tmp_path, monkeypatch):
    for wrong in (dict(batch=8, micro_batch=3), dict(steps=0)):
        with pytest.raises(ValueError, match="micro_batch must divide batch"):
            Recipe(**wrong)
    with pytest.raises(ValueError, match="No examples to train on"):
        tune.sft("unused", [], QUICK, tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune.wheels, "hash_files", full)
    with pytest.raises(OSError, match=r"\(No space left on device\); make room and run again"):
        tune.save(models.load("random:llama").weights, tiny, tmp_path, {})
    assert not list(tmp_path.iterdir())
