"""Weights & Biases; the one module that imports wandb."""

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.training.tracking.base import TrackedArtifact, keep_run_id, run_id_of

PROJECT = re.compile(r"[^/\\#?%:]{1,128}")


class WandbTracker:
    """Tells a run on Weights & Biases.

    Args:
        logger: Its logger.
    """

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def summary(self, figures: Mapping[str, float]) -> None:
        """Adds to the run's summary."""
        self.logger.experiment.summary.update(dict(figures))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table."""
        self.logger.log_table(name, columns=list(columns), data=[list(row) for row in rows])

    def image(self, name: str, path: Path) -> None:
        """Logs an image."""
        self.logger.log_image(name, [str(path)])

    def artifact(self, artifact: TrackedArtifact) -> None:
        """Logs files as a version of an artifact.

        What it was made from stands in its metadata: offline there is no server that could say which version was used,
        and both are outputs of one run, which the server shows together.
        """
        wandb = import_wandb()
        made = wandb.Artifact(artifact.name, type=artifact.kind, metadata=artifact.described())
        for name in artifact.files:  # published files are never altered: no copy of them is staged
            made.add_file(str(artifact.folder / name), name=name, policy="immutable", skip_cache=True)
        self.logger.experiment.log_artifact(made)


def wandb_logger(
    *,
    save_dir: str,
    project: str = "rag_lightning",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    offline: bool = False,
    id: str | None = None,
    resume: str | None = None,
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
        id: The run's id there; by default that of the run that is resumed, else a new one, as with ``new``.
        resume: The folder of the run that is resumed; None for a new run.

    Raises:
        ConfigError: Not a project's name.
        CheckpointError: A resumed run whose id is lost.
        MissingExtraError: wandb is not installed.
    """
    wandb = import_wandb()
    if PROJECT.fullmatch(project) is None:
        raise ConfigError(
            rf"logger.project: expected 1 to 128 characters without / \ # ? % :, got {project!r}. Whose project it is "
            "says logger.entity."
        )
    run_id = run_id_of(save_dir, "wandb", resumed=resume is not None, given=id) or secrets.token_hex(4)
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
    logger = WandbLogger(
        name=name,
        project=project,
        save_dir=save_dir,
        version=run_id,
        entity=entity,
        group=group,
        mode="offline" if offline else None,
        settings=settings,
    )
    if rank_zero_only.rank == 0:
        keep_run_id(save_dir, "wandb", run_id)
    return logger


def import_wandb() -> Any:
    """Returns wandb.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("wandb", "wandb", "The logger 'wandb'") from error
    return wandb
