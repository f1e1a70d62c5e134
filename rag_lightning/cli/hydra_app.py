"""How a command becomes a Hydra application: where ``conf/`` is, resolvers, and errors that speak to people."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from rag_lightning.errors import RagError

INSTALLED_CONF = Path(__file__).parents[1] / "conf"
CHECKOUT_CONF = Path(__file__).parents[2] / "conf"


def conf_dir() -> Path:
    """Returns the folder of the configuration: inside an installed package, or beside it in a checkout."""
    return INSTALLED_CONF if INSTALLED_CONF.is_dir() else CHECKOUT_CONF


def register_resolvers() -> None:
    """Makes ``${run_dir:resume,default}`` known: the run's own folder when resuming, else the default."""
    OmegaConf.register_new_resolver(
        "run_dir", lambda resume, default: default if resume in (None, "None", "null") else str(resume), replace=True
    )


def run_app(name: str, task: Callable[[DictConfig], Any], arguments: list[str]) -> None:
    """Runs a command under Hydra with the given arguments (overrides, ``-m``, ``--cfg job`` …).

    Args:
        name: The command, and the name of its primary configuration.
        task: Takes the composed configuration; its return value goes to a sweeper.
        arguments: What stood behind the command.
    """
    register_resolvers()
    sys.argv = [f"rag-lightning {name}", *arguments]

    def job(config: DictConfig) -> Any:
        return speaking(task, config)

    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()


def speaking(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Runs a task; errors meant for people end the program with their message alone.

    The traceback is shown when ``HYDRA_FULL_ERROR=1``.
    """
    try:
        return task(config)
    except (RagError, InstantiationException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RagError):
            cause = cause.__cause__
        if cause is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {cause}")
