"""TensorBoard."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from rag_lightning.errors import MissingExtraError
from rag_lightning.training.tracking.base import TrackedArtifact

MAX_CELL = 400


class TensorBoardTracker:
    """Writes texts, images and summary figures as events.

    Args:
        logger: Its logger.
    """

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger

    def summary(self, figures: Mapping[str, float]) -> None:
        """Writes each figure, and all of them beside the settings (the HPARAMS page)."""
        for name, value in figures.items():
            self.logger.experiment.add_scalar(f"summary/{name}", value)
        self.logger.log_hyperparams(self.logger.hparams, {f"hparams/{name}": value for name, value in figures.items()})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a Markdown table."""
        lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
        self.logger.experiment.add_text(name, "\n".join("| " + " | ".join(line) + " |" for line in lines))

    def image(self, name: str, path: Path) -> None:
        """Writes an image."""
        from PIL import Image

        with Image.open(path) as picture:
            self.logger.experiment.add_image(name, np.asarray(picture.convert("RGB")), dataformats="HWC")

    def artifact(self, artifact: TrackedArtifact) -> None:
        """Writes what the files are; TensorBoard keeps none."""
        record = {"kind": artifact.kind, "files": list(artifact.files), "metadata": artifact.described()}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        self.logger.experiment.add_text(f"artifacts/{artifact.name}", f"```\n{text}\n```")


def tensorboard_logger(*, save_dir: str, name: str = "logs") -> TensorBoardLogger:
    """Returns a TensorBoard logger.

    Args:
        save_dir: The run's folder.
        name: The folder in it.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "The logger 'tensorboard'")
    return TensorBoardLogger(save_dir=save_dir, name=name, default_hp_metric=False)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= MAX_CELL else text[:MAX_CELL] + "…"
