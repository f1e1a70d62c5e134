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
from pathlib import Path

from rag_lightning.corpora.generation.parts import EXAMPLES, data_file, divided_by, read_passages, with_examples
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.generation.published import question_file, read_asked
from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import identified_lines
from rag_lightning.errors import ConfigError
from rag_lightning.types import Question
from rag_lightning.utils.io import read_json_lines


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


@dataclass(frozen=True, kw_only=True)
class Clues:
    """Reads answers with the clues that ask for them, and the passages that a clue is written from.

    Lewis et al. 2020 (§3.3) take the clues and answers of SearchQA (Dunn et al. 2017), which MRQA publishes in its own
    form; the answer alone is what is given.

    Attributes:
        folder: Holds a folder for each data set.
        train: Training file, named from ``folder``, with or without its ending: MRQA's form, or lines as above.
        test: Test file; by default the training file is divided by ``shares``.
        shares: To train, validate and test on, by hashes of the answers; with a test file, to train and validate on.
        passages: Passage files, one after another; none where another file is searched (``data.passages``).
    """

    folder: str
    train: str
    test: str | None = None
    shares: Sequence[float] = (0.8, 0.1, 0.1)
    passages: Sequence[str] = ()

    def files(self) -> list[Path]:
        """Returns the files that are read; see :class:`~rag_lightning.corpora.generation.prepared.NamesFiles`."""
        tests = [self.test] if self.test is not None else []
        return [question_file(self.folder, name) for name in (self.train, *tests, *self.passages)]

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        expected = 3 if self.test is None else 2
        if len(self.shares) != expected:
            raise ConfigError(f"task.prepare.shares: expected {expected} of them, came {list(self.shares)}.")
        parts = divided_by(self._read(self.train, "train"), lambda one: one.question.lower(), self.shares)
        test = parts[2] if self.test is None else self._read(self.test, "test")
        passages = read_passages(question_file(self.folder, name) for name in self.passages)
        return PreparedData(passages or None, {"train": parts[0], "validation": parts[1], "test": test})

    def _read(self, name: str, split: str) -> list[Question]:
        file = question_file(self.folder, name)
        if "clue" not in next(read_json_lines(file), (0, {}))[1]:
            return [Question(f"{split}-{one.id}", one.answers[0], (one.question,)) for one in read_asked(file)]
        return [
            Question(record_id, string_field(record, "answer", place), (string_field(record, "clue", place),))
            for place, record_id, record in identified_lines(file)
        ]
