"""GGUF files, dequantized once to a folder of 16-bit safetensors that `load` reads.

The weights are those of the quantized file, not of the model that it was made from. transformers
and the gguf package know the kinds of blocks (Q4_1, Q4_K, Q6_K, ...) and the architectures.
"""

import shutil
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from kit import paths
from kit.hub import hash_files
from kit.paths import atomic

# Fields of a GGUF file, by parts of their names, that change what a model computes and that
# transformers passes over: scaled RoPE, windows, capped scores, multipliers.
WEIGHTY = ("rope.scaling", "sliding_window", "softcapping", "_scale", ".scale", "alibi")
STOPS = ("eos", "eot", "eom", "padding")
PASSED_OVER = (
    "which transformers passes over: take the folder or hub:ORG/NAME that the file was made from."
)


class GGUFError(ValueError):
    """A GGUF file cannot be read; the message says why."""


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds dequantized weights: their hash is written last."""
    return (folder / "weights.sha256").is_file()


def weights(file: Path) -> tuple[Path, str]:
    """The folder of the dequantized weights of any GGUF file, made once for each content, and what
    provenance says of it. Raises GGUFError as `dequantize` does."""
    if not file.is_file():
        raise GGUFError(f"There is no file {file}; give the path of a GGUF file.")
    sha256 = hash_files([file])
    folder = paths.MODELS / f"{file.stem}-{sha256[:12]}"
    if not is_whole(folder):
        dequantize(file, folder)
    return folder, f"{file.name}, SHA-256 {sha256[:12]} (quantized as published, dequantized)"


def dequantize(file: Path, folder: Path, dtype: str = "") -> None:
    """Write the GGUF file as safetensors with config and tokenizer to `folder`, once.

    `dtype` is that of the written weights: if not given, float32 or float16 where all of the file
    is, else bfloat16. Two processes at once write once. Raises GGUFError for a damaged file, for
    one that transformers does not read, or not whole, and for a full disk.
    """
    import gguf  # in functions, since who has the weights dequantized need not have it

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one process dequantizes, others wait
        if is_whole(folder):
            return
        size = file.stat().st_size / 1e6
        try:
            print(f"Dequantizing {file.name} ({size:,.0f} MB) to {folder}, once ...", flush=True)
            # transformers reads a file four times, each time all words of its vocabulary.
            with mock.patch("gguf.GGUFReader", cache(gguf.GGUFReader)), atomic(folder) as part:
                kind, need = _check(file, dtype)
                _check_room(folder, need)
                _write(file, part, kind)
        except GGUFError:
            raise
        except Exception as error:  # whatever a damaged file makes of its readers
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            if isinstance(error, SafetensorError) or getattr(error, "errno", None):
                raise GGUFError(
                    f"Cannot write {folder} ({why}); make room and run again, or set KIT_CACHE to "
                    f"a folder on another disk."
                ) from error
            raise GGUFError(
                f"Cannot read {file} ({why}); it is damaged, or of a kind that transformers does "
                f"not read: take another file."
            ) from error


def _check(file: Path, dtype: str) -> tuple[str, int]:
    """The dtype in which to write a file, as in `dequantize`, and how many bytes that makes;
    GGUFError for what transformers would pass over in silence."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.")
    }
    architecture = fields["general.architecture"]
    if fields.get("split.count", 1) > 1:
        raise GGUFError(
            f"{file} is one of {fields['split.count']} parts; join them (llama-gguf-split --merge)."
        )
    known_fields = GGUF_CONFIG_MAPPING.get(architecture, {})
    for name in fields:
        own = name.removeprefix(f"{architecture}.")
        plain = own == "rope.scaling.type" and fields[name] == "none"
        if own not in known_fields and own != name and any(w in own for w in WEIGHTY) and not plain:
            raise GGUFError(f"{file}: {name} is {fields[name]}, {PASSED_OVER}")
    if frequencies := [t.name for t in reader.tensors if t.name.startswith("rope_")]:
        raise GGUFError(f"{file}: it has {frequencies[0]}, {PASSED_OVER}")
    kinds = {each.tensor_type.name for each in reader.tensors}
    plain = "float32" if kinds == {"F32"} else "float16" if kinds <= {"F16", "F32"} else "bfloat16"
    kind = dtype or plain
    numbers = sum(int(each.n_elements) for each in reader.tensors)
    return kind, numbers * getattr(torch, kind).itemsize


def _stops(file: Path) -> list[int]:
    """Ids that end an answer: of the end of text, turn and message, and of padding where that is a
    control token. Qwen's end of text, at which its makers stop too, is named as padding only."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    tokens = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in STOPS}
    ids = {name: int(field.contents()) for name, field in tokens.items() if field}
    kinds = fields.get("tokenizer.ggml.token_type")
    if kinds is None or kinds.contents(ids.get("padding", 0)) != gguf.TokenType.CONTROL:
        ids.pop("padding", None)
    return [*dict.fromkeys(ids.values())]


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise GGUFError(
            f"{folder} needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make room, or "
            f"set KIT_CACHE to a folder on another disk."
        )


def _write(file: Path, folder: Path, dtype: str) -> None:
    source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    weights, report = AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), output_loading_info=True
    )
    if report["missing_keys"]:  # transformers would initialize them at random
        raise ValueError(f"it lacks {min(report['missing_keys'])}")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF converter reports <|im_start|> as end of text; the model config has it right.
    if (end := weights.config.eos_token_id) is not None:
        end = end[0] if isinstance(end, list) else end
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.clean_up_tokenization_spaces = False  # would eat spaces before punctuation
    if stops := _stops(file):
        weights.generation_config.eos_token_id = stops
    del weights.config.quantization_config  # the saved weights are plain
    tied = weights.all_tied_weights_keys
    state = {k: v.contiguous() for k, v in weights.state_dict().items() if k not in tied}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    weights.config.save_pretrained(folder)
    weights.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Written last: if it exists, everything above is complete.
    (folder / "weights.sha256").write_text(hash_files([folder / "model.safetensors"]) + "\n")
