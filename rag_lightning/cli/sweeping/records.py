"""What a sweep keeps of each job in the job's folder, ``sweep_job.json``, and what a relaunch makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rag_lightning.errors import DataError
from rag_lightning.reports.runs import JOB_FILE
from rag_lightning.utils.io import read_json, write_json

RECORD_FILE = JOB_FILE
Status = Literal["planned", "running", "finished", "pruned", "failed"]
NOT_COMPARED = ("paths", "resume", "tracking")


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job of a sweep.

    Attributes:
        number: Its place in the sweep.
        overrides: Its settings, as on the command line.
        config: Its whole configuration as composed; interpolations stay as written, so that nothing of the environment
            is kept and a moved folder is the same.
        status: How far it came.
        value: What it returned: the sweep metric.
        error: The message of a failed one.
        seconds: How long it took.
        num_threads: How many threads torch had in its process.
    """

    number: int
    overrides: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    status: Status = "planned"
    value: float | None = None
    error: str | None = None
    seconds: float | None = None
    num_threads: int | None = None

    def write(self, folder: Path) -> None:
        """Writes the record into the job's folder, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD_FILE, asdict(self))

    def become(self, folder: Path, status: Status, **changes: Any) -> "JobRecord":
        """Returns the record with another status, written."""
        changed = replace(self, status=status, **changes)
        changed.write(folder)
        return changed


def read_record(folder: Path) -> JobRecord | None:
    """Returns the record of a job's folder; None where there is none.

    Raises:
        DataError: It is torn, or none of ours.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    record = cast(Any, read_json(path, "sweep record"))
    names = {one.name for one in fields(JobRecord)}
    if not isinstance(record, dict) or set(record) != names or record["status"] not in get_args(Status):
        raise DataError(
            f"{path}: expected the record of a sweep's job ({', '.join(sorted(names))}), came "
            f"{sorted(record) if isinstance(record, dict) else record!r}. Remove the folder to run the job again."
        )
    return JobRecord(**{**record, "overrides": tuple(record["overrides"])})


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the settings in which two configurations differ, as ``name: before -> now``.

    Where a run lies, what it resumes and what it tells its trackers is no difference.

    >>> differences({"seed": 0, "optim": {"lr": 0.1}}, {"seed": 0, "optim": {"lr": 0.2}})
    ['optim.lr: 0.1 -> 0.2']
    """
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        if prefix == "" and key in NOT_COMPARED:
            continue
        old, new = before.get(key, "(none)"), now.get(key, "(none)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def listed(items: Sequence[str], most: int = 5) -> str:
    """Returns the first items, joined, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
