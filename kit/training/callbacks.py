"""What a training tells at each step, and why one stops, in one sentence."""

import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

from kit.inference import energy

IDLE = 10  # steps of GRPO without a gradient that are worth a warning


class Unstable(RuntimeError):
    """The loss is no number any more; says at which step, and what was kept."""


class Watch(TrainerCallback):
    """Adds seconds, energy and peak memory to the figures of each step, and reports them; stops a
    training whose loss is no number."""

    def __init__(self, report: Callable[[dict], None], place: Path):
        self.report, self.place, self.equal = report, place, 0

    def on_step_begin(self, args, state, control, **_):
        self.began, self.counted = time.perf_counter(), energy.joules()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        logs["seconds"] = time.perf_counter() - self.began
        logs["joules"] = energy.drawn(self.counted, energy.joules())
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        on_gpu = torch.cuda.is_available()
        logs["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else resident
        state.log_history[-1].update(logs)
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
            kept = last_checkpoint(self.place / "checkpoints")
            raise Unstable(
                f"The loss is {logs['loss']} at step {state.global_step}; "
                f"{f'the checkpoint {Path(kept).name} is kept' if kept else 'nothing was saved'}"
                f". Lower learning_rate."
            )
        self.equal = self.equal + 1 if logs.get("frac_reward_zero_std") == 1 else 0
        if self.equal == min(IDLE, state.max_steps):
            warnings.warn(
                f"In {self.equal} steps every group had equal rewards, so nothing is learnt; take "
                f"problems that are solved at times (traces.learnable), or larger groups.",
                stacklevel=2,
            )
        self.report({"step": state.global_step, **logs})


def told(error: Exception, trainer, place: Path) -> Exception | None:
    """The error in one sentence, if it is of memory, or of the disk and not told already."""
    step, said = trainer.state.global_step, str(error)
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in said:
        return MemoryError(
            f"Out of memory after step {step} with micro_batch "
            f"{trainer.args.per_device_train_batch_size}; lower it (the steps stay the same) and "
            f"run again: the last checkpoint is kept."
        )
    full = "No space left" in said or "PytorchStreamWriter" in said  # so torch says it
    if full and "make room" not in said:
        return OSError(
            f"Cannot save a checkpoint of step {step} in {place} ({said.splitlines()[0][:80]}); "
            f"make room and run again: it goes on at the checkpoint before."
        )
    return None


def last_checkpoint(checkpoints: Path) -> str | None:
    """The last checkpoint that was saved whole: its state is written after all else."""
    whole = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None
