"""A training loop that saves its state as it goes and resumes after a kill at the same step."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kit.paths import atomic
from kit.schema import digest

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, per parameter
SAVE_EVERY_S = 60  # seconds between two saved states


class ResumableTraining:
    """A training of `steps` steps in a folder of its own, named by the digest of all that
    determines it.

    A subclass fills `parameters`, the trained ones by name, sets `optimizer`, an AdamW over them,
    and defines `step`. The state lies in one file, which is complete or what it was before:
    parameters, moments and `history`, one entry per step.
    """

    optimizer: torch.optim.AdamW

    def __init__(self, folder: Path, identity: list, steps: int):
        self.job = digest(identity, 12)
        self.folder, self.steps = Path(folder) / self.job, steps
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.history: list[dict] = []

    @property
    def state(self) -> Path:
        """The file of `save`."""
        return self.folder / "state.safetensors"

    def step(self) -> dict:
        """Do step len(history) + 1, append its figures to `history` and return them."""
        raise NotImplementedError

    def train(
        self,
        report: Callable[[dict], None] = lambda figures: None,
        milestone: Callable[[int], bool] = lambda step: False,
    ) -> None:
        """Do the steps that are left, saving once a minute and where `milestone`, called after each
        step with its number, returns True."""
        saved = time.monotonic()
        while len(self.history) < self.steps:
            report(self.step())
            if milestone(len(self.history)) or time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        """Write what `resume` reads. The moments are left out after the last step: the file is then
        a third as large."""
        tensors, finished = {}, len(self.history) >= self.steps
        for name, value in self.parameters.items():
            state = {} if finished else self.optimizer.state[value]
            tensors[f"{name}|value"] = value.detach()
            tensors |= {f"{name}|{key}": state[key] for key in MOMENTS if key in state}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        with atomic(self.state) as part:
            save_file(tensors, part, metadata={"history": json.dumps(self.history)})

    def resume(self) -> None:
        """Restore the state of `save`, if there is one."""
        if not self.state.is_file():
            return
        with safe_open(self.state, "pt") as handle:
            self.history, stored = json.loads(handle.metadata()["history"]), set(handle.keys())
            for name, value in self.parameters.items():
                value.data.copy_(handle.get_tensor(f"{name}|value"))
                if f"{name}|{MOMENTS[0]}" in stored:
                    step = torch.tensor(float(len(self.history)), device=value.device)
                    moments = {key: handle.get_tensor(f"{name}|{key}") for key in MOMENTS}
                    moments = {key: moment.to(value.device) for key, moment in moments.items()}
                    self.optimizer.state[value] = {"step": step, **moments}
