"""Fetches what names stand for, each into its folder, and keeps the checksums of what came."""

import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from filelock import FileLock

from rag_lightning.corpora.fetch.download import (
    PATIENT,
    Report,
    Settings,
    check_space,
    checksums,
    discard,
    download,
    part_of,
)
from rag_lightning.corpora.fetch.hub import fetch_repository
from rag_lightning.corpora.fetch.lock import Lock, Locked
from rag_lightning.corpora.fetch.sources import RemoteFile, Source, mirrored
from rag_lightning.errors import ConfigError, FetchError
from rag_lightning.utils.io import atomic_path

logger = logging.getLogger(__name__)
Outcome = Literal["fetched", "already there"]
Watch = Callable[[str], Report]
"""Returns what is told of a file's bytes as they come."""


def chosen(names: Sequence[str], sources: Mapping[str, Source]) -> list[Source]:
    """Returns the sources of some names, or of ``all``.

    Raises:
        ConfigError: No name, or an unknown one.
    """
    if not names:
        raise ConfigError(f"expected names of what to fetch, or all, got none. There are: {', '.join(sources)}.")
    if list(names) == ["all"]:
        return list(sources.values())
    if unknown := [name for name in names if name not in sources]:
        raise ConfigError(f"expected names among {', '.join(sources)}, or all, got {', '.join(unknown)}.")
    return [sources[name] for name in dict.fromkeys(names)]


def fetch(
    source: Source,
    output: Path,
    *,
    rules: Sequence[tuple[str, str]] = (),
    settings: Settings = PATIENT,
    watch: Watch = lambda _: lambda *_: None,
) -> dict[str, Outcome]:
    """Fetches what a source names and is not there yet; returns what became of each file.

    Args:
        source: The source.
        output: Files lie in ``output/NAME``; a repository of the hub lies in the hub's cache.
        rules: Mirrors, from :func:`~rag_lightning.corpora.fetch.sources.mirror_rules`.
        settings: Patience.
        watch: For progress bars.

    Raises:
        FetchError: A file did not come, or is not what was expected.
    """
    if source.repo is not None:
        folder = fetch_repository(source)
        logger.info("%s: %s", source.name, folder)
        return {str(folder): "fetched"}
    lock = Lock(output)
    outcomes: dict[str, Outcome] = {}
    for file in source.files:
        name = f"{source.name}/{file.file_name}"
        (output / source.name).mkdir(parents=True, exist_ok=True)
        with FileLock(output / source.name / f".{Path(file.file_name).name}.lock"):
            outcomes |= _fetch_file(file, name, output, lock, rules=rules, settings=settings, report=watch(name))
    return outcomes


def _fetch_file(
    file: RemoteFile,
    name: str,
    output: Path,
    lock: Lock,
    *,
    rules: Sequence[tuple[str, str]],
    settings: Settings,
    report: Report,
) -> dict[str, Outcome]:
    target = output / name
    wanted = {f"{Path(name).parent}/{member}": member for member in file.members} or {name: ""}
    if all((output / one).is_file() for one in wanted):
        for one in wanted:
            _check_kept(file, output / one, one, lock)
        return dict.fromkeys(wanted, "already there")
    url = mirrored(file.url, rules)
    known = lock.get(name)
    expected = replace(file, sha256=known.sha256) if known is not None and file.sha256 is None else file
    if not target.is_file():
        try:
            sha256 = download(expected, url, target, settings=settings, report=report)
        except FetchError as error:
            if expected is file or "sha256" not in str(error):
                raise
            raise FetchError(
                f"{error} The checksum is that of {lock.path.name}, from an earlier fetch: if the file changed at "
                f"its source on purpose, remove the line of {name} there."
            ) from error
        lock.put(name, Locked(sha256, target.stat().st_size, file.url))
        if file.sha256 is None and known is None:
            logger.info("%s: no checksum is published; sha256 %s is kept in %s", name, sha256, lock.path)
    if file.members:
        _take_out(target, file, name, lock)
    return dict.fromkeys(wanted, "fetched")


def _check_kept(file: RemoteFile, path: Path, name: str, lock: Lock) -> None:
    """Compares a file that is there with what it should be; it stays, whatever it is."""
    known = lock.get(name)
    expected = file.sha256 if file.sha256 is not None and not file.members else known.sha256 if known else None
    sha256, md5 = checksums(path)
    if expected is None and (file.md5 is None or file.members):
        lock.put(name, Locked(sha256, path.stat().st_size, file.url))
    elif (expected is not None and sha256 != expected) or (expected is None and md5 != file.md5):
        raise FetchError(
            f"{path}: expected {'sha256 ' + expected if expected else f'md5 {file.md5}'}, came "
            f"{sha256 if expected else md5}. Remove the file to fetch it again, or put its own folder elsewhere."
        )


def _take_out(archive: Path, file: RemoteFile, name: str, lock: Lock) -> None:
    """Takes the wanted files out of a zip archive, then deletes it."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in file.members:
                size = opened.getinfo(member).file_size
                check_space(part_of(archive), size, f"{file.url}, {member}")
                with atomic_path(archive.parent / member) as part, opened.open(member) as source, part.open("wb") as to:
                    while chunk := source.read(1 << 20):
                        to.write(chunk)
                place = archive.parent / member
                lock.put(f"{Path(name).parent}/{member}", Locked(checksums(place)[0], size, file.url))
    except (zipfile.BadZipFile, KeyError) as error:
        discard(part_of(archive))
        archive.unlink(missing_ok=True)
        raise FetchError(
            f"{file.url}: expected a zip archive with {', '.join(file.members)}, came one that is damaged or lacks one "
            f"({error}). What came is deleted."
        ) from error
    archive.unlink()
