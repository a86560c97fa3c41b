"""What the devices say they have drawn: counters of energy, where there are any.

NVIDIA GPUs count since the driver was loaded (NVML, from Volta on), Intel and AMD CPUs through
RAPL where the files may be read, which most systems leave to root. GPUs that torch does not see,
which others may be using, are not counted.
"""

from functools import cache
from pathlib import Path

import pynvml
import torch

RAPL = Path("/sys/class/powercap")


def joules() -> float | None:
    """Energy counted so far by the GPUs that torch sees and all CPU packages, in joules; None
    where none counts."""
    counted = [*_packages(), *_gpus()]
    return sum(counted) if counted else None


def drawn(before: float | None, after: float | None) -> float | None:
    """Joules between two readings; None where there is none, or a counter began anew."""
    if before is None or after is None or after < before:
        return None
    return after - before


def _packages() -> list[float]:
    found = []
    for file in sorted(RAPL.glob("intel-rapl:[0-9]*/energy_uj")):
        if file.parent.name.count(":") == 1:  # a package, not a part of one
            try:
                found.append(int(file.read_text()) / 1e6)
            except OSError:
                return []
    return found


def _gpus() -> list[float]:
    try:
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3 for h in _handles()]
    except pynvml.NVMLError:
        return []


@cache
def _handles() -> list:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = [torch.cuda.get_device_properties(i).uuid for i in range(count)]
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in seen]
    except pynvml.NVMLError:  # no driver, or a part of a GPU, which has no counter
        return []
