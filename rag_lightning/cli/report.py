"""``rag-lightning report runs=DIR [curve=SETTING]``: one table of the runs under a folder, also as ``results.json``.

With ``curve``, runs of a sweep that differ in their seed alone are one row, and ``curve.png`` draws the metrics.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rag_lightning.reports.collect import collect_runs, summary
from rag_lightning.reports.groups import by_setting, spreads
from rag_lightning.reports.plots import plot_curve
from rag_lightning.reports.tables import NOT_MEASURED, markdown_table, screen_table
from rag_lightning.utils.io import write_json


def run(config: DictConfig) -> None:
    """Prints the table and writes ``results.json`` and ``results.md``."""
    folder = Path(config.runs)
    runs = collect_runs(folder)
    if config.curve is not None:
        _curve(config, folder, runs)
        return
    if config.order is not None:
        runs = {name: runs[name] for name in config.order if name in runs} | runs
    write_json(folder / "results.json", {name: summary(metrics) for name, metrics in runs.items()})
    (folder / "results.md").write_text(markdown_table(runs) + "\n", encoding="utf-8")
    Console().print(screen_table(runs, str(folder)))


def _told(value: object) -> str:
    """Returns a setting's value as a sweep's folders tell it."""
    return "null" if value is None else str(value)


def _natural(value: str) -> tuple[bool, float, str]:
    """Sorts numbers by size, before everything else.

    >>> sorted(["null", "20", "5", "1e-3"], key=_natural)
    ['1e-3', '5', '20', 'null']
    """
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _curve(config: DictConfig, folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    groups = by_setting(runs, config.curve)
    order = sorted(groups, key=_natural) if config.order is None else [_told(value) for value in config.order]
    groups = {value: groups[value] for value in [name for name in order if name in groups]} | groups
    curves = {metric: spreads(groups, metric) for metric in config.metrics}
    table = Table(title=str(folder))
    lines = [f"| {config.curve} | runs | {' | '.join(config.metrics)} |", "|---" * (2 + len(curves)) + "|"]
    for column in (config.curve, "runs", *config.metrics):
        table.add_column(column)
    for value, members in groups.items():
        cells = [str(points[value]) if value in points else NOT_MEASURED for points in curves.values()]
        row = [value, str(len(members)), *cells]
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    figures = {metric: {value: asdict(point) for value, point in points.items()} for metric, points in curves.items()}
    write_json(folder / "curve.json", {"setting": config.curve, "curves": figures})
    (folder / "curve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_curve(curves, setting=config.curve, path=folder / "curve.png")
    Console().print(table)
