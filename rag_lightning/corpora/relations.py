"""Relation mentions: a text in which two entities stand and the relation between them, as JSON lines of two forms.

- with markers (SemEval-2010 task 8): ``{"id": 0, "text": "an array of <e1> antenna </e1> <e2> elements </e2>",
  "relation": "Component-Whole(e2,e1)"}``; ``e1`` is the head, ``e2`` the tail, whichever comes first
- with words (FewRel): ``{"tokens": ["Madras", "in", "India"], "head": {"spans": [[0]]}, "tail": {"spans": [[2]]},
  "relation": "P17"}``; a span is a list of the places of its words, and of several spans of an entity the first counts

A line with the field of the words is of the second form. In both the record's text is without markers, and its offsets
count characters.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import (
    LabelNames,
    at_least_one,
    identified_lines,
    json_lines_file,
    label_field,
    present,
    string_list,
)
from rag_lightning.errors import DataError
from rag_lightning.types import RelationMention

_MARKER = re.compile(r"(\s*)<(/?)e([12])>(\s*)")
_ORDERS = (["1", "/1", "2", "/2"], ["2", "/2", "1", "/1"])
Span = tuple[int, int]


def read_relations(
    path: str | Path,
    *,
    text: str = "text",
    tokens: str = "tokens",
    head: str = "head",
    tail: str = "tail",
    label: str = "relation",
    label_names: Mapping[str, str | None] | None = None,
) -> list[RelationMention]:
    """Returns the relation mentions of a ``.jsonl`` or ``.jsonl.gz`` file, in order.

    Args:
        path: As :func:`~rag_lightning.corpora.passages.resolve` takes it.
        text: The field of a text with markers.
        tokens: The field of the words, of lines that have it in place of ``text``.
        head: The field of the first entity, with ``spans``; beside ``tokens``.
        tail: That of the second.
        label: The field of the relation, a string or a whole number.
        label_names: See :class:`~rag_lightning.corpora.records.LabelNames`: other names, merged and dropped classes.

    Raises:
        MissingFileError: No such file.
        ConfigError: A blank name in ``label_names``.
        DataError: No mention, a repeated id, markers that do not enclose two entities, a span out of range, entities
            that overlap, or a bad field; names file, line, field, what was expected and what came.
    """
    file = json_lines_file(path, "relations")
    names = LabelNames(label_names)
    mentions: list[RelationMention] = []
    for place, record_id, record in identified_lines(file):
        if tokens in record:
            plain, first, second = _of_words(record, tokens, head, tail, place)
        else:
            plain, first, second = marked_text(string_field(record, text, place), f"{place}: field {text!r}")
        name = names.of(label_field(record, label, place))
        if name is not None:
            mentions.append(RelationMention(id=record_id, text=plain, head=first, tail=second, label=name))
    names.report(file)
    return at_least_one(mentions, file, "relation mention")


def marked_text(marked: str, place: str) -> tuple[str, Span, Span]:
    """Returns the text without markers, and the spans of e1 and e2.

    White space on either side of a marker becomes one space; where there is none, none is made.

    Args:
        marked: With ``<e1>…</e1>`` and ``<e2>…</e2>``.
        place: Where it stands, for messages.

    Raises:
        DataError: A marker is missing, or there are no words between two.
    """
    plain, end, places = "", 0, dict[str, int]()
    order: list[str] = []
    for marker in _MARKER.finditer(marked):
        before, slash, number, after = marker.groups()
        plain += marked[end : marker.start()]
        closed_at = len(plain)
        if (before or after) and plain and not plain.endswith(" "):
            plain += " "
        order.append(slash + number)
        places[slash + number] = closed_at if slash else len(plain)
        end = marker.end()
    if order not in _ORDERS:
        raise DataError(
            f"{place}: expected <e1> </e1> and <e2> </e2> once each, neither within the other, came "
            f"{' '.join(f'<{one[:-1]}e{one[-1]}>' for one in order) or 'no marker'}. Mend or remove the line."
        )
    plain = (plain + marked[end:]).rstrip()
    head, tail = (places["1"], places["/1"]), (places["2"], places["/2"])
    for number, (start, stop) in (("1", head), ("2", tail)):
        if start >= stop:
            raise DataError(f"{place}: expected words between <e{number}> and </e{number}>, came none. Mend the line.")
    return plain, head, tail


def _of_words(record: Mapping[str, Any], tokens: str, head: str, tail: str, place: str) -> tuple[str, Span, Span]:
    """Returns the words joined by a space, and the characters of head and tail."""
    words = string_list(record, tokens, place)
    spans = [_word_span(record, field, words, place) for field in (head, tail)]
    (first_start, first_end), (second_start, second_end) = spans
    if first_start < second_end and second_start < first_end:
        raise DataError(
            f"{place}: fields {head!r} and {tail!r}: expected entities that do not overlap, came the words "
            f"{first_start} to {first_end - 1} and {second_start} to {second_end - 1}. Mend or remove the line."
        )
    starts, position = [], 0
    for word in words:
        starts.append(position)
        position += len(word) + 1
    characters = [(starts[start], starts[end - 1] + len(words[end - 1])) for start, end in spans]
    return " ".join(words), characters[0], characters[1]


def _word_span(record: Mapping[str, Any], field: str, words: Sequence[str], place: str) -> Span:
    """Returns the words of an entity's first span, start and exclusive end."""
    entity = present(record, field, place, "an entity with the field 'spans'")
    spans = entity.get("spans") if isinstance(entity, dict) else None
    place = f"{place}: field {field!r}"
    if not isinstance(spans, list) or not spans or not isinstance(spans[0], list) or not spans[0]:
        raise DataError(
            f"{place}: expected 'spans', a list of lists of word places such as [[2, 3]], came {str(entity)[:80]}."
        )
    span = spans[0]
    if any(type(number) is not int for number in span) or span != list(range(span[0], span[0] + len(span))):
        raise DataError(f"{place}: expected adjacent word places in order, such as [2, 3], came {str(span)[:80]}.")
    if span[0] < 0 or span[-1] >= len(words):
        raise DataError(f"{place}: expected word places from 0 to {len(words) - 1}, came {span}. Mend the line.")
    if not "".join(words[span[0] : span[-1] + 1]).strip():
        raise DataError(f"{place}: expected words at the places {span}, came white space. Mend or remove the line.")
    return span[0], span[-1] + 1
