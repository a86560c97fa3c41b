"""Rejection sampling and SFT: what is learnt from, and that a killed training ends the same."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kit.data import prompts
from kit.inference import energy
from kit.models.load import load, save, twin
from kit.schema import Problem
from kit.training import callbacks, rejection_sampling, sft
from kit.training.sft import SFTConfig
from tests import rounding

QUICK = SFTConfig(steps=6, batch=4, micro_batch=2, learning_rate=1e-3, save_every=2)


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
    found = rejection_sampling.accept(RECORDS, cap=2)
    assert found["problem_id"].value_counts().to_dict() == {"easy": 2, "hard": 1}
    assert not found.duplicated(["problem_id", "text"]).any()
    assert len(rejection_sampling.accept(RECORDS, cap=99)) == 7
    assert rejection_sampling.accept(RECORDS, cap=2).equals(
        rejection_sampling.accept(RECORDS.iloc[::-1], cap=2)
    )
    drawn = {tuple(rejection_sampling.accept(RECORDS, 2, seed)["text"]) for seed in range(9)}
    assert len(drawn) > 1, "another seed draws others"


def test_nothing_to_learn_from_is_one_sentence():
    with pytest.raises(ValueError, match="None of 3 answers to 3 problems is correct and ended"):
        rejection_sampling.accept(RECORDS[~RECORDS["correct"] | (RECORDS["finish"] == "length")])
    with pytest.raises(ValueError, match="cap is 0"):
        rejection_sampling.accept(RECORDS, cap=0)


def test_the_unfiltered_control_has_as_many_answers_of_each_problem():
    accepted, drawn = rejection_sampling.accept(RECORDS, cap=2), []
    for seed in range(9):
        found = rejection_sampling.sample_unfiltered(RECORDS, accepted, seed)
        assert found["problem_id"].value_counts().to_dict() == {"easy": 2, "hard": 1}
        assert not found.duplicated("key").any() and set(found["finish"]) == {"stop"}
        drawn.append(found.query("problem_id == 'hard'")["correct"].item())
    assert set(drawn) == {True, False}, "right or wrong"


def test_learnable_problems_are_neither_always_nor_never_solved():
    known = [problem(name) for name in ("easy", "hard", "long", "never", "unseen")]
    assert [p.id for p in rejection_sampling.with_reward_variance(RECORDS, known)] == ["hard"]
    assert rejection_sampling.with_reward_variance(RECORDS, known, least=2) == known


def problem(name: str) -> Problem:
    return Problem(name, f"What is {name}?", "4", "sums", 1, "test")


def test_loss_is_on_the_completion_and_its_end_only(bundled):
    asked = [prompts.format_only(problem("easy")), prompts.plain(problem("hard"))]
    rows = RECORDS[RECORDS["text"].isin(["way 1", "right"])]
    first, second = rejection_sampling.training_sequences(bundled, rows, asked)
    read = bundled.tokenizer.decode
    said = [i for i, m in zip(first["input_ids"], first["completion_mask"], strict=True) if m]
    assert read(said) == "way 1<|im_end|>" and said[-1] in bundled.stop_ids
    rest = [i for i, m in zip(first["input_ids"], first["completion_mask"], strict=True) if not m]
    assert "Answer: <answer>" in read(rest) and read(rest).endswith("<|im_start|>assistant\n")
    assert "Answer: <answer>" not in read(second["input_ids"])
    with pytest.raises(ValueError, match="No prompt for problem hard"):
        rejection_sampling.training_sequences(bundled, rows, asked[:1])


def examples(model, count: int = 12) -> list[dict]:
    names = [f"{i} + {i}" for i in range(count)]
    rows = pd.DataFrame([record(name, f"It is {name}.") for name in names])
    return rejection_sampling.training_sequences(
        model, rows, [prompts.plain(problem(name)) for name in names]
    )


@torch.no_grad()
def nats(model, batch: list[dict]) -> torch.Tensor:
    """Cross-entropy of each completion token of the batch."""
    found = []
    for example in batch:
        ids, mask = (torch.tensor(example[name]) for name in ("input_ids", "completion_mask"))
        logp = model.weights(ids[None]).logits[0].log_softmax(-1)
        found.append(-logp[:-1].gather(-1, ids[1:, None])[:, 0][mask[1:].bool()])
    return torch.cat(found)


def by_hand(model, batch: list[dict]) -> float:
    return float(nats(model, batch).mean())


@pytest.mark.parametrize("rank, dtype", [(0, "float32"), (0, "bfloat16"), (4, "bfloat16")])
def test_training_lowers_the_loss_that_is_computed_by_hand(
    tiny, tiny_folder, tmp_path, rank, dtype, monkeypatch
):
    monkeypatch.setenv("KIT_DTYPE", dtype)
    data = examples(tiny, 4)
    rounded = dataclasses.replace(tiny, weights=twin(tiny.weights, getattr(torch, dtype)))
    plain, right = (nats(model, data) for model in (rounded, rounding.exact(tiny)))
    recipe = dataclasses.replace(QUICK, steps=20, learning_rate=5e-3, lora_rank=rank, save_every=50)
    place = sft.sft(str(tiny_folder), data, recipe, tmp_path)
    log = sft.history(place)
    assert [row["step"] for row in log] == list(range(1, 21))
    off = rounding.tolerance(plain, right)
    assert log[0]["loss"] == pytest.approx(float(right.mean()), abs=off)
    trained = load(str(place), dtype="float32")
    assert by_hand(trained, data) < 0.9 * log[0]["loss"]
    assert by_hand(trained, data) == pytest.approx(log[-1]["loss"], rel=0.1), "as it was trained"
    assert json.loads((place / "card.json").read_text())["base_hash"] == tiny.weights_hash
    assert not (place.parent / "checkpoints").exists()


def test_a_killed_training_goes_on_and_ends_the_same(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_DTYPE", "bfloat16")

    class Killed(Exception):
        pass

    data = examples(tiny)
    whole = sft.sft(str(tiny_folder), data, QUICK, tmp_path / "whole")
    for at in (3, 5):

        def die(figures, at=at):
            if figures["step"] == at:
                raise Killed

        with pytest.raises(Killed):
            sft.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", die)
    seen, warned = [], []
    monkeypatch.setattr("transformers.trainer.logger.warning", warned.append)
    cut = sft.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", seen.append)
    assert [figures["step"] for figures in seen] == [5, 6], "it went on where it was saved"
    assert not warned, "of a head that is tied to the embeddings"
    losses = [[row["loss"] for row in sft.history(place)] for place in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ours, theirs = (load_file(place / "model.safetensors") for place in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sft.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", lambda f: 1 / 0) == cut
    for recipe, dtype in ((dataclasses.replace(QUICK, seed=1), "bfloat16"), (QUICK, "float32")):
        monkeypatch.setenv("KIT_DTYPE", dtype)
        with pytest.raises(ZeroDivisionError):  # another training, which begins
            sft.sft(str(tiny_folder), data, recipe, tmp_path / "cut", lambda f: 1 / 0)


def test_special_tokens_follow_the_tokenizer_without_a_warning(
    tiny, tiny_folder, tmp_path, monkeypatch
):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    said = []
    monkeypatch.setattr("transformers.trainer_utils.logger.handle", said.append)
    place = sft.sft(str(other), examples(tiny), dataclasses.replace(QUICK, steps=1), tmp_path)
    trained = json.loads((place / "config.json").read_text())
    assert trained["bos_token_id"] == tiny.tokenizer.bos_token_id != 7
    assert not said


def test_models_of_several_steps_are_kept_to_choose_from(tiny, tiny_folder, tmp_path):
    recipe = dataclasses.replace(QUICK, keep_every=2)
    place = sft.sft(str(tiny_folder), examples(tiny), recipe, tmp_path)
    kept = sft.saved_models(place)
    assert list(kept) == [2, 4, 6] and kept[6] == place
    weights = [load_file(folder / "model.safetensors") for folder in kept.values()]
    changed = [
        sum(float((a[name] - b[name]).abs().sum()) for name in a)
        for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert all(change > 0 for change in changed)
    assert load(str(kept[2])).weights_hash != load(str(place)).weights_hash
    assert "lm_head.weight" not in weights[0], "tied to the embeddings, which are saved"
    spent = sft.cost(place)
    assert spent["steps"] == 6 and spent["seconds"] > 0 and spent["tokens"] > 6 * 4 * 8


def test_out_of_memory_says_what_to_lower_and_goes_on(tiny, tiny_folder, tmp_path, monkeypatch):
    data, whole = examples(tiny), sft.sft(str(tiny_folder), examples(tiny), QUICK, tmp_path / "w")

    def full(figures):
        if figures["step"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(MemoryError, match="after step 3 with micro_batch 2; lower it"):
        sft.sft(str(tiny_folder), data, QUICK, tmp_path / "cut", full)
    seen = []
    small = dataclasses.replace(QUICK, micro_batch=1)
    cut = sft.sft(str(tiny_folder), data, small, tmp_path / "cut", seen.append)
    assert [figures["step"] for figures in seen] == [3, 4, 5, 6], "from step 2, which was saved"
    losses = [[row["loss"] for row in sft.history(place)] for place in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "the steps are the same"


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(
    tiny, tiny_folder, tmp_path, monkeypatch
):
    """A full disk at the second checkpoint: one sentence, and the first one is gone on from."""
    data, saved = examples(tiny), torch.save

    def full(content, file, *rest, **options):
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3")
        return saved(content, file, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="Cannot save a checkpoint of step 4 .*make room and run"):
            sft.sft(str(tiny_folder), data, QUICK, tmp_path)
    (checkpoints,) = tmp_path.glob("*/checkpoints")
    assert (checkpoints / "checkpoint-4").is_dir()
    assert callbacks.last_checkpoint(checkpoints).endswith("checkpoint-2")
    seen = []
    sft.sft(str(tiny_folder), data, QUICK, tmp_path, seen.append)
    assert [figures["step"] for figures in seen] == [3, 4, 5, 6]


def test_energy_is_the_sum_of_what_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.joules() is None, "nothing counts here"
    for name, count in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 3_500_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{count}\n")
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "energy_uj").write_text("999")
    assert energy.joules() == 5.5
    assert energy.consumed(5.5, 7.0) == 1.5
    assert energy.consumed(7.0, 5.5) is None, "a counter began anew"
    assert energy.consumed(None, 5.5) is None


def test_energy_is_that_of_the_gpus_that_torch_sees(tmp_path, monkeypatch):
    """The second of three GPUs is this process's, by CUDA_VISIBLE_DEVICES; NVML counts them all."""
    counters = {"GPU-a": 1_000, "GPU-b": 20_000, "GPU-c": 300_000}  # millijoules
    ours = SimpleNamespace(uuid="b")
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: ours)
    nvml = dict(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetCount=lambda: 3)
    nvml |= dict(nvmlDeviceGetHandleByIndex=[*counters].__getitem__)
    nvml |= dict(nvmlDeviceGetTotalEnergyConsumption=counters.__getitem__)
    for name, function in nvml.items():
        monkeypatch.setattr(energy.pynvml, name, function)
    energy._handles.cache_clear()
    try:
        assert energy.joules() == 20
    finally:
        energy._handles.cache_clear()


def test_nothing_of_a_training_is_left_when_the_next_begins(
    tiny, tiny_folder, tmp_path, one_at_a_time
):
    for seed in range(2):
        recipe = dataclasses.replace(QUICK, steps=1, seed=seed)
        sft.sft(str(tiny_folder), examples(tiny), recipe, tmp_path)
    assert len(one_at_a_time) == 2


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tiny, tiny_folder, tmp_path):
    wild = dataclasses.replace(QUICK, learning_rate=1e38, warmup=0.5, steps=8, save_every=1)
    with pytest.raises(
        callbacks.NonFiniteLossError, match=r"The loss is \S+ at step \d; .*Lower learning_rate"
    ):
        sft.sft(str(tiny_folder), examples(tiny), wild, tmp_path)


def test_wrong_recipes_and_a_full_disk_are_one_sentence(tiny, tmp_path, monkeypatch):
    for wrong in (dict(batch=8, micro_batch=3), dict(steps=0)):
        with pytest.raises(ValueError, match="micro_batch must divide batch"):
            SFTConfig(**wrong)
    with pytest.raises(ValueError, match="No examples to train on"):
        sft.sft("unused", [], QUICK, tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kit.models.load.hash_files", full)
    with pytest.raises(OSError, match=r"\(No space left on device\); make room and run again"):
        save(load("random:llama").weights, tiny, tmp_path / "model", {})
    assert not list(tmp_path.iterdir())
