"""``rag-lightning evaluate checkpoint=RUN [data.test=F]``: metrics.json and predictions.jsonl of a finished run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rag_lightning.cli import heads
from rag_lightning.cli.build import bind, build_trainer, decoding_of, instantiate, load_checkpoint
from rag_lightning.cli.build import run_config as run_config_of
from rag_lightning.cli.prepared import ensure_prepared
from rag_lightning.cli.record import record_evaluation
from rag_lightning.errors import ConfigError
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.build import RetrieverSettings, build_fusion
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.objectives import ClosedBook, Contrastive, MarginalObjective, Objective
from rag_lightning.training.optim import OptimSettings

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Evaluates as configured."""
    if heads.is_of_heads(config.checkpoint):
        heads.evaluate(config)
        return
    ensure_prepared(run_config_of(config.checkpoint))
    model, run_config = load_checkpoint(config.checkpoint)
    apply_overrides(model, config)
    check_cut_offs(config.module.recall_at, model.settings.num_passages)
    if config.retrieval_only and config.module.token_posteriors:
        raise ConfigError("module.token_posteriors: expected answers to tell of, got retrieval_only=true. Drop one.")
    data = build_data(config, model, run_config)
    objective = objective_of(model) if not config.retrieval_only else Contrastive()
    bind(data, model, objective)
    module = RagLightningModule(
        model=model, objective=objective, optim=OptimSettings(), learns=False, **metric_settings(config, run_config)
    )
    record_evaluation(config, run_config, Path(config.output))
    further = [instantiate(run_config.callbacks.ranking)] if run_config is not None and _ranks(run_config) else []
    trainer = build_trainer(config, config.callbacks, further)
    trainer.test(module, datamodule=data, weights_only=True)
    logger.info("metrics.json and predictions.jsonl are in %s", config.output)


def apply_overrides(model: RagModel, config: DictConfig) -> None:
    """Puts decoding settings and K of the command line in place of the model's own, where given."""
    model.settings, model.decoding_options = decoding_of(
        model.settings, model.decoding_options, config.decoding, config.num_passages
    )


def metric_settings(config: DictConfig, run_config: DictConfig | None) -> dict[str, Any]:
    """Returns which figures to compute, and in whose language: of the command line, else the run's."""
    settings: dict[str, Any] = {"token_posteriors": config.module.token_posteriors}
    for name in ("text_metrics", "language", "recall_at"):
        value = config.module[name]
        if value is None and run_config is not None:
            value = run_config.module.get(name)
        if value is not None:
            settings[name] = value if name == "language" else list(value)
    return settings


def check_cut_offs(recall_at: Sequence[int] | None, num_passages: int) -> None:
    """Refuses a cut-off that was asked for and that no list of K passages reaches.

    Raises:
        ConfigError: Names it and K.
    """
    if recall_at is not None and max(recall_at, default=0) > num_passages:
        raise ConfigError(
            f"module.recall_at: expected cut-offs up to K = {num_passages}, got {max(recall_at)}. "
            f"Retrieve as many: num_passages={max(recall_at)}."
        )


def build_data(config: DictConfig, model: RagModel, run_config: DictConfig | None) -> RagDataModule:
    """Returns the data module: files of the command line, else those that the run used."""
    test = config.data.test if config.data.test is not None else (run_config.data.test if run_config else None)
    if test is None:
        raise ConfigError("data.test: expected a question file, came none, and the checkpoint's run names none")
    source = model.retriever_source
    passages, snapshot = config.data.passages, config.index.snapshot
    own_index = config.index.factory is None or config.index.sharded  # whose vectors are divided
    if config.index.factory is None:
        config.index.factory = "exact"  # what is built where no snapshot serves
    if passages is None and source is not None:
        passages = source.passages
        snapshot = source.snapshot if own_index and snapshot is None else snapshot
    elif passages is None and run_config is not None:
        passages = run_config.data.passages
    train = config.data.train
    if train is None and run_config is not None and _ranks(run_config):
        train = run_config.data.train  # popularity is counted there
    data: RagDataModule = instantiate(config.data, train=train, test=test, passages=passages)
    data.index_settings = replace(data.index_settings, snapshot=snapshot)
    if config.retriever is None and source is not None:
        data.retriever_settings = source.settings
    elif config.retriever is None and run_config is not None and run_config.get("retriever") is not None:
        data.retriever_settings = instantiate(run_config.retriever)
    elif config.retriever is not None and model.encoder is not None:
        _fit_fusion(model, data.retriever_settings)
    return data


def _ranks(run_config: DictConfig) -> bool:
    return run_config.get("callbacks") is not None and run_config.callbacks.get("ranking") is not None


def _fit_fusion(model: RagModel, settings: RetrieverSettings) -> None:
    """Gives a model the fusion that another retriever wants; its own stays where it serves."""
    assert model.encoder is not None
    wanted = build_fusion(settings, dimension=model.encoder.dimension)
    if wanted is None or model.fusion is None or wanted.settings() != model.fusion.settings():
        model.fusion = wanted
        if settings.fusion == "gate":
            logger.warning("retriever=hybrid_gate: this model has no such gate; an untrained one weighs both alike")


def objective_of(model: RagModel) -> Objective:
    """Returns the objective that a model answers by."""
    if model.settings.num_passages == 0:
        return ClosedBook()
    return MarginalObjective(kind=model.settings.objective, hf_compat=model.settings.hf_compat)
