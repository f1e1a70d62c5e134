"""The comparison with a paper as Markdown, LaTeX (booktabs), JSON, and for the screen."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from rag_lightning.reports.bootstrap import Interval
from rag_lightning.reports.comparison import Cell, Line, Pair
from rag_lightning.reports.error_analysis import VERDICTS, ErrorCounts
from rag_lightning.reports.groups import Spread
from rag_lightning.reports.notes import short_commits
from rag_lightning.reports.runs import CONFIG_FILE
from rag_lightning.reports.tables import NOT_MEASURED

HEADINGS = ("row", "measured", "ours", "n", "paper", "difference [95 %]", "commit", "config")
ERROR_HEADINGS = (
    "row",
    "answers",
    "right",
    "mismatch",
    "not retrieved",
    "not read",
    "right of those in no passage",
    "in no passage of the right",
)
LEFT = ("row", "measured", "commit", "config", "found by", "first above second", "shown")
MINUS = "\u2212"
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    MINUS: "$-$",
    NOT_MEASURED: "--",
    "…": r"\ldots{}",
    "÷": r"$\div$",
    "§": r"\S{}",
}


def rows_of(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Returns the cells of the table, without the link to the configuration."""
    return [
        (
            line.cell.name,
            _measured(line.cell),
            spread_text(line.ours),
            _count(line),
            published_text(line.published),
            NOT_MEASURED if line.difference is None else difference_text(line.difference, line.interval),
            short_commits(line.cell.runs) if line.cell.runs else NOT_MEASURED,
        )
        for line in lines
    ]


def error_rows(counts: Mapping[str, ErrorCounts]) -> list[tuple[str, ...]]:
    """Returns the cells of the table of errors: percent of all answers, and the two shares of the last columns.

    >>> counts = {"right": 3, "annotation_mismatch": 0, "not_retrieved": 1, "not_read": 0}
    >>> error_rows({"joint": ErrorCounts(counts, 2, 1)})
    [('joint', '4', '3 (75.0)', '0 (0.0)', '1 (25.0)', '0 (0.0)', '1 of 2 (50.0)', '1 of 3 (33.3)')]
    """
    rows = []
    for name, told in counts.items():
        shares = [f"{told.counts[key]} ({100 * told.counts[key] / told.num_questions:.1f})" for key in VERDICTS]
        lucky = told.num_right_without_passage
        rows.append(
            (
                name,
                str(told.num_questions),
                *shares,
                _share(lucky, told.num_without_passage, told.accuracy_without_passage),
                _share(lucky, told.counts["right"], told.share_of_right_without_passage),
            )
        )
    return rows


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Returns a Markdown table; a bar within a cell is escaped.

    >>> print(markdown(("row", "n"), [("a|b", "3")]))
    | row | n |
    |---|---:|
    | a\|b | 3 |
    """
    ruler = "".join("---|" if heading in LEFT else "---:|" for heading in headings)
    lines = [f"| {' | '.join(headings)} |", f"|{ruler}"]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows])


def latex(headings: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, notes: Sequence[str] = ()) -> str:
    r"""Returns a LaTeX table; needs ``\usepackage{booktabs}``.

    >>> print(latex(("row", "n"), [("a_b", "3")], caption="50 %"))
    \begin{table}
    \centering
    \caption{50 \%}
    \begin{tabular}{lr}
    \toprule
    row & n \\
    \midrule
    a\_b & 3 \\
    \bottomrule
    \end{tabular}
    \end{table}
    """
    columns = "".join("l" if heading in LEFT else "r" for heading in headings)
    body = [f"{' & '.join(map(escaped, row))} \\\\" for row in rows]
    below = (
        [
            "\\par\\smallskip\\footnotesize "
            + " ".join(escaped(note if note.endswith(".") else f"{note}.") for note in notes)
        ]
        if notes
        else []
    )
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escaped(caption)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            f"{' & '.join(map(escaped, headings))} \\\\",
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            *below,
            "\\end{table}",
        ]
    )


def escaped(text: str) -> str:
    r"""Returns text that LaTeX sets as it reads.

    >>> escaped("a_b & 5 % ± 1")
    'a\\_b \\& 5 \\% $\\pm$ 1'
    """
    return "".join(_LATEX.get(sign, sign) for sign in text)


def screen(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Returns a table for a terminal."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def config_links(lines: Sequence[Line], folder: Path) -> list[str]:
    """Returns, for each line, a Markdown link to the configuration of its first run, from a file in ``folder``."""
    links = []
    for line in lines:
        paths = [run.folder / CONFIG_FILE for run in line.cell.runs if (run.folder / CONFIG_FILE).is_file()]
        name = line.cell.runs[0].experiment if line.cell.runs else None
        place = os.path.relpath(paths[0], folder).replace(os.sep, "/") if paths else None
        links.append(f"[{name or CONFIG_FILE}](<{place}>)" if place is not None else NOT_MEASURED)
    return links


def config_names(lines: Sequence[Line]) -> list[str]:
    """Returns each line's recipe, or its first run where it has none."""
    runs = [line.cell.runs[0] if line.cell.runs else None for line in lines]
    return [NOT_MEASURED if run is None else run.experiment or run.name for run in runs]


def pair_sentences(pairs: Sequence[Pair]) -> list[str]:
    """Returns each difference of two groups as a line of text."""
    sentences = []
    for pair in pairs:
        interval = difference_text(pair.difference, pair.interval)
        how = "questions" if "questions" in pair.drawn else ""
        paired = " and ".join(part for part in ("seeds" if pair.same_seeds else "", how) if part)
        sentences.append(
            f"{pair.first.name} {MINUS} {pair.second.name}, {_measured(pair.first)}: {interval}"
            + (f", paired by {paired}" if paired else "")
        )
    return sentences


def as_json(lines: Sequence[Line], pairs: Sequence[Pair], notes: Sequence[str]) -> dict[str, Any]:
    """Returns the comparison as plain values, figures in percent."""
    rows = [
        {
            "row": line.cell.row,
            "settings": line.cell.settings,
            "column": line.cell.column.name,
            "metric": line.cell.metric,
            "ours": asdict(line.ours) | {"sd": _plain_sd(line.ours)} if line.ours is not None else None,
            "values": {str(run.seed): value for run, value in zip(line.cell.measured, line.cell.values, strict=True)},
            "num_wanted": line.num_wanted,
            "paper": line.published,
            "difference": line.difference,
            "interval": line.interval,
            "drawn": line.drawn,
            "runs": [str(run.folder) for run in line.cell.runs],
            "commits": sorted({run.commit for run in line.cell.runs if run.commit is not None}),
        }
        for line in lines
    ]
    compared = [
        {
            "first": pair.first.name,
            "second": pair.second.name,
            "column": pair.first.column.name,
            "difference": pair.difference,
            "interval": pair.interval,
            "drawn": pair.drawn,
            "same_seeds": pair.same_seeds,
        }
        for pair in pairs
    ]
    return {"rows": rows, "compared": compared, "notes": list(notes)}


def _plain_sd(spread: Spread) -> float | None:
    return spread.sd if spread.num_runs > 1 else None  # JSON has no NaN


def _measured(cell: Cell) -> str:
    """Returns the column, and the metric where the column's name is not it."""
    return cell.column.name if cell.column.name == cell.metric else f"{cell.column.name}: {cell.metric}"


def spread_text(spread: Spread | None) -> str:
    """Returns a percentage with its standard deviation, a dash where there is none."""
    if spread is None:
        return NOT_MEASURED
    return f"{spread.mean:.1f}" + (f" ± {spread.sd:.1f}" if spread.num_runs > 1 else "")


def _count(line: Line) -> str:
    if line.num_wanted == 0:  # a system of the paper's that we have no recipe for
        return NOT_MEASURED
    num = len(line.cell.values)
    return str(num) if num == line.num_wanted else f"{num} of {line.num_wanted}"


def published_text(figure: float | None) -> str:
    """Returns a paper's figure with its digits, at least one decimal.

    >>> published_text(44.0), published_text(45.87)
    ('44.0', '45.87')
    """
    if figure is None:
        return NOT_MEASURED
    return f"{figure:.1f}" if round(figure, 1) == figure else f"{figure:g}"


def difference_text(difference: float, interval: Interval | None) -> str:
    """Returns a signed difference with its interval.

    >>> difference_text(1.25, (0.5, 3.0))
    '+1.2 [+0.5, +3.0]'
    """
    ends = f" [{_signed(interval[0])}, {_signed(interval[1])}]" if interval is not None else ""
    return _signed(difference) + ends


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", MINUS)  # never a negative zero


def _share(part: int, whole: int, share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{part} of {whole} ({100 * share:.1f})"
