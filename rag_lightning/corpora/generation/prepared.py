"""What a reader of a data set returns: passages to search, and questions to ask in each split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from rag_lightning.types import Passage, Question

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A data set in the package's own form.

    Attributes:
        passages: What is searched.
        questions: For each split, what is asked and what is to be written.
    """

    passages: Sequence[Passage]
    questions: Mapping[Split, Sequence[Question]]


@runtime_checkable
class Preparation(Protocol):
    """Reads a data set as it is published; a frozen dataclass whose fields are its settings."""

    def __call__(self) -> PreparedData:
        """Returns the whole data set.

        Raises:
            MissingFileError: A file of it is missing.
            DataError: A line is bad; names file, line and field.
        """
        ...
