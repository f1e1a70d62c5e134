"""``rag-lightning train``: fit, test with a fresh index, save the model; returns the metric of a sweep."""

import logging
import time
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from rag_lightning.cli.build import (
    build_run,
    build_task_run,
    build_trainer,
    build_walk,
    check_task_choices,
    has_heads,
    logger_nodes,
    recordable,
)
from rag_lightning.cli.prepared import check_languages, prepares, with_prepared
from rag_lightning.cli.record import record_run
from rag_lightning.cli.run_pictures import draw_run
from rag_lightning.cli.sweeping.job import job_folder
from rag_lightning.errors import ConfigError, MissingExtraError, MissingFileError
from rag_lightning.methods.curriculum.walk import Walk
from rag_lightning.rag_parts import RetrieverSource
from rag_lightning.reports.curriculum_plots import plot_walk
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.study import PruningCallback
from rag_lightning.training.tracking import TrackingCallback
from rag_lightning.training.tracking.base import TRACKING_FILE
from rag_lightning.utils.io import read_json, write_json
from rag_lightning.utils.subnormals import subnormals_flushed

logger = logging.getLogger(__name__)
CONFIG_NAME = "config.yaml"


def run(config: DictConfig) -> float | None:
    """Trains as configured; everything the run leaves is under its folder."""
    with subnormals_flushed():
        return _run(config)


def _run(config: DictConfig) -> float | None:
    start = time.perf_counter()
    config, checkpoint = _resumed(config) if config.resume is not None else (config, None)
    config = with_prepared(config, resumed=checkpoint is not None) if prepares(config) else config
    folder = Path(config.paths.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None and rank_zero_only.rank == 0:
        (folder / TRACKING_FILE).unlink(missing_ok=True)  # another run's, whose folder this one takes
    OmegaConf.save(OmegaConf.create(recordable(config)), folder / CONFIG_NAME)
    record_run(config, folder, resumed=checkpoint is not None)
    L.seed_everything(config.seed, verbose=False)
    if config.matmul_precision is not None:
        torch.set_float32_matmul_precision(config.matmul_precision)
    if config.get("curriculum") is not None and not has_heads(config):
        raise ConfigError("curriculum: expected tasks to walk over, got none. Choose them, as task=multitask.")
    if config.index.factory is None:
        raise ConfigError("index.factory: expected exact or a FAISS factory, came none: index=own is for evaluate.")
    train = _train_heads if has_heads(config) else _train_rag
    fitted: dict[str, float] = {}
    trainer = train(config, folder, checkpoint, fitted)
    if trainer.is_global_zero:
        _record_seconds(folder, time.perf_counter() - start)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrackingCallback):
                if callback.plots and callback.trackers:
                    draw_run(folder, callback.history, name=config.run_name)
                callback.finish(folder)
    return _sweep_metric(trainer, config, fitted)


def _train_rag(config: DictConfig, folder: Path, checkpoint: Path | None, fitted: dict[str, float]) -> L.Trainer:
    module, data = build_run(config)
    if prepares(config):
        check_languages(config, module.model)
    trainer = build_trainer(config, config.callbacks)
    if not _fit(trainer, module, data, folder, checkpoint, fitted):
        return trainer
    if config.data.test is not None:
        trainer.test(module, datamodule=data, ckpt_path=_best(trainer), weights_only=True)
    else:  # a saved model names the index of its passage tower as it is
        data.ensure_index(step=trainer.global_step, fresh=True)
    if trainer.is_global_zero:
        save_model(module, data, folder)
    return trainer


def _train_heads(config: DictConfig, folder: Path, checkpoint: Path | None, fitted: dict[str, float]) -> L.Trainer:
    check_task_choices(config, HydraConfig.get().overrides.task)
    module, data = build_task_run(config)
    walks = []
    if config.get("curriculum") is not None:
        walks.append(build_walk(config, module, data, resumed=checkpoint is not None))
    trainer = build_trainer(config, config.callbacks, walks)
    if not _fit(trainer, module, data, folder, checkpoint, fitted):
        return trainer
    if trainer.is_global_zero and walks:
        _draw_walk(walks[0].walk, folder / "curriculum.png")
    try:
        if any("test" in splits for splits in data.examples.values()):
            trainer.test(module, datamodule=data, ckpt_path=_best(trainer), weights_only=True)
    finally:  # a test that fails costs no training
        if trainer.is_global_zero:
            module.model.save_pretrained(folder / "model", labels=module.labels)
            logger.info("model saved to %s", folder / "model")
    return trainer


def _draw_walk(walk: Walk, path: Path) -> None:
    try:
        plot_walk(walk.graph, walk.history, path=path)
        logger.info("the walk is drawn in %s", path)
    except MissingExtraError as error:
        logger.info("the walk is not drawn: %s", error)


def _fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: L.LightningDataModule,
    folder: Path,
    checkpoint: Path | None,
    fitted: dict[str, float],
) -> bool:
    """Fits, and keeps what was measured in ``fitted``, which a test overwrites; False for a run that was pruned."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        logger.info("interrupted; resume with: rag-lightning train resume=%s", folder)
        raise
    fitted.update({name: float(value) for name, value in trainer.callback_metrics.items()})
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            fitted[callback.monitor] = float(callback.best_model_score)  # what is tested, not what came last
    if any(isinstance(callback, PruningCallback) and callback.pruned for callback in callbacks):
        logger.info("pruned at step %d: other runs of the sweep were better; it is not tested", trainer.global_step)
        return False
    return True


def save_model(module: RagLightningModule, data: RagDataModule, folder: Path) -> None:
    """Writes ``model/`` with the index that it was tested with."""
    model = module.model
    if data.retriever is not None and data.passages is not None:
        passages = data.passages if data.passages.startswith("bundled:") else str(Path(data.passages).absolute())
        snapshot = str(data.dense.snapshot.path.absolute()) if data.dense is not None else None
        settings = data.retriever_settings
        # the BM25 index is not named: the cache it lies in may be cleared, and it is made again in seconds
        model.retriever_source = RetrieverSource(passages, snapshot, settings=settings)
    model.save_pretrained(folder / "model")
    logger.info("model saved to %s", folder / "model")


def _resumed(config: DictConfig) -> tuple[DictConfig, Path]:
    """Returns the earlier run's configuration, with plain overrides on top, and its last checkpoint."""
    folder = Path(config.resume)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    for path in (folder / CONFIG_NAME, checkpoint):
        if not path.is_file():
            raise MissingFileError(
                f"resume: expected a run folder with {path.relative_to(folder)}, found none in {folder}"
            )
    overrides = [text for text in HydraConfig.get().overrides.task if not text.startswith("resume=")]
    if job_folder() == folder:  # a relaunched sweep, which has seen that the configuration is the run's own
        overrides = []
    groups = [text for text in overrides if "." not in text.split("=")[0] and text.split("=")[0] not in ("seed",)]
    if groups:
        raise ConfigError(
            f"resume: expected plain values such as trainer.max_steps=500, got {', '.join(groups)}: "
            "a run goes on with its own configuration"
        )
    earlier = OmegaConf.load(folder / CONFIG_NAME)
    assert isinstance(earlier, DictConfig)
    merged = OmegaConf.merge(earlier, OmegaConf.from_dotlist(overrides))
    assert isinstance(merged, DictConfig)
    for node in logger_nodes(merged):
        if "resume" in node:  # a tracker that goes on under the run's id
            node.resume = str(folder)
    return merged, checkpoint


def _best(trainer: L.Trainer) -> str | None:
    """Returns the best checkpoint where validation chose one; None keeps the weights of the last step."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.best_model_path:
        return str(callback.best_model_path)
    return None


def _record_seconds(folder: Path, seconds: float) -> None:
    path = folder / "metrics.json"
    if path.is_file():
        write_json(path, {**read_json(path), "seconds": round(seconds, 1)})


def _sweep_metric(trainer: L.Trainer, config: DictConfig, fitted: dict[str, float]) -> float | None:
    """Returns what a sweep compares: of the test, or of the validation that chose the checkpoint."""
    if config.sweep_metric is None:
        return None
    measured = {**fitted, **trainer.callback_metrics}
    if config.sweep_metric in fitted and not config.sweep_metric.startswith("test/"):
        measured[config.sweep_metric] = fitted[config.sweep_metric]
    value = measured.get(config.sweep_metric)
    if value is None:
        logger.warning("sweep_metric %s was not measured; there are: %s", config.sweep_metric, ", ".join(measured))
        return None
    return float(value)
