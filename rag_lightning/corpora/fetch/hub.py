"""A repository of the hub, in the hub's own cache, where transformers looks for it; the only importer of its client.

``HF_ENDPOINT`` names a mirror, ``HF_HUB_CACHE`` (or ``HF_HOME``) the cache: the hub's own variables. The client resumes
and renames by itself; added here is that large files are checked against the checksum that names them.
"""

import os
import re
from pathlib import Path

from rag_lightning.corpora.fetch.download import checksums
from rag_lightning.corpora.fetch.sources import Source
from rag_lightning.errors import FetchError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE, _PICKLED = "*.safetensors", "*.bin"


def fetch_repository(source: Source) -> Path:
    """Fetches a repository, or what of it is missing; returns the folder of its files.

    Weights that lie there twice come once: ``*.bin`` only where no ``*.safetensors`` lies beside the configuration.

    Raises:
        FetchError: It did not come, or a file of it is damaged, which is then deleted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert source.repo is not None
    cache = os.environ.get("HF_HUB_CACHE")
    rounds = [list(source.patterns)]
    if {_SAFE, _PICKLED} <= set(source.patterns):
        rounds.insert(0, [pattern for pattern in source.patterns if pattern != _PICKLED])
    try:
        for patterns in rounds:
            folder = Path(
                snapshot_download(
                    source.repo,
                    repo_type=source.repo_type,
                    revision=source.revision,
                    allow_patterns=patterns,
                    endpoint=os.environ.get("HF_ENDPOINT"),
                    cache_dir=Path(cache) if cache is not None else None,
                )
            )
            if any(folder.glob(_SAFE)):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(
            f"{source.repo}: expected the repository from the hub, came: {reason} Check the connection, name a mirror "
            "(HF_ENDPOINT), or bring the cache from another machine (HF_HUB_CACHE)."
        ) from error
    for path in sorted(folder.rglob("*")):
        check_blob(path, source.repo)
    return folder


def check_blob(path: Path, repo: str) -> None:
    """Compares a file of the cache with the SHA-256 that the hub names large files by.

    Raises:
        FetchError: It is damaged; it is then deleted.
    """
    blob = path.resolve()
    if not blob.is_file() or _SHA256.fullmatch(blob.name) is None:
        return
    sha256, _ = checksums(blob)
    if sha256 != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise FetchError(
            f"{repo}: {path.name}: expected sha256 {blob.name}, came {sha256}. What came is deleted. Fetch it again."
        )
