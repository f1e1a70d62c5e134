"""The lock file beside fetched data: the checksum of each file that came, compared from then on."""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from rag_lightning.errors import DataError
from rag_lightning.utils.io import read_json, write_json

LOCK_NAME = "fetch.lock.json"


@dataclass(frozen=True)
class Locked:
    """What is known of a file that was fetched."""

    sha256: str
    size: int
    url: str


class Lock:
    """The checksums of the files under a folder, in ``fetch.lock.json``; several processes may write it.

    Args:
        folder: Where data is fetched to.

    Raises:
        DataError: The file is there and is not such a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_NAME
        self._read()

    def get(self, name: str) -> Locked | None:
        """Returns what is known of a file, named from the folder."""
        return self._read().get(name)

    def put(self, name: str, locked: Locked) -> None:
        """Writes down what came."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{LOCK_NAME}.lock")):
            entries = {**self._read(), name: locked}
            write_json(self.path, {key: vars(entries[key]) for key in sorted(entries)})

    def _read(self) -> dict[str, Locked]:
        if not self.path.is_file():
            return {}
        content = read_json(self.path, LOCK_NAME)
        try:
            return {name: Locked(**entry) for name, entry in content.items()}
        except (AttributeError, TypeError) as error:
            raise DataError(
                f"{self.path}: expected sha256, size and url of each file, came something else ({error}). Mend it, or "
                "remove it: checksums are then taken anew."
            ) from error
