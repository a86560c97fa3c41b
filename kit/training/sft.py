"""Supervised fine-tuning on traces, by TRL: full weights or LoRA, resumed after a kill.

Weights are kept in float32, and multiplied under autocast where the dtype of this machine is
bfloat16. A training is named by all that determines it. Its folder holds checkpoints while it runs,
then `model` (safetensors, loaded by `kit.models.load.load`) with `card.json` beside the weights,
and the log of its steps in `history.json`; of the steps that are to be compared on the validation
split, `step-N` like `model`. Every arm takes the same number of steps of the same batch.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import TrainerCallback

from kit.models.load import Model, collect, default_dtype, load, save
from kit.schema import digest
from kit.training.callbacks import Watch, last_checkpoint, told

VERSIONS = [torch.__version__, transformers.__version__]  # with others the same steps differ


@dataclass(frozen=True)
class SFTConfig:
    """How weights are changed."""

    steps: int = 32
    batch: int = 8  # sequences per step
    micro_batch: int = 8  # sequences read at once; divides `batch`
    learning_rate: float = 5e-5
    warmup: float = 0.1  # share of the steps
    lora_rank: int = 0  # 0 trains all weights
    save_every: int = 16  # steps
    keep_every: int = 0  # steps between two models that are kept; 0 keeps the last one only
    seed: int = 0

    def __post_init__(self):
        if self.batch % self.micro_batch or self.steps < 1:
            raise ValueError(
                f"batch is {self.batch}, micro_batch {self.micro_batch}, steps {self.steps}: "
                f"micro_batch must divide batch, and steps be at least 1."
            )


def alone(train: Callable[..., Path]) -> Callable[..., Path]:
    """The same training, of which nothing is left in memory when it has ended. A Trainer and its
    callbacks refer to each other, so its weights, gradients and moments would stay until Python
    looks for circles, which may be in the middle of the next training."""

    @wraps(train)
    def run(*args, **how) -> Path:
        try:
            return train(*args, **how)
        finally:
            collect()

    return run


@alone
def sft(
    base: str,
    examples: Sequence[dict],
    recipe: SFTConfig,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    device: str = "auto",
) -> Path:
    """Train `base` on `examples` (see `traces.sequences`); the folder of the trained model.

    Trained before, it is returned as it is; killed before, it goes on at its last checkpoint.
    """
    import datasets  # these take seconds to import
    import trl

    if not examples:
        raise ValueError("No examples to train on; see traces.accepted.")
    datasets.disable_progress_bars()
    model = load(base, dtype="float32", device=device)
    data = digest([[e["input_ids"], e["completion_mask"]] for e in examples], 12)
    parts = ["sft", model.weights_hash, data, identity(recipe), computed(model), VERSIONS]
    place = Path(folder) / digest(parts, 12)
    if (place / "model" / "card.json").is_file():
        return place / "model"
    trainer = trl.SFTTrainer(
        model.weights,
        trl.SFTConfig(**_settings(recipe, model, place)),
        train_dataset=datasets.Dataset.from_list(list(examples)),
        processing_class=model.tokenizer,
        peft_config=lora(recipe.lora_rank) if recipe.lora_rank else None,
        callbacks=[Watch(report, place)],
    )
    card = {"base": base, "data": data, "examples": len(examples)}
    return train(trainer, model, place, recipe, card)


def identity(recipe) -> dict:
    """What of a recipe names its training: not how many sequences are read at once."""
    return asdict(recipe) | {"micro_batch": None}


def computed(model: Model) -> str:
    """The dtype that the device of `model` computes in, whatever its weights are kept in."""
    return str(default_dtype(model.device)).removeprefix("torch.")


def _settings(recipe: SFTConfig, model: Model, place: Path) -> dict:
    """What TRL is told."""
    return common(recipe, model, place) | dict(
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        completion_only_loss=True,
        max_length=None,
    )


def common(recipe, model: Model, place: Path) -> dict:
    """What TRL is told whatever is trained."""
    cpu = model.device.type == "cpu"
    return dict(
        output_dir=str(place / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        learning_rate=recipe.learning_rate,
        bf16=computed(model) == "bfloat16",
        use_cpu=cpu,
        gradient_checkpointing=not cpu,
        dataloader_pin_memory=not cpu,
        save_steps=recipe.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        report_to=[],
        disable_tqdm=True,
    )


def train(trainer, model: Model, place: Path, recipe, card: dict) -> Path:
    """Run a TRL trainer to its end, from its last checkpoint where it has one; the folder of the
    trained model. Of several processes the first one saves."""
    if recipe.lora_rank and trainer.is_fsdp_enabled:
        raise ValueError(
            f"lora_rank is {recipe.lora_rank} and FSDP shards the weights; train all weights, or "
            f"LoRA with a copy in each process (data/launch/ddp.yaml)."
        )
    trainer.remove_callback(transformers.PrinterCallback)
    card |= {"base_hash": model.weights_hash, "recipe": asdict(recipe), "versions": VERSIONS}
    trainer.add_callback(Keep(trainer, model, place, recipe.keep_every, card))
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(place / "checkpoints"))
    except (OSError, RuntimeError, SafetensorError) as error:
        if sentence := told(error, trainer, place):
            raise sentence from error
        raise
    if trainer.is_world_process_zero():
        history = [row for row in trainer.state.log_history if "loss" in row]
        (place / "history.json").write_text(json.dumps(history))
    keep(trainer, model, place / "model", card | {"step": recipe.steps})
    shutil.rmtree(place / "checkpoints", ignore_errors=True)  # three times the size, of no more use
    trainer.accelerator.wait_for_everyone()
    return place / "model"


def keep(trainer, model: Model, folder: Path, card: dict) -> None:
    """Save what `trainer` trains as it is now. Each of several processes has to call this."""
    trained, weights = trainer.accelerator.unwrap_model(trainer.model), None
    if hasattr(trained, "merge_and_unload"):  # LoRA is put into a copy of the weights
        trained = deepcopy(trained).merge_and_unload()
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers shards
    if trainer.is_world_process_zero():
        save(trained, model, folder, card, weights)


class Keep(TrainerCallback):
    """Keeps the model of every `every`th step but the last, which `train` keeps without the
    checkpoint that the Trainer would save there."""

    def __init__(self, trainer, model: Model, place: Path, every: int, card: dict):
        self.trainer, self.model, self.place = trainer, model, place
        self.every, self.card = every, card

    def on_step_end(self, args, state, control, **_):
        step = state.global_step
        if step == state.max_steps:
            control.should_save = False
        elif self.every and step % self.every == 0:
            folder = self.place / f"step-{step:04}"
            keep(self.trainer, self.model, folder, self.card | {"step": step})


def kept(model_folder: Path) -> dict[int, Path]:
    """The models of a training by their step, the last one among them."""
    folders = [Path(model_folder), *Path(model_folder).parent.glob("step-*")]
    found = {json.loads((folder / "card.json").read_text())["step"]: folder for folder in folders}
    return dict(sorted(found.items()))


def history(model_folder: Path) -> list[dict]:
    """The log of the training that made `model_folder`: one dict per step."""
    return json.loads((Path(model_folder).parent / "history.json").read_text())


def cost(model_folder: Path) -> dict[str, float | None]:
    """What a training took: `steps`, `seconds`, `tokens` seen, `joules` (None where no device
    counts them)."""
    log = history(model_folder)
    drawn = [row["joules"] for row in log]
    return {
        "steps": len(log),
        "seconds": sum(row["seconds"] for row in log),
        "tokens": log[-1]["num_tokens"],
        "joules": None if None in drawn else sum(drawn),
    }


def lora(rank: int):
    from peft import LoraConfig

    where = dict(target_modules="all-linear", task_type="CAUSAL_LM")
    return LoraConfig(r=rank, lora_alpha=2 * rank, **where)
