"""Summarisation: a document and one or more summaries of it.

SciTLDR (Cachola et al. 2020, abstracts of papers; Apache-2.0)::

    {"id": "SysEexbRb", "source": ["Due to the success of deep learning …", …], "summaries": ["We provide …", …]}

DialogSum (Chen et al. 2021, dialogues of everyday life; CC BY-NC-SA 4.0) has one text in the field ``dialogue``.

A document becomes a question whose answers are its summaries; the first is the training target. The passages are the
training documents with their first summaries, searched by the documents.
"""

from dataclasses import dataclass

from rag_lightning.corpora.generation.parts import EXAMPLES, data_file, divided_by, with_examples
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import identified_lines, present, string_list
from rag_lightning.types import Question


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """Reads documents with summaries.

    Attributes:
        folder: Holds the files (``.jsonl.gz`` or ``.jsonl``).
        document: The field to summarise: a text, or a list of sentences.
        summaries: The field with a list of summaries.
        train: Name of the training file.
        validation: Name of the validation file; None to hold out ``validation_share`` of the training file.
        test: Name of the test file.
        validation_share: By hashes of ids, where there is no validation file.
        passages: ``examples``, or a passage file.
    """

    folder: str
    document: str = "source"
    summaries: str = "summaries"
    train: str = "train"
    validation: str | None = "dev"
    test: str = "test"
    validation_share: float = 0.1
    passages: str = EXAMPLES

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        train = self._read("train", self.train)
        if self.validation is None:
            shares = (1 - self.validation_share, self.validation_share)
            train, validation = divided_by(train, lambda question: question.id, shares)
        else:
            validation = self._read("validation", self.validation)
        return with_examples(self.passages, train, validation, self._read("test", self.test))

    def _read(self, split: str, name: str) -> list[Question]:
        questions = []
        for place, record_id, record in identified_lines(data_file(self.folder, name)):
            if isinstance(present(record, self.document, place, "a text or a list of sentences"), list):
                joined = " ".join(string_list(record, self.document, place))
                document = string_field({self.document: joined}, self.document, place)
            else:
                document = string_field(record, self.document, place)
            summaries = string_list(record, self.summaries, place)
            answers = tuple(
                string_field({self.summaries: summary}, self.summaries, place).strip() for summary in summaries
            )
            questions.append(Question(f"{split}-{record_id}", " ".join(document.split()), answers))
        return questions
