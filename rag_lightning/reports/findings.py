"""What papers found, as differences of two groups of runs, and whether our runs show it: ``paper_findings.yaml``.

A finding says that one group stands above another. Ours shows it where the whole interval of the difference does, and
the reverse likewise; else the two cannot be told apart with so many seeds and questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from rag_lightning.corpora.passages import resolve
from rag_lightning.errors import MissingFileError
from rag_lightning.reports.comparison import Cell, Pair, pair_of
from rag_lightning.reports.comparison_tables import difference_text, published_text, spread_text
from rag_lightning.reports.groups import Spread
from rag_lightning.reports.notes import commit_notes, interval_notes
from rag_lightning.reports.papers import Column, check_known, paper_table
from rag_lightning.reports.runs import Run, matching
from rag_lightning.reports.scores import Locate
from rag_lightning.reports.tables import NOT_MEASURED

FINDINGS_FILE = Path(__file__).with_name("paper_findings.yaml")
HEADINGS = ("found by", "first above second", "theirs", "measured", "ours", "difference [95 %]", "shown")
SHORT = {"exact_match": "EM"}
"""Metrics as tables call them, where that is not their name."""
Verdict = Literal["yes", "the reverse", "not told apart", "not measured"]


@dataclass(frozen=True)
class Finding:
    """A difference that a paper reports, and the runs that stand for it.

    Attributes:
        source: The paper, and where in it.
        first: Name and pattern of the runs that the paper found above.
        second: Of those below.
        setting: What the two have in common, for people; empty where their names say all.
        metric: A key of ``metrics.json``.
        published: The paper's two figures, percent; None where it draws a curve only, or has none.
    """

    source: str
    first: tuple[str, str]
    second: tuple[str, str]
    setting: str
    metric: str
    published: tuple[float | None, float | None] | None

    @property
    def name(self) -> str:
        """The finding in words."""
        return f"{self.first[0]} > {self.second[0]}" + (f" ({self.setting})" if self.setting else "")


@dataclass(frozen=True)
class Outcome:
    """A finding beside our runs.

    Attributes:
        finding: What the paper found.
        cells: Our two groups; empty ones where there is no run.
        pair: Their difference; None where one of them was not measured.
    """

    finding: Finding
    cells: tuple[Cell, Cell]
    pair: Pair | None

    @property
    def verdict(self) -> Verdict:
        """Whether the runs show it."""
        if self.pair is None or self.pair.interval is None:
            return "not measured"
        lower, upper = self.pair.interval
        return "yes" if lower > 0 else "the reverse" if upper < 0 else "not told apart"


def findings(name: str) -> list[Finding]:
    """Returns a list of findings by its name.

    Raises:
        ConfigError: No such list; names those that there are.

    >>> findings("reproduce")[0].name
    'frozen > BM25 (RAG-Token, films)'
    """
    check_known("findings", [name], _lists())
    return [_finding(told) for told in _lists()[name]]


def outcomes(
    told: Sequence[Finding], runs: Sequence[Run], *, num_resamples: int = 2000, locate: Locate = resolve
) -> list[Outcome]:
    """Returns each finding beside the runs that stand for it; what is missing is shown as missing.

    Args:
        told: The findings.
        runs: All that were found.
        num_resamples: Of the bootstrap.
        locate: See :data:`~rag_lightning.reports.scores.Locate`.
    """
    results = []
    for finding in told:
        column = Column(finding.metric, (), (finding.metric,))
        first, second = (Cell(name, column, _matching(runs, p)) for name, p in (finding.first, finding.second))
        pair = (
            pair_of(first, second, num_resamples=num_resamples, locate=locate)
            if first.values and second.values
            else None
        )
        results.append(Outcome(finding, (first, second), pair))
    return results


def finding_rows(results: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Returns the cells of the table: figures in percent, mean ± sd, the number of runs where some are missing."""
    rows: list[tuple[str, ...]] = []
    for one in results:
        published = one.finding.published
        ours = [_ours(cell) for cell in one.cells]
        rows.append(
            (
                one.finding.source,
                one.finding.name,
                NOT_MEASURED if published is None else " / ".join(map(published_text, published)),
                SHORT.get(one.finding.metric, one.finding.metric),
                " / ".join(ours),
                NOT_MEASURED if one.pair is None else difference_text(one.pair.difference, one.pair.interval),
                one.verdict,
            )
        )
    return rows


def finding_notes(results: Sequence[Outcome]) -> list[str]:
    """Returns what to write under the table: what is missing, commits that differ, how intervals were drawn."""
    cells = [cell for one in results for cell in one.cells]
    runs = list({run.name: run for cell in cells for run in cell.runs}.values())
    measured = {run.name for cell in cells for run in cell.measured}
    notes = commit_notes(runs)
    if unfinished := [run.name for run in runs if run.name not in measured]:
        notes.append(f"Not measured, and in no mean: {', '.join(unfinished)}.")
    pairs = [one.pair for one in results if one.pair is not None]
    counts = [min(len(pair.first.values), len(pair.second.values)) for pair in pairs]
    return [*notes, *interval_notes([pair.drawn for pair in pairs], counts)]


def findings_json(results: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Returns the outcomes as plain values, figures in percent."""
    return [
        {
            **asdict(one.finding),
            "values": [list(cell.values) for cell in one.cells],
            "difference": one.pair.difference if one.pair is not None else None,
            "interval": one.pair.interval if one.pair is not None else None,
            "drawn": one.pair.drawn if one.pair is not None else "",
            "shown": one.verdict,
            "runs": [[run.name for run in cell.runs] for cell in one.cells],
            "commits": sorted({run.commit for cell in one.cells for run in cell.runs if run.commit is not None}),
        }
        for one in results
    ]


def _ours(cell: Cell) -> str:
    if not cell.values:
        return NOT_MEASURED
    missing = f" ({len(cell.values)} of {len(cell.runs)})" if len(cell.values) < len(cell.runs) else ""
    return spread_text(Spread.of(cell.values)) + missing


def _matching(runs: Sequence[Run], pattern: str) -> tuple[Run, ...]:
    try:
        return tuple(matching(runs, pattern))
    except MissingFileError:
        return ()


@lru_cache(maxsize=1)
def _lists() -> Mapping[str, Any]:
    lists: dict[str, Any] = yaml.safe_load(FINDINGS_FILE.read_text(encoding="utf-8"))
    return lists


def _finding(told: Mapping[str, Any]) -> Finding:
    published = None
    if "paper" in told:
        table = paper_table(told["paper"]["table"])
        first, second = (table.figure(row, told["paper"]["column"]) for row in told["paper"]["rows"])
        published = first, second
    groups = [(str(name), str(pattern)) for name, pattern in told["groups"].items()]
    return Finding(told["source"], groups[0], groups[1], told.get("setting", ""), told["metric"], published)
