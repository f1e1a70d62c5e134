"""A sweep that learns from its trials where to look next, on Optuna; our own plugin because Hydra's wants optuna 2."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException

from rag_lightning.cli.sweeping.records import JobRecord
from rag_lightning.cli.sweeping.sweeper import Job, RecordedSweeper
from rag_lightning.errors import ConfigError
from rag_lightning.training.study import Dimension, Direction, Sampler, Search, TrialResult, check_search
from rag_lightning.utils.io import write_json

logger = logging.getLogger(__name__)
TRIAL_KEY = "callbacks.pruning.trial"


class SearchSweeper(RecordedSweeper):
    """Draws trials, a few at a time, and keeps the search in the sweep's folder.

    Args:
        params: The space: ``interval(a, b)``, ``tag(log, interval(a, b))``, ``range(a, b, step)``, ``choice(a, b)``;
            single values are fixed. The command line's come after them.
        num_trials: Complete and pruned trials wanted, those of earlier launches included.
        num_parallel: Trials drawn at a time; the launcher says how many of them run at once.
        direction: Whether more is better of what a job returns.
        sampler: How trials are drawn.
        seed: For the draws.
        num_startup_trials: Trials drawn at random before the sampler learns from them.
        rerun: See :class:`~rag_lightning.cli.sweeping.sweeper.RecordedSweeper`.
        max_jobs: Refuse more trials.
    """

    def __init__(
        self,
        *,
        params: Mapping[str, Any] | None = None,
        num_trials: int = 20,
        num_parallel: int = 1,
        direction: str = "maximize",
        sampler: str = "tpe",
        seed: int = 0,
        num_startup_trials: int = 5,
        rerun: str = "never",
        max_jobs: int = 2000,
    ) -> None:
        super().__init__(rerun=rerun, max_jobs=max_jobs)
        self.params = dict(params or {})
        self.num_trials = num_trials
        self.num_parallel = num_parallel
        self.direction = direction
        self.sampler = sampler
        self.seed = seed
        self.num_startup_trials = num_startup_trials

    def run(self, arguments: list[str]) -> list[JobRecord]:
        """Runs the search; returns how each of this launch's jobs ended.

        Raises:
            ConfigError: Before the first job: an unknown setting, a value at an end of a range that cannot be taken, or
                a search of another space in the folder.
            JobFailedError: After the last: names those that failed.
        """
        sampler, direction = self._check()
        space, fixed = self._space(arguments)
        self.common = frozenset(fixed)
        for number, corner in enumerate(_corners(space)):  # what the first trials would run into is found now
            self.compose(number, [*fixed, *corner], subdir="trial=000")
        search = Search(
            self.folder.absolute(),
            space=space,
            settings={"fixed": sorted(fixed)},
            direction=direction,
            sampler=sampler,
            seed=self.seed,
            num_startup_trials=self.num_startup_trials,
        )
        jobs: list[Job] = []
        records: dict[int, JobRecord] = {}
        while batch := self._batch(search, tried={job.number for job in jobs}):
            drawn = [self._job(trial, fixed) for trial in batch]
            records |= self.run_jobs(drawn)
            jobs += drawn
            self._tell(search, drawn, records)
        self._write_best(search)
        self.sum_up(jobs, records)
        return [records[job.number] for job in jobs]

    def _check(self) -> tuple[Sampler, Direction]:
        agreed = check_search(self.sampler, self.direction)
        for name in ("num_trials", "num_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hydra.sweeper.{name}: expected 1 or more, got {getattr(self, name)}")
        if self.rerun != "never":
            raise ConfigError(
                "hydra.sweeper.rerun: expected never in a search, which learns from its earlier trials, got "
                f"{self.rerun}. Choose another hydra.sweep.dir."
            )
        self.check_number(self.num_trials)
        return agreed

    def _space(self, arguments: Sequence[str]) -> tuple[dict[str, Dimension], list[str]]:
        assert self.hydra_context is not None
        given = [f"{key}={value}" for key, value in self.params.items()] + list(arguments)
        try:
            parsed = OverridesParser.create(self.hydra_context.config_loader).parse_overrides(given)
        except HydraException as error:
            raise ConfigError(f"sweep: {error}") from error
        last = {override.get_key_element(): override for override in parsed}
        space = {key: _dimension(one) for key, one in last.items() if one.is_sweep_override()}
        fixed = [f"{key}={one.get_value_element_as_str()}" for key, one in last.items() if key not in space]
        if not space:
            raise ConfigError(
                "sweep=optuna: expected settings to search over, got single values alone. Give one a range, as "
                "'optim.lr_generator=tag(log, interval(1e-4, 1e-2))'."
            )
        return space, fixed

    def _batch(self, search: Search, tried: Collection[int]) -> list[TrialResult]:
        """Returns the next trials: first those that an earlier launch had begun, then new ones."""
        trials = search.trials()
        begun = [trial for trial in trials if trial.state == "running"]
        if begun:
            return begun[: self.num_parallel]
        lost = sum(trial.state == "failed" and trial.number in tried for trial in trials)  # not drawn anew for ever
        left = self.num_trials - lost - sum(trial.state in ("complete", "pruned") for trial in trials)
        return [search.ask() for _ in range(min(left, self.num_parallel))]

    def _job(self, trial: TrialResult, fixed: Sequence[str]) -> Job:
        overrides = [*fixed, *(f"{key}={_text(value)}" for key, value in trial.values.items())]
        subdir = f"trial={trial.number:03d}"
        job = self.compose(trial.number, overrides, subdir)
        if (job.config.get("callbacks") or {}).get("pruning") is None:
            return job
        return self.compose(trial.number, [*overrides, f"{TRIAL_KEY}={trial.number}"], subdir)

    def _tell(self, search: Search, jobs: Sequence[Job], records: dict[int, JobRecord]) -> None:
        for job in jobs:
            record = records[job.number]
            if record.status == "finished":
                search.tell(job.number, "complete", record.value)
                if record.value is None:
                    reason = f"sweep_metric: expected {job.config['sweep_metric']} to be measured, it was not"
                    records[job.number] = record.become(job.folder, "failed", error=reason)
            else:
                search.tell(job.number, "pruned" if record.status == "pruned" else "failed")

    def _write_best(self, search: Search) -> None:
        best = search.best()
        if best is None:
            return
        write_json(self.folder / "best.json", {"trial": best.number, "value": best.value, "settings": best.values})
        chosen = " ".join(f"{key}={_text(value)}" for key, value in best.values.items())
        logger.info("best so far: %s, value %.6g (trial %d)", chosen, best.value, best.number)


def _dimension(override: Override) -> Dimension:
    """Returns what an override spans.

    Raises:
        ConfigError: A choice among lists or mappings, which no sampler can take.
    """
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Dimension(low=value.start, high=value.end, log="log" in value.tags, whole=whole)
    if isinstance(value, RangeSweep) and not value.shuffle:
        assert value.start is not None
        assert value.stop is not None
        whole = all(isinstance(number, int) for number in (value.start, value.stop, value.step))
        values = list(override.sweep_iterator(transformer=Transformer.identity))
        return Dimension(low=value.start, high=float(values[-1]), step=value.step, whole=whole)  # type: ignore[arg-type]
    assert isinstance(value, ChoiceSweep | RangeSweep)
    choices = tuple(override.sweep_iterator(transformer=Transformer.encode))
    if not all(isinstance(choice, str | int | float | bool | None) for choice in choices):
        raise ConfigError(f"{override.key_or_group}: expected single values to choose from, got {choices}")
    return Dimension(choices=choices)


def _corners(space: Mapping[str, Dimension]) -> list[list[str]]:
    """Returns settings that together touch every choice and both ends of every range."""
    values = {key: one.choices or _ends(one) for key, one in space.items()}
    most = max(len(some) for some in values.values())
    return [[f"{key}={_text(some[number % len(some)])}" for key, some in values.items()] for number in range(most)]


def _ends(one: Dimension) -> tuple[float, float]:
    return (int(one.low), int(one.high)) if one.whole else (float(one.low), float(one.high))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
