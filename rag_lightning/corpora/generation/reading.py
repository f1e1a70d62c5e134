"""Reading: questions about passages, in English, in Chinese, or in another language than the passages.

CMRC 2018 (Cui et al. 2019, simplified Chinese; CC BY-SA 4.0), DRCD (Shao et al. 2018, traditional; CC BY-SA 3.0) and
XQuAD (Artetxe et al. 2020, SQuAD translated; CC BY-SA 4.0) are in the package's own form already::

    {"id": "TRIAL_800_QUERY_0", "question": "生命数耗完即算为什么？", "answers": ["踢爆"],
     "positive_passage_ids": ["cmrc-TRIAL_800"]}

so that only splits are made here: where a data set lacks one, by hashes of the gold paragraphs, whose questions stay
together. Paragraphs may be cut into passages of so many words, as Wikipedia is for DPR and RAG.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rag_lightning.corpora.generation.parts import data_file, divided_by
from rag_lightning.corpora.generation.prepared import PreparedData, Split
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.normalise import contains_answer
from rag_lightning.types import Passage, Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadingComprehension:
    """Reads passages and questions of one language.

    Attributes:
        folder: Holds ``passages`` and the files named below (``.jsonl.gz`` or ``.jsonl``).
        train: Name of the training file.
        test: Name of the test file.
        validation_share: Of the training paragraphs, to validate on.
        passage_words: Cut paragraphs into passages of at most so many words (:func:`in_pieces`). A question's gold
            passages are then those of its paragraph that show an answer; where none does, as the answer lies across a
            border, the question is left out. None keeps paragraphs whole.
    """

    folder: str
    train: str = "train"
    test: str = "test"
    validation_share: float = 0.1
    passage_words: int | None = None

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        corpus = PassageCorpus.read(data_file(self.folder, "passages"))
        train, test = (read_questions(data_file(self.folder, name), corpus=corpus) for name in (self.train, self.test))
        shares = (1 - self.validation_share, self.validation_share)
        train, validation = divided_by(train, _paragraph, shares)
        splits: dict[Split, list[Question]] = {"train": train, "validation": validation, "test": test}
        if self.passage_words is None:
            return PreparedData(list(corpus), splits)
        pieces = {passage.id: in_pieces(passage, self.passage_words) for passage in corpus}
        return PreparedData(
            [piece for of_one in pieces.values() for piece in of_one],
            {name: _asked_of_pieces(name, questions, pieces) for name, questions in splits.items()},
        )


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


def in_pieces(passage: Passage, num_words: int) -> list[Passage]:
    """Returns a passage cut into disjoint ones of at most so many words, all about as long, each with its title.

    Words are what white space separates: a text without any stays whole.

    Raises:
        ConfigError: Fewer than one word.

    >>> for piece in in_pieces(Passage("p", "Oz", "there is no place like home"), 4):
    ...     print(piece)
    Passage(id='p-0', title='Oz', text='there is no')
    Passage(id='p-1', title='Oz', text='place like home')
    """
    if num_words < 1:
        raise ConfigError(f"task.prepare.passage_words: expected 1 or more, or null, came {num_words}.")
    words = passage.text.split()
    count = max(1, -(-len(words) // num_words))
    borders = [round(part * len(words) / count) for part in range(count + 1)]
    return [
        Passage(f"{passage.id}-{part}", passage.title, " ".join(words[start:end]))
        for part, (start, end) in enumerate(pairwise(borders))
    ]


def _asked_of_pieces(
    name: str, questions: Sequence[Question], pieces: Mapping[str, Iterable[Passage]]
) -> list[Question]:
    kept = []
    for question in questions:
        gold = [piece for one in question.positive_passage_ids for piece in pieces[one]]
        shows = tuple(piece.id for piece in gold if contains_answer(piece.text, question.answers))
        if shows:
            kept.append(replace(question, positive_passage_ids=shows))
    if len(kept) < len(questions):
        logger.info(
            "%s: %d of %d questions have no passage that shows an answer: left out",
            name,
            len(questions) - len(kept),
            len(questions),
        )
    return kept


def _paragraph(question: Question) -> str:
    return question.positive_passage_ids[0] if question.positive_passage_ids else question.id
