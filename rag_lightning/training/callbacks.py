"""Small callbacks: the run's state beyond weights, its outputs, and how it ends."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

from rag_lightning.corpora.questions import write_predictions
from rag_lightning.training.module import RagLightningModule
from rag_lightning.utils import distributed
from rag_lightning.utils.io import write_json


class RandomStateCallback(L.Callback):
    """Keeps every process's random state in the checkpoint, so that dropout goes on where it stopped."""

    def __init__(self) -> None:
        self._to_restore: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all processes, in rank order."""
        mine: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            mine["cuda"] = torch.cuda.get_rng_state()
        return {"ranks": distributed.gather_objects(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the states until training starts."""
        self._to_restore = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores this process's state; a run resumed on more processes keeps its seed for the new ones."""
        if self._to_restore is None or trainer.global_rank >= len(self._to_restore):
            return
        mine = self._to_restore[trainer.global_rank]
        torch.set_rng_state(mine["cpu"].cpu())
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"].cpu())
        self._to_restore = None


class InterruptCallback(L.Callback):
    """Ctrl-C ends training after the step in progress, so that the checkpoint saved is one that can be resumed.

    A second Ctrl-C stops at once. Place it after callbacks that act at the end of a step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over Ctrl-C, where this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Ends the run if asked to; the checkpoint callback saves on the way out."""
        self._end_if_asked()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the run if asked to during validation."""
        self._end_if_asked()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nCtrl-C: ending after this step and saving a checkpoint; press again to stop at once.", flush=True)

    def _end_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


class OutputCallback(L.Callback):
    """Writes the test's ``metrics.json`` and ``predictions.jsonl`` into the run's folder.

    Args:
        directory: Where.
    """

    def __init__(self, *, directory: str) -> None:
        self.directory = Path(directory)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers every process's predictions and writes them in question order."""
        assert isinstance(pl_module, RagLightningModule)
        parts = distributed.gather_objects(pl_module.predictions)
        if trainer.global_rank != 0:
            return
        order = {question.id: place for place, question in enumerate(pl_module.data.questions.get("test", []))}
        predictions = sorted((p for part in parts for p in part), key=lambda prediction: order[prediction.id])
        metrics = {
            name.removeprefix("test/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        write_json(self.directory / "metrics.json", {**metrics, "num_questions": len(order)})
        if predictions:
            write_predictions(self.directory / "predictions.jsonl", predictions)
