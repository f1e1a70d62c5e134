"""Labelled texts: a text, or a text with a context to judge it by, and its class, as JSON lines.

``{"id": 1, "text": "a stirring , funny film", "label": 1}`` (SST-2; the label may be a string or a whole number)
``{"id": "b1", "question": "is it?", "passage": "It is.", "label": "yes"}`` (BoolQ: ``text="question",
context="passage"``)

Also here: dividing the one file of a data set into parts, and the ordered names of the classes to learn. Sequences of
tagged words are read by :mod:`~rag_lightning.corpora.tagged`, relations by :mod:`~rag_lightning.corpora.relations`.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import (
    LabelNames,
    at_least_one,
    identified_lines,
    json_lines_file,
    label_field,
    string_list,
)
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.tagging import entity_type
from rag_lightning.types import LabelledText, Question, RelationMention, TaggedSentence

RecordT = TypeVar("RecordT", bound=LabelledText | TaggedSentence | RelationMention | Question)


def read_labelled(
    path: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    context: str | None = None,
    title: str | None = None,
    label_names: Mapping[str, str | None] | None = None,
) -> list[LabelledText]:
    """Returns the labelled texts of a ``.jsonl`` or ``.jsonl.gz`` file, in order.

    Args:
        path: As :func:`~rag_lightning.corpora.passages.resolve` takes it.
        text: The field of the text.
        label: The field of the label, a string or a whole number.
        context: The field of the context: a string, or a list of strings, which are joined by a space.
        title: A field that is put before the text, with a space between, in the lines that have one.
        label_names: See :class:`~rag_lightning.corpora.records.LabelNames`: other names, merged and dropped classes.

    Raises:
        MissingFileError: No such file.
        ConfigError: A blank name in ``label_names``.
        DataError: No text, a repeated id, or a bad field; names file, line, field, what was expected and what came.
    """
    file = json_lines_file(path, "labelled texts")
    names = LabelNames(label_names)
    records: list[LabelledText] = []
    for place, record_id, record in identified_lines(file):
        words = string_field(record, text, place)
        if title is not None and record.get(title) is not None:
            words = f"{string_field(record, title, place)} {words}"
        passage = None if context is None else _context(record, context, place)
        name = names.of(label_field(record, label, place))
        if name is not None:
            records.append(LabelledText(id=record_id, text=words, label=name, context=passage))
    names.report(file)
    return at_least_one(records, file, "labelled text")


def _context(record: Mapping[str, Any], field: str, place: str) -> str:
    if not isinstance(record.get(field), list):
        return string_field(record, field, place)
    joined = " ".join(string_list(record, field, place))
    return string_field({field: joined}, field, place)


def divided(
    records: Iterable[RecordT], shares: Sequence[float] = (0.8, 0.1, 0.1), *, seed: int = 0
) -> tuple[list[RecordT], ...]:
    """Divides the records of a data set that comes as one file.

    Where a record falls is decided by a hash of its id and the seed alone: neither the order of the records nor what
    else is there changes it. The parts are therefore only about as large as their shares.

    Args:
        records: The records; each part keeps their order.
        shares: The share of each part; positive, summing to 1.
        seed: Another seed gives another division.

    Returns:
        One list for each share.

    Raises:
        ConfigError: Shares that are not positive, or do not sum to 1.

    >>> records = [LabelledText(str(number), "text", "yes") for number in range(1000)]
    >>> [len(part) for part in divided(records)]
    [814, 92, 94]
    """
    if not shares or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(f"shares: expected positive numbers that sum to 1, such as (0.8, 0.1, 0.1); came {shares}.")
    inner_bounds = list(accumulate(shares))[:-1]
    parts: tuple[list[RecordT], ...] = tuple([] for _ in shares)
    for record in records:
        digest = sha256(f"{seed}\n{record.id}".encode()).digest()
        parts[bisect_right(inner_bounds, int.from_bytes(digest[:8], "big") / 2**64)].append(record)
    return parts


@dataclass(frozen=True)
class LabelSet:
    """The names of the classes that a model tells apart; a class's number is its place here.

    Make one from training records: labels in alphabetical order, or ``O`` and then ``B-`` and ``I-`` of each entity
    type in alphabetical order, so that the order of the records does not matter.

    Args:
        names: The names in order.

    Raises:
        DataError: Fewer than two names, a repeated one, or a blank one.

    >>> labels = LabelSet.from_records([LabelledText("1", "good", "positive"), LabelledText("2", "bad", "negative")])
    >>> labels.names, labels.number("positive", "test.jsonl, line 1")
    (('negative', 'positive'), 1)
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(name.strip() for name in self.names):
            raise DataError(f"label set: expected names that are not blank, came {list(self.names)}.")
        if len(set(self.names)) != len(self.names) or len(self.names) < 2:
            raise DataError(
                f"label set: expected at least two names, each once, came {list(self.names)}. Check the labels of the "
                "training data and label_names."
            )

    @classmethod
    def from_records(cls, records: Iterable[LabelledText | RelationMention]) -> "LabelSet":
        """Returns the labels of training records, in alphabetical order."""
        return cls(tuple(sorted({record.label for record in records})))

    @classmethod
    def from_sentences(cls, sentences: Iterable[TaggedSentence]) -> "LabelSet":
        """Returns ``O``, and ``B-`` and ``I-`` of each type in the tags of training sentences."""
        tags = {tag for sentence in sentences for tag in sentence.tags}
        types = sorted({entity_type(tag) for tag in tags} - {""})
        return cls(("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")))

    @classmethod
    def from_list(cls, names: Any) -> "LabelSet":
        """Returns the label set that :meth:`to_list` wrote.

        Raises:
            DataError: Not a list of at least two different strings.
        """
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"label set: expected a list of strings, came {type(names).__name__} {str(names)[:80]!r}.")
        return cls(tuple(names))

    def to_list(self) -> list[str]:
        """Returns the names as a list, for JSON."""
        return list(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def number(self, name: str, place: str) -> int:
        """Returns the number of a class.

        Args:
            name: Its name.
            place: Where it was met, for the message.

        Raises:
            DataError: No training record had this label.
        """
        try:
            return self._numbers[name]
        except KeyError:
            raise DataError(
                f"{place}: expected one of the labels seen in training ({', '.join(self.names)}), came {name!r}. Give "
                "it one of these names, or drop it, with label_names."
            ) from None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}
