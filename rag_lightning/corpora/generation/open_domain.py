"""Open-domain questions: asked of passages that were not made for them, each with answers of a few words.

Natural Questions (Kwiatkowski et al. 2019; open form, Lee et al. 2019), WebQuestions (Berant et al. 2013, CC BY 4.0),
TriviaQA (Joshi et al. 2017), CuratedTREC (Baudiš and Šedivý 2015), in the forms of
:mod:`~rag_lightning.corpora.generation.published`::

    {"question": "where do the great lakes meet the ocean", "answers": ["the Saint Lawrence River"]}

and SQuAD (Rajpurkar et al. 2016, CC BY-SA 4.0) as it is published, whose paragraphs become the passages. What is done
to them is what Lewis et al. 2020 (appendix) did: each answer a training example of its own (Natural Questions,
WebQuestions); an answer that some passage shows first (TriviaQA); texts in place of regular expressions (CuratedTREC).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rag_lightning.corpora.generation.parts import divided_by, read_passages
from rag_lightning.corpora.generation.prepared import PreparedData, Split
from rag_lightning.corpora.generation.published import Asked, question_file, read_asked
from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import present
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.normalise import normalise_answer
from rag_lightning.text.regex_examples import regex_examples
from rag_lightning.types import Passage, Question
from rag_lightning.utils.hashing import hash_texts
from rag_lightning.utils.io import read_json, read_json_lines

logger = logging.getLogger(__name__)
Names = str | Sequence[str]
MAX_WORDS = 6
"""Longer answers are not looked for in passages."""


@dataclass(frozen=True, kw_only=True)
class OpenQuestions:
    """Reads questions, and the passages that they are asked of.

    Files are named from ``folder``, without their endings: ``nq_open/train``.

    Attributes:
        folder: Holds a folder for each data set.
        train: Training files.
        test: Test files.
        validation: Validation files; by default a share of the training questions, by hashes of their texts.
        validation_share: Of the training questions.
        passages: Passage files, one after another; none where another file is searched (``data.passages``).
        answers: ``text``; ``regex`` where each question has regular expressions (``answer_regex`` says so by itself).
        each_answer: Make a training example of each answer, not of the first alone.
        shown_first: Put answers that passages show before others, the most frequent one first.
        exclude: Files whose questions are never trained or validated on.
        limit_train: Training questions at most, those whose texts hash lowest: few-shot learning.
    """

    folder: str
    train: Names
    test: Names
    validation: Names | None = None
    validation_share: float = 0.1
    passages: Sequence[str] = ()
    answers: Literal["text", "regex"] = "text"
    each_answer: bool = False
    shown_first: bool = False
    exclude: Sequence[str] = ()
    limit_train: int | None = None

    def files(self) -> list[Path]:
        """Returns the files that are read; see :class:`~rag_lightning.corpora.generation.prepared.NamesFiles`."""
        validation = _names(self.validation) if self.validation is not None else []
        named = [*_names(self.train), *validation, *_names(self.test), *self.passages, *self.exclude]
        return [question_file(self.folder, name) for name in named]

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        if self.answers not in ("text", "regex"):
            raise ConfigError(f"task.prepare.answers: expected text or regex, came {self.answers!r}.")
        if self.limit_train is not None and self.limit_train < 1:
            raise ConfigError(f"task.prepare.limit_train: expected 1 or more, or null, came {self.limit_train}.")
        if self.shown_first and not self.passages:
            raise ConfigError("task.prepare.shown_first: expected passages to look for answers in, came none.")
        known = self._excluded()
        train = [one for one in self._read(self.train, "train") if _key(one.question) not in known]
        if self.validation is None:
            shares = (1 - self.validation_share, self.validation_share)
            train, validation = divided_by(train, lambda one: _key(one.question), shares)
        else:
            validation = self._read(self.validation, "validation")
        if self.limit_train is not None:
            train = sorted(train, key=lambda one: hash_texts([_key(one.question)]))[: self.limit_train]
        passages = read_passages(question_file(self.folder, name) for name in self.passages)
        learned = self._to_learn(train, passages)
        splits: dict[Split, list[Question]] = {
            "train": learned,
            "validation": [self._judged(one) for one in validation],
            "test": [self._judged(one) for one in self._read(self.test, "test")],
        }
        return PreparedData(passages or None, splits)

    def _read(self, names: Names, split: Split) -> list[Asked]:
        """Returns the questions of some files, under ids that no other file has."""
        found = []
        for number, name in enumerate(_names(names)):
            mark = split if number == 0 else f"{split}{number}"
            found += [replace(one, id=f"{mark}-{one.id}") for one in read_asked(question_file(self.folder, name))]
        return found

    def _excluded(self) -> set[str]:
        files = [question_file(self.folder, name) for name in self.exclude]
        named = [file for file in files if file.name.removesuffix(".gz").endswith(".jsonl")]
        texts = [str(record.get("question")) for file in named for _, record in read_json_lines(file)]
        texts += [one.question for file in files if file not in named for one in read_asked(file)]
        return {_key(text) for text in texts}

    def _regex(self, one: Asked) -> str | None:
        return "|".join(one.answers) if one.is_regex or self.answers == "regex" else None

    def _judged(self, one: Asked) -> Question:
        regex = self._regex(one)
        if regex is None:
            return one.record(one.id, one.answers)
        return replace(one.record(one.id, ()), answer_regex=regex)

    def _to_learn(self, train: Sequence[Asked], passages: Sequence[Passage]) -> list[Question]:
        texts = {one.id: self._texts(one) for one in train}
        if num_untold := sum(not answers for answers in texts.values()):
            logger.info("%d training questions left out: no text that their expressions accept is known", num_untold)
        if self.shown_first:
            counts = shown(passages, (answer for answers in texts.values() for answer in answers))
            texts = {key: sorted(found, key=counts.__getitem__, reverse=True) for key, found in texts.items()}
        questions = []
        for one in train:
            answers = texts[one.id]
            if self.each_answer and len(answers) > 1:
                questions += [one.record(f"{one.id}-{n}", (answer,)) for n, answer in enumerate(answers)]
            elif answers:
                questions.append(one.record(one.id, answers))
        return questions

    def _texts(self, one: Asked) -> list[str]:
        regex = self._regex(one)
        return list(one.answers) if regex is None else regex_examples(regex)


def shown(passages: Iterable[Passage], answers: Iterable[str]) -> Counter[str]:
    """Returns how often passages show each answer, both in their normalised form; 0 is left out.

    >>> shown([Passage("1", "Oz", "The Wizard of Oz, and Oz.")], ["the Wizard", "Oz", "Kansas"])
    Counter({'Oz': 3, 'the Wizard': 1})
    """
    normalised = {answer: normalise_answer(answer) for answer in dict.fromkeys(answers)}
    wanted = set(normalised.values()) - {""}
    first_words = {text.split(" ", 1)[0] for text in wanted}
    lengths = sorted({text.count(" ") + 1 for text in wanted} & set(range(1, MAX_WORDS + 1)))
    counts: Counter[str] = Counter()
    for passage in passages:
        words = normalise_answer(f"{passage.title} {passage.text}").split()
        starts = [start for start, word in enumerate(words) if word in first_words]
        for length in lengths:
            spans = (" ".join(words[start : start + length]) for start in starts if start + length <= len(words))
            counts.update(span for span in spans if span in wanted)
    return Counter({answer: counts[text] for answer, text in normalised.items() if counts[text] > 0})


def _names(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _key(text: str) -> str:
    return " ".join(normalise_answer(text).split())


@dataclass(frozen=True, kw_only=True)
class Squad:
    """Reads SQuAD 1.1 as it is published: its paragraphs are the passages, its own test set is not public.

    Attributes:
        folder: Holds the files named below, ``.json``.
        train: Name of the training file; of its articles a share validates.
        test: Name of the development file, which is tested on.
        validation_share: Of the training articles, by hashes of their titles.
    """

    folder: str
    train: str = "train-v1.1"
    test: str = "dev-v1.1"
    validation_share: float = 0.1

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        passages: list[Passage] = []
        train = self._read(self.train, passages)
        test = self._read(self.test, passages)
        shares = (1 - self.validation_share, self.validation_share)
        learned, validation = divided_by(train, lambda pair: pair[0], shares)
        parts: dict[Split, list[tuple[str, Question]]] = {"train": learned, "validation": validation, "test": test}
        return PreparedData(passages, {split: [question for _, question in part] for split, part in parts.items()})

    def _read(self, name: str, passages: list[Passage]) -> list[tuple[str, Question]]:
        """Returns (article, question) pairs; adds the paragraphs to ``passages``."""
        file = question_file(self.folder, name)
        content: Any = read_json(file)
        if not isinstance(content, dict):
            raise DataError(f"{file}: expected a mapping with the field 'data', came a {type(content).__name__}.")
        pairs = []
        for article in present(content, "data", str(file), "a list of articles"):
            title = string_field(article, "title", str(file)).replace("_", " ")
            for paragraph in present(article, "paragraphs", f"{file}, {title}", "a list"):
                passage = Passage(f"{name}-{len(passages)}", title, string_field(paragraph, "context", str(file)))
                passages.append(passage)
                for asked in present(paragraph, "qas", f"{file}, {title}", "a list of questions"):
                    texts = dict.fromkeys(string_field(one, "text", f"{file}, {title}") for one in asked["answers"])
                    text = string_field(asked, "question", f"{file}, {title}")
                    pairs.append((title, Question(str(asked["id"]), text.strip(), tuple(texts), (passage.id,))))
        return pairs
