"""When the index is made anew: a schedule as a pure function of the step, and the callback that follows it."""

import itertools
import logging
import time
from dataclasses import dataclass

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.metrics.diagnostics import overlap_at_k
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule

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
    """Keeps the index: builds the first one, refreshes by schedule, and makes sure a test searches a fresh one.

    Refreshing is synchronous: the new snapshot is built beside the live one, verified, published by rename, and
    swapped in at the end of an optimiser step. The schedule is a function of the step alone and the live snapshot's id
    is in the checkpoint, so a resumed run goes on as if it had not stopped. A refresh that failed (a full disk) or was
    broken off is made up for when the run is resumed.

    Args:
        schedule: See :meth:`ReindexSchedule.parse`.
        probe_size: Questions whose retrieval before and after a refresh is compared (overlap@K).
    """

    def __init__(self, *, schedule: str | int | None = None, probe_size: int = 128) -> None:
        self.schedule = ReindexSchedule.parse(schedule)
        self.probe_size = probe_size
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a schedule that would do nothing."""
        module, _ = _parts(trainer, pl_module)
        if self.schedule.pieces and "passage_encoder" not in module.trained:
            raise ConfigError(
                "reindex.schedule is set but the passage encoder does not learn, so every refresh would build the same "
                "index: set optim.train_passage_encoder=true, or reindex=none"
            )

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes a snapshot live before anything is retrieved."""
        _parts(trainer, pl_module)[1].ensure_index(step=trainer.global_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes a snapshot live, now that weights and step of a resumed run are restored under every strategy."""
        _, data = _parts(trainer, pl_module)
        step = self._last_step = trainer.global_step
        data.ensure_index(step=step)
        if self.schedule.is_due(step) and data.snapshot_step < step:
            self._refresh(trainer, step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Refreshes at the end of an optimiser step at which one is due."""
        step = trainer.global_step
        if step == self._last_step:  # gradients are still accumulating
            return
        self._last_step = step
        if self.schedule.is_due(step):
            self._refresh(trainer, step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes a snapshot live for a validation outside training; within training the live one is used as it is."""
        if not trainer.training and not trainer.sanity_checking and trainer.state.fn != "fit":
            _parts(trainer, pl_module)[1].ensure_index(step=trainer.global_step, fresh=True)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes sure that the test searches an index of the passage tower as it is."""
        _parts(trainer, pl_module)[1].ensure_index(step=trainer.global_step, fresh=True)

    def _refresh(self, trainer: L.Trainer, step: int) -> None:
        module, data = _parts(trainer, trainer.lightning_module)
        if data.retriever is None:
            return
        age = step - data.snapshot_step
        before_BK = self._probe(module, data)
        start = time.perf_counter()
        data.swap(data.build_snapshot(step))
        values = {"reindex/seconds": time.perf_counter() - start, "reindex/replaced_age_steps": float(age)}
        after_BK = self._probe(module, data)
        if before_BK is not None and after_BK is not None:
            values[f"reindex/overlap@{before_BK.shape[1]}"] = float(overlap_at_k(before_BK, after_BK).mean())
        for tracker in trainer.loggers:  # each refresh, whatever log_every_n_steps is; steps count from 0 there
            tracker.log_metrics(values, step - 1)
        logger.info("index refreshed at step %d: %s", step, values)

    @torch.no_grad()
    def _probe(self, module: RagLightningModule, data: RagDataModule) -> Int[Tensor, "B K"] | None:
        questions = (data.questions.get("validation") or data.questions.get("train") or [])[: self.probe_size]
        encoder = module.model.encoder
        if not questions or data.retriever is None or encoder is None:
            return None
        texts = [question.question for question in questions]
        was_training = module.training
        module.eval()
        queries_BD = encoder.query(module.model.query_tokens(texts).to(module.device))
        hits = data.retriever.retrieve(texts, queries_BD, module.model.settings.num_passages)
        module.train(was_training)
        return hits.ids_BK


def _parts(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[RagLightningModule, RagDataModule]:
    assert isinstance(pl_module, RagLightningModule)
    return pl_module, pl_module.data
