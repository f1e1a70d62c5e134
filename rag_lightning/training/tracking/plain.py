"""Files beside ``metrics.csv``: tables as JSON lines, images copied, artifacts and summary as JSON."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from rag_lightning.training.tracking.base import TrackedArtifact
from rag_lightning.utils.io import read_json, write_json, write_json_lines


class FileTracker:
    """Writes what is tracked into a folder.

    Args:
        folder: Which; made where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def summary(self, figures: Mapping[str, float]) -> None:
        """Writes ``summary.json``, with what is there already."""
        path = self.folder / "summary.json"
        write_json(path, {**(read_json(path) if path.is_file() else {}), **figures})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes one object a row."""
        lines = [dict(zip(columns, row, strict=True)) for row in rows]
        write_json_lines(self.folder / "tables" / f"{file_name(name)}.jsonl", lines)

    def image(self, name: str, path: Path) -> None:
        """Copies the file."""
        target = self.folder / "images" / f"{file_name(name)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def artifact(self, artifact: TrackedArtifact) -> None:
        """Writes where the files are and what they were made from; they stay where they are."""
        record = {
            "kind": artifact.kind,
            "folder": artifact.folder.name,
            "files": list(artifact.files),
            "metadata": artifact.described(),
        }
        write_json(self.folder / "artifacts" / f"{file_name(artifact.name)}.json", record)


def csv_logger(*, save_dir: str, name: str = "logs") -> CSVLogger:
    """Returns the CSV logger.

    Args:
        save_dir: The run's folder.
        name: The folder in it.
    """
    return CSVLogger(save_dir=save_dir, name=name)


def file_name(name: str) -> str:
    """Returns a tracked name as a file's.

    >>> file_name("test/predictions")
    'test_predictions'
    """
    return name.replace("/", "_")
