"""MLflow; the one module that imports mlflow (mlflow-skinny is enough)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from rag_lightning.errors import CheckpointError, ConfigError, MissingExtraError
from rag_lightning.training.tracking.base import TrackedArtifact, keep_run_id, run_id_of
from rag_lightning.training.tracking.plain import file_name

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


class RagMLFlowLogger(MLFlowLogger):  # type: ignore[misc]
    """Lightning's logger, with metric names that MLflow takes: ``recall@5`` becomes ``recall_at_5``."""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Logs settings; MLflow lets none change, so those that a resumed run has changed become tags."""
        known = self.experiment.get_run(self.run_id).data.params
        flat = {key: str(value)[:250] for key, value in _flat(params).items()}
        super().log_hyperparams({key: value for key, value in flat.items() if key not in known})
        for key, value in flat.items():
            if known.get(key, value) != value:
                self.experiment.set_tag(self.run_id, f"resumed.{key}", value)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs figures of a step."""
        super().log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step)


class MlflowTracker:
    """Tells a run on MLflow.

    Args:
        logger: Its logger.
    """

    def __init__(self, logger: MLFlowLogger) -> None:
        self.logger = logger

    def summary(self, figures: Mapping[str, float]) -> None:
        """Logs each figure once."""
        self.logger.log_metrics(dict(figures))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keeps a table as JSON, one list for each column, as MLflow's own tables are."""
        columns_of = {"columns": list(columns), "data": [list(row) for row in rows]}
        self.logger.experiment.log_dict(self.logger.run_id, columns_of, f"tables/{file_name(name)}.json")

    def image(self, name: str, path: Path) -> None:
        """Keeps an image."""
        self.logger.experiment.log_artifact(self.logger.run_id, str(path), "images")

    def artifact(self, artifact: TrackedArtifact) -> None:
        """Keeps the files, and what they were made from."""
        client, run_id = self.logger.experiment, self.logger.run_id
        for name in artifact.files:
            parent = (Path(artifact.name) / name).parent.as_posix()
            client.log_artifact(run_id, str(artifact.folder / name), parent)
        described = {"kind": artifact.kind, **artifact.described()}
        client.log_dict(run_id, described, f"{artifact.name}/artifact.json")


def mlflow_logger(
    *,
    save_dir: str,
    experiment: str = "rag_lightning",
    name: str | None = None,
    group: str | None = None,
    tracking_uri: str | None = None,
    id: str | None = None,
    resume: str | None = None,
) -> MLFlowLogger:
    """Returns an MLflow logger; the run is made without MLflow's tags of user, source file and git state.

    Args:
        save_dir: The run's folder.
        experiment: The experiment that the run belongs to.
        name: The run's name.
        group: A tag, ``rag_lightning.sweep``, that groups runs.
        tracking_uri: ``sqlite:///FILE``, ``http://HOST``, …; by default ``mlflow.db`` in the run's folder, with the
            artifacts beside it.
        id: The run's id there; by default that of the run that is resumed, else a new one, as with ``new``.
        resume: The folder of the run that is resumed; None for a new run.

    Raises:
        ConfigError: An address of another kind, or one that cannot be opened.
        CheckpointError: A resumed run whose id is lost, or not known there.
        MissingExtraError: mlflow, or what its database needs, is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports how it is used, unless told not to
    folder = Path(save_dir).absolute()
    uri = tracking_uri if tracking_uri is not None else f"sqlite:///{folder / 'mlflow.db'}"
    if uri.split(":")[0].split("+")[0] not in SCHEMES or ":" not in uri:
        raise ConfigError(
            f"logger.tracking_uri: expected an address that begins with one of {', '.join(SCHEMES)}, got {uri!r}. "
            "For a file of its own: sqlite:///PATH/mlflow.db"
        )
    client_class, failure = _import_mlflow()
    folder.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank != 0:
        return RagMLFlowLogger(experiment_name=experiment, tracking_uri=uri)
    run_id = run_id_of(save_dir, "mlflow", resumed=resume is not None, given=id)
    place = (folder / "mlflow_artifacts").as_uri() if tracking_uri is None else None
    try:
        client = client_class(uri)
        known = client.get_experiment_by_name(experiment)
        where = known.experiment_id if known is not None else client.create_experiment(experiment, place)
        tags = {"mlflow.runName": name or experiment, **({"rag_lightning.sweep": group} if group is not None else {})}
        if run_id is None:
            run_id = client.create_run(where, tags=tags).info.run_id
    except failure as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"logger.tracking_uri: expected an MLflow store at {uri}, got none: {reason}") from error
    try:
        client.get_run(run_id)
    except failure as error:
        raise CheckpointError(
            f"logger.id: expected a run that {uri} knows, got {run_id}: {error}. Track what follows as another run: "
            "logger.id=new"
        ) from error
    keep_run_id(save_dir, "mlflow", run_id)
    return RagMLFlowLogger(experiment_name=experiment, tracking_uri=uri, run_id=run_id)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _import_mlflow() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import mlflow
        from sqlalchemy.exc import SQLAlchemyError  # of the default store; mlflow-skinny does not bring it
    except ImportError as error:
        raise MissingExtraError("mlflow", "mlflow", "The logger 'mlflow'") from error
    return mlflow.MlflowClient, (mlflow.MlflowException, SQLAlchemyError, OSError)
