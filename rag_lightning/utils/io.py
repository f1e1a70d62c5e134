"""Files in safe formats (JSON, JSON lines, npy, safetensors: never pickle), written whole or not at all."""

import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rag_lightning.errors import DataError, MissingFileError


def existing_file(path: str | Path, what: str) -> Path:
    """Returns ``path`` as a Path.

    Raises:
        MissingFileError: No such file; the message names ``what`` it was wanted for.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{what}: no such file: {path} (looked in {path.absolute().parent}). Check the path.")
    return path


def open_text(path: Path) -> TextIOWrapper:
    """Opens a UTF-8 text file for reading, through gzip when its name ends in ``.gz``."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open("r", encoding="utf-8")


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a ``.jsonl`` or ``.jsonl.gz`` file; blank lines are skipped.

    Raises:
        DataError: A line is no JSON object, or the file is no UTF-8 text or no gzip; names file and line.
    """
    number = 0
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: expected one JSON object on the line, "
                        f"came {line.strip()[:80]!r} ({error.msg} at column {error.colno}). Mend or remove the line."
                    ) from error
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {number}: expected a JSON object, came a {type(record).__name__}.")
                yield number, record
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}, after line {number}: the file is not readable as UTF-8 JSON lines: {error}"
        ) from error


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as JSON lines (gzip when the name ends in ``.gz``), atomically."""
    with atomic_path(path) as part, part.open("wb") as raw:
        # mtime=0 keeps the bytes of an unchanged file unchanged
        stream: Any = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
        for record in records:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        if stream is not raw:
            stream.close()


def read_json(path: Path, what: str = "JSON file") -> Any:
    """Returns the content of a JSON file.

    Raises:
        MissingFileError: No such file.
        DataError: Not JSON.
    """
    try:
        return json.loads(existing_file(path, what).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{what}: {path} is not valid JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; renames it over ``path`` on success, removes it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    part.chmod(0o644)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; renames it to ``path`` on success, removes it on failure.

    Args:
        path: The folder to publish.
        replace: Put the new folder in the place of an existing one. Otherwise, where another process published
            ``path`` first, its folder stays and this one is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    part.chmod(0o755)
    try:
        yield part
        if replace and path.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.rename(old / path.name)
            part.rename(path)
            shutil.rmtree(old)
            return
        try:
            part.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
