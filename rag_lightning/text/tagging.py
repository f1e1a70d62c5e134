"""Entity tags of words, and the words of a sentence among the word pieces of a tokenizer.

Tags: in BIO, the form used everywhere else, ``B-LOC`` begins a mention, ``I-LOC`` goes on with it and ``O`` is outside.
IOB1 (Ramshaw and Marcus 1995) begins a mention with ``I-`` too, and has ``B-`` only where it touches another of its
type. BIOES has ``S-`` for a mention of one word and ``E-`` for the last of several. A tag that breaks its form is read
as conlleval reads it: ``I-`` (or ``E-``) where no mention of its type goes on begins one.

Pieces: a tagger reads each word at its first piece, so it must know where that lies.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rag_lightning.errors import ConfigError, DataError

OUTSIDE = "O"
TAG_FORM = "O, or B-, I-, E- or S- and an entity type, such as 'B-LOC'"
Tags = tuple[str, ...]
Scheme = Literal["BIO", "IOB1", "BIOES"]
_PROBE = ("new", "york")


def entity_type(tag: str) -> str:
    """Returns the entity type of a tag, empty for ``O``.

    >>> entity_type("B-creative-work")
    'creative-work'
    """
    return tag[2:]


def is_tag(tag: str) -> bool:
    """Whether a string is a tag of any of the three forms."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-", "E-", "S-") and bool(tag[2:].strip()))


def tag_scheme(sentences: Iterable[Sequence[str]]) -> Scheme:
    """Returns the form of a file's tags, by rule.

    BIOES if any tag is ``E-`` or ``S-``. IOB1 if some ``I-`` begins a mention and every ``B-`` follows a mention of its
    type, as IOB1 alone asks for. Else BIO.

    Args:
        sentences: The tags of each sentence.

    >>> tag_scheme([["I-LOC", "O"], ["I-PER", "B-PER"]]), tag_scheme([["B-LOC", "O"], ["O", "I-PER"]])
    ('IOB1', 'BIO')
    """
    begins_inside, begins_apart = False, False
    for tags in sentences:
        before = OUTSIDE
        for tag in tags:
            if tag[0] in "ES":
                return "BIOES"
            follows = tag != OUTSIDE and entity_type(before) == entity_type(tag)
            begins_inside |= tag[0] == "I" and not follows
            begins_apart |= tag[0] == "B" and not follows
            before = tag
    return "IOB1" if begins_inside and not begins_apart else "BIO"


def repaired(tags: Sequence[str]) -> tuple[Tags, int]:
    """Returns BIO tags in which each mention begins with ``B-``, and how many ``I-`` had to become ``B-``.

    >>> repaired(["O", "I-LOC", "I-LOC", "I-PER"])
    (('O', 'B-LOC', 'I-LOC', 'B-PER'), 2)
    """
    mended, num_repairs, before = [], 0, OUTSIDE
    for tag in tags:
        wrong = tag[0] == "I" and entity_type(before) != entity_type(tag)
        mended.append(f"B-{entity_type(tag)}" if wrong else tag)
        num_repairs += wrong
        before = tag
    return tuple(mended), num_repairs


def from_iob1(tags: Sequence[str]) -> Tags:
    """Returns IOB1 tags in BIO.

    >>> from_iob1(["I-LOC", "I-LOC", "B-LOC", "O"])
    ('B-LOC', 'I-LOC', 'B-LOC', 'O')
    """
    return repaired(tags)[0]


def from_bioes(tags: Sequence[str]) -> Tags:
    """Returns BIOES tags in BIO; an ``I-`` or ``E-`` where no mention of its type goes on begins one.

    >>> from_bioes(["S-LOC", "B-PER", "E-PER", "E-PER"])
    ('B-LOC', 'B-PER', 'I-PER', 'B-PER')
    """
    converted, open_type = [], ""
    for tag in tags:
        kind = entity_type(tag)
        goes_on = tag[0] in "IE" and kind == open_type
        converted.append(tag if tag == OUTSIDE else f"{'I' if goes_on else 'B'}-{kind}")
        open_type = kind if tag[0] in "BI" else ""
    return tuple(converted)


def to_bioes(tags: Sequence[str]) -> Tags:
    """Returns BIO tags in BIOES, mended as :func:`repaired` mends them.

    >>> to_bioes(["B-LOC", "O", "B-PER", "I-PER"])
    ('S-LOC', 'O', 'B-PER', 'E-PER')
    """
    converted = [OUTSIDE] * len(tags)
    for start, end, kind in bio_spans(tags):
        prefixes = "S" if end == start + 1 else "B" + "I" * (end - start - 2) + "E"
        converted[start:end] = [f"{prefix}-{kind}" for prefix in prefixes]
    return tuple(converted)


def bio_spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Returns the mentions in BIO (or IOB1) tags: first word, word after the last, entity type.

    >>> bio_spans(["B-LOC", "I-LOC", "B-LOC", "O", "I-PER"])
    [(0, 2, 'LOC'), (2, 3, 'LOC'), (4, 5, 'PER')]
    """
    spans: list[tuple[int, int, str]] = []
    for position, tag in enumerate(repaired(tags)[0]):
        if tag[0] == "B":
            spans.append((position, position + 1, entity_type(tag)))
        elif tag[0] == "I":
            spans[-1] = (spans[-1][0], position + 1, spans[-1][2])
    return spans


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that cannot take a sentence as words, or would run them together.

    Words are encoded as the tokenizer encodes them between spaces, also those of a language without spaces.

    Raises:
        ConfigError: A slow tokenizer, or one that encodes a word apart otherwise than in its sentence.
    """
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ConfigError(f"tagging: expected a fast tokenizer, which knows where words are, came {name}.")
    apart = tokenizer(list(_PROBE), is_split_into_words=True)["input_ids"]
    together = [tokenizer(text)["input_ids"] for text in (" ".join(_PROBE), f" {' '.join(_PROBE)}")]
    if apart not in together:
        raise ConfigError(
            f"tagging: expected a tokenizer that encodes words apart as in a sentence, but {name} leaves out their "
            "space. Load it with add_prefix_space=True."
        )


def first_pieces(words_L: Sequence[int | None], num_words: int) -> list[int]:
    """Returns the place of each word's first piece; -1 for one that was cut off, or has none (control characters).

    Args:
        words_L: The word that each piece belongs to; None for special tokens and other texts.
        num_words: How many there are.

    >>> first_pieces([None, 0, 1, 1, None], num_words=3)
    [1, 2, -1]
    """
    places = [-1] * num_words
    for place, word in enumerate(words_L):
        if word is not None and places[word] < 0:
            places[word] = place
    return places


def unknown_share(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Returns the share of the tokens of texts that are the unknown token; special tokens do not count.

    A tokenizer that falls back on bytes knows every text: its share is 0, whatever it was trained on.

    Raises:
        DataError: The texts have no tokens.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    num_tokens = sum(len(row) for row in rows)
    if not num_tokens:
        raise DataError(
            f"expected texts with at least one token of {type(tokenizer).__name__}, came {len(rows)} texts without."
        )
    unknown = tokenizer.unk_token_id
    return sum(one == unknown for one in chain.from_iterable(rows)) / num_tokens if unknown is not None else 0.0


def check_language(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, allow: bool = False, limit: float = 0.2
) -> float:
    """Refuses a tokenizer that does not know the texts' words, as one of English does not know Chinese.

    Args:
        texts: A sample of what is to be read.
        tokenizer: The model's.
        allow: Whether to let it through all the same.
        limit: The largest share of unknown tokens, from 0 to 1.

    Returns:
        The share of unknown tokens; see :func:`unknown_share`.

    Raises:
        DataError: A larger share, unless allowed.
    """
    share = unknown_share(texts, tokenizer)
    if share > limit and not allow:
        raise DataError(
            f"expected a tokenizer that knows the texts, with at most {limit:.0%} unknown tokens; came {share:.0%} "
            f"with {tokenizer.name_or_path or type(tokenizer).__name__}. Choose a tokenizer and model of the texts' "
            "language, or allow unknown tokens."
        )
    return share
