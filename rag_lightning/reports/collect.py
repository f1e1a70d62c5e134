"""What finished runs measured, read from their ``metrics.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.utils.io import existing_file, read_json

METRICS_FILE = "metrics.json"
RECALLS = ("recall@1", "recall@5")


def collect_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the metrics of every run directly under ``folder``, by the run's name, in order of time.

    Raises:
        MissingFileError: No such folder, or no finished run in it.
    """
    existing_file(folder, "runs")
    paths = sorted(folder.glob(f"*/{METRICS_FILE}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise MissingFileError(
            f"runs: expected run folders with {METRICS_FILE} in {folder}, found none. Has a run finished there?"
        )
    runs = {}
    for path in paths:
        metrics = read_json(path, "metrics")
        if not isinstance(metrics, dict):
            raise DataError(f"{path}: expected an object of metrics, came a {type(metrics).__name__}")
        runs[path.parent.name] = metrics
    return runs


def summary(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of the short table, fractions of 1 and seconds; a run that retrieves nothing recalls 0."""
    figures = {name: float(metrics.get(name, 0.0)) for name in ("exact_match", "f1", *RECALLS)}
    return figures | {"seconds": float(metrics.get("seconds", 0.0))}
