"""Supervised fine-tuning (SFT) by TRL: full weights or LoRA, resumed after a kill.

Weights are stored in float32; the forward pass runs under autocast where the dtype of the device is
bfloat16. A training is named by a hash of all that determines it. Its folder holds checkpoints
while it runs, then `model` (safetensors, loaded by `kit.models.load.load`) with `card.json` beside
the weights, the log of its steps in `history.json`, and a folder `step-N` like `model` for each
step that is to be compared on the validation split.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import TrainerCallback

from kit.models.load import Model, collect, default_dtype, load, save
from kit.schema import digest
from kit.training import memory
from kit.training.callbacks import MetricsCallback, explain_error, last_checkpoint

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit"}  # names in TRL
VERSIONS = [torch.__version__, transformers.__version__]  # others may take other steps
# It would warn that a model's special tokens follow its tokenizer's from now on, as they should.
logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


@dataclass(frozen=True)
class SFTConfig:
    """Hyperparameters of supervised fine-tuning."""

    steps: int = 32
    batch: int = 8  # sequences per step
    micro_batch: int = 8  # sequences per forward pass; divides `batch`
    learning_rate: float = 5e-5
    warmup: float = 0.1  # fraction of the steps
    lora_rank: int = 0  # 0 trains all weights
    optimizer: str = "adamw"  # of OPTIMIZERS
    save_every: int = 16  # steps
    keep_every: int = 0  # steps between two saved models; 0 saves the last one only
    seed: int = 0

    def __post_init__(self):
        if self.batch % self.micro_batch or self.steps < 1:
            raise ValueError(
                f"batch is {self.batch}, micro_batch {self.micro_batch}, steps {self.steps}: "
                f"micro_batch must divide batch, and steps be at least 1."
            )
        check_optimizer(self.optimizer)


def check_optimizer(name: str) -> None:
    """ValueError unless `name` is one of OPTIMIZERS."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; choose one of {', '.join(OPTIMIZERS)}.")


def releases_memory(train: Callable[..., Path]) -> Callable[..., Path]:
    """Decorator: frees the memory of a training when it ends. A Trainer and its callbacks refer to
    each other, so its weights, gradients and moments would stay until Python collects reference
    cycles, which may be in the middle of the next training."""

    @wraps(train)
    def run(*args, **how) -> Path:
        try:
            return train(*args, **how)
        finally:
            collect()

    return run


@releases_memory
def sft(
    base: str,
    examples: Sequence[dict],
    config: SFTConfig,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    device: str = "auto",
) -> Path:
    """Train `base` on `examples`, see `rejection_sampling.training_sequences`; the folder of the
    trained model.

    A finished training is returned as it is; a killed one continues from its last checkpoint.
    """
    import datasets  # these take seconds to import
    import trl

    if not examples:
        raise ValueError("No examples to train on; see rejection_sampling.accept.")
    datasets.disable_progress_bars()
    model = load(base, dtype="float32", device=device)
    data = digest([[e["input_ids"], e["completion_mask"]] for e in examples], 12)
    parts = ["sft", model.weights_hash, data, identity(config), compute_dtype(model), VERSIONS]
    place = Path(folder) / digest(parts, 12)
    if (place / "model" / "card.json").is_file():
        return place / "model"
    longest = max(len(example["input_ids"]) for example in examples)
    checkpointing = memory.checkpoints_layers(model, config, longest)
    trainer = trl.SFTTrainer(
        model.weights,
        trl.SFTConfig(gradient_checkpointing=checkpointing, **_settings(config, model, place)),
        train_dataset=datasets.Dataset.from_list(list(examples)),
        processing_class=model.tokenizer,
        peft_config=lora_config(config.lora_rank) if config.lora_rank else None,
        callbacks=[MetricsCallback(report, place)],
    )
    card = {"base": base, "data": data, "examples": len(examples)}
    return train(trainer, model, place, config, card)


def identity(config) -> dict:
    """The fields of a configuration that name its training: all except `micro_batch`, and the
    optimizer where it is not AdamW, the only one of earlier trainings."""
    named = asdict(config) | {"micro_batch": None}
    return {name: value for name, value in named.items() if (name, value) != ("optimizer", "adamw")}


def compute_dtype(model: Model) -> str:
    """The dtype in which the device of `model` computes, whatever its weights are stored in."""
    return str(default_dtype(model.device)).removeprefix("torch.")


def _settings(config: SFTConfig, model: Model, place: Path) -> dict:
    """TRL's settings for `config`."""
    return trainer_settings(config, model, place) | dict(
        gradient_accumulation_steps=config.batch // config.micro_batch,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * config.steps),
        completion_only_loss=True,
        max_length=None,
    )


def trainer_settings(config, model: Model, place: Path) -> dict:
    """TRL's settings that SFT and GRPO share. ValueError for an optimizer whose package is not
    installed."""
    cpu = model.device.type == "cpu"
    if cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # else "cpu:0", which torch.load refuses
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if config.optimizer == "adamw-8bit" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "optimizer is 'adamw-8bit', which needs bitsandbytes (not part of the kit: pip install "
            "it into the environment, on a machine with a GPU); or set lora_rank."
        )
    return dict(
        output_dir=str(place / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        learning_rate=config.learning_rate,
        bf16=compute_dtype(model) == "bfloat16",
        use_cpu=cpu,
        optim=OPTIMIZERS[config.optimizer],
        dataloader_pin_memory=not cpu,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=config.seed,
        report_to=[],
        disable_tqdm=True,
    )


def train(trainer, model: Model, place: Path, config, card: dict) -> Path:
    """Run a TRL trainer to its end, from its last checkpoint where it has one; the folder of the
    trained model. Of several processes the first one saves."""
    if config.lora_rank and trainer.is_fsdp_enabled:
        raise ValueError(
            f"lora_rank is {config.lora_rank} and FSDP shards the weights; train all weights, or "
            f"LoRA with a copy in each process (data/launch/ddp.yaml)."
        )
    trainer.remove_callback(transformers.PrinterCallback)
    # Else a resumed training warns that a tied head is missing in its checkpoint.
    model.weights._keys_to_ignore_on_save = {*model.weights.all_tied_weights_keys}
    card |= {"base_hash": model.weights_hash, "recipe": asdict(config), "versions": VERSIONS}
    trainer.add_callback(CheckpointCallback(trainer, model, place, config.keep_every, card))
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(place / "checkpoints"))
    except (OSError, RuntimeError, SafetensorError) as error:
        if sentence := explain_error(error, trainer, place):
            raise sentence from error
        raise
    if trainer.is_world_process_zero():
        history = [row for row in trainer.state.log_history if "loss" in row]
        (place / "history.json").write_text(json.dumps(history))
    save_model(trainer, model, place / "model", card | {"step": config.steps})
    shutil.rmtree(place / "checkpoints", ignore_errors=True)  # three times the size, of no more use
    trainer.accelerator.wait_for_everyone()
    return place / "model"


def save_model(trainer, model: Model, folder: Path, card: dict) -> None:
    """Save the model of `trainer` as it is now. Each of several processes has to call it."""
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(trained, "get_base_model"):
        weights, trained = merged_weights(trained), trained.get_base_model()
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers shards
    if trainer.is_world_process_zero():
        save(trained, model, folder, card, weights)


@torch.no_grad()
def merged_weights(lora) -> dict[str, torch.Tensor]:
    """The weights of a model with its LoRA added to them, matrix by matrix in float16, so that
    there is no second copy in float32."""
    base = lora.get_base_model()
    weights = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()
               if ".lora_" not in name}  # fmt: skip
    for name, layer in base.named_modules():
        if hasattr(layer, "get_delta_weight"):
            (adapter,) = layer.active_adapters
            weights[f"{name}.weight"] = (layer.weight + layer.get_delta_weight(adapter)).half()
    return weights


class CheckpointCallback(TrainerCallback):
    """Saves the model of every `every`th step except the last, which `train` saves without the
    checkpoint that the Trainer would write there."""

    def __init__(self, trainer, model: Model, place: Path, every: int, card: dict):
        self.trainer, self.model, self.place = trainer, model, place
        self.every, self.card = every, card

    def on_step_end(self, args, state, control, **_):
        step = state.global_step
        if step == state.max_steps:
            control.should_save = False
        elif self.every and step % self.every == 0:
            folder = self.place / f"step-{step:04}"
            save_model(self.trainer, self.model, folder, self.card | {"step": step})


def saved_models(model_folder: Path) -> dict[int, Path]:
    """The saved models of a training by step, the last one included."""
    folders = [Path(model_folder), *Path(model_folder).parent.glob("step-*")]
    by_step = {json.loads((folder / "card.json").read_text())["step"]: folder for folder in folders}
    return dict(sorted(by_step.items()))


def history(model_folder: Path) -> list[dict]:
    """The log of the training that made `model_folder`: one dict per step."""
    return json.loads((Path(model_folder).parent / "history.json").read_text())


def cost(model_folder: Path) -> dict[str, float | None]:
    """Cost of a training: `steps`, `seconds`, `tokens` seen, `joules` (None where no device
    measures energy)."""
    log = history(model_folder)
    joules = [row["joules"] for row in log]
    return {
        "steps": len(log),
        "seconds": sum(row["seconds"] for row in log),
        "tokens": log[-1]["num_tokens"],
        "joules": None if None in joules else sum(joules),
    }


def lora_config(rank: int):
    from peft import LoraConfig

    where = dict(target_modules="all-linear", task_type="CAUSAL_LM")
    return LoraConfig(r=rank, lora_alpha=2 * rank, **where)
