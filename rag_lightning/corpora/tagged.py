"""Tagged sentences: words with an entity tag each, from three kinds of files into one form, BIO.

- JSON lines: ``{"id": 0, "tokens": ["Empire", "State"], "tags": ["B-location", "I-location"]}`` (WNUT-17, Wikigold)
- columns as of CoNLL-2003, ``.txt`` or ``.conll``: a word first and its tag last on each line, a blank line after each
  sentence, ``-DOCSTART-`` lines between documents
- JSON lines of spans (CLUENER 2020): ``{"text": "叶老桂认为", "entities": [[0, 3, "name", "叶老桂"]]}``, character
  offsets, end exclusive; each character is a word

IOB1, BIO and BIOES tags are told apart by rule (:func:`~rag_lightning.text.tagging.tag_scheme`). A tag that breaks its
scheme is mended by rule, and one warning for the file says how many were.
"""

import gzip
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rag_lightning.corpora.passages import resolve, string_field
from rag_lightning.corpora.records import at_least_one, identified_lines, json_lines_file, present, string_list
from rag_lightning.errors import DataError
from rag_lightning.text.tagging import TAG_FORM, from_bioes, is_tag, repaired, tag_scheme, to_bioes
from rag_lightning.types import TaggedSentence
from rag_lightning.utils.io import existing_file, open_text

logger = logging.getLogger(__name__)
_GAP = re.compile(r"[ \t]+")
_DOCUMENT = "-DOCSTART-"
Span = tuple[int, int, str]  # first character, character after the last, entity type


def read_tagged(path: str | Path, *, tokens: str = "tokens", tags: str = "tags") -> list[TaggedSentence]:
    """Returns the sentences of a file of words and tags, in order; see the module's description for the two forms.

    Args:
        path: As :func:`~rag_lightning.corpora.passages.resolve` takes it; ``.gz`` is opened.
        tokens: The field of the words; of JSON lines only.
        tags: The field of the tags; of JSON lines only.

    Raises:
        MissingFileError: No such file.
        DataError: No sentence, a repeated id, a sentence without words or with more or fewer tags than words, or an
            unknown tag; names file, line, field, what was expected and what came.
    """
    file = existing_file(resolve(path), "tagged sentences")
    name = file.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        sentences = [_json_sentence(*line, tokens, tags) for line in identified_lines(file)]
    elif name.endswith((".txt", ".conll")):
        sentences = list(_column_sentences(file))
    else:
        raise DataError(
            f"tagged sentences: expected a file ending in .jsonl, .txt or .conll (or these with .gz), came {file}. "
            "Rename or convert it."
        )
    return _in_bio(at_least_one(sentences, file, "sentence"), file)


def read_spans(
    path: str | Path,
    *,
    text: str = "text",
    entities: str = "entities",
    nested: Literal["refuse", "outermost"] = "refuse",
) -> list[TaggedSentence]:
    """Returns the texts of a file of entity spans as sentences whose words are their characters, in order.

    Args:
        path: A ``.jsonl`` or ``.jsonl.gz`` file, as :func:`~rag_lightning.corpora.passages.resolve` takes it.
        text: The field of the text.
        entities: The field of the entities: lists of start, exclusive end, type and the string between the two.
        nested: What to do with an entity within another, which one tag for each character cannot say (CLUENER's
            training data has two): refuse the file, or keep the outermost and log how many were left out.

    Raises:
        MissingFileError: No such file.
        DataError: No text, a repeated id, a bad field, or a span that is out of range, overlaps another or whose string
            is not that of the text; names file, line, field, what was expected and what came.
    """
    file = json_lines_file(path, "entity spans")
    sentences, num_left_out = [], 0
    for place, record_id, record in identified_lines(file):
        characters = string_field(record, text, place)
        spans = _checked_spans(record, entities, characters, place)
        if nested == "outermost":
            outermost = _outermost(spans)
            num_left_out += len(spans) - len(outermost)
            spans = outermost
        _check_apart(spans, f"{place}: field {entities!r}")
        sentences.append(TaggedSentence(record_id, tuple(characters), _span_tags(spans, len(characters))))
    if num_left_out:
        logger.warning("%s: %d entities lie within others and were left out", file, num_left_out)
    return at_least_one(sentences, file, "text")


def _json_sentence(place: str, record_id: str, record: Mapping[str, Any], tokens: str, tags: str) -> TaggedSentence:
    words = string_list(record, tokens, place)
    labels = string_list(record, tags, place)
    if len(labels) != len(words):
        raise DataError(
            f"{place}: field {tags!r}: expected one tag for each of the {len(words)} {tokens}, came {len(labels)}. "
            "Mend or remove the line."
        )
    for position, tag in enumerate(labels):
        _check_tag(tag, f"{place}: field {tags!r}, position {position}")
    return TaggedSentence(id=record_id, words=tuple(words), tags=tuple(labels))


def _column_sentences(file: Path) -> Iterator[TaggedSentence]:
    """Yields sentences with the line number of their first word as id."""
    number, first, pairs = 0, 0, list[tuple[str, str]]()
    try:
        with open_text(file) as stream:
            for number, line in enumerate(stream, start=1):
                pair = _word_and_tag(line, f"{file}, line {number}")
                if pair is not None:
                    first = first or number
                    pairs.append(pair)
                elif pairs:
                    yield _from_pairs(first, pairs)
                    first, pairs = 0, []
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{file}, after line {number}: the file is not readable as UTF-8 text: {error}") from error
    if pairs:
        yield _from_pairs(first, pairs)


def _word_and_tag(line: str, place: str) -> tuple[str, str] | None:
    """Returns None on a line that ends a sentence."""
    columns = _GAP.split(line.strip(" \t\r\n"))
    if columns[0] in ("", _DOCUMENT):
        return None
    if len(columns) < 2:
        raise DataError(
            f"{place}: expected a word first and its tag last, with a space or a tab between, came {columns}. Mend the "
            "line; a blank line ends a sentence."
        )
    _check_tag(columns[-1], f"{place}: last column")
    return columns[0], columns[-1]


def _from_pairs(number: int, pairs: list[tuple[str, str]]) -> TaggedSentence:
    return TaggedSentence(id=str(number), words=tuple(word for word, _ in pairs), tags=tuple(tag for _, tag in pairs))


def _check_tag(tag: str, place: str) -> None:
    if not is_tag(tag):
        raise DataError(f"{place}: expected {TAG_FORM}, came {tag!r}. Convert the tags.")


def _in_bio(sentences: list[TaggedSentence], file: Path) -> list[TaggedSentence]:
    """Converts by the scheme of the whole file, and says how many tags broke it."""
    scheme = tag_scheme(sentence.tags for sentence in sentences)
    converted, num_mended = [], 0
    for sentence in sentences:
        if scheme == "BIOES":
            tags = from_bioes(sentence.tags)
            num_mended += sum(old != new for old, new in zip(sentence.tags, to_bioes(tags), strict=True))
        else:
            tags, num_repairs = repaired(sentence.tags)  # of IOB1 too: only there it is no mistake
            num_mended += num_repairs if scheme == "BIO" else 0
        converted.append(TaggedSentence(id=sentence.id, words=sentence.words, tags=tags))
    if scheme != "BIO":
        logger.info("%s: the tags are %s; they are read as BIO", file, scheme)
    if num_mended:
        logger.warning(
            "%s: %d of %d tags break %s (an I- that follows no tag of its type, and the like) and were mended",
            file,
            num_mended,
            sum(len(sentence.tags) for sentence in sentences),
            scheme,
        )
    return converted


def _checked_spans(record: Mapping[str, Any], field: str, text: str, place: str) -> list[Span]:
    """Returns the spans in the order of the text, a longer one before those that it holds."""
    values = present(record, field, place, "a list of [start, end, type, string]")
    place = f"{place}: field {field!r}"
    if not isinstance(values, list):
        raise DataError(f"{place}: expected a list of [start, end, type, string], came {str(values)[:80]!r}.")
    return sorted((_checked_span(value, text, place) for value in values), key=lambda span: (span[0], -span[1]))


def _outermost(spans: list[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in spans:
        if not kept or span[1] > kept[-1][1]:
            kept.append(span)
    return kept


def _check_apart(spans: list[Span], place: str) -> None:
    for span, following in pairwise(spans):
        if following[0] < span[1]:
            raise DataError(
                f"{place}: expected spans that do not overlap, came {list(span)} and {list(following)}. Remove one (a "
                "character has one tag), or read with nested='outermost' if one lies within the other."
            )


def _span_tags(spans: list[Span], num_characters: int) -> tuple[str, ...]:
    tags = ["O"] * num_characters
    for start, end, kind in spans:
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tuple(tags)


def _checked_span(value: Any, text: str, place: str) -> Span:
    shaped = isinstance(value, list) and [type(part) for part in value] == [int, int, str, str]
    if not shaped or not value[2].strip():
        raise DataError(f"{place}: expected [start, end, type, string], came {str(value)[:80]}. Mend the line.")
    start, end, kind, string = value
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{place}: expected 0 <= start < end <= {len(text)}, the characters of the text, came {value}. Mend the "
            "line (the end is exclusive)."
        )
    if text[start:end] != string:
        raise DataError(
            f"{place}: expected the string of characters {start} to {end}, {text[start:end]!r}, came {string!r}. Mend "
            "the line (offsets count characters from 0, the end is exclusive)."
        )
    return start, end, kind
