"""How much memory this machine has left, how much this process has had at most, and weights in memory of their own."""

import os
import resource
import sys
from pathlib import Path
from typing import TypeVar

from torch import nn

ALIGNMENT = 64
"""Bytes: a cache line and the widest vector register, where torch's own allocations begin."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def aligned(model: ModuleT) -> ModuleT:
    """Moves the weights of a model to memory that begins where torch's own allocations do; returns the model.

    Weights read from a safetensors file begin wherever they begin in the file, and there matrix products take other
    paths and round otherwise: a saved model would not answer with the very numbers of the model that was saved.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.device.type == "cpu" and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()
    return model


def available_memory() -> int:
    """Returns the bytes that a new process can have without swapping: of the machine, or of its container if less."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    control_group = Path("/sys/fs/cgroup")
    limit, used = control_group / "memory.max", control_group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def peak_memory() -> int:
    """Returns the highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone; getrusage begins with what its parent had when it was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024
