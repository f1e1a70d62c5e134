"""Warm-up examples made from passages alone: what joint training stands on.

Joint training does not start from a random retriever and an untrained reader (Lewis et al. 2020 start from DPR and
BART). Where no such models fit, these make the examples that warm both up, without a single labelled question:

- ``inverse_cloze``: a sentence asks for the passage that it was taken from (Lee et al. 2019, §5), for ``contrastive``;
- ``span_copy``: a hole asks for the words that fill it, found in the passage (as BART's text infilling, Lewis et al.
  2020), for ``denoising``: teaches to find a place in the passage and to copy;
- ``substitute_entities``: rare words are renamed alike in passage, question and answer (Longpre et al. 2021), so that
  an answer can only be read, not remembered.

All are functions of text and of a ``random.Random``; the same generator state gives the same example.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.sentences import sentences
from rag_lightning.types import Passage

_WORD = re.compile(r"[^\W_]+")
_TRIES = 50  # draws from a pool before it is searched through


def inverse_cloze(passage: Passage, rng: random.Random, keep_probability: float = 0.1) -> tuple[str, str]:
    """Returns a sentence of the passage as pseudo-question, and the text without it.

    Args:
        passage: Split at sentence ends.
        rng: Draws the sentence.
        keep_probability: How often the sentence stays in the text, so that matching words is learned too (Lee et al.
            2019 use 0.1). A passage of one sentence always keeps it.

    Raises:
        ConfigError: ``keep_probability`` is no probability.

    >>> passage = Passage(id="1", title="Kismet", text="A film. It sings.")
    >>> inverse_cloze(passage, random.Random(1), keep_probability=0.0)
    ('A film.', 'It sings.')
    """
    if not 0.0 <= keep_probability <= 1.0:
        raise ConfigError(f"inverse cloze: expected keep_probability between 0 and 1, came {keep_probability}.")
    parts = sentences(passage.text)
    chosen = rng.randrange(len(parts))
    keep = rng.random() < keep_probability
    rest = parts if keep or len(parts) == 1 else parts[:chosen] + parts[chosen + 1 :]
    return parts[chosen], " ".join(rest)


def span_repeat(passage: Passage, rng: random.Random, *, min_words: int = 2, max_words: int = 5) -> tuple[str, str]:
    """Returns consecutive words of the passage as question, and the same words as answer: the plainest copying.

    A reader learns to copy from it before it learns what to copy; :func:`span_copy` asks for both at once and takes
    several times as many steps to start.

    Raises:
        ConfigError: Limits below 1 or in the wrong order.
        DataError: The passage has no word.

    >>> span_repeat(Passage(id="1", title="Kismet", text="A film."), random.Random(0))
    ('Kismet A film.', 'Kismet A film.')
    """
    if not 1 <= min_words <= max_words:
        raise ConfigError(f"span repeat: expected 1 <= min_words <= max_words, came {min_words} and {max_words}.")
    words = f"{passage.title} {passage.text}".split()
    if not words:
        raise DataError(f"span repeat: expected a passage with words, came passage {passage.id!r}, which is empty.")
    length = min(rng.randint(min_words, max_words), len(words))
    start = rng.randrange(len(words) - length + 1)
    span = " ".join(words[start : start + length])
    return span, span


def span_copy(
    passage: Passage,
    rng: random.Random,
    *,
    mask: str = "<mask>",
    max_span_words: int = 5,
    context_words: int = 6,
    salient_probability: float = 0.5,
) -> tuple[str, str]:
    """Returns words of the passage with a hole as question, and the words of the hole as answer.

    Args:
        passage: At least one word.
        rng: Draws the span.
        mask: What stands for the hole, the tokenizer's mask token.
        max_span_words: The longest answer.
        context_words: Words of the passage kept on each side of the hole.
        salient_probability: How often the span is a run of capitalised words or numbers (a name, a year), where the
            passage has one.

    Raises:
        ConfigError: A limit below 1.
        DataError: The passage has no word.

    >>> passage = Passage(id="1", title="Kismet", text="it was made by John Ford.")
    >>> span_copy(passage, random.Random(0), salient_probability=1.0)
    ('it was made by <mask>.', 'John Ford')
    """
    if max_span_words < 1 or context_words < 1:
        raise ConfigError(
            f"span copy: expected max_span_words and context_words of at least 1, came {max_span_words} and "
            f"{context_words}."
        )
    words = passage.text.split()
    sayable = [position for position, word in enumerate(words) if _WORD.search(word)]
    if not sayable:
        raise DataError(
            f"span copy: expected a passage with words, came passage {passage.id!r}: {passage.text[:80]!r}."
        )
    salient = _salient_spans(words, max_span_words)
    if salient and rng.random() < salient_probability:
        start, stop = rng.choice(salient)
    else:
        start = rng.choice(sayable)
        stop = min(start + rng.randint(1, max_span_words), len(words))
    span = " ".join(words[start:stop])
    first, last = _sayable_part(span)
    hole = span[:first] + mask + span[last:]
    return " ".join([*words[max(0, start - context_words) : start], hole, *words[stop : stop + context_words]]), span[
        first:last
    ]


def substitute_entities(
    passage_text: str,
    question: str,
    answers: str,
    rare: Callable[[str], bool],
    pool: Sequence[str],
    rng: random.Random,
) -> tuple[str, str, str]:
    """Returns the three texts with each rare word renamed, alike in all three.

    Different words get different names, none of which occurs in the texts; everything that is no word stays, and so
    does the pattern of capitals. A number is renamed to a number of the pool, or stays where the pool has none.

    Args:
        passage_text: The passage.
        question: Its question.
        answers: Its answer (or several in one string).
        rare: Whether a word, in lower case, is to be renamed; such as ``frozenset(rare_words(…)).__contains__``.
        pool: Words to draw from, such as :func:`rare_words` gives.
        rng: Draws the names.

    Raises:
        ConfigError: The pool has too few words for the rare words of these texts.

    >>> rare = {"kismet"}.__contains__
    >>> substitute_entities("KISMET, by Ford.", "who made Kismet?", "Ford", rare, ["zulu"], random.Random(0))
    ('ZULU, by Ford.', 'who made Zulu?', 'Ford')
    """
    texts = (passage_text, question, answers)
    present = {word.lower() for text in texts for word in _WORD.findall(text)}
    taken = set(present)
    names: dict[str, str] = {}
    for word in sorted(present):
        if not rare(word):
            continue
        name = _draw_name(pool, word.isdecimal(), taken, rng)
        if name is None and not word.isdecimal():
            raise ConfigError(
                f"entity substitution: expected a pool with a word for each of {sum(map(rare, present))} rare "
                f"words that is not in the texts, came a pool of {len(pool)}. "
                "Give a larger pool (raise max_count of rare_words)."
            )
        if name is not None:
            names[word] = name
            taken.add(name)
    passage_text, question, answers = (_rename(text, names) for text in texts)
    return passage_text, question, answers


def rare_words(texts: Iterable[str], max_count: int, min_count: int = 1) -> list[str]:
    """Returns the words, in lower case and sorted, that occur ``min_count`` to ``max_count`` times in the texts.

    Raises:
        ConfigError: ``max_count`` is below 1.

    >>> rare_words(["the cat", "The dog"], max_count=1)
    ['cat', 'dog']
    """
    if max_count < 1:
        raise ConfigError(f"rare words: expected max_count of at least 1, came {max_count}. Raise it.")
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    return sorted(word for word, count in counts.items() if min_count <= count <= max_count)


def _salient_spans(words: Sequence[str], max_span_words: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of runs of words that start with a capital or a digit; runs end after punctuation."""
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for position, word in enumerate(words):
        match = _WORD.search(word)
        salient = match is not None and (match[0][0].isupper() or match[0][0].isdigit())
        if start is None and salient:
            start = position
        if start is not None and not salient:
            spans.append((start, position))
            start = None
        elif start is not None and (
            position + 1 == len(words) or position + 1 - start == max_span_words or word[-1] in ",.;:!?)"
        ):
            spans.append((start, position + 1))
            start = None
    return spans


def _sayable_part(span: str) -> tuple[int, int]:
    """Returns where the first word of a span starts and its last ends: punctuation around them is no answer."""
    matches = list(_WORD.finditer(span))
    return matches[0].start(), matches[-1].end()


def _draw_name(pool: Sequence[str], number: bool, taken: set[str], rng: random.Random) -> str | None:
    """Returns a word of the pool that is not taken, a number or not as asked; None where there is none."""
    for _ in range(_TRIES if pool else 0):
        name = rng.choice(pool).lower()
        if name not in taken and name.isdecimal() == number:
            return name
    free = sorted({name.lower() for name in pool if name.lower() not in taken and name.isdecimal() == number})
    return rng.choice(free) if free else None


def _rename(text: str, names: dict[str, str]) -> str:
    def renamed(match: re.Match[str]) -> str:
        word = match[0]
        name = names.get(word.lower())
        if name is None:
            return word
        if len(word) > 1 and word.isupper():
            return name.upper()
        return name[0].upper() + name[1:] if word[0].isupper() else name

    return _WORD.sub(renamed, text)
