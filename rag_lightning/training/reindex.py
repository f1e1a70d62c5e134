"""When the index is made anew: a schedule as a pure function of the step, and the callback that follows it."""

import itertools
import logging
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from rag_lightning.errors import ConfigError, RagError
from rag_lightning.index.locks import SnapshotLock
from rag_lightning.metrics.diagnostics import overlap_at_k
from rag_lightning.training.async_refresh import AsyncRefresher
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.refresh import Refresher, SyncRefresher
from rag_lightning.training.staleness import freshness, take_probe
from rag_lightning.utils import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReindexSchedule:
    """At which optimiser steps to refresh.

    Attributes:
        pieces: ``(start, stop, period)`` each; ``stop`` None is open. In ``[start, stop)`` a refresh is due at
            ``start + n * period`` for n >= 1, and at ``stop`` the next piece begins.
    """

    pieces: tuple[tuple[int, int | None, int], ...]

    @classmethod
    def parse(cls, text: str | int | None) -> "ReindexSchedule":
        """Reads ``500`` (every 500 steps), ``0-1000:500,1000-:2000`` (piecewise, as Atlas writes it), or nothing.

        Raises:
            ConfigError: Not of that form, a period below 1, or pieces that overlap or run backwards.

        >>> schedule = ReindexSchedule.parse("0-1000:500,1000-:2000")
        >>> [step for step in range(1, 6000) if schedule.is_due(step)]
        [500, 1000, 3000, 5000]
        """
        if text is None or str(text).strip() in ("", "none"):
            return cls(())
        if isinstance(text, int) or str(text).strip().isdigit():
            return cls(((0, None, _positive(str(text), text)),))
        pieces = tuple(_piece(part, text) for part in str(text).split(","))
        for (_, stop, _), (start, _, _) in itertools.pairwise(pieces):
            if stop is None or start < stop:
                raise ConfigError(f"reindex.schedule: expected pieces in order without overlap, got {text!r}")
        return cls(pieces)

    def is_due(self, step: int) -> bool:
        """Whether a refresh belongs at the end of this optimiser step (counted from 1)."""
        for start, stop, period in self.pieces:
            if step > start and (stop is None or step <= stop):
                return (step - start) % period == 0
        return False


def _piece(part: str, text: object) -> tuple[int, int | None, int]:
    bounds, colon, period = part.strip().partition(":")
    start, dash, stop = bounds.partition("-")
    if not (colon and dash and start.isdigit() and (stop.isdigit() or stop == "")):
        raise ConfigError(
            f"reindex.schedule: expected a number of steps or pieces such as '0-1000:500,1000-:2000', got {text!r}"
        )
    if stop and int(stop) <= int(start):
        raise ConfigError(f"reindex.schedule: expected each piece to end after it starts, got {part!r}")
    return int(start), int(stop) if stop else None, _positive(period, text)


def _positive(period: str, text: object) -> int:
    if not period.strip().isdigit() or int(period) < 1:
        raise ConfigError(f"reindex.schedule: expected a period of at least 1 step, got {text!r}")
    return int(period)


class ReindexCallback(L.Callback):
    """Keeps the index: builds the first one, refreshes it, and makes sure a test searches a fresh one.

    A refresh builds a new snapshot beside the live one, verifies it, publishes it by rename, and takes it live at the
    end of an optimiser step, in all processes at the same one. ``mode`` says whether training waits meanwhile. The
    schedule is a function of the step alone, and the checkpoint holds the live snapshot's id and the refresh under
    way, so a resumed run goes on as if it had not stopped. A refresh that failed (a full disk) or was broken off is
    made up for when the run is resumed.

    Args:
        mode: ``sync`` encodes in the training processes while training waits; ``async`` leaves it to a process of its
            own, see :class:`~rag_lightning.training.async_refresh.AsyncRefresher`.
        schedule: See :meth:`ReindexSchedule.parse`; nothing never refreshes.
        trigger: ``schedule`` refreshes when the schedule says so; ``staleness`` measures then, and refreshes where the
            live index has drifted, see :func:`~rag_lightning.training.staleness.freshness`.
        min_overlap: For ``staleness``: refresh when overlap@K of live and fresh retrieval falls below it, in (0, 1].
        num_candidates: For ``staleness``: passages found for each probe question and encoded anew.
        probe_size: Questions whose retrieval is compared before and after a refresh, and measured for staleness.
        keep_last: Snapshots to keep; the live one and that of the last checkpoint are kept besides.
        device: For ``async``: where the builder encodes, such as ``cuda:1`` or ``cpu``; by default the model's device.
        num_threads: For ``async``: CPU threads of the builder; by default as many as this process.
        lag_steps: For ``async``: take the new snapshot live after exactly so many steps; by default as soon as it is
            there.
        max_attempts: For ``async``: how often to try one refresh.
        timeout_s: For ``async``: seconds after which an attempt is given up, so that a builder that hangs is not waited
            for without end.

    Raises:
        ConfigError: A mode, trigger or number out of range, or a setting that nothing would read.
    """

    def __init__(
        self,
        *,
        mode: Literal["sync", "async"] = "sync",
        schedule: str | int | None = None,
        trigger: Literal["schedule", "staleness"] = "schedule",
        min_overlap: float = 0.9,
        num_candidates: int = 50,
        probe_size: int = 128,
        keep_last: int = 2,
        device: str | None = None,
        num_threads: int | None = None,
        lag_steps: int | None = None,
        max_attempts: int = 3,
        timeout_s: float = 21_600.0,
    ) -> None:
        _check_settings(mode, trigger, min_overlap, num_candidates, probe_size, keep_last, lag_steps, max_attempts)
        if timeout_s <= 0:
            raise ConfigError(f"reindex.timeout_s: expected seconds above 0, got {timeout_s}")
        self.mode = mode
        self.schedule = ReindexSchedule.parse(schedule)
        self.trigger = trigger
        self.min_overlap = min_overlap
        self.num_candidates = num_candidates
        self.probe_size = probe_size
        self.keep_last = keep_last
        self.device = device
        self.num_threads = num_threads
        self.lag_steps = lag_steps
        self.max_attempts = max_attempts
        self.timeout_s = timeout_s
        self.refresher: Refresher = SyncRefresher()
        self._lock: SnapshotLock | None = None
        self._last_step = 0
        self._restored: dict[str, Any] | None = None
        self._missed = False
        self._began = 0.0
        self._stalls: list[float] = []
        self._step_seconds: deque[float] = deque(maxlen=100)
        self._step_end = 0.0

    # ------------------------------------------------------------------ hooks

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a schedule that would do nothing, and a folder of snapshots that another run is using."""
        module, data = _parts(trainer, pl_module)
        if self.schedule.pieces and "passage_encoder" not in module.trained:
            raise ConfigError(
                "reindex.schedule is set but the passage encoder does not learn, so every refresh would build the same "
                "index: set optim.train_passage_encoder=true, or reindex=none"
            )
        if self.mode == "async" and self.schedule.pieces:
            _check_strategy(trainer)
            self.refresher = AsyncRefresher(
                passages=str(data.passages),
                cache_dir=data.cache_dir,
                device=self.device,
                num_threads=self.num_threads,
                lag_steps=self.lag_steps,
                max_attempts=self.max_attempts,
                timeout_s=self.timeout_s,
            )
        if data.index is not None:
            self._take_folder(data)
            if isinstance(self.refresher, AsyncRefresher):
                self.refresher.start(data.index, keep=(self._restored or {}).get("pending_folder"))
        elif self.schedule.pieces:
            raise ConfigError("reindex.schedule is set, but words alone are searched: there is no index of vectors")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes a snapshot live before anything is retrieved."""
        self._ensure(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes a snapshot live, now that weights and step of a resumed run are restored under every strategy."""
        _, data = _parts(trainer, pl_module)
        step = self._last_step = trainer.global_step
        self._step_end = time.perf_counter()
        self._ensure(trainer, pl_module)
        if data.index is None or data.dense is None:
            return
        restored, self._restored = self._restored or {}, None
        pending = restored.get("pending_step")
        self._missed = bool(restored.get("missed", False))
        if pending is not None:
            self._began, self._stalls = time.perf_counter(), [0.0]
            folder = restored.get("pending_folder", "")
            if not isinstance(self.refresher, AsyncRefresher) or not self.refresher.resume(data.index, pending, folder):
                logger.warning("the refresh of step %d was not kept; it begins anew at step %d", pending, step)
                self._begin(trainer, step)
        elif self.schedule.is_due(step) and data.snapshot_step < step and self.trigger == "schedule":
            self._begin(trainer, step)
        self._finish(trainer, step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Tells the other processes how far a refresh under way is; the answer is read after the batch."""
        self.refresher.announce(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """At the end of an optimiser step: takes a finished snapshot live, begins a refresh that is due."""
        step = trainer.global_step
        if step == self._last_step:  # gradients are still accumulating
            return
        self._last_step = step
        now = time.perf_counter()
        self._step_seconds.append(now - self._step_end)
        self._finish(trainer, step)
        due = self.schedule.is_due(step) or self._missed
        self._missed = due and self.refresher.pending_step is not None  # made up for when that one is done
        if due and not self._missed and self._wanted(trainer, step):
            self._begin(trainer, step)
            self._finish(trainer, step)
        self._step_end = time.perf_counter()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sees to it that the passage tower of a refresh under way is on disk, where a resumed run will look for it."""
        if isinstance(self.refresher, AsyncRefresher):
            self.refresher.checkpoint()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes a snapshot live for a validation outside training; within training the live one is used as it is."""
        if not trainer.training and not trainer.sanity_checking and trainer.state.fn != "fit":
            self._ensure(trainer, pl_module, fresh=True)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes sure that the test searches an index of the passage tower as it is."""
        self._ensure(trainer, pl_module, fresh=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the builder and gives the folder of snapshots back."""
        self._close(_parts(trainer, pl_module)[1])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same: Lightning tears nothing down after an error."""
        self._close(_parts(trainer, pl_module)[1])

    def _close(self, data: RagDataModule) -> None:
        self.refresher.close(data.index)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the refresh under way, if any, and whether another has become due meanwhile."""
        folder = self.refresher.pending_folder if isinstance(self.refresher, AsyncRefresher) else None
        return {"pending_step": self.refresher.pending_step, "pending_folder": folder, "missed": self._missed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the refresh that was under way, to be gone on with."""
        self._restored = dict(state_dict)

    # ------------------------------------------------------------------ one refresh

    def _ensure(self, trainer: L.Trainer, pl_module: L.LightningModule, *, fresh: bool = False) -> None:
        _, data = _parts(trainer, pl_module)
        live = data.dense.snapshot_id if data.dense is not None else None
        data.ensure_index(step=trainer.global_step, fresh=fresh)
        if data.dense is not None and data.dense.snapshot_id != live:
            _log(trainer, _recall_of(data), trainer.global_step)

    def _take_folder(self, data: RagDataModule) -> None:
        assert data.index is not None
        error = None
        if distributed.rank() == 0 and self._lock is None:
            store = data.index.store()
            try:
                self._lock = store.lock()
                store.sweep()
            except (RagError, OSError) as caught:
                error = str(caught)
        error = distributed.broadcast_object(error)
        if error is not None:
            raise ConfigError(error)

    def _wanted(self, trainer: L.Trainer, step: int) -> bool:
        if self.trigger == "schedule":
            return True
        module, data = _parts(trainer, trainer.lightning_module)
        start = time.perf_counter()
        probe = take_probe(module.model, data, self.probe_size)
        overlap = freshness(module.model, data, probe, num_candidates=self.num_candidates)
        overlap = distributed.broadcast_object(overlap)  # a rounding apart, and processes would part
        values = {"reindex/freshness": overlap, "reindex/measure_seconds": time.perf_counter() - start}
        _log(trainer, values, step)
        logger.info("index freshness at step %d: overlap %.3f (refresh below %.3f)", step, overlap, self.min_overlap)
        return overlap < self.min_overlap

    def _begin(self, trainer: L.Trainer, step: int) -> None:
        module, data = _parts(trainer, trainer.lightning_module)
        if data.index is None or data.dense is None:
            return
        self._began = time.perf_counter()
        probe = take_probe(module.model, data, self.probe_size)
        self.refresher.begin(data.index, step, probe.queries_PD if probe is not None else None)
        self._stalls = [time.perf_counter() - self._began]

    def _finish(self, trainer: L.Trainer, step: int) -> None:
        module, data = _parts(trainer, trainer.lightning_module)
        if data.index is None or data.dense is None:
            return
        start = time.perf_counter()
        snapshot = self.refresher.finish(data.index, step)
        if snapshot is None:
            if self.refresher.pending_step is not None:
                self._stalls.append(time.perf_counter() - start)
            return
        probe = take_probe(module.model, data, self.probe_size)
        replaced = data.snapshot_step
        before_PK = probe.search(data) if probe is not None else None
        data.index.go_live(snapshot)
        values = {
            "reindex/seconds": time.perf_counter() - self._began,
            "reindex/replaced_age_steps": float(step - replaced),
            "reindex/lag_steps": float(step - snapshot.manifest.step),
            **_recall_of(data),
        }
        if probe is not None and before_PK is not None:
            after_PK = probe.search(data)
            overlap = float(overlap_at_k(before_PK, after_PK).mean())
            values[f"reindex/overlap@{before_PK.shape[1]}"] = overlap
            values[f"retrieval_collapse/overlap@{before_PK.shape[1]}"] = overlap  # beside the other signs
        if distributed.rank() == 0:
            data.index.collect(self.keep_last)
        self._stalls.append(time.perf_counter() - start)
        if snapshot.manifest.step == step:  # begun and ended at one step: one stall
            self._stalls = [sum(self._stalls)]
        stall = values["reindex/stall_seconds"] = max(self._stalls)
        if self._step_seconds:
            values["reindex/stall_steps"] = stall / statistics.median(self._step_seconds)
        _log(trainer, values, step)
        logger.info("index refreshed at step %d: %s", step, values)


def _parts(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[RagLightningModule, RagDataModule]:
    assert isinstance(pl_module, RagLightningModule)
    return pl_module, pl_module.data


def _log(trainer: L.Trainer, values: dict[str, float], step: int) -> None:
    """Logs outside the rhythm of ``log_every_n_steps``: each refresh counts; steps count from 0 there."""
    for tracker in trainer.loggers if values else []:
        tracker.log_metrics(values, max(step - 1, 0))


def _recall_of(data: RagDataModule) -> dict[str, float]:
    assert data.dense is not None
    return {f"index/{name}": value for name, value in data.dense.snapshot.manifest.recall.items()}


def _check_strategy(trainer: L.Trainer) -> None:
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ConfigError(
            f"reindex.mode=async: expected a strategy that keeps the passage tower whole in each process (one device, "
            f"ddp), came {type(trainer.strategy).__name__}, which may divide it. Use reindex.mode=sync."
        )


def _check_settings(
    mode: str,
    trigger: str,
    min_overlap: float,
    num_candidates: int,
    probe_size: int,
    keep_last: int,
    lag_steps: int | None,
    max_attempts: int,
) -> None:
    if mode not in ("sync", "async"):
        raise ConfigError(f"reindex.mode: expected sync or async, got {mode!r}")
    if trigger not in ("schedule", "staleness"):
        raise ConfigError(f"reindex.trigger: expected schedule or staleness, got {trigger!r}")
    if not 0 < min_overlap <= 1:
        raise ConfigError(f"reindex.min_overlap: expected a share above 0 and at most 1, got {min_overlap}")
    for name, value, least in (
        ("num_candidates", num_candidates, 1),
        ("probe_size", probe_size, 0),
        ("keep_last", keep_last, 1),
        ("lag_steps", 0 if lag_steps is None else lag_steps, 0),
        ("max_attempts", max_attempts, 1),
    ):
        if value < least:
            raise ConfigError(f"reindex.{name}: expected {least} or more, got {value}")
    if trigger == "staleness" and probe_size == 0:
        raise ConfigError("reindex.trigger=staleness measures with probe questions: set reindex.probe_size above 0")
    if mode == "sync" and lag_steps is not None:
        raise ConfigError("reindex.lag_steps: a synchronous refresh has no lag; leave it unset, or set mode=async")
