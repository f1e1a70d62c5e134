"""A search of Optuna's, kept in one file that the jobs of a sweep share; the one module that imports optuna.

Inputs: a folder, what may vary, and what each trial reports. A sweeper asks for trials and says how they ended; the
jobs, in their own processes, report validation figures through :class:`PruningCallback` and ask whether to go on. All
of them append to the same journal (JSON lines behind a file lock), so a search that was stopped is simply opened again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L

from rag_lightning.errors import ConfigError, MissingExtraError, MissingFileError
from rag_lightning.training.pruned import write_pruned

JOURNAL_FILE = "study.journal"
STUDY_NAME = "sweep"
SETTINGS_KEY = "settings"
Sampler = Literal["tpe", "random"]
Direction = Literal["maximize", "minimize"]
Outcome = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """What one setting may be: a choice of values, or a range of numbers.

    Attributes:
        choices: The values; empty for a range.
        low: The range's lower end, included.
        high: Its upper end, included.
        step: Between neighbours; None for any number between.
        log: Whether factors, not differences, count.
        whole: Whether only whole numbers.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial as the journal has it.

    Attributes:
        number: Its place.
        values: What was drawn for it.
        state: ``complete``, ``pruned``, ``failed``, or ``running``: begun by a launch that was stopped.
        value: What it came to.
    """

    number: int
    values: dict[str, Any]
    state: str
    value: float | None


class Search:
    """A search in a folder.

    Args:
        folder: Where its journal is, made where there is none.
        space: What may vary.
        settings: Whatever must be the same for two trials to be compared, as plain values.
        direction: Whether more is better.
        sampler: How trials are drawn.
        seed: For the draws; each launch of a search draws anew from it and from the trials so far.
        num_startup_trials: Trials drawn at random before the sampler learns from them.

    Raises:
        ConfigError: The folder's search is another one, or an unknown sampler or direction.
        MissingExtraError: optuna is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        space: Mapping[str, Dimension],
        settings: Mapping[str, Any],
        direction: Direction = "maximize",
        sampler: Sampler = "tpe",
        seed: int = 0,
        num_startup_trials: int = 5,
    ) -> None:
        optuna = import_optuna()
        samplers = optuna.samplers
        folder.mkdir(parents=True, exist_ok=True)
        self._optuna = optuna
        self._space = {name: _distribution(optuna, dimension) for name, dimension in space.items()}
        self._study = optuna.create_study(
            storage=_storage(optuna, folder / JOURNAL_FILE),
            study_name=STUDY_NAME,
            direction=direction,
            load_if_exists=True,
        )
        drawn = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = (
            samplers.TPESampler(seed=seed + drawn, n_startup_trials=num_startup_trials)
            if sampler == "tpe"
            else samplers.RandomSampler(seed=seed + drawn)
        )
        self._agree({"direction": direction, **dict(settings), "space": {n: str(d) for n, d in self._space.items()}})

    def _agree(self, settings: dict[str, Any]) -> None:
        before = self._study.user_attrs.get(SETTINGS_KEY)
        if before is None:
            self._study.set_user_attr(SETTINGS_KEY, settings)
            return
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"sweep=optuna: expected the search that the folder holds, whose {name} is {before.get(name)}, got "
                f"{settings.get(name)}. Its trials could not be compared: choose another hydra.sweep.dir."
            )

    def ask(self) -> TrialResult:
        """Draws a trial."""
        trial = self._study.ask(self._space)
        return TrialResult(number=trial.number, values=dict(trial.params), state="running", value=None)

    def tell(self, number: int, outcome: Outcome, value: float | None = None) -> None:
        """Says how a trial ended; what is told already stays.

        Args:
            number: The trial.
            outcome: How; a complete one without a finite value counts as failed.
            value: What it came to.
        """
        states = self._optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[outcome]
        if outcome == "complete" and (value is None or not math.isfinite(value)):
            state = states.FAIL
        self._study.tell(number, value if state == states.COMPLETE else None, state=state, skip_if_finished=True)

    def trials(self) -> list[TrialResult]:
        """Returns all trials, the first drawn first."""
        names = {"FAIL": "failed"}
        return [
            TrialResult(
                number=trial.number,
                values=dict(trial.params),
                state=names.get(trial.state.name, trial.state.name.lower()),
                value=trial.value,
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]

    def best(self) -> TrialResult | None:
        """Returns the best of the complete trials; None where there is none yet."""
        complete = [trial for trial in self.trials() if trial.state == "complete" and trial.value is not None]
        sign = 1 if self._study.direction.name == "MAXIMIZE" else -1
        return max(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)


class PruningCallback(L.Callback):
    """Reports each validation to the search that a run belongs to, and ends a run that falls behind the others' median.

    Optuna's median rule decides, on the curves that all jobs have reported to the journal. A pruned run is not tested.

    Args:
        directory: The run's folder, where ``pruned.json`` is written.
        journal: The search's file; None for a run that belongs to none.
        trial: The run's trial; None likewise.
        monitor: What is reported.
        num_startup_trials: Trials that must have ended before any is pruned.
        num_warmup_steps: Optimiser steps before which none is pruned.
    """

    def __init__(
        self,
        *,
        directory: str,
        journal: str | None = None,
        trial: int | None = None,
        monitor: str = "val/exact_match",
        num_startup_trials: int = 3,
        num_warmup_steps: int = 0,
    ) -> None:
        self.directory = Path(directory)
        self.journal = Path(journal) if journal is not None else None
        self.trial = trial
        self.monitor = monitor
        self.num_startup_trials = num_startup_trials
        self.num_warmup_steps = num_warmup_steps
        self.pruned = False
        self._trial: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the journal, in the first process."""
        if self.trial is None or trainer.global_rank != 0:
            return
        if self.journal is None or not self.journal.is_file():
            raise MissingFileError(f"callbacks.pruning.journal: expected a search's file, found none: {self.journal}")
        optuna = import_optuna()
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=self.num_startup_trials, n_warmup_steps=self.num_warmup_steps
        )
        study = optuna.load_study(storage=_storage(optuna, self.journal), study_name=STUDY_NAME, pruner=pruner)
        (known,) = [one for one in study.get_trials(deepcopy=False) if one.number == self.trial]
        self._trial = optuna.trial.Trial(study, known._trial_id)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports, and stops the run where the search says so."""
        if self.trial is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        pruned = self._trial is not None and self._report(trainer)
        self.pruned = bool(trainer.strategy.reduce_boolean_decision(pruned, all=False))
        if self.pruned:
            trainer.should_stop = True

    def _report(self, trainer: L.Trainer) -> bool:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ConfigError(
                f"callbacks.pruning.monitor: expected one of {', '.join(trainer.callback_metrics)}, got {self.monitor}"
            )
        step = int(trainer.global_step)
        if step not in self._trial.study.get_trials(deepcopy=False)[self.trial].intermediate_values:  # a resumed run
            self._trial.report(float(value), step)
        if step >= trainer.max_steps > 0 or not self._trial.should_prune():  # the last figure is worth its test
            return False
        write_pruned(self.directory, step=step, monitor=self.monitor, value=float(value))
        return True


def check_search(sampler: str, direction: str) -> tuple[Sampler, Direction]:
    """Returns both; refuses a sampler or a direction that there is not.

    Raises:
        ConfigError: Names the choices.
    """
    for name, value, choices in (("sampler", sampler, Sampler), ("direction", direction, Direction)):
        if value not in get_args(choices):
            raise ConfigError(f"hydra.sweeper.{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
    return cast(Sampler, sampler), cast(Direction, direction)


def import_optuna() -> Any:
    """Returns optuna, which speaks only of what goes wrong.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "sweeps", "sweep=optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(optuna: Any, journal: Path) -> Any:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    distributions = optuna.distributions
    if dimension.choices:
        return distributions.CategoricalDistribution(dimension.choices)
    if dimension.whole:
        step = int(dimension.step) if dimension.step is not None else 1
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
