"""What a reader of a table must know before believing it, a line each."""

from collections.abc import Callable, Sequence

from rag_lightning.reports.comparison import Cell, Line, Pair
from rag_lightning.reports.papers import PaperTable
from rag_lightning.reports.runs import Run

FEW_SEEDS = 5
PAPER_SCALE = "paper"
"""The choice of ``conf/scale`` that leaves a recipe at its own size."""
DATA = ("test", "validation", "train", "passages")
_SHOWN = 4


def notes_of(
    lines: Sequence[Line], pairs: Sequence[Pair], runs: Sequence[Run], table: PaperTable | None = None
) -> list[str]:
    """Returns what to write under a table.

    Runs of several commits or of different data, runs that are missing, left out or of another scale than the paper's,
    and how intervals were drawn.

    Args:
        lines: The table's.
        pairs: Differences told below it.
        runs: All that were found, those of no line included.
        table: The paper's; None where ours stand alone.
    """
    cells = [line.cell for line in lines]
    used = list({run.name: run for cell in cells for run in cell.runs}.values())
    notes = [
        *commit_notes(used),
        *_data(cells),
        *_recipes(cells, table),
        *_splits(cells),
        *_scales(used),
        *_missing(lines),
    ]
    others = [run.name for run in runs if run.name not in {one.name for one in used}]
    if others:
        notes.append(f"Not in this table: {_some(others)}.")
    return [*notes, *_intervals(lines, pairs)]


def commit_notes(runs: Sequence[Run]) -> list[str]:
    """Returns a line where runs are of several commits, and one where files differed from theirs."""
    notes = _differing("commits", runs, lambda run: (_short(run.commit),) * 2)
    if any("+" in (run.commit or "") for run in runs):
        notes.append("A + behind a commit: files differed from it.")
    return notes


def _data(cells: Sequence[Cell]) -> list[str]:
    """Returns a line for each column whose runs read different files, told by their hash."""
    notes = []
    for column in dict.fromkeys(cell.column.name for cell in cells):
        runs = [run for cell in cells if cell.column.name == column for run in cell.runs]
        for name in DATA:
            notes += _differing(f"{name} data in {column}", runs, lambda run, name=name: _fingerprint(run, name))
    return list(dict.fromkeys(notes))


def data_notes(runs: Sequence[Run]) -> list[str]:
    """Returns a line for each file of which runs read different ones, told by its hash; of those that read one."""
    names = [*DATA, *(name for run in runs for name in run.record.get("data") or {})]
    notes = []
    for name in dict.fromkeys(names):
        having = [run for run in runs if run.data_file(name) is not None]
        notes += _differing(f"{name} data", having, lambda run, name=name: _fingerprint(run, name))
    return notes


def list_notes(runs: Sequence[Run]) -> list[str]:
    """Returns what to write under a plain list of runs: several commits, different data, runs without figures."""
    measured = [run for run in runs if run.metrics is not None]
    others = [run.name for run in runs if run.metrics is None]
    lacking = [f"Without figures (not finished, failed or pruned), and in no mean: {_some(others)}."] if others else []
    return [*commit_notes(measured), *data_notes(measured), *lacking]


def _recipes(cells: Sequence[Cell], table: PaperTable | None) -> list[str]:
    """Returns a line that names the rows whose runs are of other recipes than the paper's, and so of other data."""
    if table is None:
        return []
    others = {
        f"{cell.row}: {run.experiment or run.name}"
        for cell in cells
        for run in cell.runs
        if run.experiment != table.experiments.get(cell.row)
    }
    return [f"Not the paper's recipe, data or size: {_some(sorted(others))}."] if others else []


def _splits(cells: Sequence[Cell]) -> list[str]:
    """Returns a line that names the runs not tested on the development set, where the paper's figures are of it."""
    others = [
        run.name
        for cell in cells
        if cell.column.split == "validation"
        for run in cell.runs
        if _fingerprint(run, "test") != _fingerprint(run, "validation")
    ]
    told = _some(list(dict.fromkeys(others)))
    return [f"The paper's figures are of the development set; tested on others: {told}."] if others else []


def _scales(runs: Sequence[Run]) -> list[str]:
    small = [run for run in runs if run.scale not in (None, PAPER_SCALE)]
    if not small:
        return []
    named = ", ".join(sorted({f"scale={run.scale}" for run in small}))
    return [f"Smaller than the paper's: {named} ({_some([run.name for run in small])})."]


def _missing(lines: Sequence[Line]) -> list[str]:
    notes = []
    unfinished = [run.name for line in lines for run in line.cell.runs if run not in line.cell.measured]
    if unfinished:
        notes.append(f"Not measured, and in no mean: {_some(list(dict.fromkeys(unfinished)))}.")
    empty = [
        f"{line.cell.row} ({line.cell.column.name})" for line in lines if not line.cell.runs and line.num_wanted > 0
    ]
    if empty:
        notes.append(f"Without a run: {_some(empty)}.")
    return notes


def _intervals(lines: Sequence[Line], pairs: Sequence[Pair]) -> list[str]:
    drawn = [line.drawn for line in lines] + [pair.drawn for pair in pairs]
    counts = [len(line.cell.values) for line in lines if line.interval is not None]
    counts += [min(len(pair.first.values), len(pair.second.values)) for pair in pairs if pair.interval is not None]
    return interval_notes(drawn, counts)


def interval_notes(told: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Returns a line on how intervals were drawn; none where there is no interval.

    Args:
        told: For each, what was drawn; empty where there is none.
        counts: For each, of how many runs the smaller group is.
    """
    drawn = [one for one in dict.fromkeys(told) if one]
    if not drawn:
        return []
    few = f"; of fewer than {FEW_SEEDS} seeds they are too narrow" if min(counts) < FEW_SEEDS else ""
    return [f"Intervals: 95 %, percentiles of a bootstrap over {', or over '.join(drawn)}{few}."]


def _differing(what: str, runs: Sequence[Run], tell: Callable[..., tuple[str, str]]) -> list[str]:
    """Returns a line that names which runs are of which, where they are not all of one.

    Args:
        what: Differs.
        runs: To compare.
        tell: Returns of a run by what it is compared, and how that is shown.
    """
    told: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for run in runs:
        key, label = tell(run)
        told.setdefault(key, []).append(run.name)
        shown.setdefault(key, label)
    if len(told) < 2:
        return []
    parts = "; ".join(f"{shown[key]}: {_some(list(dict.fromkeys(names)))}" for key, names in told.items())
    return [f"Different {what}: {parts}."]


def _fingerprint(run: Run, name: str) -> tuple[str, str]:
    """Returns a file's hash, and its name with the start of it; of a run that is older than the record its name."""
    told = (run.record.get("data") or {}).get(name)
    digest = told.get("sha256") if told is not None else None
    if told is None or digest is None:  # such a file can be told from another by its place alone
        place = f"{told['file']} #unknown" if told is not None else str(run.data_file(name) or "none told")
        return place, place
    return digest, f"{told['file']} #{digest[:8]}"


def _short(commit: str | None) -> str:
    """Returns a commit as people write it.

    >>> _short("0123456789abcdef+"), _short(None)
    ('0123456+', 'no commit told')
    """
    if commit is None:
        return "no commit told"
    return ", then ".join(one[:7] + ("+" if one.endswith("+") else "") for one in commit.split(", then "))


def short_commits(runs: Sequence[Run]) -> str:
    """Returns the commits of some runs, each once."""
    return ", ".join(dict.fromkeys(_short(run.commit) for run in runs))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
