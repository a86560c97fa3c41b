"""GGUF files, dequantized once to a folder of 16-bit safetensors that `load` reads.

The weights are those of the quantized file, not of the model that it was made from. transformers
and the gguf package know the kinds of blocks (Q4_1, Q4_K, Q6_K, ...) and the architectures.
"""

import struct
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.hub import hash_files
from kit.paths import atomic


class GGUFError(ValueError):
    """A GGUF file cannot be read; the message says why."""


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds dequantized weights: their hash is written last."""
    return (folder / "weights.sha256").is_file()


def dequantize(file: Path, folder: Path, dtype: str = "") -> None:
    """Write the GGUF file as safetensors with config and tokenizer to `folder`, once.

    `dtype` is that of the written weights: if not given, float32 or float16 where all of the file
    is, else bfloat16. Two processes at once write once. Raises GGUFError for a damaged file, and
    for an architecture that transformers does not read.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one process dequantizes, others wait
        if is_whole(folder):
            return
        size = file.stat().st_size / 1e6
        print(f"Dequantizing {file.name} ({size:,.0f} MB) to {folder}, once ...", flush=True)
        try:
            with atomic(folder) as part:
                _write(file, part, dtype or _dtype(file))
        except (ValueError, KeyError, IndexError, TypeError, struct.error, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise GGUFError(
                f"Cannot read {file} ({why}); it is damaged, or of a kind that transformers does "
                f"not read: take another file."
            ) from error


def _dtype(file: Path) -> str:
    """The dtype that holds all weights of a file, bfloat16 if they are quantized."""
    from gguf import GGUFReader

    kinds = {each.tensor_type.name for each in GGUFReader(file).tensors}
    return "float32" if kinds == {"F32"} else "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _write(file: Path, folder: Path, dtype: str) -> None:
    source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    weights = AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF converter reports <|im_start|> as end of text; the model config has it right.
    if (end := weights.config.eos_token_id) is not None:
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.clean_up_tokenization_spaces = False  # would eat spaces before punctuation
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
