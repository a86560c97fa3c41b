"""A training that is killed anywhere ends as one that was not; what it saves is whole."""

import pytest
import torch

from kit.models import checkpoint
from kit.models.checkpoint import ResumableTraining

STEPS = 12


class LineFit(ResumableTraining):
    """Least squares on other points at each step."""

    def __init__(self, folder, rate=0.1):
        super().__init__(folder, ["line", rate], STEPS)
        self.parameters["slope"] = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW(self.parameters.values(), rate)

    def step(self) -> dict:
        rng = torch.Generator().manual_seed(len(self.history))
        points = torch.randn(8, 3, generator=rng)
        loss = ((points @ self.parameters["slope"] - points.sum(1)) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.history.append({"step": len(self.history) + 1, "loss": loss.item()})
        return self.history[-1]


def killed_at(step: int):
    def report(figures: dict) -> None:
        if figures["step"] == step:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("every_s", [0, 1e9])
def test_a_training_killed_twice_ends_as_an_undisturbed_one(every_s, tmp_path, monkeypatch):
    """Saved after every step, or at milestones alone: then what came after them is done again."""
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_S", every_s)
    whole = LineFit(tmp_path / "whole")
    whole.train()
    steps = []
    for stop in (4, 9):
        part = LineFit(tmp_path / "parts")
        part.resume()
        with pytest.raises(KeyboardInterrupt):
            part.train(killed_at(stop), lambda step: step == 6)
    last = LineFit(tmp_path / "parts")
    last.resume()
    last.train(lambda figures: steps.append(figures["step"]))
    assert steps == [*range(9 if every_s == 0 else 7, STEPS + 1)]
    assert last.history == whole.history
    assert torch.equal(last.parameters["slope"], whole.parameters["slope"])


def test_a_folder_belongs_to_one_training_and_a_finished_one_keeps_no_moments(tmp_path):
    one, other = LineFit(tmp_path), LineFit(tmp_path, rate=0.2)
    assert one.folder != other.folder == tmp_path / other.job
    sizes = {}
    one.train(milestone=lambda step: sizes.update({step: one.save() or one.state.stat().st_size}))
    assert sizes[STEPS] < sizes[STEPS - 1] and [*one.folder.iterdir()] == [one.state]
    again = LineFit(tmp_path)
    again.resume()
    assert len(again.history) == STEPS and not again.optimizer.state
    other.resume()
    assert other.history == []
