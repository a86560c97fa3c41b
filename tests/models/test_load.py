"""Where models come from: bundled, hub, folder and random, and one sentence for each failure."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from kit import hub, paths
from kit.inference.decode import tokenize
from kit.models import gguf
from kit.models.bundled import SMOLLM2
from kit.models.load import (
    BUNDLED,
    RANDOM,
    ModelError,
    check_head,
    default_dtype,
    hash_files,
    load,
    set_dtype,
    twin,
)
from kit.schema import Problem, Prompt
from tests.fake_hub import build_cache, serve


def says(error: type[Exception], words: str, name: str, **options) -> None:
    """Loading `name` raises `error` with one line that matches `words`."""
    with pytest.raises(error, match=words) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def flip_byte(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


# Random weights


@pytest.mark.parametrize("shape", sorted(RANDOM))
def test_random_weights_are_a_function_of_shape_and_seed(shape):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (load(f"random:{shape}", "float32", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers are left alone"
    states = [model.weights.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
    assert one.weights_hash == same.weights_hash != other.weights_hash
    assert one.tokenizer is None and one.stop_ids == frozenset() and not one.weights.training


def test_one_knob_decides_the_dtype_of_every_model_here_and_in_processes_started(monkeypatch):
    monkeypatch.setenv("KIT_DTYPE", "float16")
    assert load("random:llama").dtype == torch.float16
    assert load("random:llama", "float32").dtype == torch.float32, "asked for by name"
    set_dtype("auto")
    assert load("random:llama").dtype == torch.float16
    set_dtype("bfloat16")
    assert load("random:llama").dtype == torch.bfloat16
    assert os.environ["KIT_DTYPE"] == "bfloat16"
    with pytest.raises(ModelError, match="DTYPE is 'half'; choose auto, float32"):
        set_dtype("half")
    monkeypatch.setenv("KIT_DTYPE", "fp32")
    with pytest.raises(ModelError, match="KIT_DTYPE is 'fp32'; choose auto, float32"):
        load("random:llama")


def test_by_itself_a_cpu_takes_the_dtype_that_it_multiplies_and_a_gpu_never_emulates(monkeypatch):
    monkeypatch.delenv("KIT_DTYPE", raising=False)
    for native, on_cpu, on_gpu in ((True, torch.bfloat16, torch.bfloat16),
                                   (False, torch.float32, torch.float16)):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert default_dtype(torch.device("cpu")) == on_cpu
        assert default_dtype(torch.device("cuda")) == on_gpu


def test_random_models_differ_in_hash_by_shape_and_dtype():
    kinds = [(shape, dtype) for shape in RANDOM for dtype in ("float32", "bfloat16")]
    every = [load(f"random:{shape}", dtype) for shape, dtype in kinds]
    assert len({model.weights_hash for model in every}) == len(every)
    assert [str(model.dtype) for model in every] == [f"torch.{dtype}" for _, dtype in kinds]


def test_a_folder_with_a_configuration_gives_random_weights_of_its_shape(tmp_path, tiny_folder):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    model = load(f"random:{tmp_path}", "float32")
    assert model.weights.config.hidden_size == 32 and model.weights.config.vocab_size == 4096


def test_what_does_not_exist_is_one_sentence(tmp_path):
    says(ModelError, r"No random model 'random:gpt9'; use one of .*'llama'", "random:gpt9")
    says(ModelError, "bundles bundled:smollm2-135m, bundled:qwen2.5-coder-0.5b, ", "bundled:gpt9")
    says(ModelError, "no config.json; give a folder", str(tmp_path / "none"))
    says(ModelError, "dtype is 'float33'; choose auto, float32", "random:llama", dtype="float33")


# A local folder


def test_a_folder_is_loaded_as_it_was_saved(tiny_folder):
    model = load(str(tiny_folder), dtype="float32")
    saved = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).state_dict()
    state = model.weights.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[k], saved[k]) for k in saved)
    file = (tiny_folder / "model.safetensors").read_bytes()
    assert model.weights_hash == hashlib.sha256(file).hexdigest()[:12]
    assert model.stop_ids == {2} and not model.weights.training and model.weights.config.use_cache
    assert model.tokenizer.decode(model.tokenizer("two words").input_ids) == "two words"


def test_a_changed_weight_changes_the_hash(folder, tiny):
    flip_byte(folder / "model.safetensors", -2)
    assert load(str(folder)).weights_hash != tiny.weights_hash


def test_hash_files_depends_on_content_and_order(tmp_path):
    one, two, three = (tmp_path / name for name in "abc")
    for file, content in ((one, b"ab"), (two, b"c"), (three, b"ab")):
        file.write_bytes(content)
    assert hash_files([one, two]) == hash_files([three, two])
    assert hash_files([one, two]) != hash_files([two, one])
    one.write_bytes(b"a")
    two.write_bytes(b"bc")
    assert hash_files([one, two]) != hash_files([three, two])


def test_a_folder_that_cannot_be_read_is_one_sentence(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-1000])
    says(ModelError, "Cannot load .*not fully covered", str(folder))
    weights.write_bytes(whole)
    config.write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    says(ModelError, "lack 9 tensors .*first model.layers.2", str(folder))
    config.write_text(json.dumps(settings | {"intermediate_size": 65}))
    says(ModelError, "Cannot load", str(folder))
    config.write_text('{"model_type": "nope"}')
    says(ModelError, "Cannot load .*nope", str(folder))
    config.write_text("{")
    says(ModelError, "Cannot load .*JSON", str(folder))
    config.write_text(json.dumps(settings))
    assert load(str(folder)).weights_hash
    (folder / "tokenizer.json").unlink()
    says(ModelError, "Cannot load .*tokenizer", str(folder))
    config.unlink()
    says(ModelError, "no config.json", str(folder))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"use_cache": None}, "'use_cache' expected bool, got NoneType"),
        ({"max_position_embeddings": None}, "'max_position_embeddings' expected int, got NoneType"),
        ({"num_attention_heads": None}, "'num_attention_heads' expected int, got NoneType"),
        ({"pad_token_id": 9999}, "Padding_idx must be within"),
    ],
)
def test_a_field_of_a_config_that_says_nothing_is_named(folder, changed, words):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    says(ModelError, f"Cannot load .*{words}", str(folder))


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_dim", "pad_token_id"])
def test_a_null_that_transformers_fills_in_loads(folder, field):
    config = folder / "config.json"
    shape = {"num_attention_heads": 2, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 16}
    shape |= {"layer_types": None, field: None}
    settings = json.loads(config.read_text()) | shape
    config.write_text(json.dumps(settings))
    weights = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.float32)
    weights.save_pretrained(folder)
    config.write_text(json.dumps(settings))
    assert load(str(folder)).weights.config.num_key_value_heads == 2


USER = "{% for m in messages if m['role'] == 'user' %}U: {{ m['content'] }}\n{% endfor %}A:"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"


def ask(model, *messages: tuple[str, str]) -> str:
    prompt = Prompt(Problem("", "", "", "", 0, ""), "plain", messages)
    return model.tokenizer.decode(tokenize(model, prompt))


@pytest.mark.parametrize("template", [USER, STRICT + USER])
def test_a_template_without_a_system_role_says_the_text_in_the_first_user_turn(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    model = load(str(folder))
    said = ask(model, ("system", "Be brief."), ("user", "How many?"), ("user", "Well?"))
    assert said == "U: Be brief.\n\nHow many?\nU: Well?\nA:"
    assert ask(model, ("user", "How many?")) == "U: How many?\nA:"


def test_a_template_that_says_the_system_text_is_left_alone(folder, tiny):
    before = tiny.tokenizer.chat_template
    assert load(str(folder)).tokenizer.chat_template == before


def test_a_template_that_cannot_be_asked_is_one_sentence_at_load(folder):
    template = folder / "chat_template.jinja"
    for text, words in (
        ("{{ messages[0]['content'] }", "fails .*unexpected"),
        ("Hello", "leaves out what the user says"),
        ("{{ raise_exception('Not today.') }}", r"fails \(Not today\)"),
    ):
        template.write_text(text)
        says(ModelError, f"The chat template of .* {words}.*; mend it", str(folder))
    template.unlink()
    says(ModelError, "has no chat template, so it cannot be asked", str(folder))


def test_a_kind_that_the_cache_cannot_serve_is_one_sentence_at_load(folder, tmp_path):
    shape = dict(vocab_size=4096, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    words = r"\(gpt2\) is of a kind that the KV cache of the kit cannot serve: its config names no"
    says(ModelError, words, str(folder))
    says(ModelError, words, f"random:{folder}")


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    says(ModelError, "No .*safetensors.*pickles are not read", str(folder))


def test_code_in_a_model_folder_is_not_run(folder, monkeypatch):
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = folder / "config.json"
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    config.write_text(json.dumps({"model_type": "own", "auto_map": own}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nor is a person asked
    says(ModelError, "Cannot load", str(folder))
    says(ModelError, "Cannot load", f"random:{folder}")
    assert not ran.exists()


# The bundled model


@pytest.mark.parametrize(
    "stored, words",
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "gptq weights of 3 bit are not"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq weights of version gemv"),
        ({"quant_method": "compressed-tensors"}, "requires compressed_tensors|compressed-tensors"),
    ],
)
def test_quantized_checkpoints_that_are_not_read_say_why(tiny_folder, tmp_path, stored, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    says(ModelError, words, str(folder))


def test_the_bundled_model_knows_its_end_its_name_and_its_hash(bundled):
    assert bundled.name == BUNDLED and bundled.revision == SMOLLM2.sources
    assert "b179c9523d0e (4-bit as published, dequantized)" in bundled.revision
    assert bundled.tokenizer.eos_token == "<|im_end|>"
    assert bundled.stop_ids == {bundled.tokenizer.eos_token_id}
    sidecar = paths.MODELS / "smollm2-135m" / "weights.sha256"
    assert sidecar.read_text().startswith(bundled.weights_hash)
    assert bundled.weights.num_parameters() == 134_515_008


@pytest.fixture
def cached(folder, tmp_path, monkeypatch) -> Path:
    """A cache of bundled models where a tiny one stands for the real one."""
    monkeypatch.setattr(paths, "MODELS", tmp_path / "models")
    target = paths.MODELS / "smollm2-135m"
    shutil.copytree(folder, target)
    (target / "weights.sha256").write_text(hash_files([target / "model.safetensors"]) + "\n")
    return target


def test_damaged_weights_are_refused(cached):
    assert load(BUNDLED).weights.config.hidden_size == 32
    flip_byte(cached / "model.safetensors", 100_000)
    says(ModelError, "do not match weights.sha256 .*delete the folder", BUNDLED)


def test_a_half_written_folder_is_made_again_once(cached, folder, monkeypatch):
    made = []

    def write(source: Path, target: Path, dtype: str) -> None:
        made.append((source.read_bytes(), dtype))
        shutil.copytree(folder, target)
        (target / "weights.sha256").write_text(hash_files([target / "model.safetensors"]))

    (paths.MODELS / "model.gguf").write_bytes(b"quantized")
    monkeypatch.setattr("kit.models.load.fetch", lambda *_: [paths.MODELS / "model.gguf"])
    monkeypatch.setattr(gguf, "_check", lambda _, dtype: (dtype, 0))
    monkeypatch.setattr(gguf, "_write", write)
    (cached / "weights.sha256").unlink()
    (cached / "model.safetensors").write_bytes(b"half")
    for _ in range(2):
        assert load(BUNDLED).weights.config.hidden_size == 32
    assert made == [(b"quantized", "float16")]
    names = sorted(child.name for child in paths.MODELS.iterdir())
    assert names == ["model.gguf", "smollm2-135m", "smollm2-135m.lock"]


# The hub

REPO, OLD, NEW = "Qwen/Qwen3-1.7B", "a" * 40, "b" * 40


@pytest.fixture
def hub_files(bundled, hub_cache, tmp_path, monkeypatch) -> dict[str, bytes]:
    """Files of a tiny Qwen3 with a real tokenizer, for an empty hub cache without a network."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    shape = dict(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, eos_token_id=2)
    config = Qwen3Config(**shape, **heads, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "q")
    bundled.tokenizer.save_pretrained(tmp_path / "q")
    return {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}


def test_a_hub_model_keeps_the_commit_of_its_first_use(hub_files, tmp_path):
    cache = build_cache(tmp_path / "hub", "model", REPO, hub_files, OLD)
    model = load(f"hub:{REPO}")
    assert model.revision == OLD and model.weights.config.model_type == "qwen3"
    assert model.tokenizer.chat_template and model.stop_ids == {2}
    assert json.loads(paths.REVISIONS.read_text()) == {f"model:{REPO}": OLD}

    build_cache(tmp_path / "hub", "model", REPO, hub_files, NEW)
    assert (cache / "refs" / "main").read_text() == NEW
    assert load(f"hub:{REPO}").revision == OLD, "the recorded commit is still cached"
    says(hub.HubError, f"first used at commit {OLD[:12]}", f"hub:{REPO}@{NEW}")
    shutil.rmtree(cache / "snapshots" / OLD)
    says(hub.HubError, f"first used at commit {OLD[:12]}", f"hub:{REPO}")


def test_a_hub_model_at_a_named_commit(hub_files, tmp_path):
    build_cache(tmp_path / "hub", "model", REPO, hub_files, OLD)
    build_cache(tmp_path / "hub", "model", REPO, hub_files, NEW)
    assert load(f"hub:{REPO}@{OLD}").revision == OLD


def test_a_hub_model_is_downloaded_and_then_needs_no_network(hub_files, monkeypatch):
    served = {f"{REPO}/{name}": content for name, content in hub_files.items()}
    with serve(served, {"main": OLD, OLD: OLD}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        first = load(f"hub:{REPO}")
    assert load(f"hub:{REPO}").weights_hash == first.weights_hash
    assert first.revision == OLD


def test_what_the_hub_refuses_is_one_sentence(hub_files, monkeypatch):
    says(hub.HubError, "not in the hub cache and the hub cannot be reached", f"hub:{REPO}")
    pickled = {"org/pickled/config.json": hub_files["config.json"], "org/pickled/model.bin": b""}
    with serve(pickled, {"main": OLD, OLD: OLD}, gated="org/gated") as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        says(hub.HubError, "gated: accept its terms at .*/org/gated", "hub:org/gated")
        says(hub.HubError, "not on the hub, or private", "hub:org/missing")
        says(hub.HubError, "pickled weights are not read", "hub:org/pickled")


def test_a_copy_of_a_model_that_a_trainer_has_wrapped_runs_its_own_layers():
    weights = load("random:llama").weights
    ids, plain = torch.tensor([[3, 4, 5]]), weights.forward
    before = weights(ids).logits
    weights.forward = lambda *args, **how: plain(*args, **how)  # bound to these weights
    copied = twin(weights)
    assert torch.equal(copied(ids).logits, before)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not copied(ids).logits.any() and torch.equal(weights(ids).logits, before)


def test_a_copy_in_fewer_bits_keeps_what_is_no_parameter():
    """Frequencies of RoPE in bfloat16 would turn the keys of late tokens by radians."""
    weights = load("random:llama", dtype="float32").weights
    copied = twin(weights, torch.bfloat16)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert torch.equal(copied.model.rotary_emb.inv_freq, weights.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "kind, does",
    [
        (LlamaConfig, {}),
        (GraniteConfig, {"logits_scaling": 8.0}),
        (CohereConfig, {"logit_scale": 0.0625}),
        (
            Gemma2Config,
            {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None, "head_dim": 16},
        ),  # fmt: skip
    ],
)
def test_a_head_that_does_more_than_its_matrix_is_refused(kind, does, tmp_path):
    config = kind(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **does,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    weights = load(f"random:{tmp_path}", dtype="float32").weights
    if does:
        with pytest.raises(ModelError, match=f"{type(weights).__name__} does more to its"):
            check_head(weights)
    else:
        check_head(weights)
        before = weights(torch.tensor([[1, 2, 3]])).logits
        check_head(weights)
        assert torch.equal(before, weights(torch.tensor([[1, 2, 3]])).logits)
