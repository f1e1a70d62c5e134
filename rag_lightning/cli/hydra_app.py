"""How a command becomes a Hydra application: where ``conf/`` is, resolvers, and errors that speak to people."""

import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

from rag_lightning.cli.quiet import be_quiet
from rag_lightning.cli.sweeping.grid import GridSweeper
from rag_lightning.cli.sweeping.job import job_folder, run_recorded
from rag_lightning.cli.sweeping.records import RECORD_FILE
from rag_lightning.cli.sweeping.search import SearchSweeper
from rag_lightning.cli.sweeping.sweeper import check_launcher, register, speaking_plainly
from rag_lightning.errors import RagError

INSTALLED_CONF = Path(__file__).parents[1] / "conf"
MAX_FOLDER_BYTES = 200
COMMAND_VARIABLE = "RAG_LIGHTNING_COMMAND"  # tells the processes that Lightning starts which command they belong to
CHECKOUT_CONF = Path(__file__).parents[2] / "conf"


def conf_dir() -> Path:
    """Returns the folder of the configuration: inside an installed package, or beside it in a checkout."""
    return INSTALLED_CONF if INSTALLED_CONF.is_dir() else CHECKOUT_CONF


def register_resolvers(swept: Collection[str] = ()) -> None:
    """Makes the resolvers of ``conf/`` known.

    ``${run_dir:resume,default}`` is the run's own folder when resuming, else the default; ``${basename:a/b}`` is
    ``b``; ``${sweep_folder:overrides,number}`` names the folder of a sweep's job, see :func:`sweep_folder`;
    ``${sweep_dir:}`` and ``${sweep_name:}`` are the folder of the sweep that a job belongs to, and its name; elsewhere
    ``.`` and none.

    Args:
        swept: The settings that a sweep varies.
    """
    resolvers: dict[str, Callable[..., str | None]] = {
        "run_dir": lambda resume, default: default if resume in (None, "None", "null") else str(resume),
        "basename": lambda path: str(path).rsplit("/", 1)[-1],
        "sweep_folder": lambda overrides, number: sweep_folder(overrides, number, swept),
        "sweep_dir": lambda: "." if job_folder() is None else str(Path(HydraConfig.get().sweep.dir).absolute()),
        "sweep_name": lambda: None if job_folder() is None else Path(HydraConfig.get().sweep.dir).absolute().name,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def swept_settings(arguments: Sequence[str]) -> list[str]:
    """Returns the settings to which the command line gives several values.

    >>> swept_settings(["-m", "seed=0,1", "run_name=x", "optim.lr_generator=1e-3,1e-4"])
    ['seed', 'optim.lr_generator']
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:  # Hydra will say what is wrong with it
        return []
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def sweep_folder(overrides: Sequence[str], number: int, swept: Collection[str]) -> str:
    """Returns the name of a job's folder: what the sweep varies, or the job's number where that is not known.

    Args:
        overrides: The job's settings.
        number: The job.
        swept: The settings that the sweep varies.

    >>> sweep_folder(["encoder=minilm", "objective=rag_token", "seed=1"], 3, ["objective", "seed"])
    'objective=rag_token,seed=1'
    """
    varied = [text for text in overrides if text.split("=")[0].lstrip("+~") in swept]
    name = ",".join(varied).replace("/", "-")
    return name if 0 < len(name.encode()) <= MAX_FOLDER_BYTES else str(number)


class Command:
    """What Hydra runs: a command that speaks to people, and that a launcher can send to another process.

    Args:
        name: The command.
        task: Takes the composed configuration; its return value goes to a sweeper.
        swept: The settings that a sweep varies.
    """

    def __init__(self, name: str, task: Callable[[DictConfig], Any], swept: Collection[str]) -> None:
        self.name = name
        self.task = task
        self.swept = tuple(swept)
        self.prepare()

    def __call__(self, config: DictConfig) -> Any:
        """Runs the command; a sweep's job is recorded, and its errors are left to the sweep."""
        folder = job_folder()
        if folder is not None and (folder / RECORD_FILE).is_file():
            return run_recorded(self.task, config, lambda error: _message(error) or f"{type(error).__name__}: {error}")
        return speaking(self.task, config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepare()  # in a launcher's worker, before Hydra composes the job there

    def prepare(self) -> None:
        """Makes this process ready to compose and to run the command."""
        register_resolvers(self.swept)
        for sweeper in (GridSweeper, SearchSweeper):
            register(sweeper.__name__, sweeper)
        os.environ[COMMAND_VARIABLE] = self.name
        be_quiet()


def run_app(name: str, task: Callable[[DictConfig], Any], arguments: list[str]) -> None:
    """Runs a command under Hydra with the given arguments (overrides, ``-m``, ``--cfg job`` …).

    Args:
        name: The command, and the name of its primary configuration.
        task: Takes the composed configuration; its return value goes to a sweeper.
        arguments: What stood behind the command.
    """
    with speaking_plainly():
        check_launcher(arguments)
    sys.argv = [sys.argv[0], *arguments]  # the program stays: Lightning starts further processes by it
    command = Command(name, task, swept_settings(arguments))
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(command)()


def speaking(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Runs a task; errors meant for people end the program with their message alone.

    The traceback is shown when ``HYDRA_FULL_ERROR=1``.
    """
    try:
        return task(config)
    except (RagError, InstantiationException, MissingMandatoryValue) as error:
        message = _message(error)
        if message is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {message}")


def _message(error: BaseException) -> str | None:
    """Returns what to tell people: the message of the first error on purpose among an error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MissingMandatoryValue):
            name = getattr(cause, "full_key", None)
            return f"{name}: expected a value, came none. Give one: {name}=…"
        if isinstance(cause, RagError):
            return str(cause)
        cause = cause.__cause__
    return None
