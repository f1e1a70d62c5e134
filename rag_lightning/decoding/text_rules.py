"""The options that name texts, ``stop`` and ``allowed``, made ready for one generator and its tokenizer.

Stop strings are looked for in the decoded text, not among the tokens: where one text can be cut into tokens in several
ways, or a stop string begins in the middle of a token, no list of token ids finds them all.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rag_lightning.corpora.passages import resolve
from rag_lightning.decoding.constraints import NO_RULES, OutputRules
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.trie import TokenTrie, read_allowed
from rag_lightning.errors import DataError
from rag_lightning.generators.base import Generator

logger = logging.getLogger(__name__)
CHUNK_SIZE = 10_000  # texts tokenised and padded together

TargetTokens = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class StopStrings:
    """Says which outputs hold a stop string.

    Attributes:
        tokenizer: The generator's.
        stop: The strings.
    """

    tokenizer: Any
    stop: Sequence[str]

    def __call__(self, written_NT: Int[Tensor, "N T"]) -> Bool[Tensor, "N"]:
        """Returns True for outputs, start token first, whose text holds a stop string."""
        texts = self.tokenizer.batch_decode(written_NT, skip_special_tokens=True)
        held = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(held, dtype=torch.bool, device=written_NT.device)


def cut_before(text: str, stop: Sequence[str]) -> str:
    """Returns the text up to the first stop string in it.

    >>> cut_before("1912. It was", [" It", "."])
    '1912'
    """
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def text_rules(
    options: DecodingOptions,
    *,
    generator: Generator,
    tokenizer: Any,
    target_tokens: TargetTokens,
    max_target_tokens: int,
) -> OutputRules:
    """Returns the rules that ``stop`` and ``allowed`` stand for.

    Args:
        options: The texts and the file.
        generator: Whose vocabulary.
        tokenizer: Reads and writes it.
        target_tokens: Gives answers the form of training targets; allowed answers get the same.
        max_target_tokens: Where ``target_tokens`` cuts them.

    Raises:
        MissingFileError: There is no such file.
        DataError: An allowed answer that is empty, has no known token, or is too long; names it and its line.
    """
    if options.allowed is None:
        return OutputRules(stops=StopStrings(tokenizer, options.stop)) if options.stop else NO_RULES

    def tokenise(texts: Sequence[str]) -> list[list[int]]:
        rows = []
        for start in range(0, len(texts), CHUNK_SIZE):
            rows += target_tokens(texts[start : start + CHUNK_SIZE]).tolist()
        rows = [[row[0], *(token for token in row[1:] if token != generator.pad_token_id)] for row in rows]
        _refuse_cut(rows, texts, tokenizer, max_target_tokens, str(options.allowed))
        return _with_forced(_known(rows, texts, tokenizer, str(options.allowed)), options.forced_bos_token_id)

    trie = TokenTrie.from_texts(
        read_allowed(resolve(options.allowed)),
        tokenise,
        vocab_size=generator.vocab_size,
        max_new_tokens=options.max_new_tokens,
        source=options.allowed,
    )
    return OutputRules(allowed=trie)


def _refuse_cut(
    rows: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: Any, max_target_tokens: int, source: str
) -> None:
    """Refuses answers of which training targets would hold only the beginning."""
    for line, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
        if len(row) < max_target_tokens:
            continue
        whole = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip()
        if tokenizer.decode(row, skip_special_tokens=True).strip() != whole:
            raise DataError(
                f"{source}, line {line}: expected at most model.max_target_tokens = {max_target_tokens} tokens with "
                f"start and end, came {text[:80]!r}, which is longer. Raise it, or remove the line."
            )


def _known(rows: Sequence[list[int]], texts: Sequence[str], tokenizer: Any, source: str) -> list[list[int]]:
    """Returns the rows, empty where a text has no known token; warns of those with a token that is not known."""
    special = set(tokenizer.all_special_ids)
    partly = [line for line, row in enumerate(rows, start=1) if tokenizer.unk_token_id in row]
    known = [row if set(row) - special else [] for row in rows]
    partly = [line for line in partly if known[line - 1]]
    if partly:
        logger.warning(
            "%s: %d allowed answers have a token that the generator's tokenizer does not know, and will be written "
            "without it; the first is %r on line %d",
            source,
            len(partly),
            texts[partly[0] - 1],
            partly[0],
        )
    return known


def _with_forced(rows: Sequence[list[int]], forced_bos_token_id: int | None) -> list[list[int]]:
    """Returns the rows with the forced first token, where the tokenizer does not write it by itself."""
    if forced_bos_token_id is None:
        return list(rows)
    return [
        row if not row or row[1] == forced_bos_token_id else [row[0], forced_bos_token_id, *row[1:]] for row in rows
    ]
