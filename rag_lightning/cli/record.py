"""What a run was: commit, versions, choices and data, kept in its folder so that a report can tell runs apart.

``config.yaml`` beside it holds every setting; this file holds what a configuration cannot say. Nothing of it is read
from the process's environment, and paths are written as the configuration gives them.
"""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from rag_lightning.benchmark.machine import commit, machine, versions
from rag_lightning.cli.build import recordable, run_folder
from rag_lightning.corpora.passages import resolve
from rag_lightning.utils.hashing import fingerprint
from rag_lightning.utils.io import read_json, write_json

RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
SPLITS = ("train", "validation", "test")


def record_run(config: DictConfig, folder: Path, *, resumed: bool) -> None:
    """Writes ``run.json`` of a training, once for all its processes.

    A resumed run keeps what it began with; the commit and the settings that it went on with are added.

    Args:
        config: The run's, composed.
        folder: The run's.
        resumed: It goes on with an earlier run, whose configuration this is.
    """
    if rank_zero_only.rank != 0:
        return
    path = folder / RUN_FILE
    if resumed and path.is_file():
        earlier = read_json(path)
        later = {"commit": commit(), "started": _now(), "overrides": _overrides()}
        write_json(path, {**earlier, "resumed": [*earlier.get("resumed", ()), later]})
        return
    write_json(path, {**_circumstances(), "choices": _choices(), "data": _fingerprints(config)})


def record_evaluation(config: DictConfig, run_config: DictConfig | None, folder: Path) -> None:
    """Writes ``evaluation.json`` beside the metrics of ``rag-lightning evaluate``: also which run was judged.

    Args:
        config: The evaluation's, composed.
        run_config: That of the run behind the checkpoint; None where it lies apart from one.
        folder: Where the metrics go.
    """
    if rank_zero_only.rank != 0:
        return
    judged = run_folder(config.checkpoint)
    trained = _fingerprints(run_config) if run_config is not None else {}
    given = {name: value for name, value in _fingerprints(config).items() if value is not None}
    record = {**_circumstances(), "data": {**trained, **given}, "checkpoint": str(judged.absolute())}
    if (judged / RUN_FILE).is_file():
        record["choices"] = read_json(judged / RUN_FILE).get("choices", {})
    if run_config is not None:
        record["seed"] = run_config.get("seed")  # known after the run has been moved, too
    write_json(folder / EVALUATION_FILE, record)


def _circumstances() -> dict[str, Any]:
    return {
        "commit": commit(),
        "started": _now(),
        "overrides": _overrides(),
        "versions": versions(),
        "machine": machine(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _overrides() -> list[str]:
    """Returns the command line's settings as they were written: what they read from the environment stays there."""
    written = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(written, list)
    return [str(text) for text in written]


def _choices() -> dict[str, str]:
    """Returns which file each group was composed of, less Hydra's own groups and those without a choice."""
    chosen = HydraConfig.get().runtime.choices.items()
    return {
        str(group): str(choice)
        for group, choice in chosen
        if choice not in (None, "null") and not str(group).startswith("hydra/")
    }


def _fingerprints(config: DictConfig) -> dict[str, dict[str, Any] | None]:
    """Returns, for each file of data, its name as the configuration gives it, its bytes and its hash; None of none."""
    shown = _data_files(recordable(config))
    found: dict[str, dict[str, Any] | None] = {}
    for name, place in _data_files(config).items():
        path = resolve(place) if place is not None else None
        if path is None or not path.exists():  # what reads it will say so
            found[name] = None
        else:
            found[name] = {"file": str(shown[name]), **fingerprint(path)}
    return found


def _data_files(config: Mapping[str, Any] | DictConfig) -> dict[str, str | None]:
    data, task = config.get("data") or {}, config.get("task") or {}
    files = {name: data.get(name) for name in ("passages", *SPLITS, "answers_from") if data.get(name) is not None}
    for name, node in (task.get("tasks") or {}).items():
        files |= {f"{name}/{split}": node.get(split) for split in SPLITS if isinstance(node.get(split), str)}
    return files
