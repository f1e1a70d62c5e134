"""Labelled examples, altered so that their labels still hold: more examples where labels are few.

Inputs: a record of a task and a random generator made for its place, so that a resumed run alters it alike. The words
of entities stay: a tagged sentence is altered between its mentions, a relation between its entities; a text anywhere.

- ``deletion``, ``swap``: words left out, neighbours exchanged (Wei and Zou 2019, "EDA")
- ``synonyms``: words replaced by a lexicon's (the same)
- ``masking``: spans replaced by the reader's mask token (Devlin et al. 2019, §3.1; Joshi et al. 2020, spans)
- ``entities``: a mention replaced by another of its type (Dai and Adel 2020, "mention replacement")
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.heads.reading import TaskExample
from rag_lightning.text.tagging import bio_spans
from rag_lightning.types import RelationMention, TaggedSentence

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+")
Change = Callable[[Sequence[str], random.Random], list[str]]
"""Alters a stretch of words."""
Augmentation = Callable[[TaskExample, random.Random], TaskExample]


def deletion(rate: float = 0.1) -> Change:
    """Returns a change that leaves each word out with a probability.

    >>> deletion(0.5)(["a", "b", "c", "d"], random.Random(0))
    ['a', 'b']
    """
    _check_rate("deletion", rate)
    return lambda words, rng: [word for word in words if rng.random() >= rate]


def swap(rate: float = 0.1) -> Change:
    """Returns a change that exchanges a word and the next with a probability.

    >>> swap(1.0)(["a", "b", "c"], random.Random(0))
    ['b', 'c', 'a']
    """
    _check_rate("swap", rate)

    def change(words: Sequence[str], rng: random.Random) -> list[str]:
        swapped = list(words)
        for place in range(len(swapped) - 1):
            if rng.random() < rate:
                swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
        return swapped

    return change


def masking(mask: str, rate: float = 0.15, mean_span_words: float = 2.0) -> Change:
    """Returns a change that replaces spans by the mask token, one for each word.

    Args:
        mask: The reader's mask token.
        rate: Of the words, about; so much at most that a word stands between spans.
        mean_span_words: Of a span; lengths are geometric.

    >>> masking("[MASK]", rate=0.5, mean_span_words=1.0)(["a", "b", "c"], random.Random(0))
    ['[MASK]', 'b', '[MASK]']
    """
    _check_rate("masking", rate)
    if not mean_span_words >= 1:
        raise ConfigError(f"augmentation.masking: expected mean_span_words of 1 or more, got {mean_span_words}")
    stays = 1 - 1 / mean_span_words
    begins = rate / (mean_span_words * (1 - rate)) if rate < 1 else 2.0  # so that the rate is what is left in the end
    if begins > 1:
        most = mean_span_words / (mean_span_words + 1)
        raise ConfigError(
            f"augmentation.masking: expected a rate of at most {most:.2f} with spans of {mean_span_words} words, "
            f"got {rate}"
        )

    def change(words: Sequence[str], rng: random.Random) -> list[str]:
        masked, inside = [], False
        for word in words:
            inside = rng.random() < (stays if inside else begins)
            masked.append(mask if inside else word)
        return masked if any(one != mask for one in masked) else list(words)  # what is left must still bear the label

    return change


def synonyms(lexicon: Mapping[str, Sequence[str]], rate: float = 0.1) -> Change:
    """Returns a change that replaces words that the lexicon has by one of their synonyms with a probability.

    Args:
        lexicon: Synonyms of lower-case words; see :mod:`~rag_lightning.methods.augmentation.lexicon`.
        rate: For each word that it has.

    >>> synonyms({"film": ["picture"]}, rate=1.0)(["a", "Film"], random.Random(0))
    ['a', 'picture']
    """
    _check_rate("synonyms", rate)

    def change(words: Sequence[str], rng: random.Random) -> list[str]:
        return [
            rng.choice(lexicon[word.lower()]) if word.lower() in lexicon and rng.random() < rate else word
            for word in words
        ]

    return change


def changed(change: Change) -> Augmentation:
    """Returns an augmentation that applies a change to what lies outside entities.

    An example of which nothing would be left stays as it is.
    """

    def augment(example: TaskExample, rng: random.Random) -> TaskExample:
        if isinstance(example, TaggedSentence):
            return _sentence(example, change, rng)
        if isinstance(example, RelationMention):
            return _relation(example, change, rng)
        words = change(_words(example.text), rng)
        return replace(example, text=_joined(words)) if words else example

    return augment


def entities(sentences: Sequence[TaggedSentence], rate: float = 0.5) -> Augmentation:
    """Returns an augmentation that replaces mentions by others of their type; of tagged sentences alone.

    Args:
        sentences: Whose mentions to take: the training sentences.
        rate: For each mention.

    Raises:
        DataError: There is no mention.
    """
    _check_rate("entities", rate)
    pool: dict[str, list[tuple[str, ...]]] = {}
    for sentence in sentences:
        for start, end, kind in bio_spans(sentence.tags):
            pool.setdefault(kind, []).append(sentence.words[start:end])
    if not pool:
        raise DataError("augmentation.entities: expected training sentences with mentions, came none")

    def augment(example: TaskExample, rng: random.Random) -> TaskExample:
        if not isinstance(example, TaggedSentence):
            return example
        words, tags = list(example.words), list(example.tags)
        for start, end, kind in reversed(bio_spans(example.tags)):
            if rng.random() < rate:
                mention = rng.choice(pool.get(kind, [example.words[start:end]]))
                words[start:end] = mention
                tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (len(mention) - 1)]
        return replace(example, words=tuple(words), tags=tuple(tags))

    return augment


def _sentence(example: TaggedSentence, change: Change, rng: random.Random) -> TaggedSentence:
    words: list[str] = []
    tags: list[str] = []
    place = 0
    for start, end, _ in [*bio_spans(example.tags), (len(example.words), len(example.words), "")]:
        outside = change(example.words[place:start], rng)
        words += [*outside, *example.words[start:end]]
        tags += ["O"] * len(outside) + list(example.tags[start:end])
        place = end
    return replace(example, words=tuple(words), tags=tuple(tags)) if words else example


def _relation(example: RelationMention, change: Change, rng: random.Random) -> RelationMention:
    text, spans, place = "", [], 0
    for start, end in [*sorted((example.head, example.tail)), (len(example.text), len(example.text))]:
        outside = _joined(change(_words(example.text[place:start]), rng))
        text = " ".join(part for part in (text, outside) if part)
        if start < end:
            text += " " if text else ""
            spans.append((len(text), len(text) + end - start))
            text += example.text[start:end]
        place = end
    first, second = spans
    head, tail = (first, second) if example.head < example.tail else (second, first)
    return replace(example, text=text, head=head, tail=tail)


def _words(text: str) -> list[str]:
    """Returns what spaces part, and of Chinese each character, since no space parts its words."""
    return _WORD.findall(text)


def _joined(words: Sequence[str]) -> str:
    """Returns words as one text, without spaces beside Chinese characters."""
    text = ""
    for word in words:
        apart = text and not _CHINESE.match(text[-1]) and not _CHINESE.match(word)
        text += f" {word}" if apart else word
    return text


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate <= 1:
        raise ConfigError(f"augmentation.{name}: expected a rate above 0 and at most 1, got {rate}")
