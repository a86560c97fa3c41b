"""Adapter folders of peft: LoRA, and others that can be merged into the model that they name."""

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel


class AdapterError(ValueError):
    """An adapter cannot be merged; the message says why."""


def weights_file(folder: Path) -> Path:
    """The file of an adapter's weights; AdapterError if they are missing or pickled."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise AdapterError(
            f"No {file.name} in {folder}; save the adapter again, pickles are not read."
        )
    return file


def base(folder: Path) -> str:
    """The model that an adapter was trained on, as `load` takes it: a folder, a GGUF file, or a
    name. A path may be relative to the adapter's folder."""
    from peft import PeftConfig  # takes seconds

    try:
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path or ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder}/adapter_config.json cannot be read ({str(error).splitlines()[0]}); save the "
            f"adapter again."
        ) from error
    for place in (folder / name, Path(name)):
        if name and place.exists():
            return str(place)
    kind = name.split(":")[0]
    whole = kind in ("bundled", "hub", "random") or name.count("/") != 1 or name.startswith(".")
    return name if whole else f"hub:{name}"


def talks(folder: Path) -> bool:
    """Whether an adapter has a tokenizer with a chat template, for which it was trained."""
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return inside or (config.is_file() and (folder / "chat_template.jinja").is_file())


def merge(weights: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`weights` with the adapter of a folder added to them, for good.

    Raises AdapterError if the adapter is not whole, was trained on a model of another shape, or is
    of a kind that is no sum with the weights (prompts, prefixes).
    """
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds

    with safe_open(weights_file(folder), "pt") as file:
        names = {*file.keys()}
    try:
        adapted = PeftModel.from_pretrained(weights, str(folder))
        own = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
        if unmatched := (own - names) | (names - own - {*adapted.state_dict()}):
            kind = "has no" if min(unmatched) in own else "has a superfluous"
            raise AdapterError(f"it {kind} {min(unmatched)}")
        return adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = str(error).splitlines()[-1].strip().rstrip(".")
        raise AdapterError(
            f"The adapter {folder} cannot be merged into {type(weights).__name__} ({why}); take "
            f"the model that it was trained on, or save the adapter again."
        ) from error
