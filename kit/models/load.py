"""Loads a model by name: weights, tokenizer, and the hash of the weights.

    bundled:smollm2-135m           real weights by hash, no account (see `bundled` for the others)
    hub:Qwen/Qwen3-1.7B[@commit]   the first commit used is recorded and enforced afterwards
    path/to/folder                 a local folder written by save_pretrained, or a LoRA adapter
    path/to/file.gguf              dequantized once, see `gguf`
    random:llama | random:config/  a real architecture with random weights, no download

`load` returns a frozen Model, whose hash is part of every record; `save` writes trained weights to
a folder that `load` reads. Weights are safetensors or GGUF, never pickle. Remote code is never run.
A model that the slot cache cannot serve (`attention`) or that has no chat template is refused.
"""

import copy
import gc
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from weakref import WeakSet

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.modeling_outputs import MoeModelOutputWithPast

from kit import hub, paths
from kit.hub import hash_files
from kit.models import adapter, gguf, quantized_checkpoint
from kit.models.attention import unserved
from kit.models.bundled import MODELS, SMOLLM2, fetch
from kit.paths import atomic
from kit.schema import DTYPES, digest

transformers.utils.logging.disable_progress_bar()  # loading takes seconds; notebooks stay quiet

BUNDLED = SMOLLM2.name  # the one that `make env` fetches

# Tiny shapes of three model families for tests; a folder with config.json (`random:path`) gives any
# other shape, for example Qwen3-8B for memory measurements. Large initial weights and an untied
# head keep the greedy text from repeating one token.
_TINY = dict(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=4,
    head_dim=16,
    initializer_range=0.3,
    tie_word_embeddings=False,
    max_position_embeddings=1024,
)
RANDOM = {
    "llama": lambda: LlamaConfig(**_TINY, num_attention_heads=6, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_TINY, num_attention_heads=8, num_key_value_heads=1),
    "gemma3": lambda: Gemma3TextConfig(
        **_TINY,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}

# Put before a template without a system role: the system's text begins the user's.
_FOLD = (
    "{%- if messages[1:] and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' %}"
    "{%- set messages = [{'role': 'user', 'content': "
    "messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] %}{%- endif %}"
)

# What transformers raises for files that are damaged or do not belong together.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip

_PLAIN: WeakSet[PreTrainedModel] = WeakSet()  # models that `check_head` has let pass


class ModelError(ValueError):
    """A model cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Model:
    """Weights and tokenizer of one model. Equal hashes mean equal weights."""

    name: str
    weights: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None for random weights
    weights_hash: str  # SHA-256 of the weight files, 12 hex digits, or of the seed and config
    revision: str  # wheel, commit or folder of the weights
    base_hash: str = ""  # of the unquantized weights, if these are quantized

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def dtype_name(self) -> str:
        """One of DTYPES."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def hashes(self) -> tuple[str, str]:
        """Hashes of these weights and of the unquantized ones; an evictor fits both."""
        return self.weights_hash, self.base_hash

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a generation, from the model's generation config."""
        ids = self.weights.generation_config.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)


def twin(weights: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of a model that shares nothing with it, with parameters in `dtype`. Buffers, such as
    the frequencies of RoPE, keep their precision. A `forward` that a trainer bound to the model, as
    TRL does, is replaced in the copy by that of its class."""
    clone = copy.deepcopy(weights)
    vars(clone).pop("forward", None)
    for parameter in clone.parameters():
        parameter.data = parameter.data.to(dtype)
    return clone


def check_head(weights: PreTrainedModel) -> None:
    """ModelError for a model whose logits are more than `lm_head` of its last hidden states: who
    computes them from those would miss what it scales, caps or adds (Granite, Cohere, Gemma 2)."""
    if weights in _PLAIN:
        return
    matrix = weights.lm_head.weight.detach()
    states = torch.randn(2, matrix.shape[1], generator=torch.Generator().manual_seed(0))
    states = states.to(matrix.device, matrix.dtype)
    # Logits up to 200, which every cap in use would change.
    states *= 200 / (states @ matrix.T).abs().max()
    out = MoeModelOutputWithPast(last_hidden_state=states[None])
    ids = torch.zeros(1, 2, dtype=torch.long, device=matrix.device)
    with torch.no_grad(), mock.patch.object(weights.base_model, "forward", lambda *_, **__: out):
        logits = weights(input_ids=ids, use_cache=False).logits[0].float()
    plain = (states @ matrix.T).float()
    if (logits - plain).abs().max() > 0.02 * plain.abs().max():
        raise ModelError(
            f"{type(weights).__name__} does more to its logits than its head says (it scales, caps "
            f"or shifts them); distillation, likelihoods and rollouts would compute others, so "
            f"take another model."
        )
    _PLAIN.add(weights)


def collect() -> None:
    """Free unused memory: objects in reference cycles, such as trainers, and the memory that torch
    caches on the device."""
    gc.collect()
    torch.cuda.empty_cache()  # no effect if CUDA is not in use


def default_device() -> torch.device:
    """The first CUDA device, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype named by KIT_DTYPE. If unset or "auto": bfloat16 if the device multiplies it
    natively, else float16 on a GPU and float32 on a CPU. ModelError for an unknown name."""
    choice = os.environ.get("KIT_DTYPE") or "auto"
    if choice != "auto":
        return _dtype(choice, "KIT_DTYPE")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def set_dtype(dtype: str) -> None:
    """Load models as `dtype` from now on, in this process and its children.

    One of DTYPES, or "auto" for `default_dtype`. ModelError for another name.
    """
    if dtype != "auto":
        _dtype(dtype, "DTYPE")
        os.environ["KIT_DTYPE"] = dtype


def _dtype(name: str, parameter: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"{parameter} is {name!r}; choose auto, {', '.join(DTYPES)}.")
    return getattr(torch, name)


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    tokenizer: Path | None = None,
) -> Model:
    """Resolve `name` to a Model in eval mode.

    `dtype` is "auto" (see `default_dtype`) or one of DTYPES; `seed` is that of `random:` weights;
    `tokenizer` is a folder with another one than the model's own. Raises ModelError, or
    hub.HubError if the hub cannot deliver.
    """
    where = default_device() if device == "auto" else torch.device(device)
    kind = default_dtype(where) if dtype == "auto" else _dtype(dtype, "dtype")
    if name.startswith("random:"):
        return _random(name, kind, where, seed)
    if name.startswith("hub:"):
        repo, _, commit = name.removeprefix("hub:").partition("@")
        folder, revision = hub.snapshot(repo, commit or None)
    else:
        folder, revision = local(name)
    if (folder / "adapter_config.json").is_file():
        talks = tokenizer or (folder if adapter.talks(folder) else None)
        return _merged(name, folder, revision, dtype, device, talks)
    return _from_folder(name, folder, revision, kind, where, tokenizer or folder)


def local(name: str) -> tuple[Path, str]:
    """Folder and provenance of a bundled model, a GGUF file, or a folder; a path is from here, or
    from the project's folder. The first two are fetched and dequantized on first use."""
    if name.startswith("bundled:"):
        return bundled(name), MODELS[name].sources
    place = Path(name).expanduser()
    place = place if place.exists() else paths.ROOT / place
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        return gguf.weights(place)
    return place, name


def _merged(name: str, folder: Path, revision: str, dtype, device, tokenizer: Path | None) -> Model:
    """The model that an adapter folder names, with the adapter merged into it."""
    files = [adapter.weights_file(folder), folder / "adapter_config.json"]
    base = adapter.base(folder)
    try:
        model = load(base, dtype, device, tokenizer=tokenizer)
    except (ValueError, hub.HubError) as error:
        raise ModelError(
            f"{name!r} is an adapter, and its model {base!r} cannot be loaded: {error} (Or put a "
            f"folder into base_model_name_or_path of its adapter_config.json.)"
        ) from error
    weights = adapter.merge(model.weights, folder).requires_grad_(False).eval()
    parts = [model.weights_hash, hash_files(files)]
    revision = f"{revision} merged into {base} ({model.revision}, {model.weights_hash})"
    return Model(name, weights, model.tokenizer, digest(parts, 12), revision)


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with a chat template that takes a system message.

    Where the template refuses or drops one, its text begins the user's. ModelError for a model
    without a template, and for one that leaves out what the user says.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name!r} has no chat template, so it cannot be asked by messages; take an "
            f"instruction-tuned model, or put a chat_template.jinja into {folder}."
        )
    templates = tokenizer.chat_template
    plain = templates if isinstance(templates, str) else templates["default"]
    for tokenizer.chat_template in (plain, _FOLD + plain):
        why = _refusal(tokenizer)
        if not why:
            return tokenizer
    raise ModelError(f"The chat template of {name!r} {why}; mend it, or take another model.")


def _refusal(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template does with a system message and a user's, if it does not say both."""
    texts = {"system": "Answer briefly", "user": "How many"}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        return f"fails ({str(error).splitlines()[0].rstrip('.')})"
    missing = [role for role, words in texts.items() if words not in text]
    return f"leaves out what the {missing[-1]} says" if missing else ""


def _from_folder(name, folder: Path, revision: str, dtype, device, tokenizer: Path) -> Model:
    """Load safetensors and tokenizer from a local folder, without remote code."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"No model at {name!r}: {folder} has no config.json; give a folder written by "
            f"save_pretrained, a .gguf file, hub:ORG/NAME, random:llama or {BUNDLED}."
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"No *.safetensors in {name!r}; convert the weights, pickles are not read."
        )
    weights_hash = hash_files(files)
    _check_sidecar(folder, weights_hash)
    try:
        weights, missing = _weights(folder, dtype)
        talks = _tokenizer(name, tokenizer)
    except ImportError as error:  # of the package that reads a quantized checkpoint
        raise ModelError(
            f"Cannot load {name!r}: {str(error).splitlines()[0]} (not part of the kit: pip install "
            f"it into the environment, on a machine with a GPU)."
        ) from error
    except ModelError:
        raise
    except UNREADABLE as error:
        raise _unreadable(name, folder, error) from error
    if missing:  # transformers would initialize them at random
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} tensors that its "
            f"config.json asks for, first {min(missing)}; fetch or save it again."
        )
    weights.config.use_cache = True  # off in some published checkpoints: 200x slower
    weights = _served(name, weights.to(device).eval())
    return Model(name, weights, talks, weights_hash[:12], revision)


def _weights(folder: Path, dtype) -> tuple[PreTrainedModel, list[str]]:
    """The model in a folder, those of GPTQ and AWQ dequantized, and the names of what it lacks."""
    if stored := quantized_checkpoint.settings(folder):
        return quantized_checkpoint.read(folder, stored, dtype)
    weights, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        attn_implementation="sdpa",
        trust_remote_code=False,  # if unset, transformers asks on the terminal
        output_loading_info=True,
    )
    return weights, sorted(report["missing_keys"])


def _served(name: str, weights: PreTrainedModel) -> PreTrainedModel:
    """ModelError unless the slot cache can serve these weights."""
    if why := unserved(weights):
        raise ModelError(
            f"{name!r} ({weights.config.model_type}) is of a kind that the KV cache of the kit "
            f"cannot serve: {why}; take one that is built as Llama, Qwen or Gemma 3 is."
        )
    return weights


def _unreadable(name: str, folder, error: Exception) -> ModelError:
    """A ModelError from the first line of a transformers error; of a wrong field in a config, from
    the last."""
    lines = str(error).splitlines() or [type(error).__name__]
    why = lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()
    return ModelError(f"Cannot load {name!r} from {folder} ({why}); fetch or save it again.")


def _random(name: str, dtype, device, seed: int) -> Model:
    """A real architecture with random weights from `seed`; no tokenizer."""
    shape = name.removeprefix("random:")
    if shape in RANDOM:
        config = RANDOM[shape]()
    elif (Path(shape) / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(shape, trust_remote_code=False)
        except UNREADABLE as error:
            raise _unreadable(name, shape, error) from error
    else:
        raise ModelError(
            f"No random model {name!r}; use one of {sorted(RANDOM)} or a folder with config.json."
        )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        weights = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    weights.generation_config = GenerationConfig(eos_token_id=None)
    text = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    identity = f"{text} {seed} {device.type} {torch.__version__}"  # CPU and CUDA sample differently
    weights_hash = hashlib.sha256(identity.encode()).hexdigest()
    weights = _served(name, weights.eval())
    return Model(name, weights, None, weights_hash[:12], f"seed {seed}")


def _check_sidecar(folder: Path, weights_hash: str) -> None:
    """Raise ModelError if weights written by the kit do not match their hash in weights.sha256."""
    sidecar = folder / "weights.sha256"
    if sidecar.is_file() and sidecar.read_text().strip() != weights_hash:
        raise ModelError(
            f"The weights in {folder} do not match {sidecar.name} (damaged or edited); "
            f"delete the folder and they are made again."
        )


def bundled(name: str = BUNDLED) -> Path:
    """Folder of the dequantized weights of a bundled model, fetched and made on first use."""
    if name not in MODELS:
        raise ModelError(f"No bundled model {name!r}; the kit bundles {', '.join(MODELS)}.")
    model = MODELS[name]
    if not gguf.is_whole(model.folder):
        (file,) = fetch(model, paths.MODELS)
        gguf.dequantize(file, model.folder, model.dtype)
    return model.folder


def save(trained, base: Model, folder: Path, card: dict, weights: dict | None = None):
    """Write weights, tokenizer, hash and card to `folder`, complete or not at all.

    `weights` is the whole state of `trained` if that holds only a shard. float32 becomes float16.
    """
    weights = trained.state_dict() if weights is None else weights
    once = {n: w for n, w in weights.items() if n not in trained.all_tied_weights_keys}
    half = {n: w.half() if w.dtype == torch.float32 else w for n, w in once.items()}
    try:
        with atomic(folder) as part:
            trained.save_pretrained(part, state_dict=half)
            base.tokenizer.save_pretrained(part)
            files = sorted(part.glob("*.safetensors"))
            (part / "weights.sha256").write_text(hash_files(files) + "\n")
            (part / "card.json").write_text(json.dumps(card, indent=1))
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Cannot save the trained model in {folder} "
            f"({getattr(error, 'strerror', None) or error}); make room and run again: the last "
            f"checkpoint is kept."
        ) from error
