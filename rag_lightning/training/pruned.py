"""A run that was stopped early because others of its sweep were better: what it leaves, and who reads that."""

from pathlib import Path
from typing import Any

from rag_lightning.utils.io import read_json, write_json

PRUNED_FILE = "pruned.json"


def write_pruned(folder: Path, *, step: int, monitor: str, value: float) -> None:
    """Says in a run's folder that it was stopped at a step, and at what value."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PRUNED_FILE, {"step": step, "monitor": monitor, "value": value})


def pruned_at(folder: Path) -> dict[str, Any] | None:
    """Returns the step, the metric and its value at which a run was stopped; None where it was not."""
    path = folder / PRUNED_FILE
    return dict(read_json(path)) if path.is_file() else None
