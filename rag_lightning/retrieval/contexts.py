"""From hits to the generator's input: passage and question joined as ids, no text touched in the training step."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.text.prompts import Prompt, join_contexts
from rag_lightning.text.token_store import TokenStore
from rag_lightning.text.tokenizers import special_affixes
from rag_lightning.types import Passage, TokenBatch
from rag_lightning.utils.transfer import to_device

logger = logging.getLogger(__name__)


class ContextAssembler:
    """Joins retrieved passages to their questions, ``[B * K, L]``.

    Args:
        corpus: The passages that hits refer to; None for closed-book input only.
        tokenizer: The generator's tokenizer.
        prompt: How passage and question are written.
        store: The corpus tokenised once with this tokenizer and prompt; without one, passages are tokenised when
            they are met (fine for a few questions, slow for training).
        affixes: Ids before and after every context; by default the tokenizer's special tokens.
    """

    def __init__(
        self,
        *,
        corpus: PassageCorpus | None,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        store: TokenStore | None = None,
        affixes: tuple[list[int], list[int]] | None = None,
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.store = store
        self.prefix_ids, self.suffix_ids = affixes if affixes is not None else special_affixes(tokenizer)
        self._told_of_cut_passages = False

    @property
    def affixes(self) -> tuple[list[int], list[int]]:
        """Ids before and after every context."""
        return self.prefix_ids, self.suffix_ids

    def contexts(self, ids_BK: Int[Tensor, "B K"], questions: TokenBatch) -> TokenBatch:
        """Returns the joined contexts, passages of one question adjacent.

        Args:
            ids_BK: Passage numbers; ``-1`` gives a context without a passage.
            questions: The B questions as :attr:`rag_lightning.types.QuestionBatch.prompt` holds them.
        """
        passages = self.passage_tokens(ids_BK.reshape(-1).cpu().numpy())
        return to_device(self._join(passages, questions, ids_BK.shape[1]), ids_BK.device)

    def for_reading(self, ids_BK: Int[Tensor, "B K"], questions: TokenBatch, *, stuffed: bool) -> TokenBatch:
        """Returns :meth:`stuffed` contexts or :meth:`contexts`."""
        return self.stuffed(ids_BK, questions) if stuffed else self.contexts(ids_BK, questions)

    def stuffed(self, ids_BK: Int[Tensor, "B K"], questions: TokenBatch) -> TokenBatch:
        """Returns one context for each question with all its passages in it, best first, ``[B, L]``.

        What does not fit into ``prompt.max_tokens`` is cut from the end of the last passages, with one warning.

        Args:
            ids_BK: Passage numbers; ``-1`` adds nothing.
            questions: As in :meth:`contexts`.
        """
        separator = np.asarray(self.tokenizer(self.prompt.passage_separator, add_special_tokens=False)["input_ids"])
        pieces = self.passage_tokens(ids_BK.reshape(-1).cpu().numpy())
        joined: list[NDArray[np.integer]] = []
        for row in range(ids_BK.shape[0]):
            found = [ids for ids in pieces[row * ids_BK.shape[1] : (row + 1) * ids_BK.shape[1]] if len(ids) > 0]
            parts = [part for ids in found for part in (separator, ids)][1:]
            joined.append(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64))
        contexts = self._join(joined, questions, 1)
        self._tell_of_cut_passages(joined, questions, contexts)
        return to_device(contexts, ids_BK.device)

    def _tell_of_cut_passages(
        self, joined: Sequence[NDArray[np.integer]], questions: TokenBatch, contexts: TokenBatch
    ) -> None:
        affixes = len(self.prefix_ids) + len(self.suffix_ids)
        wanted = np.array([len(ids) for ids in joined]) + questions.attention_mask.sum(dim=1).cpu().numpy() + affixes
        num_cut = int((wanted > contexts.attention_mask.sum(dim=1).cpu().numpy()).sum())
        if num_cut > 0 and not self._told_of_cut_passages:
            self._told_of_cut_passages = True
            logger.warning(
                "the passages of %d of %d questions do not fit into one prompt of model.prompt.max_tokens=%d tokens "
                "(the longest takes %d) and are cut at its end; further ones will be without a message. Raise it, or "
                "lower model.num_passages or model.prompt.max_passage_tokens.",
                num_cut,
                len(joined),
                self.prompt.max_tokens,
                int(wanted.max()),
            )

    def contexts_of(self, passages: Sequence[Passage], questions: TokenBatch) -> TokenBatch:
        """Returns contexts of passages that need not be in the corpus, one for each question, ``[B, L]``."""
        return to_device(self._join(self._tokenise(passages), questions, 1), questions.input_ids.device)

    def without_passage(self, questions: TokenBatch) -> TokenBatch:
        """Returns the questions alone, ``[B, L]``: the closed-book input, and the reference of retrieval utility."""
        empty = [np.zeros(0, dtype=np.int64)] * questions.input_ids.shape[0]
        return to_device(self._join(empty, questions, 1), questions.input_ids.device)

    def passage_tokens(self, rows_N: NDArray[np.int64]) -> list[NDArray[np.integer]]:
        """Returns the passage part of each row's context; empty for row ``-1``."""
        empty = np.zeros(0, dtype=np.int64)
        if self.store is not None:
            tokens = self.store.gather(np.maximum(rows_N, 0))
        else:
            assert self.corpus is not None
            tokens = self._tokenise([self.corpus[max(int(row), 0)] for row in rows_N])
        return [ids if row >= 0 else empty for row, ids in zip(rows_N, tokens, strict=True)]

    def _tokenise(self, passages: Sequence[Passage]) -> list[NDArray[np.integer]]:
        texts = [self.prompt.passage_text(passage) for passage in passages]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [np.asarray(ids[: self.prompt.max_passage_tokens], dtype=np.int64) for ids in encoded]

    def _join(self, passages: Sequence[NDArray[np.integer]], questions: TokenBatch, num_passages: int) -> TokenBatch:
        pad_id = self.tokenizer.pad_token_id
        return join_contexts(
            passages,
            questions.to("cpu"),
            num_passages=num_passages,
            prefix_ids=self.prefix_ids,
            suffix_ids=self.suffix_ids,
            pad_id=pad_id,
            max_tokens=self.prompt.max_tokens,
            question_first=self.prompt.question_first,
        )


def pad_sequences(sequences: Sequence[NDArray[np.integer] | list[int]], pad_id: int) -> TokenBatch:
    """Returns token ids padded on the right to the longest, with their mask.

    >>> pad_sequences([[5, 6], [7]], pad_id=0).input_ids
    tensor([[5, 6],
            [7, 0]])
    """
    longest = max(1, max(len(sequence) for sequence in sequences))
    ids_NL = np.full((len(sequences), longest), pad_id, dtype=np.int64)
    mask_NL = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_NL[row, : len(sequence)] = sequence
        mask_NL[row, : len(sequence)] = 1
    lengths = tuple(max(1, len(sequence)) for sequence in sequences)
    return TokenBatch(torch.from_numpy(ids_NL), torch.from_numpy(mask_NL), lengths)
