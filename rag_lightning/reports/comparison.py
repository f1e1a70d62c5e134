"""Our runs beside a paper's figures, and two groups of our own beside each other.

A row is a group of runs that differ in their seed alone. What is missing is shown as missing: a run that has not
finished counts among those wanted, and a row of the paper without a run keeps its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rag_lightning.corpora.passages import resolve
from rag_lightning.errors import ConfigError
from rag_lightning.reports.bootstrap import Interval, difference_interval, mean_interval
from rag_lightning.reports.groups import Spread
from rag_lightning.reports.papers import Column, PaperTable, check_known
from rag_lightning.reports.runs import Run, by_signature, matching
from rag_lightning.reports.scores import Locate, percent, score_matrix, shared_matrices


@dataclass(frozen=True)
class Cell:
    """A group of runs in a row and a column; of a row without runs, an empty group.

    Attributes:
        row: The paper's row, or the name that was given.
        column: The paper's column, or a metric.
        runs: Of the group, finished or not.
        settings: What tells the group from others, for its name; empty where it is the only one of its row.
    """

    row: str
    column: Column
    runs: tuple[Run, ...]
    settings: str = ""

    @property
    def name(self) -> str:
        """What a comparison calls it."""
        return f"{self.row} ({self.settings})" if self.settings else self.row

    @property
    def metric(self) -> str:
        """Which of the column's metrics was measured; the first where none was."""
        names = [name for name in self.column.metrics for run in self.runs if name in (run.metrics or {})]
        return names[0] if names else self.column.metrics[0]

    @property
    def measured(self) -> list[Run]:
        """The runs that have the metric, by seed."""
        runs = [run for run in self.runs if run.metrics is not None and self.metric in run.metrics]
        return sorted(runs, key=lambda run: (run.seed is None, run.seed, run.name))

    @property
    def values(self) -> list[float]:
        """Percentages, one for each run that was measured."""
        return [percent(self.metric, float((run.metrics or {})[self.metric])) for run in self.measured]


@dataclass(frozen=True)
class Line:
    """A cell beside the paper's figure, all in percent.

    Attributes:
        num_wanted: How many runs there should be; none of a row that the paper alone has.
        ours: None where none has been measured.
        published: The paper's; None where it has none.
        difference: Ours minus the paper's.
        interval: Of the difference; None where there is none, or too little to draw from.
        drawn: What the bootstrap drew: ``seeds and questions``, ``questions``, ``seeds``, or nothing.
    """

    cell: Cell
    num_wanted: int
    ours: Spread | None
    published: float | None
    difference: float | None
    interval: Interval | None
    drawn: str = ""


@dataclass(frozen=True)
class Pair:
    """The difference of two groups in one column, percent: the first minus the second.

    Attributes:
        drawn: As of :class:`Line`.
        same_seeds: The seeds were drawn together.
    """

    first: Cell
    second: Cell
    difference: float
    interval: Interval | None
    drawn: str
    same_seeds: bool


def cells_of_paper(runs: Sequence[Run], table: PaperTable, rows: Mapping[str, str], column: str | None) -> list[Cell]:
    """Returns the cells of a paper's table that some run belongs to, and the rows without one in the same columns.

    Args:
        runs: All of them.
        table: The paper's.
        rows: By the paper's row, a pattern of run names; empty: a run's recipe tells its row.
        column: Of the runs that do not tell theirs by a choice of data set.

    Raises:
        ConfigError: An unknown row or column, or no run that belongs to the table.
        MissingFileError: A pattern without a run.
    """
    check_known("rows", rows, table.figures)
    check_known("column", [] if column is None else [column], table.columns)
    members = {row: matching(runs, pattern) for row, pattern in rows.items()}
    if not rows:
        members = {row: [run for run in runs if table.row_of(run.experiment) == row] for row in table.experiments}
    if not any(members.values()):
        found = sorted({str(run.experiment) for run in runs})
        recipes = ", ".join(table.experiments.values()) or "its rows"
        raise ConfigError(
            f"paper={table.name}: expected runs of {recipes}; the {len(runs)} runs are of {', '.join(found)}. "
            f"Say which are which: 'rows={{{next(iter(table.figures))}: PATTERN}}'."
        )
    placed = [
        (row, one, group)
        for row, chosen in members.items()
        for group in by_signature(chosen)
        for one in _columns_of(group, table, column)
    ]
    used = [one for one in table.columns.values() if any(one == other for _, other, _ in placed)]
    cells = []
    for one in used:
        for row in [row for row in table.figures if row in members or table.figure(row, one.name) is not None]:
            groups = [group for name, other, group in placed if (name, other) == (row, one)]
            cells += _cells(row, one, groups)
    return cells


def cells_of_groups(runs: Sequence[Run], rows: Mapping[str, str], metrics: Sequence[str]) -> list[Cell]:
    """Returns the cells of a table without a paper: a row for each group, a column for each metric.

    Args:
        runs: All of them.
        rows: By a name of one's own, a pattern of run names; empty: every group is a row, named by its recipe.
        metrics: Keys of ``metrics.json``.

    Raises:
        MissingFileError: A pattern without a run.
    """
    members = {row: matching(runs, pattern) for row, pattern in rows.items()}
    if not rows:
        for run in runs:
            told = [run.experiment or run.folder.absolute().parent.name, run.dataset]
            members.setdefault(" ".join(part for part in told if part is not None), []).append(run)
    columns = [Column(metric, (), (metric,)) for metric in metrics]
    return [
        cell for one in columns for row, chosen in members.items() for cell in _cells(row, one, by_signature(chosen))
    ]


def lines_of(
    cells: Sequence[Cell],
    table: PaperTable | None,
    *,
    num_seeds: int | None = None,
    num_resamples: int = 2000,
    locate: Locate = resolve,
) -> list[Line]:
    """Returns each cell with its mean over seeds, the paper's figure, and the difference.

    Args:
        cells: Of one table.
        table: The paper's; None where ours stand alone.
        num_seeds: How many runs each cell should have; as many as the largest has where not told.
        num_resamples: Of the bootstrap.
        locate: See :data:`~rag_lightning.reports.scores.Locate`.
    """
    wanted = num_seeds if num_seeds is not None else max(len(cell.runs) for cell in cells)
    lines = []
    for cell in cells:
        ours = table is None or cell.row in table.experiments or cell.runs
        lines.append(_line(cell, table, max(wanted, len(cell.runs)) if ours else 0, num_resamples, locate))
    return lines


def pairs_of(
    cells: Sequence[Cell], names: Sequence[str], *, num_resamples: int = 2000, locate: Locate = resolve
) -> list[Pair]:
    """Returns the differences of two groups, in every column that both were measured in.

    Args:
        cells: Of one table.
        names: Of the two, as the table has them.
        num_resamples: Of the bootstrap.
        locate: See :data:`~rag_lightning.reports.scores.Locate`.

    Raises:
        ConfigError: Not two names of the table, or no column that both were measured in.
    """
    known = list(dict.fromkeys(cell.name for cell in cells))
    if len(names) != 2 or len(set(names)) != 2:
        raise ConfigError(f"compare: expected two of {', '.join(known)}; got {', '.join(names) or 'none'}.")
    check_known("compare", names, known)
    measured = {(cell.name, cell.column.name): cell for cell in cells if cell.values}
    pairs = []
    for column in dict.fromkeys(cell.column.name for cell in cells):
        first, second = (measured.get((name, column)) for name in names)
        if first is not None and second is not None:
            pairs.append(pair_of(first, second, num_resamples=num_resamples, locate=locate))
    if not pairs:
        raise ConfigError(f"compare: expected a column that both {' and '.join(names)} were measured in, found none.")
    return pairs


def pair_of(first: Cell, second: Cell, *, num_resamples: int = 2000, locate: Locate = resolve) -> Pair:
    """Returns the difference of two groups that were both measured: of their means, with a bootstrap's interval.

    Questions are drawn where both have a score for each of the same ones, and seeds; together where they are the same.

    Args:
        first: The minuend.
        second: The subtrahend.
        num_resamples: Of the bootstrap.
        locate: See :data:`~rag_lightning.reports.scores.Locate`.
    """
    seeds = [[run.seed for run in cell.measured] for cell in (first, second)]
    same_seeds = seeds[0] == seeds[1] and None not in seeds[0]
    matrices = None
    if first.metric == second.metric:
        matrices = shared_matrices(first.measured, second.measured, first.metric, locate)
    drawn = "seeds"
    if matrices is not None:
        drawn = "seeds and questions" if max(map(len, seeds)) > 1 else "questions"
    ours = [100 * scores_SQ for scores_SQ in matrices] if matrices is not None else []
    ours = ours or [np.array(cell.values)[:, None] for cell in (first, second)]
    interval = difference_interval(ours[0], ours[1], same_seeds=same_seeds, num_resamples=num_resamples)
    difference = Spread.of(first.values).mean - Spread.of(second.values).mean
    return Pair(first, second, difference, interval, drawn if interval else "", same_seeds)


def _cells(row: str, column: Column, groups: Sequence[Sequence[Run]]) -> list[Cell]:
    shared = set.intersection(*(set(group[0].overrides) for group in groups)) if groups else set()
    told = [" ".join(text for text in group[0].overrides if text not in shared) for group in groups]
    if len(groups) > 1:  # such as two evaluations whose configurations were edited in between
        told = [
            text if text and told.count(text) == 1 else f"{text} {group[0].name}".strip()
            for text, group in zip(told, groups, strict=True)
        ]
    else:
        told = [""] * len(groups)
    cells = [Cell(row, column, tuple(group), text) for group, text in zip(groups, told, strict=True)]
    return cells or [Cell(row, column, ())]


def _columns_of(group: Sequence[Run], table: PaperTable, column: str | None) -> list[Column]:
    if column is not None:
        return [table.columns[column]]
    dataset = group[0].dataset
    columns = [one for one in table.columns.values() if not one.datasets or dataset in one.datasets]
    if not columns:
        known = sorted({name for one in table.columns.values() for name in one.datasets})
        raise ConfigError(
            f"run {group[0].name!r}: expected a choice of dataset among {', '.join(known)}, to tell its column of "
            f"{table.name}; came {dataset}. Give the column: column={next(iter(table.columns))}"
        )
    return columns


def _line(cell: Cell, table: PaperTable | None, num_wanted: int, num_resamples: int, locate: Locate) -> Line:
    published = table.figure(cell.row, cell.column.name) if table is not None else None
    if not cell.values:
        return Line(cell, num_wanted, None, published, None, None)
    ours = Spread.of(cell.values)
    if published is None:
        return Line(cell, num_wanted, ours, None, None, None)
    scores_SQ, drawn = _scores(cell, locate)
    interval = mean_interval(scores_SQ, num_resamples=num_resamples)
    if interval is not None:
        interval = interval[0] - published, interval[1] - published
    return Line(cell, num_wanted, ours, published, ours.mean - published, interval, drawn if interval else "")


def _scores(cell: Cell, locate: Locate) -> tuple[Any, str]:
    """Returns the percentages to draw from, and what that is."""
    matrix_SQ = score_matrix(cell.measured, cell.metric, locate)
    if matrix_SQ is None:
        return np.array(cell.values)[:, None], "seeds"
    return 100 * matrix_SQ, "seeds and questions" if len(matrix_SQ) > 1 else "questions"
