"""Questions made of passages by masking: what retrieval-augmented pre-training asks.

- ``mask_salient_span``: a sentence without one of its names or dates (salient-span masking, REALM, Guu et al. 2020,
  §3.4): the hole asks for knowledge, so that looking it up helps;
- ``corrupt_spans``: a text without several short spans at random places (span corruption, T5, Raffel et al. 2020,
  §3.1.4; text infilling, BART, Lewis et al. 2020): most holes ask for language, some for knowledge.

The passage itself is not part of the question: it is to be found, or another that says the same. Both are functions of
text and of a ``random.Random``; the same generator state gives the same question.
"""

import random
import re
from collections.abc import Collection
from itertools import pairwise
from typing import get_args

from rag_lightning.corpora.salient import SpanKind, salient_spans
from rag_lightning.errors import ConfigError
from rag_lightning.text.sentences import sentence_spans
from rag_lightning.types import Passage

DEFAULT_KINDS: tuple[SpanKind, ...] = ("date", "entity")


def mask_salient_span(
    passage: Passage,
    rng: random.Random,
    *,
    mask: str = "<mask>",
    kinds: Collection[SpanKind] = DEFAULT_KINDS,
    with_title: bool = False,
) -> tuple[str, str] | None:
    """Returns a sentence with one salient span masked, and the span; None where the passage has none to mask.

    Each span of the passage is equally likely. Where its words occur in the sentence more than once, all are masked.

    Args:
        passage: Its text is read; its title tells names.
        rng: Draws the span.
        mask: What stands for the hole, the tokenizer's mask token.
        kinds: Which spans: ``date``, ``entity``, ``number``.
        with_title: Writes the title before the sentence, unless the answer is in it: "It was released in <mask>." asks
            for nothing that could be found.

    Raises:
        ConfigError: An empty mask or an unknown kind.

    >>> passage = Passage(id="1", title="Kismet", text="A film of 1955. It was made by John Ford.")
    >>> mask_salient_span(passage, random.Random(0), with_title=True)
    ('Kismet: It was made by <mask>.', 'John Ford')
    """
    _check_mask(mask)
    unknown = set(kinds) - {*get_args(SpanKind)}
    if unknown or not kinds:
        raise ConfigError(
            f"salient spans: expected kinds among {get_args(SpanKind)}, at least one, came {tuple(kinds)}"
        )
    text = passage.text
    if mask in text or mask in passage.title:
        return None
    spans = [span for span in salient_spans(text, passage.title, numbers="number" in kinds) if span.kind in kinds]
    sentences = list(sentence_spans(text))
    placed = [
        (span, start, end) for span in spans for start, end in sentences if start <= span.start and span.end <= end
    ]
    if not placed:
        return None
    span, start, end = rng.choice(placed)
    answer = text[span.start : span.end]
    before, after = text[start : span.start], text[span.end : end]
    occurrence = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
    question = occurrence.sub(lambda _: mask, before) + mask + occurrence.sub(lambda _: mask, after)
    if with_title and occurrence.search(passage.title) is None:
        question = f"{passage.title}: {question}"
    return question, answer


def corrupt_spans(
    text: str, rng: random.Random, *, mask: str = "<mask>", mask_share: float = 0.15, mean_span_words: float = 3.0
) -> tuple[str, str] | None:
    """Returns a text with spans of words masked, and those spans in order, parted by the mask sign.

    Of n words, ``round(mask_share · n)`` are masked, at least one and not all, in as many spans as the mean length
    says, each at least one word from the next. Lengths and places are drawn evenly among all such divisions, as T5
    divides its noise; lengths are then near geometric. Filling the holes by the answer's parts gives the text back.

    Args:
        text: At least two words.
        rng: Draws lengths and places.
        mask: What stands for a hole. T5 numbers its holes; one sign for all keeps to the tokenizer's one mask token.
        mask_share: Share of words masked, 0.15 in T5.
        mean_span_words: Mean length of a span, 3 in T5 and in BART.

    Returns:
        Question and answer; None for a text of fewer than two words, or one that holds the mask sign.

    Raises:
        ConfigError: A share not between 0 and 1, a mean length below 1, an empty mask.

    >>> corrupt_spans("a film of 1955 made by John Ford", random.Random(0), mask_share=0.5, mean_span_words=2.0)
    ('<mask> of 1955 made <mask> Ford', 'a film <mask> by John')
    """
    _check_mask(mask)
    if not 0 < mask_share < 1:
        raise ConfigError(f"random spans: expected mask_share between 0 and 1, came {mask_share}")
    if not mean_span_words >= 1:
        raise ConfigError(f"random spans: expected mean_span_words of at least 1, came {mean_span_words}")
    words = [match.span() for match in re.finditer(r"\S+", text)]
    if len(words) < 2 or mask in text:
        return None
    num_masked = min(max(1, round(mask_share * len(words))), len(words) - 1)
    num_kept = len(words) - num_masked
    num_spans = min(max(1, round(num_masked / mean_span_words)), num_kept + 1)
    lengths = _parts(num_masked, num_spans, rng)
    # the outer gaps may be empty: one more word each, taken off again
    gaps = _parts(num_kept + 2, num_spans + 1, rng)
    place, first = gaps[0] - 1, 0
    pieces, answers = [], []
    for length, gap in zip(lengths, gaps[1:], strict=True):
        start, end = words[place][0], words[place + length - 1][1]
        pieces += [text[first:start], mask]
        answers.append(text[start:end])
        place, first = place + length + gap, end
    return "".join([*pieces, text[first:]]), f" {mask} ".join(answers)


def _parts(total: int, count: int, rng: random.Random) -> list[int]:
    """Returns ``count`` numbers of at least 1 that add up to ``total``, drawn evenly among all such."""
    cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [high - low for low, high in pairwise(cuts)]


def _check_mask(mask: str) -> None:
    if not mask.strip():
        raise ConfigError(f"masking: expected a sign that stands for a hole, came {mask!r}")
