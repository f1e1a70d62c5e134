"""Locks on folders: held by one process at a time, and released by the system when that process dies."""

import os
import socket
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from rag_lightning.errors import ConfigError


class SnapshotLock:
    """An exclusive lock on a file, taken at construction; the file names its holder while it is held.

    The lock is the system's (``flock``), so one left by a killed process holds nobody up. A process cannot take it
    twice. The file is removed when the lock is released.

    Args:
        path: The file, in an existing folder.
        refusal: What to say when another holds it, with ``{owner}`` where it is named.

    Raises:
        ConfigError: Another process, or another part of this one, holds it.
        OSError: The file cannot be made.
    """

    def __init__(self, path: Path, *, refusal: str) -> None:
        self.path = path
        self._lock = FileLock(path)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ConfigError(refusal.format(owner=_owner(path))) from error
        try:
            path.write_text(f"pid {os.getpid()} on host {socket.gethostname()}")
        except OSError:
            self._lock.release()
            raise

    def release(self, path: Path | None = None) -> None:
        """Lets the next take it; doing so twice is harmless.

        Args:
            path: Where the file is now, if its folder has been renamed.
        """
        if self._lock.is_locked:
            (path or self.path).unlink(missing_ok=True)  # first: who opened it before finds it gone, and starts anew
            self._lock.release()

    def __enter__(self) -> "SnapshotLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text().strip() or "an unnamed process"
    except OSError:
        return "an unnamed process"
