"""Question generation: from an answer to a question, or clue, that asks for it (Lewis et al. 2020, §3.3).

Jeopardy! clues (a sample; rights in the clues are not stated)::

    {"id": "jeopardy-00004", "category": "WORLD HISTORY", "answer": "Vasco da Gama",
     "clue": "This Portuguese Admiral of the Indian Seas discovered & named the Amirante Islands"}

becomes the question ``WORLD HISTORY: Vasco da Gama`` with the clue as its answer. The passages are the training clues
with their answers. The data set comes as one file; it is divided by hashes of the answers, so that no answer of the
test is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rag_lightning.corpora.generation.parts import EXAMPLES, data_file, divided_by, with_examples
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import identified_lines
from rag_lightning.types import Question


@dataclass(frozen=True, kw_only=True)
class Jeopardy:
    """Reads clues with their answers.

    Attributes:
        folder: Holds ``all`` (``.jsonl.gz`` or ``.jsonl``).
        with_category: Ask by category and answer, not by the answer alone.
        shares: To train, validate and test on.
        passages: ``examples``, or a passage file.
    """

    folder: str
    with_category: bool = True
    shares: Sequence[float] = (0.8, 0.1, 0.1)
    passages: str = EXAMPLES

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        pairs = []
        for place, record_id, record in identified_lines(data_file(self.folder, "all")):
            answer = string_field(record, "answer", place)
            asked = f"{string_field(record, 'category', place)}: {answer}" if self.with_category else answer
            pairs.append((answer, Question(record_id, asked, (string_field(record, "clue", place),))))
        parts = divided_by(pairs, lambda pair: pair[0].lower(), self.shares)
        train, validation, test = ([question for _, question in part] for part in parts)
        return with_examples(self.passages, train, validation, test)
