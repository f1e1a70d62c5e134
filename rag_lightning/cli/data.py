"""``rag-lightning data fetch NAME…|all output=DIR``: published data and checkpoints, resumed and checked."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from rag_lightning.cli.console import table_console
from rag_lightning.corpora.fetch.download import Report, Settings
from rag_lightning.corpora.fetch.fetching import chosen, fetch
from rag_lightning.corpora.fetch.sources import Source, mirror_rules, read_sources
from rag_lightning.errors import ConfigError


def run(config: DictConfig) -> None:
    """Fetches, or lists what can be fetched."""
    entries: Any = OmegaConf.to_container(config.sources, resolve=True)
    sources = read_sources(entries)
    if config.action == "list":
        table_console().print(_table(sources))
        return
    if config.action != "fetch":
        raise ConfigError(f"data: expected the action fetch or list, got {config.action!r}")
    if OmegaConf.is_missing(config, "output"):
        raise ConfigError("output: expected a folder, came none. Give one: output=DIR")
    wanted = chosen(list(config.names), sources)
    rules = mirror_rules()
    settings = Settings(attempts=config.attempts, timeout_s=config.timeout_s, pause_s=config.pause_s)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        for source in wanted:
            outcomes = fetch(source, Path(config.output), rules=rules, settings=settings, watch=_Bars(progress))
            for name, outcome in outcomes.items():
                console.print(f"{name}: {outcome}", markup=False, highlight=False, soft_wrap=True)


class _Bars:
    """Draws a bar for each file."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __call__(self, name: str) -> Report:
        task = self.progress.add_task(name, total=None)

        def report(size: int, total: int | None) -> None:
            self.progress.update(task, completed=size, total=total)

        return report


def _table(sources: dict[str, Source]) -> Table:
    table = Table("name", "what, licence as stated", "GB", "from")
    for source in sources.values():
        sizes = [file.size for file in source.files]
        known = [size for size in sizes if size is not None]
        size = f"{sum(known) / 1e9:.2f}" if known and len(known) == len(sizes) else "-"
        place = f"hub: {source.repo}" if source.repo is not None else f"{len(source.files)} files"
        table.add_row(source.name, source.about, size, place)
    return table
