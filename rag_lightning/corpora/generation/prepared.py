"""What a reader of a data set returns: passages to search, and questions to ask in each split; kept as files.

The files are of the package's own form (:mod:`rag_lightning.corpora.passages`, :mod:`rag_lightning.corpora.questions`),
so a prepared data set is trained on, searched and evaluated like one's own.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from filelock import FileLock

from rag_lightning.corpora.passages import PassageCorpus, write_passages
from rag_lightning.corpora.questions import read_questions, write_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.types import Passage, Question
from rag_lightning.utils.hashing import hash_file, hash_texts
from rag_lightning.utils.io import atomic_directory, existing_file

logger = logging.getLogger(__name__)
Split = Literal["train", "validation", "test"]
PASSAGES = "passages.jsonl"
ALLOWED = "allowed.txt"
FORMAT = "prepared-2"  # raise it where a reader comes to read the same files otherwise


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A data set in the package's own form.

    Attributes:
        passages: What is searched; None where that is another file, too large to be kept twice.
        questions: For each split, what is asked and what is to be written.
        allowed: The only answers there are, such as labels; empty where answers are free.
    """

    passages: Sequence[Passage] | None
    questions: Mapping[Split, Sequence[Question]]
    allowed: Sequence[str] = ()


@runtime_checkable
class Preparation(Protocol):
    """Reads a data set as it is published; a frozen dataclass whose fields are its settings."""

    @property
    def folder(self) -> str:
        """Where the data set's files lie."""
        ...

    def __call__(self) -> PreparedData:
        """Returns the whole data set.

        Raises:
            MissingFileError: A file of it is missing.
            DataError: A line is bad; names file, line and field.
        """
        ...


@runtime_checkable
class NamesFiles(Protocol):
    """A preparation that reads files of several folders and says which."""

    def files(self) -> Sequence[Path]:
        """Returns the files that it reads.

        Raises:
            MissingFileError: One of them is missing.
        """
        ...


def prepared_name(preparation: Preparation) -> str:
    """Returns the name of the folder that keeps a data set: its reader, and a hash of settings and input files.

    The files count by their content: a data set that was moved is the same.

    Raises:
        MissingFileError: There is no such folder.
    """
    folder = existing_file(Path(preparation.folder).expanduser(), "task.folder")
    assert is_dataclass(preparation)
    settings = {name: value for name, value in asdict(preparation).items() if name != "folder"}
    named = [Path(value) for value in settings.values() if isinstance(value, str) and Path(value).is_file()]
    if isinstance(preparation, NamesFiles):
        files = list(preparation.files())
    else:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    reader = type(preparation).__name__
    parts = [FORMAT, reader, json.dumps(settings, sort_keys=True, default=str)]
    parts += [text for path in [*files, *named] for text in (path.name, hash_file(path))]
    return f"{re.sub(r'(?<!^)(?=[A-Z])', '_', reader).lower()}-{hash_texts(parts)[:16]}"


def keep(preparation: Preparation, cache_dir: str | Path) -> Path:
    """Returns a folder with ``passages.jsonl``, ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of a data set.

    Without ``passages.jsonl`` where the data set is asked of other passages; with ``allowed.txt``, an answer on each
    line, where only some answers are allowed (``decoding.allowed``). It is made once, whole or not at all; of several
    processes one makes it and the others wait. Validation and test questions stand in the order of their ids' hashes,
    so that the first so many of them are a fair sample.

    Args:
        preparation: The reader.
        cache_dir: The folder lies in it, as ``prepared/NAME``; see :func:`prepared_name`.

    Raises:
        MissingFileError: A file of the data set is missing.
        DataError: A line is bad, or a split has no question.
    """
    folder = Path(cache_dir) / "prepared" / prepared_name(preparation)
    with _one_at_a_time(folder):
        if folder.is_dir():
            return folder
        data = preparation()
        with atomic_directory(folder) as part:
            _write(data, part, preparation.folder)
        sizes = ", ".join(f"{split} {len(questions)}" for split, questions in data.questions.items())
        num_passages = "none" if data.passages is None else len(data.passages)
        logger.info("prepared %s: passages: %s; questions: %s", folder, num_passages, sizes)
    return folder


def _one_at_a_time(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def _write(data: PreparedData, folder: Path, source: str) -> None:
    for split in get_args(Split):
        if not data.questions.get(split):
            raise DataError(f"{source}: expected questions in each split, came none to {split}. Give more data.")
    corpus = None
    if data.passages is not None:
        corpus = PassageCorpus.from_passages(data.passages, source=source)  # refuses repeated ids and empty texts
        write_passages(folder / PASSAGES, data.passages)
    if data.allowed:
        (folder / ALLOWED).write_text("".join(f"{answer}\n" for answer in data.allowed), encoding="utf-8")
    for split, questions in data.questions.items():
        if split != "train":  # the first so many of them are a sample, whatever the data set's own order
            questions = sorted(questions, key=lambda question: hash_texts([question.id]))
        write_questions(folder / f"{split}.jsonl", questions)
        read_questions(folder / f"{split}.jsonl", corpus=corpus)


def keep_tokenizer(prepared: Path, *, vocab_size: int, lowercase: bool) -> Path:
    """Returns the folder of a word tokenizer trained on what a prepared data set has to train on; made once.

    It learns from the passages and from the training questions and answers, and keeps Chinese characters apart; see
    :func:`~rag_lightning.text.tokenizers.train_word_tokenizer`.

    Args:
        prepared: From :func:`keep`; the tokenizer lies beside it.
        vocab_size: The largest number of entries.
        lowercase: Whether case is dropped.

    Raises:
        ConfigError: ``vocab_size`` is too small for the characters of the texts, or the data set has no passages of
            its own to learn from.
    """
    if not (prepared / PASSAGES).is_file():
        raise ConfigError(
            f"task.vocabulary: expected passages among the prepared files to learn a vocabulary from, found none in "
            f"{prepared}. Name some (task.prepare.passages), or leave out the vocabulary of one's own "
            "(task.vocabulary=null, with a generator and an encoder that bring theirs)."
        )
    folder = prepared.with_name(f"{prepared.name}-tokenizer-{vocab_size}{'-lowercase' if lowercase else ''}")
    with _one_at_a_time(folder):
        if not folder.is_dir():
            tokenizer = train_word_tokenizer(_texts(prepared), vocab_size, lowercase=lowercase, split_ideographs=True)
            with atomic_directory(folder) as part:
                tokenizer.save_pretrained(part)
    return folder


def _texts(prepared: Path) -> Iterator[str]:
    for passage in PassageCorpus.read(prepared / PASSAGES):
        yield f"{passage.title} {passage.text}"
    for question in read_questions(prepared / "train.jsonl"):
        yield question.question
        yield from question.answers
