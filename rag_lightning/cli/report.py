"""``rag-lightning report runs=DIR …``: tables, pictures and pages of finished runs, beside what papers report.

Without further settings one table of the runs under a folder, also as ``results.json``; what has not finished is a row
of dashes there, and what the runs differ in stands below. With ``curve``, runs of a sweep
that differ in their seed alone are one row, and ``curve.png`` draws the metrics. ``paper``, ``rows``, ``compare``,
``findings`` are :mod:`rag_lightning.cli.report_paper`'s, ``errors``, ``plots`` and ``page``
:mod:`rag_lightning.cli.report_answers`'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from rag_lightning.cli.console import table_console
from rag_lightning.cli.report_answers import page_of_file, report_answers
from rag_lightning.cli.report_files import with_files
from rag_lightning.cli.report_paper import report_findings, report_paper
from rag_lightning.errors import ConfigError
from rag_lightning.reports.collect import collect_runs, summary
from rag_lightning.reports.groups import by_setting, spreads
from rag_lightning.reports.notes import list_notes
from rag_lightning.reports.plots import plot_curve
from rag_lightning.reports.runs import find_runs
from rag_lightning.reports.tables import NOT_MEASURED, listed, markdown_table, screen_table
from rag_lightning.utils.io import write_json

COMPARING = ("paper", "rows", "compare", "column", "num_seeds")
FINDINGS = ("findings",)
ANSWERS = ("errors", "plots", "page")
PLAIN = ("order", "curve")
DEFAULTS: dict[str, Any] = {
    "metrics": ["exact_match", "recall@1", "recall@5"],
    "num_resamples": 2000,
    "num_heatmaps": 3,
    "page_passages": 10,
}
"""Of settings that only some reports read; null in conf/, so that one which is given and not read is refused."""


def run(config: DictConfig) -> None:
    """Prints and writes what was asked for, the short table where nothing was."""
    _check(config)
    config = config.copy()
    for name, value in DEFAULTS.items():
        if config[name] is None:
            config[name] = value
    if config.predictions is not None:
        page_of_file(config)
        return
    folder = Path(config.runs)
    if not _given(config, (*COMPARING, *FINDINGS, *ANSWERS)):
        _short(config, folder)
        return
    runs = [with_files(one, config) for one in find_runs(folder)]
    if _given(config, COMPARING):
        report_paper(config, folder, runs)
    if _given(config, FINDINGS):
        report_findings(config, folder, runs)
    if _given(config, ANSWERS):
        report_answers(config, folder, runs)


def _check(config: DictConfig) -> None:
    """Refuses settings that do not go together: one of them would be read and ignored."""
    if (config.runs is None) == (config.predictions is None):
        raise ConfigError("report: expected runs=DIR, or predictions=FILE with questions=FILE; one of them")
    comparing = _given(config, (*COMPARING, *FINDINGS))
    answers, plain = _given(config, ANSWERS), _given(config, PLAIN)
    clashes = []
    if config.predictions is not None:
        clashes = [*comparing, *answers, *plain]
    elif comparing or answers:
        clashes = plain
    elif _given(config, ("questions", "passages")):
        raise ConfigError("questions, passages: expected errors, plots, page or paper with them, got none of these")
    if clashes:
        raise ConfigError(
            f"report: {', '.join(clashes)}: ask for it in a report of its own, not with the other settings"
        )
    if config.output is not None and config.predictions is None:
        raise ConfigError("output: expected predictions=FILE with it; what is told of runs is written beside them")
    _check_read(config)


def _check_read(config: DictConfig) -> None:
    """Refuses a setting of a report that was not asked for."""
    grouped = config.paper is None and bool(_given(config, COMPARING))
    readers = {
        "metrics": (config.curve is not None or grouped, "curve, or rows, compare or num_seeds without a paper, "),
        "num_resamples": (bool(_given(config, (*COMPARING, *FINDINGS))), "paper, rows, compare or findings"),
        "num_heatmaps": (bool(config.plots), "plots=true"),
        "page_passages": (bool(config.page) or config.predictions is not None, "page=true or predictions=FILE"),
    }
    for name, (is_read, wanted) in readers.items():
        if config[name] is not None and not is_read:
            raise ConfigError(f"{name}: expected {wanted.strip(', ')} with it, got none: nothing would read it")


def _given(config: DictConfig, names: Sequence[str]) -> list[str]:
    return [name for name in names if config[name] not in (None, False)]


def _short(config: DictConfig, folder: Path) -> None:
    """Prints the short table and writes ``results.json`` and ``results.md``; or the curve."""
    finished = collect_runs(folder)
    found = find_runs(folder, direct=True)
    notes = list_notes(found)
    runs: dict[str, dict[str, Any] | None] = {**finished, **{run.name: None for run in found if run.metrics is None}}
    if config.curve is not None:
        _curve(config, folder, runs, notes)
    else:
        if config.order is not None:
            runs = {name: runs[name] for name in config.order if name in runs} | runs
        told = {name: summary(metrics) for name, metrics in runs.items() if metrics is not None}
        write_json(folder / "results.json", told)
        (folder / "results.md").write_text(markdown_table(runs, notes) + "\n", encoding="utf-8")
        table_console().print(screen_table(runs, str(folder)))
    for note in notes:
        table_console().print(note, markup=False, highlight=False, soft_wrap=True)


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


def _curve(config: DictConfig, folder: Path, runs: Mapping[str, dict[str, Any] | None], notes: Sequence[str]) -> None:
    groups = by_setting({name: metrics or {} for name, metrics in runs.items()}, config.curve)
    wanted = max(len(members) for members in groups.values())
    order = sorted(groups, key=_natural) if config.order is None else [_told(value) for value in config.order]
    groups = {value: groups[value] for value in [name for name in order if name in groups]} | groups
    curves = {metric: spreads(groups, metric) for metric in config.metrics}
    table = Table(title=str(folder))
    lines = [f"| {config.curve} | runs | {' | '.join(config.metrics)} |", "|---" * (2 + len(curves)) + "|"]
    for column in (config.curve, "runs", *config.metrics):
        table.add_column(column)
    for value, members in groups.items():
        cells = [str(points[value]) if value in points else NOT_MEASURED for points in curves.values()]
        measured = sum(one != {} for one in members)
        row = [value, str(measured) if measured == wanted else f"{measured} of {wanted}", *cells]
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    figures = {metric: {value: asdict(point) for value, point in points.items()} for metric, points in curves.items()}
    write_json(folder / "curve.json", {"setting": config.curve, "curves": figures})
    (folder / "curve.md").write_text("\n".join(lines) + listed(notes) + "\n", encoding="utf-8")
    plot_curve(curves, setting=config.curve, path=folder / "curve.png")
    table_console().print(table)
