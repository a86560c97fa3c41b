"""The state of a training in one file, for going on after a kill: parameters, AdamW's moments, log.

The file is complete or what it was before.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, per parameter
SAVE_EVERY_S = 60  # seconds between two saved states


def save(
    file: Path,
    named: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer | None,
    history: list[dict],
) -> None:
    """Write parameters and `history`, one entry per step, and the moments of `optimiser` where it
    has any; without one, as of a training that is done, the file is a third as large."""
    tensors = {}
    for name, value in named.items():
        state = optimiser.state[value] if optimiser else {}
        tensors[f"{name}|value"] = value.detach()
        tensors |= {f"{name}|{key}": state[key] for key in MOMENTS if key in state}
    file.parent.mkdir(parents=True, exist_ok=True)
    part, meta = file.with_suffix(".part"), {"history": json.dumps(history)}
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, metadata=meta)
    os.replace(part, file)


def load(
    file: Path, named: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> list[dict]:
    """Put the state of `save` in place; its history, empty where there is no file."""
    if not file.is_file():
        return []
    with safe_open(file, "pt") as handle:
        history, stored = json.loads(handle.metadata()["history"]), set(handle.keys())
        for name, value in named.items():
            value.data.copy_(handle.get_tensor(f"{name}|value"))
            if f"{name}|{MOMENTS[0]}" in stored:
                step = torch.tensor(float(len(history)), device=value.device)
                moments = {key: handle.get_tensor(f"{name}|{key}") for key in MOMENTS}
                moments = {key: one.to(value.device) for key, one in moments.items()}
                optimiser.state[value] = {"step": step, **moments}
    return history
