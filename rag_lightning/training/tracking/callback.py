"""Tells every tracker of a run what it should know, at the right moment."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from rag_lightning.errors import ConfigError
from rag_lightning.index.manifest import MANIFEST_FILE
from rag_lightning.training.callbacks import gathered_predictions
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.tracking.base import TrackedArtifact, Tracker, prediction_table, redacted
from rag_lightning.training.tracking.mlflow import MlflowTracker
from rag_lightning.training.tracking.plain import FileTracker
from rag_lightning.training.tracking.tensorboard import TensorBoardTracker
from rag_lightning.training.tracking.wandb import WandbTracker
from rag_lightning.utils.io import read_json

logger = logging.getLogger(__name__)
SNAPSHOT_ARTIFACT = "index-snapshot"
MODEL_ARTIFACT = "model"
TABLE_KEY = "test/predictions"
PANEL = "retrieval_collapse"
"""The section in which the signs of a collapse stand together; a refresh adds its overlap@K."""
SIGNS = (
    "val/distinct_passage_ratio",
    "train/posterior_entropy",
    "val/retrieval_utility",
    "index/age_steps",
)
LOWER_IS_BETTER = ("nll", "loss")
NEITHER = ("entropy", "ratio", "index_age_steps")
"""Of these no value is the best."""
MAX_HISTORY = 4000
"""Rows of the history; of a longer run every second one is forgotten."""


def tracker_of(chosen: Logger) -> Tracker | None:
    """Returns what tells a logger the rest; None for a logger that can take metrics only."""
    if isinstance(chosen, WandbLogger):
        return WandbTracker(chosen)
    if isinstance(chosen, TensorBoardLogger):
        return TensorBoardTracker(chosen)
    if isinstance(chosen, MLFlowLogger):
        return MlflowTracker(chosen)
    return FileTracker(Path(chosen.log_dir)) if isinstance(chosen, CSVLogger) else None


class TrackingCallback(L.Callback):
    """Hands configuration, predictions, plots, artifacts and the best and last figures to every logger.

    Args:
        config: The run's settings, plain values only; those whose names call them secret are not told.
        max_table_rows: Predictions in the table, the first ones in question order.
        log_model: Hand on the saved model's files too.
        plots: Keep a history of the losses and of the validations, for whoever draws the run.
    """

    def __init__(
        self, *, config: Mapping[str, Any], max_table_rows: int = 1000, log_model: bool = True, plots: bool = True
    ) -> None:
        if max_table_rows < 0:
            raise ConfigError(f"max_table_rows: expected 0 or more, got {max_table_rows}")
        self.config = redacted(config)
        self.max_table_rows = max_table_rows
        self.log_model = log_model
        self.plots = plots
        self.history: list[dict[str, float]] = []
        self.trackers: list[Tracker] = []
        self._told_config = False
        self._trained = False
        self._told_snapshot: str | None = None
        self._summary: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the best and last figures and the history so far, for a run that is resumed."""
        return {"summary": dict(self._summary), "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from them; the checkpoint that a test loads tells nothing new of a training that is done."""
        if self._trained:
            return
        self._summary = dict(state_dict["summary"])
        self.history = [dict(row) for row in state_dict.get("history", ())]  # older checkpoints have none

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Logs the configuration, once."""
        if not self._told_config:
            for chosen in trainer.loggers:
                chosen.log_hyperparams(self.config)
            if trainer.global_rank == 0:
                self.trackers = [one for one in map(tracker_of, trainer.loggers) if one is not None]
        self._told_config = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Keeps the loss of the steps that are logged."""
        loss = trainer.callback_metrics.get("train/loss")
        done = trainer.global_step
        if not self.plots or trainer.global_rank != 0 or loss is None or done % trainer.log_every_n_steps != 0:
            return
        if done > 0 and not any(row["step"] == done - 1 for row in self.history[-1:]):  # once of accumulated batches
            self._keep(done, {"train/loss": float(loss)})

    def _keep(self, steps_done: int, figures: Mapping[str, float]) -> None:
        """Adds to the history, the last step's number as in the log files."""
        self.history.append({"step": float(steps_done - 1), **figures})
        if len(self.history) > MAX_HISTORY:
            del self.history[1::2]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the best and last figures, and draws the signs of a retrieval collapse into one panel."""
        if trainer.sanity_checking or trainer.global_rank != 0:
            return
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name, value in figures.items():
            if name.startswith("val/"):
                self._note(name, value)
        if self.plots and trainer.state.fn == TrainerFn.FITTING:
            validated = {name: value for name, value in figures.items() if name.startswith("val/")}
            self._keep(trainer.global_step, validated)
        signs = {f"{PANEL}/{name.split('/')[1]}": value for name, value in figures.items() if name.startswith(SIGNS)}
        for chosen in trainer.loggers if signs else ():
            chosen.log_metrics(signs, trainer.global_step)

    def _note(self, name: str, value: float) -> None:
        self._summary[f"last/{name}"] = value
        if name.endswith(NEITHER):
            return
        choose = min if name.endswith(LOWER_IS_BETTER) else max
        self._summary[f"best/{name}"] = choose(value, self._summary.get(f"best/{name}", value))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the manifest of the live snapshot."""
        self._trained = True
        self._log_snapshot(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the test's predictions, and the manifest of the snapshot that it searched."""
        if not trainer.loggers or not isinstance(pl_module, RagLightningModule):
            return
        predictions = gathered_predictions(pl_module)  # of all processes, so all must ask
        self._log_snapshot(pl_module)
        if not predictions or not self.trackers:
            return
        questions = {question.id: question for question in pl_module.data.questions["test"]}
        columns, rows = prediction_table(predictions[: self.max_table_rows], questions)
        for tracker in self.trackers:
            tracker.table(TABLE_KEY, columns, rows)

    def _log_snapshot(self, pl_module: L.LightningModule) -> None:
        if not self.trackers or not isinstance(pl_module, RagLightningModule) or pl_module.data.dense is None:
            return
        snapshot = pl_module.data.dense.snapshot
        if snapshot.id == self._told_snapshot:
            return
        self._told_snapshot = snapshot.id
        manifest = TrackedArtifact(
            name=SNAPSHOT_ARTIFACT,
            kind=SNAPSHOT_ARTIFACT,
            folder=snapshot.path,
            files=(MANIFEST_FILE,),
            metadata=read_json(snapshot.path / MANIFEST_FILE),
        )
        for tracker in self.trackers:
            tracker.artifact(manifest)

    def finish(self, folder: Path) -> None:
        """Hands on what the run has left in its folder: plots, the saved model, and the summary.

        Args:
            folder: The run's.
        """
        if not self.trackers:
            return
        plots = sorted(folder.glob("*.png"))
        model = self._model(folder / "model") if self.log_model and (folder / "model").is_dir() else None
        for tracker in self.trackers:
            for plot in plots:
                tracker.image(f"plots/{plot.stem}", plot)
            if model is not None:
                tracker.artifact(model)
            if self._summary:
                tracker.summary(self._summary)

    def _model(self, folder: Path) -> TrackedArtifact:
        files = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
        made_from = (f"{SNAPSHOT_ARTIFACT}/{self._told_snapshot}",) if self._told_snapshot is not None else ()
        figures = {name: value for name, value in self._summary.items() if name.startswith("best/")}
        return TrackedArtifact(
            name=MODEL_ARTIFACT,
            kind="model",
            folder=folder,
            files=files,
            metadata={"snapshot": self._told_snapshot, **figures},
            made_from=made_from,
        )
