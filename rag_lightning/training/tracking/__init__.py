"""Tracking: what a run tells its loggers beyond metrics, the same to each of them.

``base`` says what a tracker can be told; ``wandb``, ``tensorboard``, ``mlflow`` and ``plain`` are trackers, each the
one importer of its package; ``callback`` tells them. None is told anything of the process's environment, nor what a
setting's name calls secret: see :func:`~rag_lightning.training.tracking.base.redacted`.
"""

from rag_lightning.training.tracking.base import Tracker, prediction_table, redacted
from rag_lightning.training.tracking.callback import TrackingCallback
from rag_lightning.training.tracking.mlflow import mlflow_logger
from rag_lightning.training.tracking.plain import csv_logger
from rag_lightning.training.tracking.tensorboard import tensorboard_logger
from rag_lightning.training.tracking.wandb import wandb_logger

__all__ = [
    "Tracker",
    "TrackingCallback",
    "csv_logger",
    "mlflow_logger",
    "prediction_table",
    "redacted",
    "tensorboard_logger",
    "wandb_logger",
]
