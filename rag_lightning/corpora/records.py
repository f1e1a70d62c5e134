"""What the readers of labelled data share: lines with unique ids, labels as strings, labels under other names.

A label stands in a line as a string or as a whole number (``1`` and ``"1"`` are one label). Ids may be either too;
where a line has none, its line number is its id.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rag_lightning.corpora.passages import resolve
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.utils.io import existing_file, read_json_lines

logger = logging.getLogger(__name__)
RecordT = TypeVar("RecordT")


class LabelNames:
    """Gives labels the names that a model is trained with, merges classes and drops others.

    Args:
        names: From the label as it stands in the file (whole numbers as strings) to its name. Two labels of one name
            are merged; a label whose name is None is dropped with its lines; a label not named here keeps its own.

    Raises:
        ConfigError: A name that is blank.

    >>> names = LabelNames({"0": "negative", "2": None})
    >>> names.of("0"), names.of("1"), names.of("2")
    ('negative', '1', None)
    """

    def __init__(self, names: Mapping[str, str | None] | None = None) -> None:
        self.names = dict(names or {})
        self._met: set[str] = set()
        self._num_dropped = 0
        for label, name in self.names.items():
            if name is not None and not name.strip():
                raise ConfigError(f"label_names: expected a name for {label!r}, or null to drop it, came {name!r}.")

    def of(self, label: str) -> str | None:
        """Returns the label's name, None where its line is to be dropped, and counts it."""
        self._met.add(label)
        name = self.names.get(label, label)
        self._num_dropped += name is None
        return name

    def report(self, file: Path) -> None:
        """Logs how many lines were dropped, and which of the labels to rename no line had."""
        if self._num_dropped:
            dropped = sorted(label for label in self._met if self.names.get(label, label) is None)
            logger.info("%s: %d lines dropped, labelled %s", file, self._num_dropped, ", ".join(dropped))
        if unmet := sorted(set(self.names) - self._met):
            logger.warning("%s: label_names names %s, which no line has", file, ", ".join(unmet))


def json_lines_file(path: str | Path, what: str) -> Path:
    """Returns the file of JSON lines meant by a path, as :func:`~rag_lightning.corpora.passages.resolve` takes it.

    Raises:
        MissingFileError: No such file; the message names ``what`` it was wanted for.
        DataError: Its name ends neither in ``.jsonl`` nor in ``.jsonl.gz``.
    """
    file = existing_file(resolve(path), what)
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        raise DataError(f"{what}: expected a file ending in .jsonl or .jsonl.gz, came {file}. Rename or convert it.")
    return file


def identified_lines(file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (place for messages, id, fields) of each line; a line without the field ``id`` has its number as id.

    Raises:
        DataError: A line that is no JSON object, an id that is neither string nor whole number, or a repeated one.
    """
    lines: dict[str, int] = {}
    for number, record in read_json_lines(file):
        place = f"{file}, line {number}"
        record_id = _key(record["id"], "id", place) if record.get("id") is not None else str(number)
        first = lines.setdefault(record_id, number)
        if first != number:
            raise DataError(
                f"{file}: expected each id once, came id {record_id!r} on line {first} and again on line {number}. "
                "Remove or rename one (a line without id has its line number as id)."
            )
        yield place, record_id, record


def label_field(record: Mapping[str, Any], field: str, place: str) -> str:
    """Returns a field that holds a label: a string that is not blank, or a whole number, as a string.

    Raises:
        DataError: Names place, field, what was expected and what came.
    """
    return _key(present(record, field, place, "a label"), field, place)


def present(record: Mapping[str, Any], field: str, place: str, expected: str) -> Any:
    """Returns a field of a line.

    Raises:
        DataError: It is missing; the message says what was ``expected``.
    """
    if field not in record:
        raise DataError(f"{place}: field {field!r} is missing; expected {expected}. Found fields: {sorted(record)}.")
    return record[field]


def string_list(record: Mapping[str, Any], field: str, place: str) -> list[str]:
    """Returns a field that must be a list of at least one string; strings of white space are let through.

    Raises:
        DataError: Names place, field, what was expected and what came.
    """
    values = present(record, field, place, "a list of strings")
    if not isinstance(values, list):
        raise DataError(
            f"{place}: field {field!r}: expected a list of strings, came {type(values).__name__} {str(values)[:80]!r}."
        )
    if not values:
        raise DataError(f"{place}: field {field!r}: expected at least one string, came []. Remove the line.")
    for position, value in enumerate(values):
        if not isinstance(value, str) or not value:
            raise DataError(
                f"{place}: field {field!r}: expected a list of non-empty strings, came {value!r} at position "
                f"{position}."
            )
    return values


def at_least_one(records: list[RecordT], file: Path, what: str) -> list[RecordT]:
    """Returns the records.

    Raises:
        DataError: There are none.
    """
    if not records:
        raise DataError(f"{file}: expected at least one {what}, came none. Check the file and label_names.")
    return records


def _key(value: Any, field: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(
            f"{place}: field {field!r}: expected a string or a whole number, came {type(value).__name__} "
            f"{str(value)[:80]!r}. Write it as a string."
        )
    if not str(value).strip():
        raise DataError(f"{place}: field {field!r}: expected a string or a whole number, came {value!r}. Fill it in.")
    return str(value)
