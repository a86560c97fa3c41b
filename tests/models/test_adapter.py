"""Adapter folders: merged into the model that they name, whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kit.budget import advisor
from kit.hub import HubError
from kit.models.load import load
from tests.fake_hub import serve

MODULES = ["q_proj", "down_proj"]


def trained(base: Path, folder: Path, config) -> Path:
    """An adapter whose numbers are drawn, beside nothing of its model."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(tiny_folder, tmp_path) -> Path:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=MODULES, task_type="CAUSAL_LM")
    return trained(tiny_folder, tmp_path / "lora", config)


def refused(folder: Path | str, words: str) -> None:
    with pytest.raises((ValueError, HubError), match=words) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def rewritten(folder: Path, **fields) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_an_adapter_is_the_sum_of_the_products_and_of_the_model_it_names(lora, tiny, tiny_folder):
    model = load(str(lora), dtype="float32")
    numbers, before = load_file(lora / "adapter_model.safetensors"), tiny.weights.state_dict()
    for name, found in model.weights.state_dict().items():
        expected, key = before[name], f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in numbers:
            down, up = numbers[f"{key}.lora_A.weight"], numbers[f"{key}.lora_B.weight"]
            expected = expected + 12 / 4 * up @ down
            assert not torch.equal(found, before[name])
        torch.testing.assert_close(found, expected)
    assert type(model.weights) is type(tiny.weights)
    assert not any(parameter.requires_grad for parameter in model.weights.parameters())
    assert f"merged into {tiny_folder}" in model.revision and tiny.weights_hash in model.revision
    assert model.weights_hash != tiny.weights_hash
    assert load(str(rewritten(lora, lora_alpha=4))).weights_hash != model.weights_hash
    assert model.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert advisor.sizes(str(lora)) == advisor.sizes(str(tiny_folder))


def test_the_model_may_be_named_relative_to_the_adapter_by_the_hub_or_in_vain(
    lora, tiny_folder, tmp_path, hub_cache
):
    (tmp_path / "base").symlink_to(tiny_folder)
    assert load(str(rewritten(lora, base_model_name_or_path="../base"))).weights_hash
    for named, words in (("org/base", "model 'hub:org/base' cannot be loaded: .*HF_HUB_OFFLINE"),
                         ("../gone", "model '../gone' cannot be loaded: No model at"),
                         (None, "model '' cannot be loaded")):  # fmt: skip
        refused(rewritten(lora, base_model_name_or_path=named), f"is an adapter, and its {words}")


def test_a_base_model_learns_to_chat_by_its_adapter(lora, tiny, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    rewritten(lora, base_model_name_or_path=str(base))
    refused(lora, "cannot be loaded: .*has no chat template")
    tiny.tokenizer.save_pretrained(lora)
    assert load(str(lora)).tokenizer.chat_template == tiny.tokenizer.chat_template


def test_an_adapter_of_the_hub_is_merged_at_a_commit(lora, hub_cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    names, commit = ["adapter_config.json", "adapter_model.safetensors"], "a" * 40
    files = {f"org/lora/{name}": (lora / name).read_bytes() for name in names}
    with serve(files, {"main": commit, commit: commit}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        model = load("hub:org/lora")
        refused("hub:org/none", "not on the hub, or private")
    assert model.revision.startswith(f"{commit} merged into ")
    assert model.weights_hash == load(str(lora)).weights_hash == load("hub:org/lora").weights_hash


def test_an_adapter_that_is_not_whole_or_not_of_this_model_is_one_sentence(lora):
    file = lora / "adapter_model.safetensors"
    numbers = load_file(file)
    some = min(numbers)
    save_file({name: numbers[name] for name in numbers if name != some}, file)
    refused(lora, f"cannot be merged into LlamaForCausalLM \\(it has no {some}")
    save_file(numbers | {some.replace("layers.0", "layers.9"): numbers[some].clone()}, file)
    refused(lora, "it has a superfluous base_model.model.model.layers.9")
    save_file(numbers | {some: torch.ones(4, 8)}, file)
    refused(lora, "cannot be merged into LlamaForCausalLM .*size mismatch")
    save_file(numbers, file)
    refused(rewritten(lora, peft_type="NONE"), "adapter_config.json cannot be read")
    file.rename(lora / "adapter_model.bin")
    refused(lora, "No adapter_model.safetensors in .* pickles are not read")


def test_an_adapter_that_is_no_sum_is_refused(tiny_folder, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    refused(trained(tiny_folder, tmp_path / "prompt", config), "cannot be merged into")
