"""One job of a sweep, as any launcher runs it: in this process, in a worker's, or on a node of a cluster."""

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from rag_lightning.cli.sweeping.records import JobRecord, read_record
from rag_lightning.errors import JobFailedError
from rag_lightning.training.pruned import pruned_at

ERROR_FILE = "error.txt"


def job_folder() -> Path | None:
    """Returns the folder of the sweep's job that runs; None outside sweeps, and in processes that a job starts."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().job, "num"):
        return None
    return Path(HydraConfig.get().runtime.output_dir)


def run_recorded(task: Callable[[DictConfig], Any], config: DictConfig, message: Callable[[BaseException], str]) -> Any:
    """Runs a job and keeps in its folder how it ended.

    Args:
        task: The command.
        config: The job's.
        message: What to tell people of an error.

    Raises:
        JobFailedError: The task raised; plain text only, which every launcher can carry between processes.
    """
    folder = job_folder()
    record = read_record(folder) if folder is not None else None
    if folder is None or record is None or rank_zero_only.rank != 0:
        return task(config)
    start = time.perf_counter()
    record = record.become(folder, "running", num_threads=torch.get_num_threads())
    try:
        value = task(config)
    except Exception as error:
        text = message(error)
        (folder / ERROR_FILE).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        record.become(folder, "failed", error=text, seconds=_seconds(start))
        raise JobFailedError(text) from None
    _ended(record, folder, value, _seconds(start))
    return value


def _ended(record: JobRecord, folder: Path, value: Any, seconds: float) -> None:
    (folder / ERROR_FILE).unlink(missing_ok=True)  # of an earlier try
    number = float(value) if isinstance(value, int | float) else None
    status = "pruned" if pruned_at(folder) is not None else "finished"
    record.become(folder, status, value=number, error=None, seconds=seconds)  # type: ignore[arg-type]


def _seconds(start: float) -> float:
    return round(time.perf_counter() - start, 1)
