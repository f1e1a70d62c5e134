"""``report runs=DIR paper=rag/table6 [compare=[a,b]]``, ``findings=reproduce``: tables in Markdown, LaTeX and JSON."""

from pathlib import Path

from omegaconf import DictConfig

from rag_lightning.cli.console import table_console
from rag_lightning.cli.report_files import located, plain_rows
from rag_lightning.errors import ConfigError
from rag_lightning.reports.comparison import Line, cells_of_groups, cells_of_paper, lines_of, pairs_of
from rag_lightning.reports.comparison_tables import (
    HEADINGS,
    as_json,
    config_links,
    config_names,
    latex,
    markdown,
    pair_sentences,
    rows_of,
    screen,
)
from rag_lightning.reports.findings import HEADINGS as FINDING_HEADINGS
from rag_lightning.reports.findings import finding_notes, finding_rows, findings, findings_json, outcomes
from rag_lightning.reports.notes import notes_of
from rag_lightning.reports.papers import paper_table
from rag_lightning.reports.runs import Run
from rag_lightning.utils.io import write_json

UNGROUPED = "groups"
"""What the files of a table without a paper are called."""
FINDINGS_NAME = "findings"


def report_paper(config: DictConfig, folder: Path, runs: list[Run]) -> None:
    """Prints the table, and writes it beside the runs.

    Args:
        config: The command's.
        folder: Where the files go.
        runs: Found there.

    Raises:
        ConfigError: An unknown table, row, column or group, or settings that only stand beside a paper.
    """
    table = paper_table(config.paper) if config.paper is not None else None
    if table is None and config.column is not None:
        raise ConfigError(
            "column: expected paper=TABLE with it, got none. Without a paper metrics=[…] are the columns."
        )
    rows = plain_rows(config)
    if table is not None:
        cells = cells_of_paper(runs, table, rows, config.column)
    else:
        cells = cells_of_groups(runs, rows, list(config.metrics))
    resamples = config.num_resamples
    lines = lines_of(cells, table, num_seeds=config.num_seeds, num_resamples=resamples, locate=located)
    pairs = []
    if config.compare is not None:
        pairs = pairs_of(cells, list(config.compare), num_resamples=resamples, locate=located)
    notes = notes_of(lines, pairs, runs, table)
    sentences = pair_sentences(pairs)
    title = table.title if table is not None else str(folder)
    name = (config.paper or UNGROUPED).replace("/", "_")
    texts = _texts(lines, title, [*sentences, *notes], folder)
    for suffix, text in texts.items():
        (folder / f"{name}.{suffix}").write_text(text + "\n", encoding="utf-8")
    write_json(folder / f"{name}.json", {"title": title, **as_json(lines, pairs, notes)})
    console = table_console()
    console.print(screen(HEADINGS[:-1], rows_of(lines), title))
    for text in (*sentences, *notes, f"written to {folder / name}.md, .tex and .json"):
        console.print(text, markup=False, highlight=False)


def report_findings(config: DictConfig, folder: Path, runs: list[Run]) -> None:
    """Prints which of a list of findings the runs show, and writes it beside them.

    Args:
        config: The command's.
        folder: Where the files go.
        runs: Found there.

    Raises:
        ConfigError: An unknown list.
    """
    results = outcomes(findings(config.findings), runs, num_resamples=config.num_resamples, locate=located)
    rows, notes = finding_rows(results), finding_notes(results)
    title = f"What papers found, and what {folder} shows"
    listed = "".join(f"\n- {note}" for note in notes)
    text = f"{markdown(FINDING_HEADINGS, rows)}\n{listed}\n"
    (folder / f"{FINDINGS_NAME}.md").write_text(text, encoding="utf-8")
    write_json(folder / f"{FINDINGS_NAME}.json", {"findings": findings_json(results), "notes": notes})
    console = table_console()
    console.print(screen(FINDING_HEADINGS, rows, title))
    for note in (*notes, f"written to {folder / FINDINGS_NAME}.md and .json"):
        console.print(note, markup=False, highlight=False)


def _texts(lines: list[Line], title: str, notes: list[str], folder: Path) -> dict[str, str]:
    rows = rows_of(lines)
    linked = [(*row, link) for row, link in zip(rows, config_links(lines, folder), strict=True)]
    named = [(*row, name) for row, name in zip(rows, config_names(lines), strict=True)]
    listed = "".join(f"\n- {note}" for note in notes)
    return {
        "md": f"{title}; figures in %.\n\n{markdown(HEADINGS, linked)}\n{listed}",
        "tex": latex(HEADINGS, named, caption=f"{title}; figures in %.", notes=notes),
    }
