"""Trainer callback and error messages.

`MetricsCallback` logs time, energy and peak memory of each step; `explain_error` turns errors of
memory and disk into one sentence.
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

from kit.inference import energy

IDLE = 10  # consecutive steps of GRPO without a gradient after which it warns


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names the step and the checkpoint that is kept."""


class MetricsCallback(TrainerCallback):
    """Adds seconds, energy (joules) and peak memory (bytes) to the metrics of each step and reports
    them; stops a training whose loss is not finite."""

    def __init__(self, report: Callable[[dict], None], place: Path):
        self.report, self.place, self.equal = report, place, 0

    def on_step_begin(self, args, state, control, **_):
        self.began, self.joules = time.perf_counter(), energy.joules()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        logs["seconds"] = time.perf_counter() - self.began
        logs["joules"] = energy.consumed(self.joules, energy.joules())
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        on_gpu = torch.cuda.is_available()
        logs["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else resident
        state.log_history[-1].update(logs)
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
            last = last_checkpoint(self.place / "checkpoints")
            raise NonFiniteLossError(
                f"The loss is {logs['loss']} at step {state.global_step}; "
                f"{f'the checkpoint {Path(last).name} is kept' if last else 'nothing was saved'}"
                f". Lower learning_rate."
            )
        self.equal = self.equal + 1 if logs.get("frac_reward_zero_std") == 1 else 0
        if self.equal == min(IDLE, state.max_steps):
            print(
                f"In {self.equal} steps every group had equal rewards, so nothing is learnt; take "
                f"problems that are solved sometimes (rejection_sampling.with_reward_variance), or "
                f"larger groups.",
                flush=True,
            )
        self.report({"step": state.global_step, **logs})


def explain_error(error: Exception, trainer, place: Path) -> Exception | None:
    """The same error in one sentence if memory or disk ran out, None of any other error or where it
    is one sentence already."""
    step, message = trainer.state.global_step, str(error)
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message:
        return MemoryError(
            f"Out of memory after step {step} with micro_batch "
            f"{trainer.args.per_device_train_batch_size}; lower it (the steps stay the same) and "
            f"run again: the last checkpoint is kept."
        )
    full = "No space left" in message or "PytorchStreamWriter" in message  # torch's words for it
    if full and "make room" not in message:
        return OSError(
            f"Cannot save a checkpoint of step {step} in {place} ({message.splitlines()[0][:80]}); "
            f"make room and run again: it goes on at the checkpoint before."
        )
    return None


def last_checkpoint(checkpoints: Path) -> str | None:
    """The last complete checkpoint: `trainer_state.json` is the file that is written last."""
    complete = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda f: int(f.name.split("-")[1]))) if complete else None
