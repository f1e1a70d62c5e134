"""Passages: the corpus that is searched, read from any of four formats into checked records.

- JSON lines, ``.jsonl`` or ``.jsonl.gz``: ``{"id": "7", "title": "Kismet", "text": "Kismet is a film of 1955."}``
- TSV, ``.tsv`` or ``.tsv.gz``, in the form of DPR's ``psgs_w100.tsv`` (Karpukhin et al. 2020): a header line
  ``id, text, title``, fields quoted with doubled double quotes
- Parquet, ``.parquet``, with those columns
- a directory written by ``datasets.Dataset.save_to_disk``, with those columns

The position of a passage in the corpus is its *row*: what an index and ``Hits`` speak of. The records are held in
memory, about 1 GB for a million passages of 100 words.
"""

import csv
import gzip
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias, overload

from rag_lightning.errors import DataError, MissingExtraError, MissingFileError
from rag_lightning.types import Passage
from rag_lightning.utils.hashing import hash_texts
from rag_lightning.utils.io import existing_file, open_text, read_json_lines, write_json_lines

FIELDS = ("id", "title", "text")
BUNDLED = "bundled:"
Record: TypeAlias = tuple[int, Mapping[str, Any]]  # (line or row number from 1, fields)


class PassageCorpus(Sequence[Passage]):
    """An ordered, checked collection of passages with unique ids.

    Make one with :meth:`read` or :meth:`from_passages`.

    Attributes:
        source: Where the passages come from, for messages.

    >>> corpus = PassageCorpus.from_passages([Passage(id="7", title="Kismet", text="A film.")])
    >>> len(corpus), corpus[0].title, corpus.row_of("7")
    (1, 'Kismet', 0)
    """

    def __init__(self, records: Iterable[Record], *, source: str, unit: str = "passage") -> None:
        self.source = source
        self._passages: list[Passage] = []
        self._rows: dict[str, int] = {}
        numbers = array("q")
        for number, record in records:
            passage = _checked_passage(record, f"{source}, {unit} {number}")
            row = self._rows.setdefault(passage.id, len(self._passages))
            if row < len(self._passages):
                raise DataError(
                    f"{source}: expected each passage id once, came id {passage.id!r} on {unit} {numbers[row]} and "
                    f"again on {unit} {number}. Remove or rename one."
                )
            self._passages.append(passage)
            numbers.append(number)
        if not self._passages:
            raise DataError(f"{source}: expected at least one passage, came none. Check the file.")

    @classmethod
    def from_passages(cls, passages: Iterable[Passage], *, source: str = "memory") -> "PassageCorpus":
        """Returns a corpus of records that are already in memory.

        Raises:
            DataError: No passage, a repeated id, or a field that is empty or no string.
        """
        records = ({"id": p.id, "title": p.title, "text": p.text} for p in passages)
        return cls(enumerate(records, start=1), source=source)

    @classmethod
    def read(cls, path: str | Path) -> "PassageCorpus":
        """Returns the corpus in a file or directory; see the module's description for the formats.

        Args:
            path: As :func:`resolve` takes it.

        Raises:
            MissingFileError: No such file.
            DataError: An unknown format, or a bad line: names file, line, field, what was expected and what came.
            MissingExtraError: A format whose package is not installed.
        """
        file = resolve(path)
        existing_file(file, "passages")
        name = file.name.removesuffix(".gz")
        if file.is_dir():
            return cls(_dataset_records(file), source=str(file), unit="row")
        if name.endswith(".jsonl"):
            return cls(read_json_lines(file), source=str(file), unit="line")
        if name.endswith(".tsv"):
            return cls(_tsv_records(file), source=str(file), unit="line")
        if file.suffix == ".parquet":
            return cls(_parquet_records(file), source=str(file), unit="row")
        raise DataError(
            f"passages: expected a file ending in .jsonl, .jsonl.gz, .tsv, .tsv.gz or .parquet, or a directory written "
            f"by datasets' save_to_disk, came {file}. Rename or convert it."
        )

    def __len__(self) -> int:
        return len(self._passages)

    @overload
    def __getitem__(self, row: SupportsIndex) -> Passage: ...

    @overload
    def __getitem__(self, row: slice) -> list[Passage]: ...

    def __getitem__(self, row: SupportsIndex | slice) -> Passage | list[Passage]:
        return self._passages[row]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    def __contains__(self, passage: object) -> bool:
        """Whether this very record is in the corpus; for an id, see :meth:`has_id`."""
        return isinstance(passage, Passage) and self.has_id(passage.id) and self[self.row_of(passage.id)] == passage

    def has_id(self, passage_id: str) -> bool:
        """Whether a passage of that id is in the corpus."""
        return passage_id in self._rows

    def row_of(self, passage_id: str) -> int:
        """Returns the row of a passage.

        Raises:
            DataError: No passage has this id.
        """
        try:
            return self._rows[passage_id]
        except KeyError:
            raise DataError(
                f"passage id {passage_id!r} is not among the {len(self)} passages of {self.source}. Check that "
                "questions and passages belong together."
            ) from None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of ids, titles and texts in order: the same content in another format has the same hash."""
        return hash_texts(text for passage in self for text in (passage.id, passage.title, passage.text))


def write_passages(path: str | Path, passages: Iterable[Passage]) -> None:
    """Writes passages as JSON lines (gzip when the name ends in ``.gz``), atomically."""
    records = ({"id": passage.id, "title": passage.title, "text": passage.text} for passage in passages)
    write_json_lines(Path(path), records)


def resolve(path: str | Path) -> Path:
    """Returns the path meant: ``bundled:films/passages.jsonl.gz`` names a file inside the package, all else is a path.

    Raises:
        MissingFileError: No such bundled file.
    """
    if not str(path).startswith(BUNDLED):
        return Path(path).expanduser()
    name = str(path).removeprefix(BUNDLED)
    room = Path(__file__).parent
    file = room / name
    if ".." in Path(name).parts or not file.exists():
        known = sorted(f"{BUNDLED}{found.relative_to(room).as_posix()}" for found in room.glob("*/*.jsonl.gz"))
        raise MissingFileError(f"no bundled file {str(path)!r}; there are: {', '.join(known) or 'none'}.")
    return file


def string_field(record: Mapping[str, Any], field: str, place: str, *, blank: bool = False) -> str:
    """Returns a field that must be a string, and not blank unless ``blank`` allows it.

    Raises:
        DataError: Names place, field, what was expected and what came.
    """
    if field not in record:
        raise DataError(f"{place}: field {field!r} is missing; expected a string. Found fields: {sorted(record)}.")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {field!r}: expected a string, came {type(value).__name__} {str(value)[:80]!r}."
        )
    if not blank and not value.strip():
        raise DataError(f"{place}: field {field!r}: expected a text, came an empty one. Fill it or remove the line.")
    return value


def _checked_passage(record: Mapping[str, Any], place: str) -> Passage:
    return Passage(
        id=string_field(record, "id", place),
        title=string_field(record, "title", place, blank=True),
        text=string_field(record, "text", place),
    )


def _tsv_records(path: Path) -> Iterator[Record]:
    number = 1
    try:
        with open_text(path) as stream:
            # strict: a stray quote is an error here, where csv would silently swallow lines
            reader = csv.reader(stream, delimiter="\t", strict=True)
            header = next(reader, [])
            if sorted(header) != sorted(FIELDS):
                raise DataError(
                    f"{path}, line 1: expected the header 'id<TAB>text<TAB>title' (any order), came {header!r}. Add it."
                )
            number = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    raise DataError(
                        f"{path}, line {number}: expected the {len(header)} tab-separated fields {header}, "
                        f"came {len(values)}. Quote a field that holds a tab."
                    )
                if values:
                    yield number, dict(zip(header, values, strict=True))
                number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {number}: expected fields quoted as DPR writes them (a field with a double quote stands in "
            f"double quotes, the quote doubled), came a line that is not: {error}. Mend it or write .jsonl."
        ) from error
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}, near line {number}: the file is not readable as UTF-8 text: {error}") from error


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", f"reading {path.name}") from error
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            batches = file.iter_batches(columns=list(FIELDS))
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet: {error}. Write it again.") from error


def _dataset_records(path: Path) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "parquet", f"reading the dataset directory {path}") from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a directory written by datasets' save_to_disk: {error}") from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(
            f"{path}: expected one dataset, came a dictionary of the splits {sorted(dataset)}. Name one, such as "
            f"{path / sorted(dataset)[0]}."
        )
    _check_columns(dataset.column_names, path)
    yield from enumerate(dataset.select_columns(list(FIELDS)), start=1)


def _check_columns(columns: Sequence[str], path: Path) -> None:
    missing = [field for field in FIELDS if field not in columns]
    if missing:
        raise DataError(
            f"{path}: expected the columns {list(FIELDS)}, came {list(columns)}: {missing} missing. Rename them."
        )
