"""What the figures were measured on: without it they are worth little."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("rag_lightning", "torch", "transformers", "tokenizers", "numpy")


def machine() -> dict[str, Any]:
    """Returns the processor, its cores, the threads that torch uses, the memory and the GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "gpu": gpu,
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Returns the versions that decide speed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def commit() -> str | None:
    """Returns the checkout's commit, with ``+`` where files differ from it; None outside a checkout.

    A package installed within another project's repository is outside: that project's commit says nothing of it.
    """
    here = Path(__file__).parent
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name, here=here)
        head = _git("rev-parse", "HEAD", here=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", here=here)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changed else head


def _git(*words: str, here: Path) -> str:
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
