"""Questions answered in whole sentences: MS-MARCO, the part with well-formed answers (Nguyen et al. 2016).

It is published as columns, its own terms (research that is not commercial)::

    {"query": {"0": "what is rba"}, "query_id": {"0": 19699}, "answers": {"0": ["Results-Based Accountability …"]},
     "wellFormedAnswers": {"0": ["Results-Based Accountability is a …"]}}

Lewis et al. 2020 (§3.2) use questions and answers alone, none of the passages that come with them.
"""

import json
from dataclasses import dataclass
from typing import Any

from rag_lightning.corpora.generation.parts import divided_by
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.generation.published import question_file
from rag_lightning.corpora.records import present
from rag_lightning.errors import DataError
from rag_lightning.types import Question
from rag_lightning.utils.io import open_text


@dataclass(frozen=True, kw_only=True)
class MsMarco:
    """Reads questions with answers in sentences; a file of 4 GB is held in memory while it is read.

    Attributes:
        folder: Holds the files named below (``.json.gz`` or ``.json``).
        train: Name of the training file, of which a share validates.
        test: Name of the development file: the test set's answers are not public.
        validation_share: Of the training questions, by hashes of their ids.
    """

    folder: str
    train: str = "train_v2.1"
    test: str = "dev_v2.1"
    validation_share: float = 0.05

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        shares = (1 - self.validation_share, self.validation_share)
        train, validation = divided_by(self._read(self.train), lambda question: question.id, shares)
        return PreparedData(None, {"train": train, "validation": validation, "test": self._read(self.test)})

    def _read(self, name: str) -> list[Question]:
        file = question_file(self.folder, name)
        try:
            with open_text(file) as stream:
                columns: Any = json.load(stream)
        except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError) as error:
            raise DataError(f"{file}: expected columns in JSON, came {error}. Fetch the file again.") from error
        if not isinstance(columns, dict):
            raise DataError(f"{file}: expected columns in JSON, came a {type(columns).__name__}.")
        queries, ids, formed = (
            present(columns, column, str(file), "a column") for column in ("query", "query_id", "wellFormedAnswers")
        )
        questions = []
        for row, asked in queries.items():
            answers = formed.get(row)  # "[]", a string, where there is none
            texts = [text.strip() for text in answers if text.strip()] if isinstance(answers, list) else []
            if texts:
                questions.append(Question(f"{name}-{ids[row]}", asked.strip(), tuple(texts)))
        if not questions:
            raise DataError(f"{file}: expected questions with wellFormedAnswers, came none. Is it version 2.1?")
        return questions
