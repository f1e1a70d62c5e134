"""Fact verification as a text to write: the answer to a claim is the word that stands for its label.

FEVER (Thorne et al. 2018; annotations generally given as CC BY-SA 3.0)::

    {"id": 75397, "claim": "Fox 2000 Pictures released the film Soul Food.", "label": "SUPPORTS"}

becomes the question of the claim with the answer ``true``. Lewis et al. 2020 (§3.4) map each label to one output token
and train on pairs of claim and label, without evidence: which passages matter is learned through the answer. A marginal
likelihood over one token is the same under RAG-Token and RAG-Sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rag_lightning.corpora.generation.parts import divided_by, read_passages
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.generation.published import question_file
from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import LabelNames, identified_lines, label_field
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.types import Question


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Reads claims with labels.

    Attributes:
        folder: Holds a folder for each data set.
        train: Training file, named from ``folder``, with or without its ending.
        test: Test file.
        words: What is written for each label; null leaves out its claims. All labels must be named.
        validation_share: Of the training claims, by hashes of their texts.
        passages: Passage files, one after another; none where another file is searched (``data.passages``).
    """

    folder: str
    train: str
    test: str
    words: Mapping[str, str | None] = field(default_factory=dict)
    validation_share: float = 0.1
    passages: Sequence[str] = ()

    def files(self) -> list[Path]:
        """Returns the files that are read; see :class:`~rag_lightning.corpora.generation.prepared.NamesFiles`."""
        return [question_file(self.folder, name) for name in (self.train, self.test, *self.passages)]

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        allowed = list(dict.fromkeys(word for word in self.words.values() if word is not None))
        if len(allowed) < 2:
            raise ConfigError(f"task.prepare.words: expected a word for two labels or more, came {dict(self.words)}.")
        shares = (1 - self.validation_share, self.validation_share)
        train, validation = divided_by(self._read(self.train, "train"), lambda one: one.question.lower(), shares)
        passages = read_passages(question_file(self.folder, name) for name in self.passages)
        questions = {"train": train, "validation": validation, "test": self._read(self.test, "test")}
        return PreparedData(passages or None, questions, allowed)  # type: ignore[arg-type]

    def _read(self, name: str, split: str) -> list[Question]:
        file = question_file(self.folder, name)
        words = LabelNames(self.words)
        questions = []
        for place, record_id, record in identified_lines(file):
            label = label_field(record, "label", place)
            if label not in self.words:
                raise DataError(f"{place}: field 'label': expected one of {', '.join(self.words)}, came {label!r}.")
            word = words.of(label)
            if word is not None:
                questions.append(Question(f"{split}-{record_id}", string_field(record, "claim", place), (word,)))
        words.report(file)
        return questions
