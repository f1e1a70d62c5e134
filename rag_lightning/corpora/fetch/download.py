"""One file by its URL: resumed where a part of it is there already, checked, and renamed when it is whole.

Beside a part lies what the server said of it (its ETag or date). A download goes on from the part only while the server
says that the file is still the same (``If-Range``, RFC 9110 §13.1.5), or where a checksum will tell; else it begins
again. A connection that breaks is taken up again several times.
"""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from rag_lightning.corpora.fetch.sources import RemoteFile
from rag_lightning.errors import DataError, FetchError
from rag_lightning.utils.io import read_json, write_json

CHUNK_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
"""Of the disk, left free."""
Report = Callable[[int, int | None], None]
"""Is told the bytes that are there and, where known, the bytes in all."""


@dataclass(frozen=True)
class Settings:
    """How patient a download is.

    Attributes:
        attempts: Times that a broken connection is taken up, without a byte between them.
        timeout_s: Seconds without a byte until a connection counts as broken.
        pause_s: Seconds before it is taken up; doubled each time.
    """

    attempts: int = 5
    timeout_s: float = 60.0
    pause_s: float = 1.0


PATIENT = Settings()


def download(
    file: RemoteFile, url: str, target: Path, *, settings: Settings = PATIENT, report: Report = lambda *_: None
) -> str:
    """Fetches a file to ``target`` and returns its SHA-256; what is not whole stays beside it, for the next call.

    Args:
        file: Its size and checksums, as far as known.
        url: Where from, with mirrors applied: a URL, or a path.
        target: Where to; must not exist.
        settings: Patience.
        report: For progress bars.

    Raises:
        FetchError: It did not come, is too large for the disk, or is not what was expected, in which case the part is
            deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    idle, pause_s = 0, settings.pause_s
    while True:
        before = _size(part)
        try:
            _transfer(file, url, part, settings.timeout_s, report)
            break
        except urllib.error.HTTPError as error:
            error.close()  # it is a response, with a socket
            if error.code < 500 and error.code not in (408, 429):
                said = f"HTTP {error.code} {error.reason}"
                raise FetchError(f"{url}: expected the file, came {said}. {_HINT}") from error
            reason: Exception = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = error
        idle = 0 if _size(part) > before else idle + 1
        if idle >= settings.attempts:
            kept = f"{_size(part)} bytes of it are kept: the same command goes on from there" if _size(part) else _HINT
            raise FetchError(f"{url}: the connection broke {settings.attempts} times ({reason}). {kept}") from reason
        time.sleep(pause_s)
        pause_s = settings.pause_s if idle == 0 else min(60.0, 2 * pause_s)
    sha256 = check(file, part, url)
    part.replace(target)
    _notes(part).unlink(missing_ok=True)
    return sha256


_HINT = "Check the address and the connection, or name a mirror (RAG_LIGHTNING_MIRROR)."


def part_of(target: Path) -> Path:
    """Returns where the part of a file lies until it is whole."""
    return target.with_name(f".{target.name}.part")


def check(file: RemoteFile, path: Path, url: str) -> str:
    """Returns a file's SHA-256; one that is not what was expected is deleted.

    Raises:
        FetchError: Another size or checksum.
    """
    sha256, md5 = checksums(path)
    for kind, expected, came in (
        ("size", file.size, _size(path)),
        ("sha256", file.sha256, sha256),
        ("md5", file.md5, md5),
    ):
        if expected is not None and str(expected).lower() != str(came):
            discard(path)
            raise FetchError(
                f"{url}: expected {kind} {expected}, came {came}. What came is deleted. Fetch it again; if it comes "
                "the same, the file has changed at its source."
            )
    return sha256


def discard(part: Path) -> None:
    """Deletes a part and what is noted of it."""
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def checksums(path: Path) -> tuple[str, str]:
    """Returns a file's SHA-256 and MD5."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            md5.update(chunk)
    return sha256.hexdigest(), md5.hexdigest()


def _transfer(file: RemoteFile, url: str, part: Path, timeout_s: float, report: Report) -> None:
    """Fetches what is missing of a part.

    Raises:
        ConnectionError: It ended too early.
    """
    place = local_path(url)
    if place is not None:
        _copy(place, part, report)
        return
    with _opened(file, url, part, timeout_s) as (response, start):
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else file.size
        check_space(part, (total or 0) - start, url)
        write_json(_notes(part), {"url": url, "validator": _validator(response)})
        with part.open("ab" if start else "wb") as stream:
            size = start
            report(size, total)
            while chunk := response.read1(CHUNK_BYTES):
                stream.write(chunk)
                size += len(chunk)
                report(size, total)
    if total is not None and size < total:
        raise ConnectionError(f"{size} of {total} bytes came")


@contextmanager
def _opened(file: RemoteFile, url: str, part: Path, timeout_s: float) -> Iterator[tuple[Any, int]]:
    """Yields an answer and the byte that it begins with: the one after the part, or the first."""
    headers = {"User-Agent": "rag-lightning", "Accept-Encoding": "identity"}
    start, validator = _size(part), _noted(part, url)
    if start and (validator is not None or file.sha256 is not None or file.md5 is not None):
        headers["Range"] = f"bytes={start}-"
        if validator is not None:
            headers["If-Range"] = validator
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code != 416 or "Range" not in headers:
            raise
        error.close()
        discard(part)  # longer than the file is: it has changed
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers={key: headers[key] for key in ("User-Agent", "Accept-Encoding")}),
            timeout=timeout_s,
        )
    with response:
        continues = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if continues and validator is not None and _validator(response) not in (None, validator):
            continues = False  # a server that knows ranges but no If-Range
        if response.status == 206 and not continues:
            discard(part)
            raise ConnectionError(f"came bytes {response.headers.get('Content-Range')} of what may be another file")
        yield response, start if continues else 0


def _validator(response: Any) -> str | None:
    """Returns what tells one state of a file from another; a weak ETag does not, to the byte."""
    etag = response.headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):
        return str(etag)
    date = response.headers.get("Last-Modified")
    return str(date) if date is not None else None


def _noted(part: Path, url: str) -> str | None:
    try:
        notes = read_json(_notes(part))
    except DataError:
        return None
    return notes.get("validator") if isinstance(notes, dict) and notes.get("url") == url else None


def _notes(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def local_path(url: str) -> Path | None:
    """Returns the file that a ``file://`` URL or a plain path means; None for what comes over a network."""
    scheme = urlsplit(url).scheme
    if scheme == "file":
        return Path(url2pathname(urlsplit(url).path))
    return None if scheme in ("http", "https") else Path(url).expanduser()


def _copy(place: Path, part: Path, report: Report) -> None:
    if not place.is_file():
        raise FetchError(f"{place}: expected the file there, found none. {_HINT}")
    total = place.stat().st_size
    check_space(part, total, str(place))
    with place.open("rb") as source, part.open("wb") as stream:
        size = 0
        while chunk := source.read(CHUNK_BYTES):
            stream.write(chunk)
            size += len(chunk)
            report(size, total)


def check_space(path: Path, num_bytes: int, url: str) -> None:
    """Refuses what the disk has no room for.

    Raises:
        FetchError: Names what is needed and what is free.
    """
    free = shutil.disk_usage(path.parent).free
    if num_bytes + SPARE_BYTES > free:
        raise FetchError(
            f"{url}: expected {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB free in {path.parent}, came {free / 1e9:.2f} GB"
            ". Make room, or choose another folder (output=DIR)."
        )
