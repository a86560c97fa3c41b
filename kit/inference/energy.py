"""Energy that the devices have consumed, from their own counters where there are any.

NVIDIA GPUs count since the driver was loaded (NVML, from Volta on); Intel and AMD CPUs count
through RAPL, whose files only root can read on most systems. GPUs that torch does not see are not
counted, since others may be using them.
"""

from functools import cache
from pathlib import Path

import pynvml
import torch

RAPL = Path("/sys/class/powercap")


def joules() -> float | None:
    """Energy counted so far by the GPUs that torch sees and all CPU packages, in joules; None
    where there is no counter."""
    counters = [*_packages(), *_gpus()]
    return sum(counters) if counters else None


def consumed(before: float | None, after: float | None) -> float | None:
    """Joules between two readings; None where one is missing, or a counter was reset."""
    if before is None or after is None or after < before:
        return None
    return after - before


def _packages() -> list[float]:
    readings = []
    for file in sorted(RAPL.glob("intel-rapl:[0-9]*/energy_uj")):
        if file.parent.name.count(":") == 1:  # a package, not a part of one
            try:
                readings.append(int(file.read_text()) / 1e6)
            except OSError:
                return []
    return readings


def _gpus() -> list[float]:
    try:
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3 for h in _handles()]
    except pynvml.NVMLError:
        return []


@cache
def _handles() -> list:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    uuids = [torch.cuda.get_device_properties(i).uuid for i in range(count)]
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    except pynvml.NVMLError:  # no driver, or a part of a GPU, which has no counter
        return []
