"""Train the query encoder and the generator of a retrieval-augmented model together.

The flow, which is also the reading order: a question becomes a vector (``encoders``), the index finds passage numbers
(``index``, ``retrieval``), the passages are joined to the question as token ids (``text``, ``corpora``), the generator
scores the answer under each (``generators``), the marginal likelihood sums the passages out (``losses``), and its
gradient reaches both ends. ``rag.py`` is the page to read first; ``training`` drives it with Lightning, ``cli`` with
Hydra. Importing this package is cheap: the names below are loaded when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_lightning.rag import RagModel
    from rag_lightning.training.datamodule import RagDataModule
    from rag_lightning.training.module import RagLightningModule

__version__ = "0.1.0"
__all__ = ["RagDataModule", "RagLightningModule", "RagModel", "__version__"]

_PLACES = {
    "RagModel": "rag_lightning.rag",
    "RagDataModule": "rag_lightning.training.datamodule",
    "RagLightningModule": "rag_lightning.training.module",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rag_lightning' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
