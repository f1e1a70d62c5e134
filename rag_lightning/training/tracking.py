"""Tracking: what a run tells its loggers beyond metrics, and the one module that imports wandb.

Every logger (CSV, TensorBoard, Weights & Biases) is told the composed configuration. Weights & Biases also gets a table
of the test's predictions with their passages, and the manifest of the index snapshot that was searched, as an artifact.
No logger is told anything of the process's environment: see :func:`wandb_logger`.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.index.manifest import MANIFEST_FILE
from rag_lightning.index.snapshot import Snapshot
from rag_lightning.training.callbacks import gathered_predictions
from rag_lightning.training.module import RagLightningModule
from rag_lightning.types import Prediction, Question
from rag_lightning.utils.io import read_json

SNAPSHOT_ARTIFACT = "index-snapshot"
TABLE_KEY = "test/predictions"
QUESTION_COLUMNS = ("id", "question", "accepted", "answer", "log_likelihood")
PASSAGE_COLUMNS = ("passage", "probability", "posterior")


class TrackingCallback(L.Callback):
    """Hands the configuration to every logger, and predictions and snapshot manifests to Weights & Biases.

    Args:
        config: The run's settings, plain values only.
        max_table_rows: Predictions in the table, the first ones in question order.
    """

    def __init__(self, *, config: Mapping[str, Any], max_table_rows: int = 1000) -> None:
        if max_table_rows < 0:
            raise ConfigError(f"max_table_rows: expected 0 or more, got {max_table_rows}")
        self.config = dict(config)
        self.max_table_rows = max_table_rows
        self._told_config = False
        self._told_snapshot: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Logs the configuration, once."""
        if not self._told_config:
            for logger in trainer.loggers:
                logger.log_hyperparams(self.config)
        self._told_config = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the manifest of the live snapshot."""
        self._log_snapshot(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the test's predictions, and the manifest of the snapshot that it searched."""
        loggers = _wandb_loggers(trainer)
        if not loggers:
            return
        if not isinstance(pl_module, RagLightningModule):
            return
        predictions = gathered_predictions(pl_module)
        self._log_snapshot(trainer, pl_module)
        if not predictions or trainer.global_rank != 0:
            return
        questions = {question.id: question for question in pl_module.data.questions["test"]}
        columns, rows = prediction_table(predictions[: self.max_table_rows], questions)
        for logger in loggers:
            logger.log_table(TABLE_KEY, columns=columns, data=rows)

    def _log_snapshot(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loggers = _wandb_loggers(trainer)
        if not loggers or not isinstance(pl_module, RagLightningModule):
            return
        if pl_module.data.dense is None or trainer.global_rank != 0:
            return
        snapshot = pl_module.data.dense.snapshot
        if snapshot.id == self._told_snapshot:
            return
        self._told_snapshot = snapshot.id
        for logger in loggers:
            _log_manifest(logger, snapshot)


def prediction_table(
    predictions: Sequence[Prediction], questions: Mapping[str, Question]
) -> tuple[list[str], list[list[Any]]]:
    """Returns the columns and rows of a table of predictions, each passage with its prior and posterior.

    Args:
        predictions: In the order wanted.
        questions: The questions by id, for their accepted answers.

    >>> asked = Question("q", "who made Kismet?", ("Vincente Minnelli",))
    >>> columns, rows = prediction_table([Prediction("q", asked.question, "Minnelli", -0.5, ())], {"q": asked})
    >>> dict(zip(columns, rows[0]))["accepted"]
    'Vincente Minnelli'
    """
    most = max((len(prediction.passages) for prediction in predictions), default=0)
    columns = [*QUESTION_COLUMNS, *(f"{name}_{place}" for place in range(1, most + 1) for name in PASSAGE_COLUMNS)]
    rows = []
    for prediction in predictions:
        question = questions[prediction.id]
        accepted = " | ".join(question.answers) if question.answers else question.answer_regex
        row: list[Any] = [prediction.id, prediction.question, accepted, prediction.answer, prediction.log_likelihood]
        for passage in prediction.passages:
            row += [f"{passage.title}: {passage.text}", passage.probability, passage.posterior]
        rows.append(row + [None] * (len(columns) - len(row)))
    return columns, rows


def wandb_logger(
    *,
    save_dir: str,
    project: str = "rag_lightning",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    offline: bool = False,
) -> WandbLogger:
    """Returns a Weights & Biases logger that records what is logged to it, and nothing of the process around it.

    Command line, host, user, git state, source code, installed packages, console output and machine load stay here;
    the process's environment is never read into a run. A run of an earlier job of the same process is finished first.

    Args:
        save_dir: Where run files go, under ``wandb/``.
        project: The project on the server.
        name: The run's name.
        entity: User or team; the account's default where None.
        group: Groups runs, of a sweep for example.
        offline: Write files only, to be sent by ``wandb sync``; otherwise ``WANDB_MODE`` decides.

    Raises:
        MissingExtraError: wandb is not installed.
    """
    wandb = _import_wandb()
    if wandb.run is not None:
        wandb.finish()
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    return WandbLogger(
        name=name,
        project=project,
        save_dir=save_dir,
        entity=entity,
        group=group,
        mode="offline" if offline else None,
        settings=settings,
    )


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
    return TensorBoardLogger(save_dir=save_dir, name=name)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("wandb", "wandb", "The logger 'wandb'") from error
    return wandb


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _log_manifest(logger: WandbLogger, snapshot: Snapshot) -> None:
    path = snapshot.path / MANIFEST_FILE
    artifact = _import_wandb().Artifact(SNAPSHOT_ARTIFACT, type=SNAPSHOT_ARTIFACT, metadata=read_json(path))
    artifact.add_file(str(path), policy="immutable", skip_cache=True)  # a published manifest is never altered
    logger.experiment.log_artifact(artifact)
