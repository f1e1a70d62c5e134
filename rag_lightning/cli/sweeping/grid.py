"""Every combination of the values that are given: Hydra's own sweep, checked first, and resumable."""

from collections.abc import Mapping
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rag_lightning.cli.sweeping.records import JobRecord
from rag_lightning.cli.sweeping.sweeper import RecordedSweeper
from rag_lightning.errors import ConfigError


class GridSweeper(RecordedSweeper):
    """Sweeps over a grid.

    Args:
        params: Settings of the sweep itself, as ``seed: 0,1,2``; the command line's come after them.
        rerun: See :class:`~rag_lightning.cli.sweeping.sweeper.RecordedSweeper`.
        max_jobs: Refuse a sweep of more.
    """

    def __init__(self, *, params: Mapping[str, Any] | None = None, rerun: str = "never", max_jobs: int = 2000) -> None:
        super().__init__(rerun=rerun, max_jobs=max_jobs)
        self.params = dict(params or {})

    def run(self, arguments: list[str]) -> list[JobRecord]:
        """Runs the sweep; returns how each job ended.

        Raises:
            ConfigError: Before the first job: a setting that is unknown, or that cannot be taken.
            JobFailedError: After the last: names those that failed.
        """
        assert self.hydra_context is not None
        given = [f"{key}={value}" for key, value in self.params.items()] + list(arguments)
        try:
            overrides = OverridesParser.create(self.hydra_context.config_loader).parse_overrides(given)
            batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        except HydraException as error:
            raise ConfigError(f"sweep: {error}. For intervals: sweep=optuna") from error
        combinations = batches[0]
        self.check_number(len(combinations))
        if len(combinations) > 1:
            self.common = frozenset.intersection(*map(frozenset, combinations))
        jobs = [self.compose(number, overrides) for number, overrides in enumerate(combinations)]
        records = self.run_jobs(jobs)
        self.sum_up(jobs, records)
        return [records[job.number] for job in jobs]
