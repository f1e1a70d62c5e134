"""What the readers of data sets to generate from share: their files, their splits, and examples to retrieve."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeVar

from rag_lightning.corpora.generation.prepared import PreparedData, Split
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, MissingFileError
from rag_lightning.types import Passage, Question

RecordT = TypeVar("RecordT")
EXAMPLES: Literal["examples"] = "examples"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def data_file(folder: str, name: str) -> Path:
    """Returns the file of a data set by its name, ``NAME.jsonl.gz`` or ``NAME.jsonl``.

    Raises:
        MissingFileError: There is neither.
    """
    for suffix in (".jsonl.gz", ".jsonl"):
        path = Path(folder).expanduser() / f"{name}{suffix}"
        if path.is_file():
            return path
    raise MissingFileError(
        f"expected {name}.jsonl.gz or {name}.jsonl in {folder}, found neither. Check task.folder, which holds a folder "
        "for each data set."
    )


def divided_by(
    records: Iterable[RecordT], key: Callable[[RecordT], str], shares: Sequence[float]
) -> tuple[list[RecordT], ...]:
    """Divides records, those of one key together, each key by its hash alone; parts are about as large as their shares.

    Args:
        records: In an order that the parts keep.
        key: What must not be divided, such as the paragraph that several questions are about.
        shares: Of each part; positive, summing to 1.

    Raises:
        ConfigError: Shares that are not positive, or do not sum to 1.

    >>> train, test = divided_by(["a1", "a2", "b1", "c1"], lambda text: text[0], (0.5, 0.5))
    >>> train, test
    (['b1', 'c1'], ['a1', 'a2'])
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"shares: expected positive numbers that sum to 1, such as 0.9 and 0.1; came {list(shares)}.")
    bounds = list(accumulate(shares))[:-1]
    parts: tuple[list[RecordT], ...] = tuple([] for _ in shares)
    for record in records:
        place = int.from_bytes(sha256(key(record).encode()).digest()[:8], "big") / 2**64
        parts[sum(place >= bound for bound in bounds)].append(record)
    return parts


def read_passages(files: Iterable[str | Path]) -> list[Passage]:
    """Returns the passages of several files, one after another.

    Raises:
        MissingFileError: No such file.
        DataError: A bad line.
    """
    return [passage for file in files for passage in PassageCorpus.read(file)]


def with_examples(
    passages: str,
    train: Sequence[Question],
    validation: Sequence[Question],
    test: Sequence[Question],
) -> PreparedData:
    """Returns a data set whose passages are its training questions with their targets, or those of a file.

    What is searched of an example is its question (``text``); its target is its ``title``. No question finds itself.

    Args:
        passages: ``examples``, or a passage file.
        train: With unique ids, over all splits.
        validation: Likewise.
        test: Likewise.
    """
    if passages != EXAMPLES:
        questions = dict(zip(SPLITS, (train, validation, test), strict=True))
        return PreparedData(passages=list(PassageCorpus.read(passages)), questions=questions)
    made = [Passage(id=one.id, title=one.answers[0], text=one.question) for one in train]
    known = [replace(one, source_passage_id=one.id) for one in train]
    return PreparedData(passages=made, questions={"train": known, "validation": validation, "test": test})
