"""The whole corpus through the passage tower: what an index snapshot is made of."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.errors import ConfigError
from rag_lightning.retrieval.contexts import pad_sequences
from rag_lightning.text.token_store import TokenStore
from rag_lightning.text.tokenizers import special_affixes
from rag_lightning.types import Passage, TokenBatch
from rag_lightning.utils.distributed import rank
from rag_lightning.utils.transfer import to_device

BATCHES_PER_BLOCK = 32
TokenIds = Sequence[int] | NDArray[np.integer]


class PassageTokens:
    """Passages in the encoder's vocabulary.

    Args:
        encoder: Gives the tokenizer, the template and the limit.
        corpus: The passages.
        store: The corpus tokenised once; without one, passages are tokenised when they are met.
    """

    def __init__(self, *, encoder: BiEncoder, corpus: PassageCorpus, store: TokenStore | None = None) -> None:
        if encoder.tokenizer is None:
            raise ConfigError("this encoder has no tokenizer: give one when loading it")
        self.tokenizer = encoder.tokenizer
        self.encoder = encoder
        self.corpus = corpus
        self.store = store
        self.prefix_ids, self.suffix_ids = special_affixes(encoder.tokenizer)

    def __len__(self) -> int:
        return len(self.corpus)

    def token_ids(self, rows_N: NDArray[np.int64]) -> list[TokenIds]:
        """Returns the ids of some rows, without special tokens; none for row ``-1``."""
        if self.store is not None:
            return list(self.store.gather(rows_N))
        known = iter(self._tokenise([self.corpus[int(row)] for row in rows_N if row >= 0]))
        return [next(known) if row >= 0 else [] for row in rows_N]

    def batch(self, rows_N: NDArray[np.int64]) -> TokenBatch:
        """Returns the passages of some rows, special tokens included; row ``-1`` gives the special tokens alone."""
        return self.padded(self.token_ids(rows_N))

    def batch_of(self, passages: Sequence[Passage]) -> TokenBatch:
        """Returns passages that need not be in the corpus (a cloze passage without its sentence)."""
        return self.padded(self._tokenise(passages))

    def padded(self, tokens: Sequence[TokenIds]) -> TokenBatch:
        """Returns ids with the special tokens around each row and padding behind it, and their mask."""
        before, after = len(self.prefix_ids), len(self.suffix_ids)
        lengths_N = np.asarray([len(ids) for ids in tokens]) + before + after
        width = max(1, int(lengths_N.max()))
        ids_NL = np.full((len(tokens), width), self.tokenizer.pad_token_id, dtype=np.int64)
        ids_NL[:, :before] = self.prefix_ids
        for row, ids in enumerate(tokens):
            ids_NL[row, before : before + len(ids)] = ids
        for place, suffix in enumerate(self.suffix_ids):
            ids_NL[np.arange(len(tokens)), lengths_N - after + place] = suffix
        mask_NL = (np.arange(width) < lengths_N[:, None]).astype(np.int64)
        return TokenBatch(torch.from_numpy(ids_NL), torch.from_numpy(mask_NL))

    def _tokenise(self, passages: Sequence[Passage]) -> list[list[int]]:
        if not passages:
            return []
        texts = [self.encoder.passage_text(passage) for passage in passages]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [ids[: self.encoder.max_passage_tokens] for ids in encoded]


def encode_passages(
    encoder: BiEncoder, tokens: PassageTokens, rows: range, *, batch_size: int = 64, progress: bool = True
) -> Iterator[Float[Tensor, "N D"]]:
    """Yields the vectors of ``rows`` in order, block by block, float32 on the CPU, with dropout off.

    Args:
        encoder: Whose passage tower encodes.
        tokens: The corpus in the encoder's vocabulary.
        rows: Which passages; each process takes its own part.
        batch_size: Passages at a time.
        progress: Shows a bar on the first process.
    """
    tower = encoder.passage_tower()
    was_training = tower.training
    blocks = row_blocks(rows, batch_size)
    shown = track(blocks, description="encoding passages", disable=not progress or rank() != 0, transient=True)
    tower.eval()
    try:
        for block in shown:
            yield encode_block(encoder, tokens, block, batch_size=batch_size)
    finally:
        tower.train(was_training)


def row_blocks(rows: range, batch_size: int) -> list[range]:
    """Returns ``rows`` in blocks of :data:`BATCHES_PER_BLOCK` batches; the last may be smaller.

    >>> row_blocks(range(10, 110), batch_size=2)
    [range(10, 74), range(74, 110)]
    """
    size = batch_size * BATCHES_PER_BLOCK
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def encode_block(encoder: BiEncoder, tokens: PassageTokens, rows: range, *, batch_size: int) -> Float[Tensor, "M D"]:
    """Returns the vectors of one block of passages in order, float32 on the CPU, without gradient.

    Passages are batched by length, so little is spent on padding. Vectors stay on the tower's device until the block is
    done, so that a GPU is not waited for after each batch and the next one is prepared while it works. The caller puts
    the tower in evaluation mode.

    Args:
        encoder: Whose passage tower encodes.
        tokens: The corpus in the encoder's vocabulary.
        rows: Which passages.
        batch_size: Passages at a time.
    """
    tower = encoder.passage_tower()
    block = tokens.token_ids(np.arange(rows.start, rows.stop))
    batches = _batches_by_length(block, batch_size)
    encoded = [_encode(tower, tokens.padded([block[place] for place in places])) for places in batches]
    vectors_MD = torch.empty(len(block), encoder.dimension)
    vectors_MD[torch.from_numpy(np.concatenate(batches))] = torch.cat(encoded).cpu()
    return vectors_MD


@torch.no_grad()
def encode_questions(encoder: BiEncoder, questions: Sequence[str], *, batch_size: int = 64) -> Float[Tensor, "P D"]:
    """Returns the query tower's vectors of some questions, float32 on the CPU, with dropout off.

    Raises:
        ConfigError: The encoder has no tokenizer.
    """
    if encoder.tokenizer is None:
        raise ConfigError("this encoder has no tokenizer: give one when loading it")
    tower, was_training = encoder.query, encoder.query.training
    tower.eval()
    vectors = []
    try:
        for first in range(0, len(questions), batch_size):
            texts = [encoder.query_template.format(question=text) for text in questions[first : first + batch_size]]
            ids = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_query_tokens)["input_ids"]
            vectors.append(_encode(tower, pad_sequences(ids, encoder.tokenizer.pad_token_id)).cpu())
    finally:
        tower.train(was_training)
    return torch.cat(vectors)


def encoding_seconds(
    encoder: BiEncoder, tokens: PassageTokens, *, batch_size: int = 64, num_batches: int = 8, seed: int = 0
) -> float:
    """Returns how long the corpus would take to encode here, from some batches of it.

    They are drawn evenly from a block of passages sorted by length, so they are padded as in :func:`encode_block`.

    Args:
        encoder: Whose passage tower encodes.
        tokens: The corpus in the encoder's vocabulary.
        batch_size: Passages at a time.
        num_batches: How many batches are timed, after one that is not.
        seed: Seeds the draw.
    """
    tower = encoder.passage_tower()
    was_training = tower.training
    num_rows = min(len(tokens), batch_size * BATCHES_PER_BLOCK)
    block = tokens.token_ids(np.random.default_rng(seed).choice(len(tokens), num_rows, replace=False))
    batches = _batches_by_length(block, batch_size)
    chosen = [[block[place] for place in places] for places in batches[:: -(-len(batches) // num_batches)]]
    tower.eval()
    try:
        _encode(tower, tokens.padded(chosen[-1])).cpu()
        start = time.perf_counter()
        torch.cat([_encode(tower, tokens.padded(batch)) for batch in chosen]).cpu()
        seconds = time.perf_counter() - start
    finally:
        tower.train(was_training)
    return seconds * len(tokens) / sum(map(len, chosen))


def _batches_by_length(block: Sequence[TokenIds], batch_size: int) -> list[NDArray[np.int64]]:
    """Returns places in a block, the longest passages first."""
    order_M = np.argsort([-len(ids) for ids in block], kind="stable")
    return [order_M[first : first + batch_size] for first in range(0, len(order_M), batch_size)]


@torch.no_grad()
def _encode(tower: Tower, batch: TokenBatch) -> Float[Tensor, "N D"]:
    vectors_ND: Tensor = tower(to_device(batch, next(tower.parameters()).device))
    return vectors_ND.float()
