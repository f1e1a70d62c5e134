"""What a run logged over time, read from the files of ``logger=csv``."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from rag_lightning.errors import DataError

Row: TypeAlias = Mapping[str, float]
STEP = "step"


def read_log(folder: Path) -> list[Row]:
    """Returns what a run logged, in order: each row its figures by name, ``step`` among them.

    A resumed run logs into the next ``version_N``; what the earlier one had logged at or after its first step was done
    again and is left out. A run without such files has no rows.

    Raises:
        DataError: A file that is not CSV with a step in each row; names file and line.
    """
    rows: list[Row] = []
    versions = [path for path in folder.glob("logs/version_*/metrics.csv") if path.parent.name[8:].isdigit()]
    for path in sorted(versions, key=lambda path: int(path.parent.name[8:])):
        later = _read(path)
        if later:
            first = min(row[STEP] for row in later)
            rows = [row for row in rows if row[STEP] < first] + later
    return rows


def curve(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Returns a metric by the number of optimiser steps done before it was measured; the last where several were.

    >>> curve([{"step": 7, "val/f1": 0.5}, {"step": 15, "val/f1": 0.75}, {"step": 15, "train/loss": 1.0}], "val/f1")
    {8: 0.5, 16: 0.75}
    """
    return {int(row[STEP]) + 1: row[metric] for row in rows if metric in row}


def _read(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8", newline="") as stream:
        for number, record in enumerate(csv.DictReader(stream), start=2):
            try:
                row = {name: float(value) for name, value in record.items() if value not in ("", None)}
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path}, line {number}: expected numbers, as logger=csv writes them: {error}"
                ) from error
            if not math.isfinite(row.get(STEP, math.nan)):
                raise DataError(f"{path}, line {number}: expected a column 'step', found {', '.join(record)[:80]}.")
            rows.append(row)
    return rows
