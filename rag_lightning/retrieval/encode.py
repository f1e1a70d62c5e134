"""The whole corpus through the passage tower: what an index snapshot is made of."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.retrieval.contexts import pad_sequences
from rag_lightning.text.token_store import TokenStore
from rag_lightning.text.tokenizers import special_affixes
from rag_lightning.types import Passage, TokenBatch
from rag_lightning.utils.distributed import rank

BATCHES_PER_BLOCK = 32


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

    def batch(self, rows_N: NDArray[np.int64]) -> TokenBatch:
        """Returns the passages of some rows, special tokens included; row ``-1`` gives the special tokens alone."""
        if self.store is not None:
            tokens: Sequence[Sequence[int] | NDArray[np.integer]] = self.store.gather(np.maximum(rows_N, 0))
        else:
            tokens = self._tokenise([self.corpus[max(int(row), 0)] for row in rows_N])
        return self._padded([ids if row >= 0 else [] for row, ids in zip(rows_N, tokens, strict=True)])

    def batch_of(self, passages: Sequence[Passage]) -> TokenBatch:
        """Returns passages that need not be in the corpus (a cloze passage without its sentence)."""
        return self._padded(self._tokenise(passages))

    def lengths(self, rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns how long each passage is, roughly (in characters without a store): enough to sort by."""
        if self.store is not None:
            return np.asarray([len(ids) for ids in self.store.gather(rows_N)])
        return np.asarray([len(self.corpus[int(row)].text) for row in rows_N])

    def _tokenise(self, passages: Sequence[Passage]) -> list[list[int]]:
        texts = [self.encoder.passage_text(passage) for passage in passages]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [ids[: self.encoder.max_passage_tokens] for ids in encoded]

    def _padded(self, tokens: Sequence[Sequence[int] | NDArray[np.integer]]) -> TokenBatch:
        ends = (np.asarray(self.prefix_ids, dtype=np.int64), np.asarray(self.suffix_ids, dtype=np.int64))
        rows = [np.concatenate([ends[0], np.asarray(ids, dtype=np.int64), ends[1]]) for ids in tokens]
        return pad_sequences(rows, self.tokenizer.pad_token_id)


def encode_passages(
    encoder: BiEncoder, tokens: PassageTokens, rows: range, *, batch_size: int = 64, progress: bool = True
) -> Iterator[Float[Tensor, "N D"]]:
    """Yields the vectors of ``rows`` in order, block by block, float32 on the CPU, with dropout off.

    Within a block, passages are batched by length, so little is spent on padding.

    Args:
        encoder: Whose passage tower encodes.
        tokens: The corpus in the encoder's vocabulary.
        rows: Which passages; each process takes its own part.
        batch_size: Passages at a time.
        progress: Shows a bar on the first process.
    """
    tower = encoder.passage_tower()
    device = next(tower.parameters()).device
    was_training = tower.training
    block_size = batch_size * BATCHES_PER_BLOCK
    starts: Sequence[int] = range(rows.start, rows.stop, block_size)
    shown = track(starts, description="encoding passages", disable=not progress or rank() != 0, transient=True)
    tower.eval()
    try:
        for start in shown:
            block = np.arange(start, min(start + block_size, rows.stop))
            order = np.argsort(-tokens.lengths(block), kind="stable")
            vectors = torch.empty(len(block), encoder.dimension)
            for first in range(0, len(block), batch_size):
                chosen = order[first : first + batch_size]
                batch = tokens.batch(block[chosen]).to(device)
                with torch.no_grad():  # here, not around the generator: a yield would leak it to the caller
                    vectors[torch.from_numpy(chosen)] = tower(batch).float().cpu()
            yield vectors
    finally:
        tower.train(was_training)
