"""How heads' inputs are written: a text alone, or a text and a passage, as a pair of one tokenizer.

Inputs: the records of a task and, with retrieval, the passages of each. A tagged sentence is given as words, so that
each tag's place is known: that of the first piece of its word (Devlin et al. 2019, §5.3). A relation's two entities are
marked by signs of the vocabulary, ``@ head @`` and ``# tail #`` (Zhou and Chen 2022, §3.1), so that no new token has to
be learned; each is read at its first sign (Baldini Soares et al. 2019, "entity start").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.tagging import first_pieces
from rag_lightning.types import LabelledText, Passage, RelationMention, TaggedSentence, TensorRecord, TokenBatch

TaskExample = LabelledText | TaggedSentence | RelationMention
HEAD_SIGN, TAIL_SIGN = "@", "#"


@dataclass(frozen=True)
class Reading(TensorRecord):
    """Texts as a reader takes them, and where their heads look.

    Attributes:
        tokens: N rows.
        token_type_ids: 0 on the text, 1 on the passage behind it; None for a tokenizer that does not tell.
        places: Token positions that a head reads, ``[N, W]``: first pieces of words, or the signs of two entities;
            ``-1`` where there is none (padding, or cut off). None where a head reads the whole text.
    """

    tokens: TokenBatch
    token_type_ids: Int[Tensor, "N L"] | None
    places: Int[Tensor, "N W"] | None


def query_text(example: TaskExample) -> str:
    """Returns what is searched for: the text, with its context where one is given.

    >>> query_text(TaggedSentence("1", ("Anna", "sings"), ("B-PER", "O")))
    'Anna sings'
    """
    if isinstance(example, TaggedSentence):
        return " ".join(example.words)
    if isinstance(example, LabelledText) and example.context is not None:
        return f"{example.text} {example.context}"
    return example.text


def marked(mention: RelationMention) -> tuple[str, int, int]:
    """Returns a mention's text with signs around its entities, and where the signs before head and tail stand.

    Raises:
        DataError: An entity lies outside the text, is empty, or the two overlap.

    >>> marked(RelationMention("1", "smoke from fire", (0, 5), (11, 15), "Cause-Effect"))
    ('@ smoke @ from # fire #', 0, 15)
    """
    (head, tail), length = (mention.head, mention.tail), len(mention.text)
    if not all(0 <= start < end <= length for start, end in (head, tail)) or max(head[0], tail[0]) < min(
        head[1], tail[1]
    ):
        raise DataError(
            f"relation {mention.id!r}: expected two spans that do not overlap within its {length} characters, came "
            f"{head} and {tail}"
        )
    text, starts = mention.text, {}
    for (start, end), sign in sorted([(head, HEAD_SIGN), (tail, TAIL_SIGN)], reverse=True):
        text = f"{text[:start]}{sign} {text[start:end]} {sign}{text[end:]}"
    shift = len(f"{HEAD_SIGN}  {HEAD_SIGN}")
    starts = {"head": head[0] + (shift if tail < head else 0), "tail": tail[0] + (shift if head < tail else 0)}
    return text, starts["head"], starts["tail"]


def read(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TaskExample],
    passages: Sequence[Sequence[Passage]] | None,
    *,
    max_tokens: int,
    passage_template: str = "{text} : {title}",
) -> Reading:
    """Returns one row for each example, or K for each where passages are given.

    A text that is too long is cut, and its passage first.

    Args:
        tokenizer: A fast one, the reader's.
        examples: All of one kind.
        passages: K for each example; an empty title and text where nothing was found.
        max_tokens: Longest row, special tokens included.
        passage_template: How a passage is written; ``{title}``, ``{text}``. A labelled example's title is its label.

    Raises:
        ConfigError: A tokenizer that does not know its pieces' places.
        DataError: A text without a token, or an entity that was cut off.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"reader.tokenizer: expected a fast tokenizer, which knows where its pieces stand in the text, came "
            f"{type(tokenizer).__name__}. Convert it (tokenizer.json), or choose another model."
        )
    num_passages = 1 if passages is None else len(passages[0])
    rows = [example for example in examples for _ in range(num_passages)]
    seconds = None
    if passages is not None:
        seconds = [
            passage_template.format(title=p.title, text=p.text) if p.text else "" for each in passages for p in each
        ]
    encoded, signs = _encoded(tokenizer, rows, seconds, max_tokens)
    places = _places(encoded, rows, signs)
    mask_NL = encoded["attention_mask"]
    tokens = TokenBatch(encoded["input_ids"], mask_NL, lengths=tuple(mask_NL.sum(dim=1).tolist()))
    return Reading(tokens, encoded.get("token_type_ids"), places)


def _encoded(
    tokenizer: Any, rows: Sequence[TaskExample], seconds: Sequence[str] | None, max_tokens: int
) -> tuple[Any, list[tuple[int, int]]]:
    signs: list[tuple[int, int]] = []
    words = isinstance(rows[0], TaggedSentence)
    firsts: list[Any] = []
    for row in rows:
        if isinstance(row, TaggedSentence):
            firsts.append(list(row.words))
        elif isinstance(row, RelationMention):
            text, head, tail = marked(row)
            firsts.append(text)
            signs.append((head, tail))
        else:
            firsts.append(row.text)
    pairs: list[Any] | None = None
    if isinstance(rows[0], LabelledText) and any(isinstance(row, LabelledText) and row.context for row in rows):
        contexts = [row.context or "" for row in rows if isinstance(row, LabelledText)]
        joined = zip(contexts, seconds, strict=True) if seconds is not None else None
        pairs = [f"{one} {other}" for one, other in joined] if joined is not None else contexts
    elif seconds is not None:
        pairs = [second.split() for second in seconds] if words else list(seconds)
    fits = pairs is not None and _fit(tokenizer, firsts, words, max_tokens)
    encoded = tokenizer(
        firsts,
        pairs,
        is_split_into_words=words,
        truncation="only_second" if fits else "longest_first",
        max_length=max_tokens,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return encoded, signs


def _fit(tokenizer: Any, firsts: Sequence[Any], words: bool, max_tokens: int) -> bool:
    """Returns whether every text alone leaves room for a second one."""
    alone = tokenizer(firsts, is_split_into_words=words, add_special_tokens=True)["input_ids"]
    return max(map(len, alone)) < max_tokens - 4


def _places(encoded: Any, rows: Sequence[TaskExample], signs: Sequence[tuple[int, int]]) -> Int[Tensor, "N W"] | None:
    if signs:
        found = [[_token_at(encoded, row, place) for place in pair] for row, pair in enumerate(signs)]
        for row, pair in enumerate(found):
            if -1 in pair:
                raise DataError(
                    f"relation {rows[row].id!r}: expected both entities within the reader's tokens, but the text was "
                    "cut before one. Raise reader.max_tokens, or shorten the text."
                )
        return torch.tensor(found)
    if not isinstance(rows[0], TaggedSentence):
        return None
    width = max(len(row.words) for row in rows if isinstance(row, TaggedSentence))
    places = torch.full((len(rows), width), -1)
    for row in range(len(rows)):
        of_text = zip(encoded.word_ids(row), encoded.sequence_ids(row), strict=True)
        words = [word if sequence == 0 else None for word, sequence in of_text]
        places[row] = torch.tensor(first_pieces(words, width))
    return places


def _token_at(encoded: Any, row: int, character: int) -> int:
    token = encoded.char_to_token(row, character, sequence_index=0)
    return -1 if token is None else int(token)
