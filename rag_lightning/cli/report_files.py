"""Where a report's files are: settings of the command, and places that runs have noted down."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rag_lightning.corpora.passages import resolve
from rag_lightning.errors import ConfigError
from rag_lightning.reports.runs import Run


def located(place: str) -> Path:
    """Returns the path of a place that a run's configuration names.

    Runs keep what they read from the environment as it was written (``${oc.env:NAME}``); it is read again here. What
    cannot be read stays as it is, and is then no file.
    """
    try:
        return resolve(str(OmegaConf.create({"place": place}).place))
    except OmegaConfBaseException:  # such as a variable that is not set here
        return Path(place)


def with_files(run: Run, config: DictConfig) -> Run:
    """Returns a run that looks for its questions and passages where the command says; what they held is not changed."""
    given = {"test": config.questions, "passages": config.passages}
    data = dict(run.record.get("data") or {})
    for name, place in given.items():
        if place is not None:
            data[name] = {**(data.get(name) or {}), "file": str(place)}
    return replace(run, record={**run.record, "data": data}) if any(given.values()) else run


def plain_rows(config: DictConfig) -> Mapping[str, str]:
    """Returns ``rows`` as plain strings.

    Raises:
        ConfigError: Something else than a mapping of names to patterns.
    """
    rows = OmegaConf.to_container(config.rows, resolve=True) if OmegaConf.is_config(config.rows) else config.rows
    if rows is None:
        return {}
    if not isinstance(rows, dict) or not all(isinstance(pattern, str) for pattern in rows.values()):
        raise ConfigError(
            f"rows: expected a pattern of run names for each row, as rows={{joint: 'joint/*'}}, got {rows!r}"
        )
    return {str(name): pattern for name, pattern in rows.items()}
