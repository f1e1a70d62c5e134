"""Run folders: what each is a run of, and which of them differ in their seed alone."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.reports.collect import METRICS_FILE
from rag_lightning.utils.hashing import hash_texts
from rag_lightning.utils.io import existing_file, read_json

CONFIG_FILE, RUN_FILE, EVALUATION_FILE = "config.yaml", "run.json", "evaluation.json"
JOB_FILE = "sweep_job.json"
"""What a sweep leaves of a job before the job starts."""
PREDICTIONS_FILE = "predictions.jsonl"
CHOICES = ("experiment", "dataset", "task", "scale")
"""Groups by which a table finds a run's place."""
NOT_SETTINGS = ("paths", "run_name", "resume", "logger", "tracking", "sweep_metric", "hydra")
"""Top keys that change no figure: where a run writes, and what it tells whom."""
NOT_FIGURES = ("seed", "enable_progress_bar", "progress", "cache_dir", "index_dir", "token_posteriors")
"""Keys of any depth that do not tell one group of runs from another."""
NOT_TOLD = ("seed", "experiment", "dataset", "checkpoint", "output", "trainer.enable_progress_bar", *NOT_SETTINGS)
"""Overrides left out of a group's name."""


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        name: Its place under the folder that was searched.
        folder: Where it is.
        config: Its configuration, resolved; empty where none was kept.
        record: Of ``run.json`` or ``evaluation.json``; of a sweep's job that has not started, what its command line
            said, and ``planned``; empty of a run that is older than these.
        metrics: What it measured; None of a run that has not finished.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    metrics: Mapping[str, Any] | None

    @property
    def seed(self) -> int | None:
        """The run's; None where nothing tells it."""
        seed: int | None = self.config.get("seed", self.record.get("seed"))
        return seed

    @property
    def commit(self) -> str | None:
        """Of the code that trained it; several, where it was resumed at another one."""
        commits = [self.record.get("commit"), *(later.get("commit") for later in self.record.get("resumed", ()))]
        known = list(dict.fromkeys(commit for commit in commits if commit is not None))
        return ", then ".join(known) if known else None

    @property
    def experiment(self) -> str | None:
        """Which recipe it is of."""
        return self._choice("experiment")

    @property
    def dataset(self) -> str | None:
        """Which data set, of a recipe that takes several; or which task."""
        chosen = self._choice("dataset")
        return chosen if chosen is not None else self._choice("task")

    @property
    def scale(self) -> str | None:
        """At which scale a recipe was run, where it has several."""
        return self._choice("scale")

    @property
    def language(self) -> str:
        """Whose normalisation judged its answers."""
        return str((self.config.get("module") or {}).get("language", "en"))

    def _choice(self, group: str) -> str | None:
        choices = self.record.get("choices", {})
        named = [choice for name, choice in choices.items() if name.rpartition("/")[2].partition("@")[0] == group]
        return str(named[-1]) if named else None

    def data_file(self, name: str) -> str | None:
        """Returns where its ``test`` questions, ``passages`` and so on lie; None where it has none."""
        told = (self.record.get("data") or {}).get(name)
        given = told["file"] if told is not None else (self.config.get("data") or {}).get(name)
        return str(given) if given is not None else None

    @cached_property
    def overrides(self) -> tuple[str, ...]:
        """What the command line said, less the seed and what changes no figure."""
        told = (str(text) for text in self.record.get("overrides", ()))
        return tuple(text for text in told if not _is_untold(text.lstrip("+~").partition("=")[0]))

    @cached_property
    def signature(self) -> str:
        """Returns what runs that differ in their seed alone have in common.

        An evaluation is told by its checkpoint's configuration and its own settings.
        """
        if self.record.get("planned", False):
            return hash_texts(["planned", *sorted(self.overrides), str(self.experiment), str(self.dataset)])
        if not self.config:
            return hash_texts([self.name])
        own = str((self.config.get("paths") or {}).get("run_dir", self.folder))
        settings = {key: value for key, value in self.config.items() if key not in NOT_SETTINGS}
        text = json.dumps(_without_places(settings, own), sort_keys=True, ensure_ascii=False)
        further = self.overrides if "checkpoint" in self.record else ()
        return hash_texts([text, *sorted(further)])


def find_runs(place: Path, *, direct: bool = False) -> list[Run]:
    """Returns the runs at or under a folder, in the order of their names, finished or not, or not even started.

    Args:
        place: The folder.
        direct: Look no deeper than the folders in it.

    Raises:
        MissingFileError: No such folder, or no run in it.
        DataError: A file that a run left is broken; names it.
    """
    existing_file(place, "runs")
    folders = [path for path in _folders(place) if _is_run(path)] if direct else _run_folders(place)
    runs = [_read(folder, place) for folder in folders]
    if not runs:
        raise MissingFileError(
            f"runs: expected run folders with {METRICS_FILE} or {CONFIG_FILE} in {place} or below, found none."
        )
    return runs


def matching(runs: Sequence[Run], pattern: str) -> list[Run]:
    """Returns the runs whose name matches a pattern such as ``frozen/seed=*``.

    Raises:
        MissingFileError: None does; names those that there are.
    """
    chosen = [run for run in runs if fnmatch.fnmatchcase(run.name, pattern)]
    if not chosen:
        names = ", ".join(run.name for run in runs[:12]) + (", …" if len(runs) > 12 else "")
        raise MissingFileError(f"rows: expected runs that match {pattern!r}, found none among {names}.")
    return chosen


def by_signature(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs in groups that differ in their seed alone.

    A job that has not started has no resolved configuration; it belongs to the run whose command line said the same.
    """
    groups: dict[str, list[Run]] = {}
    planned = [run for run in runs if run.record.get("planned", False)]
    for run in [run for run in runs if run not in planned]:
        groups.setdefault(run.signature, []).append(run)
    for run in planned:
        same = [key for key, members in groups.items() if any(_is_sibling(run, one) for one in members)]
        groups.setdefault(same[0] if same else run.signature, []).append(run)
    return list(groups.values())


def _is_sibling(run: Run, other: Run) -> bool:
    """Whether the command line said the same of both, less their seeds."""
    alike = (run.experiment, run.dataset, run.scale) == (other.experiment, other.dataset, other.scale)
    return alike and sorted(run.overrides) == sorted(other.overrides)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS_FILE, RUN_FILE, EVALUATION_FILE, CONFIG_FILE, JOB_FILE))


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _run_folders(place: Path) -> list[Path]:
    return [place] if _is_run(place) else [folder for path in _folders(place) for folder in _run_folders(path)]


def _read(folder: Path, root: Path) -> Run:
    name = folder.relative_to(root).as_posix() if folder != root else folder.absolute().name
    kept = [folder / file for file in (RUN_FILE, EVALUATION_FILE) if (folder / file).is_file()]
    job = folder / JOB_FILE
    record = _object(kept[0]) if kept else _planned(_object(job)) if job.is_file() else {}
    configured = folder / CONFIG_FILE
    if not configured.is_file() and "checkpoint" in record:
        configured = Path(record["checkpoint"]) / CONFIG_FILE
    metrics = _object(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else None
    config = _config(configured) if configured.is_file() else {}
    if not config and not kept and job.is_file():
        config, record = {"seed": (_object(job).get("config") or {}).get("seed")}, {**record, "planned": True}
    return Run(name, folder, config, record, metrics)


def _planned(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a job's command line says of the run that it is to be."""
    overrides = [str(text) for text in job.get("overrides") or ()]
    given = {name.lstrip("+"): value.strip("'\"") for name, _, value in (text.partition("=") for text in overrides)}
    choices = {name: given[name] for name in CHOICES if name in given}
    told = {"overrides": overrides, "choices": {"scale": "paper", **choices}}
    return told | ({"checkpoint": given["checkpoint"]} if "checkpoint" in given else {})


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, path.stem)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object, came a {type(value).__name__}")
    return value


def _config(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected YAML, as rag-lightning train writes it: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a mapping, came a {type(value).__name__}")
    return value


def _is_untold(key: str) -> bool:
    return key in NOT_TOLD or key.partition(".")[0] in NOT_SETTINGS or key.rpartition(".")[2] in NOT_FIGURES


def _without_places(node: Any, run_dir: str) -> Any:
    if isinstance(node, dict):
        return {key: _without_places(value, run_dir) for key, value in node.items() if key not in NOT_FIGURES}
    if isinstance(node, list):
        return [_without_places(value, run_dir) for value in node]
    return node.replace(run_dir, "RUN") if isinstance(node, str) else node
