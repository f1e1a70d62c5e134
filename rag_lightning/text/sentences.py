"""Where sentences end: by rule, for English and the languages written like it."""

import re
from collections.abc import Iterator

# a sentence ends at . ! or ? before a space, but not after an initial ("J. Ford") or a common title
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bJr\.)(?<!\bSr\.)\s+"
)


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields where each sentence starts and ends; the spaces between sentences, and around the text, belong to none.

    >>> text = " It was made by J. Ford. It sings! "
    >>> [text[start:end] for start, end in sentence_spans(text)]
    ['It was made by J. Ford.', 'It sings!']
    """
    stop = len(text.rstrip())
    start = len(text) - len(text.lstrip())
    for match in _SENTENCE_END.finditer(text, start, stop):
        yield start, match.start()
        start = match.end()
    if start < stop:
        yield start, stop


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text.

    >>> sentences("Dr. No is a film. It sings.")
    ['Dr. No is a film.', 'It sings.']
    """
    return [text[start:end] for start, end in sentence_spans(text)]
