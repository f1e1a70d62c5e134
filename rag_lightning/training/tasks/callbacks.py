"""What a run of tasks leaves in its folder."""

from dataclasses import asdict
from pathlib import Path

import lightning as L

from rag_lightning.training.callbacks import measured_by_test
from rag_lightning.training.tasks.module import TaskLightningModule, gathered_predictions
from rag_lightning.utils.io import write_json, write_json_lines


class TaskOutputCallback(L.Callback):
    """Writes the test's ``metrics.json`` and ``predictions.jsonl``, and of tags the report of each, ``tags.json``.

    Args:
        directory: Where.
    """

    def __init__(self, *, directory: str) -> None:
        self.directory = Path(directory)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers every process's predictions and writes them in the order of the examples."""
        assert isinstance(pl_module, TaskLightningModule)
        predictions = gathered_predictions(pl_module)
        if trainer.global_rank != 0:
            return
        figures = {**measured_by_test(trainer), "num_examples": len(predictions)}
        write_json(self.directory / "metrics.json", figures)
        write_json_lines(self.directory / "predictions.jsonl", (asdict(prediction) for prediction in predictions))
        if pl_module.tag_reports:
            write_json(self.directory / "tags.json", pl_module.tag_reports)
