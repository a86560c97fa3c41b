"""Supervised fine-tuning on traces, by TRL: full weights or LoRA, resumed after a kill.

A training is named by all that determines it. Its folder holds checkpoints while it runs, then
`model` (safetensors, loaded by `kit.models.load`) with `card.json` beside the weights, and the log
of its steps in `history.json`. Every arm takes the same number of steps of the same batch.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from kit import models, wheels
from kit.schema import digest

VERSIONS = [torch.__version__, transformers.__version__]  # with others the same steps differ


@dataclass(frozen=True)
class Recipe:
    """How weights are changed."""

    steps: int = 60
    batch: int = 8  # sequences per step
    micro_batch: int = 8  # sequences read at once; divides `batch`
    learning_rate: float = 2e-5
    warmup: float = 0.1  # share of the steps
    lora_rank: int = 0  # 0 trains all weights
    save_every: int = 20  # steps
    seed: int = 0

    def __post_init__(self):
        if self.batch % self.micro_batch or self.steps < 1:
            raise ValueError(
                f"batch is {self.batch}, micro_batch {self.micro_batch}, steps {self.steps}: "
                f"micro_batch must divide batch, and steps be at least 1."
            )


class Unstable(RuntimeError):
    """The loss is no number any more; says at which step, and what was kept."""


def sft(
    base: str,
    examples: Sequence[dict],
    recipe: Recipe,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    device: str = "auto",
) -> Path:
    """Train `base` on `examples` (see `traces.sequences`); the folder of the trained model.

    Trained before, it is returned as it is; killed before, it goes on at its last checkpoint.
    """
    import datasets  # these take seconds to import
    from trl import SFTConfig, SFTTrainer

    if not examples:
        raise ValueError("No examples to train on; see traces.accepted.")
    model = models.load(base, dtype="float32", device=device)
    data = digest([[e["input_ids"], e["completion_mask"]] for e in examples], 12)
    job = digest(["sft", model.weights_hash, data, asdict(recipe), VERSIONS], 12)
    place = Path(folder) / job
    if (place / "model" / "card.json").is_file():
        return place / "model"
    trainer = SFTTrainer(
        model.weights,
        SFTConfig(**_settings(recipe, model, place)),
        train_dataset=datasets.Dataset.from_list(list(examples)),
        processing_class=model.tokenizer,
        peft_config=lora(recipe.lora_rank) if recipe.lora_rank else None,
        callbacks=[Watch(report, place)],
    )
    card = {"base": base, "data": data, "examples": len(examples)}
    return train(trainer, model, place, recipe, card)


def _settings(recipe: Recipe, model: models.Model, place: Path) -> dict:
    """What TRL is told."""
    return common(recipe, model, place) | dict(
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        completion_only_loss=True,
        max_length=None,
    )


def common(recipe, model: models.Model, place: Path) -> dict:
    """What TRL is told whatever is trained."""
    cpu = model.device.type == "cpu"
    return dict(
        output_dir=str(place / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        learning_rate=recipe.learning_rate,
        bf16=models.default_dtype(model.device) == torch.bfloat16,
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


def train(trainer, model: models.Model, place: Path, recipe, card: dict) -> Path:
    """Run a TRL trainer to its end, from its last checkpoint where it has one; the folder of the
    trained model. Of several processes the first one saves."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(place / "checkpoints"))
    if trainer.is_world_process_zero():
        history = [row for row in trainer.state.log_history if "loss" in row]
        trained = trainer.model.merge_and_unload() if recipe.lora_rank else trainer.model
        card |= {"base_hash": model.weights_hash, "recipe": asdict(recipe), "versions": VERSIONS}
        (place / "history.json").write_text(json.dumps(history))
        save(trained, model, place, card)
        shutil.rmtree(place / "checkpoints")  # three times the size, and of no more use
    return place / "model"


class Watch(TrainerCallback):
    """Reports the figures of each step; stops a training whose loss is no number."""

    def __init__(self, report: Callable[[dict], None], place: Path):
        self.report, self.place = report, place

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
            kept = last_checkpoint(self.place / "checkpoints")
            raise Unstable(
                f"The loss is {logs['loss']} at step {state.global_step}; "
                f"{f'the checkpoint {Path(kept).name} is kept' if kept else 'nothing was saved'}"
                f". Lower learning_rate."
            )
        self.report({"step": state.global_step, **logs})


def save(weights, base: models.Model, place: Path, card: dict) -> None:
    """Weights, tokenizer, hash and card into `place/model`, complete or not at all."""
    part = place / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        weights.to(torch.float16 if weights.dtype == torch.float32 else weights.dtype)
        weights.save_pretrained(part)
        base.tokenizer.save_pretrained(part)
        files = sorted(part.glob("*.safetensors"))
        (part / "weights.sha256").write_text(wheels.hash_files(files) + "\n")
        (part / "card.json").write_text(json.dumps(card, indent=1))
        os.replace(part, place / "model")
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"Cannot save the trained model in {place} ({error.strerror or error}); make room and "
            f"run again: the last checkpoint is kept."
        ) from error


def history(model_folder: Path) -> list[dict]:
    """The log of the training that made `model_folder`: one dict per step."""
    return json.loads((Path(model_folder).parent / "history.json").read_text())


def last_checkpoint(checkpoints: Path) -> str | None:
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


def lora(rank: int):
    from peft import LoraConfig

    where = dict(target_modules="all-linear", task_type="CAUSAL_LM")
    return LoraConfig(r=rank, lora_alpha=2 * rank, **where)
