"""What every sweep does around its jobs: compose and check them all, leave out what is done, launch, and sum up."""

import importlib.util
import logging
import os
import re
import shutil
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from rag_lightning.cli.prepared import FOUND_BY_THE_RUN, prepares
from rag_lightning.cli.sweeping.checks import check_setting
from rag_lightning.cli.sweeping.job import ERROR_FILE
from rag_lightning.cli.sweeping.records import JobRecord, differences, listed, read_record
from rag_lightning.errors import ConfigError, DataError, JobFailedError, MissingExtraError, RagError
from rag_lightning.training.pruned import PRUNED_FILE

logger = logging.getLogger(__name__)
Rerun = Literal["never", "changed", "all"]
DONE = ("finished", "pruned")
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
PACKAGES = {"joblib": "joblib", "workers": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}
PACKAGES |= {"slurm": "submitit"}
"""Launchers of the extra ``sweeps``, and which of Hydra's plugins brings them."""


@dataclass(frozen=True)
class Job:
    """A job of the sweep, composed.

    Attributes:
        number: Its place.
        overrides: Its settings, as on the command line.
        folder: Where it writes.
        config: Its configuration, interpolations as written.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    config: dict[str, Any]


class RecordedSweeper(Sweeper):
    """The base of our sweepers.

    Args:
        rerun: What becomes of a job whose folder holds a run already. ``never``: a finished one is left out, one of
            another configuration is refused; ``changed``: that one is replaced; ``all``: every one is replaced.
        max_jobs: Refuse a sweep of more.
    """

    def __init__(self, *, rerun: str = "never", max_jobs: int = 2000) -> None:
        self.rerun = rerun
        self.max_jobs = max_jobs
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None
        self.common: frozenset[str] = frozenset()

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[[Any], Any], config: DictConfig) -> None:
        """Makes the launcher ready."""
        with speaking_plainly():
            if self.rerun not in get_args(Rerun):
                choices = ", ".join(get_args(Rerun))
                raise ConfigError(f"hydra.sweeper.rerun: expected one of {choices}, got {self.rerun!r}")
        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobRecord]:
        """Runs the sweep; returns how each job ended. Errors end the program with their message alone."""
        setup_globals()
        with speaking_plainly():
            return self.run(arguments)

    @abstractmethod
    def run(self, arguments: list[str]) -> list[JobRecord]:
        """Runs the sweep that the settings of a command line ask for."""

    # ------------------------------------------------------------------ before the first job

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        assert self.config is not None
        return Path(self.config.hydra.sweep.dir)

    def compose(self, number: int, overrides: Sequence[str], subdir: str | None = None) -> Job:
        """Composes a job as its launcher will, and checks its settings.

        Args:
            number: Its place.
            overrides: Its settings.
            subdir: Where it writes, in the sweep's folder; None leaves it to ``hydra.sweep.subdir``.

        Raises:
            ConfigError: It cannot be composed, or a constructor cannot take a setting.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        chosen = [*overrides, *([subdir_override(subdir)] if subdir is not None else [])]
        before = HydraConfig.instance().cfg
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, chosen)
            with read_write(composed.hydra.runtime), open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
                HydraConfig.instance().set_config(composed)
                folder = self.folder / str(composed.hydra.sweep.subdir)
                composed.hydra.runtime.output_dir = str(folder.absolute())
            HydraConfig.instance().set_config(composed)
            config = self._checked(composed, overrides)
        except (HydraException, OmegaConfBaseException, ConfigError) as error:
            reason = " ".join(str(part) for part in (error, error.__cause__) if part)
            name = self.name_of(number, overrides)
            raise ConfigError(f"sweep, job {number} ({name}): {reason}\nNo job was started.") from error
        finally:
            HydraConfig.instance().cfg = before
        return Job(number, tuple(overrides), folder, config)

    def _checked(self, composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
        task = composed.copy()
        with open_dict(task):
            del task["hydra"]
        OmegaConf.to_container(_as_if_prepared(task), resolve=True)  # what refers to nothing is found now
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group.partition("@")[0]
            if not override.is_delete() and "/" not in key and not key.startswith("hydra."):
                check_setting(task, key)
        container = OmegaConf.to_container(task, resolve=False)
        assert isinstance(container, dict)
        return {str(name): value for name, value in container.items()}

    def name_of(self, number: int, overrides: Sequence[str]) -> str:
        """Returns what tells a job from the others: the settings that not all of them have."""
        return " ".join(text for text in overrides if text not in self.common) or f"job {number}"

    def check_number(self, number: int) -> None:
        """Refuses more jobs than agreed.

        Raises:
            ConfigError: Too many.
        """
        if number > self.max_jobs:
            raise ConfigError(
                f"sweep: expected at most {self.max_jobs} jobs, got {number}. Sweep over less, search with "
                f"sweep=optuna, or allow them: hydra.sweeper.max_jobs={number}"
            )

    # ------------------------------------------------------------------ the jobs

    def run_jobs(self, jobs: Sequence[Job]) -> dict[int, JobRecord]:
        """Runs the jobs that are not done, in this launch or an earlier one; returns how each of all ended.

        A launcher that dies with one of its workers is started again for the jobs that it had not begun.

        Raises:
            ConfigError: Two jobs of one folder, or a folder with a run of another configuration.
        """
        assert self.launcher is not None
        waiting = self._waiting(jobs)
        for job, overrides in waiting:
            JobRecord(number=job.number, overrides=overrides, config=job.config).write(job.folder)
        if len(waiting) < len(jobs):
            logger.info("%d of %d jobs are done already", len(jobs) - len(waiting), len(jobs))
        while waiting:
            try:
                self._launch(waiting)
            except Exception as error:
                logger.error("the launcher broke off: %s", error)
            begun = [job for job, _ in waiting if _record(job).status != "planned"]
            for job in begun:
                if _record(job).status == "running":
                    _record(job).become(job.folder, "failed", error="its process ended without a word (killed?)")
            waiting = [(job, overrides) for job, overrides in waiting if job not in begun]
            if not begun:
                break
        return {job.number: _record(job) for job in jobs}

    def _launch(self, waiting: Sequence[tuple[Job, tuple[str, ...]]]) -> None:
        """Launches jobs; each is told its folder, as those of a relaunch need not have consecutive numbers."""
        assert self.launcher is not None
        assert self.config is not None
        folders = [str(job.folder.relative_to(self.folder)) for job, _ in waiting]
        batch = [(*one[1], subdir_override(name)) for one, name in zip(waiting, folders, strict=True)]
        try:
            with shared_threads(str(self.config.hydra.launcher._target_), len(batch)):
                self.launcher.launch(batch, initial_job_idx=waiting[0][0].number)
        except (KeyboardInterrupt, SystemExit):
            logger.info("interrupted. The same command goes on: what is done is left out, the rest resumed or started")
            raise
        finally:
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)

    def _waiting(self, jobs: Sequence[Job]) -> list[tuple[Job, tuple[str, ...]]]:
        """Returns the jobs to run, each with its settings; looks at every folder before it touches one."""
        places: dict[Path, Job] = {}
        for job in jobs:
            if (other := places.setdefault(job.folder, job)) is not job:
                raise ConfigError(
                    f"sweep: expected a folder for each job, got {job.folder} for {self.name_of(0, other.overrides)} "
                    f"and for {self.name_of(0, job.overrides)}. Name what varies in hydra.sweep.subdir. "
                    "No job was started."
                )
        plans = [(job, self._plan(job)) for job in jobs]
        waiting = []
        for job, plan in plans:
            if plan == "replace":
                shutil.rmtree(job.folder)
            if plan == "resume":
                waiting.append((job, (*job.overrides, f"resume={quoted_value(str(job.folder.absolute()))}")))
            elif plan != "done":
                for name in ("metrics.json", PRUNED_FILE, ERROR_FILE, LAST_CHECKPOINT):  # of an earlier try, or unknown
                    (job.folder / name).unlink(missing_ok=True)
                waiting.append((job, job.overrides))
        return waiting

    def _plan(self, job: Job) -> Literal["start", "done", "resume", "replace"]:
        record = read_record(job.folder)
        if record is None:
            return "start"
        if self.rerun == "all":
            return "replace"
        if changed := differences(record.config, job.config):
            if self.rerun == "changed":
                return "replace"
            raise ConfigError(
                f"{job.folder}: expected a run of the same configuration, found one that differs: {listed(changed)}. "
                "Choose another hydra.sweep.dir, or replace such runs: hydra.sweeper.rerun=changed. No job was started."
            )
        if record.status in DONE:
            return "done"
        return "resume" if (job.folder / LAST_CHECKPOINT).is_file() else "start"

    # ------------------------------------------------------------------ afterwards

    def sum_up(self, jobs: Sequence[Job], records: dict[int, JobRecord]) -> None:
        """Says how the sweep went.

        Raises:
            JobFailedError: Names the jobs that failed, why, and how to run them again.
        """
        done = [job for job in jobs if records[job.number].status in DONE]
        pruned = sum(records[job.number].status == "pruned" for job in jobs)
        logger.info("sweep: %d of %d jobs done%s", len(done), len(jobs), f", {pruned} pruned" if pruned else "")
        failed = [job for job in jobs if job not in done]
        if not failed:
            return
        lines = []
        for job in failed:
            reason = records[job.number].error or "it was not started"
            lines.append(f"  {self.name_of(job.number, job.overrides)}: {reason.splitlines()[0]}")
            if (job.folder / ERROR_FILE).is_file():
                lines.append(f"    in {job.folder / ERROR_FILE}")
        raise JobFailedError(
            f"sweep: {len(failed)} of {len(jobs)} jobs failed, {len(done)} are done and kept in {self.folder}\n"
            + "\n".join(lines)
            + f"\nRun the same command again, with hydra.sweep.dir={self.folder}: it runs only what is missing."
        )


@contextmanager
def shared_threads(launcher: str, num_jobs: int) -> Iterator[None]:
    """Divides the cores among jobs that submitit starts here all at once, as joblib does; SLURM says so itself."""
    if not launcher.endswith(".LocalLauncher") or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_jobs))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def check_launcher(arguments: Sequence[str]) -> None:
    """Refuses a launcher whose plugin is not installed; Hydra would only say that there is no such choice.

    Raises:
        MissingExtraError: Names the extra.
    """
    for argument in arguments:
        group, _, name = argument.partition("=")
        if group != "hydra/launcher" or name not in PACKAGES:
            continue
        plugin = f"hydra_{PACKAGES[name]}_launcher"
        try:
            found = importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
        except ModuleNotFoundError:  # not even the namespace
            found = False
        if not found:
            raise MissingExtraError(plugin.replace("_", "-"), "sweeps", argument)


@contextmanager
def speaking_plainly() -> Iterator[None]:
    """Ends the program with the message of an error meant for people; with its traceback if ``HYDRA_FULL_ERROR=1``."""
    try:
        yield
    except RagError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {error}")


def _record(job: Job) -> JobRecord:
    record = read_record(job.folder)
    if record is None:
        raise DataError(f"{job.folder}: expected the record of a job that was just launched, found none")
    return record


def quoted_value(text: str) -> str:
    """Returns a text as the value of an override, whatever is in it.

    >>> print(quoted_value("objective=a,seed=0"))
    'objective=a,seed=0'
    """
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text).replace(
        "${", "\\${"
    )
    return f"'{escaped}'"


def _as_if_prepared(config: DictConfig) -> DictConfig:
    """Returns the configuration as it will be where the job has found its data set's files."""
    if not prepares(config):
        return config
    config = config.copy()
    for name in FOUND_BY_THE_RUN:
        if OmegaConf.is_missing(config.task, name):
            config.task[name] = f"task.{name}"
    return config


def subdir_override(subdir: str) -> str:
    """Returns the setting that tells a job its folder: a relaunch of a part of the jobs counts from another number."""
    return f"hydra.sweep.subdir={quoted_value(subdir)}"


def register(name: str, sweeper: Callable[..., Sweeper]) -> None:
    """Makes a sweeper of this package known to Hydra, which takes plugins from one namespace only."""
    Plugins.instance().class_name_to_class[f"hydra_plugins.rag_lightning.{name}"] = sweeper  # type: ignore[assignment]
