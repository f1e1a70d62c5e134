"""Reading in other languages: questions about passages, in Chinese, or in another language than the passages.

CMRC 2018 (Cui et al. 2019, simplified Chinese; CC BY-SA 4.0), DRCD (Shao et al. 2018, traditional; CC BY-SA 3.0) and
XQuAD (Artetxe et al. 2020, SQuAD translated; CC BY-SA 4.0) are in the package's own form already::

    {"id": "TRIAL_800_QUERY_0", "question": "生命数耗完即算为什么？", "answers": ["踢爆"],
     "positive_passage_ids": ["cmrc-TRIAL_800"]}

so that only splits are made here: where a data set lacks one, by hashes of the gold paragraphs, whose questions stay
together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rag_lightning.corpora.generation.parts import data_file, divided_by
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.types import Question


@dataclass(frozen=True, kw_only=True)
class ReadingComprehension:
    """Reads passages and questions of one language.

    Attributes:
        folder: Holds ``passages`` and the files named below (``.jsonl.gz`` or ``.jsonl``).
        train: Name of the training file.
        test: Name of the test file.
        validation_share: Of the training paragraphs, to validate on.
    """

    folder: str
    train: str = "train"
    test: str = "test"
    validation_share: float = 0.1

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        corpus = PassageCorpus.read(data_file(self.folder, "passages"))
        train, test = (read_questions(data_file(self.folder, name), corpus=corpus) for name in (self.train, self.test))
        shares = (1 - self.validation_share, self.validation_share)
        train, validation = divided_by(train, _paragraph, shares)
        return PreparedData(list(corpus), {"train": train, "validation": validation, "test": test})


@dataclass(frozen=True, kw_only=True)
class CrossLingualReading:
    """Reads questions in one language about passages in another; answers are in the passages' language.

    XQuAD is meant for evaluation alone; to train on a part of it is for trying things out, and what is reported on the
    rest is not comparable with a zero-shot figure.

    Attributes:
        folder: Holds ``passages.LANGUAGE`` and ``questions.LANGUAGE`` (``.jsonl.gz`` or ``.jsonl``).
        question_language: Such as ``de``.
        passage_language: Such as ``en``.
        shares: Of the paragraphs, to train, validate and test on.
    """

    folder: str
    question_language: str = "de"
    passage_language: str = "en"
    shares: Sequence[float] = (0.6, 0.1, 0.3)

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        if len(self.shares) != 3:
            raise ConfigError(f"task.prepare.shares: expected three, came {list(self.shares)}.")
        corpus = PassageCorpus.read(data_file(self.folder, f"passages.{self.passage_language}"))
        file = data_file(self.folder, f"questions.{self.question_language}")
        asked = {question.id: question.question for question in read_questions(file)}
        answered = read_questions(data_file(self.folder, f"questions.{self.passage_language}"), corpus=corpus)
        for question in answered:
            if question.id not in asked:
                raise DataError(f"{file}: expected the questions of both languages, came none of id {question.id!r}.")
        crossed = [replace(question, question=asked[question.id]) for question in answered]
        train, validation, test = divided_by(crossed, _paragraph, self.shares)
        return PreparedData(list(corpus), {"train": train, "validation": validation, "test": test})


def _paragraph(question: Question) -> str:
    return question.positive_passage_ids[0] if question.positive_passage_ids else question.id
