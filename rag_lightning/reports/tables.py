"""Tables for the screen and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rag_lightning.reports.collect import RECALLS, summary

NOT_MEASURED = "–"  # noqa: RUF001 (an en dash is what a table wants)
HEADINGS = ("run", "EM %", "F1 %", "recall@1 %", "recall@5 %", "seconds")


def rows(runs: Mapping[str, Mapping[str, Any] | None]) -> list[tuple[str, ...]]:
    """Returns the cells of the short table; a dash where a run measures nothing, and all along where it has no metrics.

    >>> rows({"closed_book": {"exact_match": 0.125, "f1": 0.25, "seconds": 9.5}})
    [('closed_book', '12.5', '25.0', '–', '–', '10')]
    """
    table = []
    for name, metrics in runs.items():
        if metrics is None:
            table.append((name, *[NOT_MEASURED] * (len(HEADINGS) - 1)))
            continue
        figures = summary(metrics)
        shares = [
            f"{100 * figures[key]:.1f}" if key in metrics else NOT_MEASURED for key in ("exact_match", "f1", *RECALLS)
        ]
        table.append((name, *shares, f"{figures['seconds']:.0f}"))
    return table


def screen_table(runs: Mapping[str, Mapping[str, Any] | None], title: str) -> Table:
    """Returns the short table for a terminal."""
    table = Table(title=title)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows(runs):
        table.add_row(*row)
    return table


def markdown_table(runs: Mapping[str, Mapping[str, Any] | None], notes: Sequence[str] = ()) -> str:
    """Returns the short table as Markdown, notes below it."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows(runs)]) + listed(notes)


def listed(notes: Sequence[str]) -> str:
    r"""Returns notes as a Markdown list that follows a table; nothing where there are none.

    >>> listed(["one", "two"]), listed([])
    ('\n\n- one\n- two', '')
    """
    return "\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""
