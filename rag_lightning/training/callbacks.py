"""Small callbacks: the run's state beyond weights, its outputs, and how it ends."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

from rag_lightning.corpora.questions import write_predictions
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.staleness import index_recall
from rag_lightning.types import Prediction
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
    """Ctrl-C ends training after the optimiser step in progress, so that the checkpoint saved can be resumed.

    Between two optimiser steps gradients may be accumulating, which no checkpoint holds; so the run goes on to the end
    of the step. Several processes end at the same step. A second Ctrl-C stops at once. Place it after callbacks that
    act at the end of a step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None
        self._last_step = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over Ctrl-C, where this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Ends the run if asked to; the checkpoint callback saves on the way out."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._end_if_asked(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:  # perhaps in the middle of a step: what is in memory now must not become a checkpoint
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._asked = True
        print("\nCtrl-C: ending after this step and saving a checkpoint; press again to stop at once.", flush=True)

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # Lightning would log this step after this callback
            figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" not in name}
            for tracker in trainer.loggers:
                tracker.log_metrics(figures, trainer.global_step - 1)
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
        predictions = gathered_predictions(pl_module)
        if trainer.global_rank != 0:
            return
        metrics = {**measured_by_test(trainer), **index_recall(pl_module.model, pl_module.data)}
        num_questions = len(predictions) if predictions else len(pl_module.data.questions.get("test", []))
        write_json(self.directory / "metrics.json", {**metrics, "num_questions": num_questions})
        if predictions:
            write_predictions(self.directory / "predictions.jsonl", predictions)


def measured_by_test(trainer: L.Trainer) -> dict[str, float]:
    """Returns what the test measured, without ``test/``."""
    return {
        name.removeprefix("test/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("test/")
    }


def gathered_predictions(module: RagLightningModule) -> list[Prediction]:
    """Returns every process's predictions of the test, on every process, in the order of the questions."""
    parts = distributed.gather_objects(module.predictions)
    order = {question.id: place for place, question in enumerate(module.data.questions.get("test", []))}
    return sorted((p for part in parts for p in part), key=lambda prediction: order[prediction.id])
