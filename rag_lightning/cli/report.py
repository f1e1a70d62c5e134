"""``rag-lightning report runs=DIR``: one table of the runs under a folder, also as ``results.json`` there."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from rag_lightning.reports.collect import collect_runs, summary
from rag_lightning.reports.tables import markdown_table, screen_table
from rag_lightning.utils.io import write_json


def run(config: DictConfig) -> None:
    """Prints the table and writes ``results.json`` and ``results.md``."""
    folder = Path(config.runs)
    runs = collect_runs(folder)
    if config.order is not None:
        runs = {name: runs[name] for name in config.order if name in runs} | runs
    write_json(folder / "results.json", {name: summary(metrics) for name, metrics in runs.items()})
    (folder / "results.md").write_text(markdown_table(runs) + "\n", encoding="utf-8")
    Console().print(screen_table(runs, str(folder)))
