"""Answers that are allowed, as a trie of their tokens (De Cao et al. 2021, "Autoregressive entity retrieval").

Inputs: the tokens of each allowed answer, start token first and end token last, as training targets are written. At
each step only the children of the prefix may follow, so that a search or a sample ends at an allowed answer. Use it
where the set of answers is known: entities, labels, titles.

The trie is one sorted array of edges, ``parent * V + token``. Nodes are numbered breadth first in the order of their
edges, so that edge e leads to node ``e + 1`` and the children of a node lie side by side. Looking up a prefix of T
tokens is T binary searches for all rows at once, and marking the next tokens costs their number, once for each prefix;
nothing has to be kept or reordered with the beams. Millions of answers take tens of megabytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.types import TensorRecord
from rag_lightning.utils.io import existing_file


@dataclass(frozen=True)
class TokenTrie(TensorRecord):
    """The allowed answers.

    Attributes:
        edges_E: ``parent * vocab_size + token``, ascending.
        vocab_size: V, larger than every token.
    """

    edges_E: Int[Tensor, "E"]
    vocab_size: int

    @classmethod
    def from_tokens(cls, answers: Sequence[Sequence[int]], vocab_size: int) -> "TokenTrie":
        """Builds the trie of some answers; the same one may come twice.

        Args:
            answers: Their tokens, start token first, end token last.
            vocab_size: V.

        >>> trie = TokenTrie.from_tokens([[1, 3, 2], [1, 3, 4, 2], [1, 4, 2]], vocab_size=5)
        >>> trie.next_tokens(torch.tensor([[1, 3]]), vocab_size=5)
        tensor([[False, False,  True, False,  True]])
        """
        lengths_A = torch.tensor([len(tokens) for tokens in answers])
        flat_X = torch.tensor([token for tokens in answers for token in tokens], dtype=torch.long)
        starts_A = lengths_A.cumsum(dim=0) - lengths_A
        nodes_A = torch.zeros_like(lengths_A)
        levels, num_nodes = [], 1
        for depth in range(int(lengths_A.max())):
            longer_A = lengths_A > depth
            lengths_A, starts_A, nodes_A = lengths_A[longer_A], starts_A[longer_A], nodes_A[longer_A]
            edges, inverse_A = torch.unique(nodes_A * vocab_size + flat_X[starts_A + depth], return_inverse=True)
            levels.append(edges)
            nodes_A = num_nodes + inverse_A
            num_nodes += len(edges)
        return cls(torch.cat(levels), vocab_size)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenise: Callable[[Sequence[str]], Sequence[Sequence[int]]],
        *,
        vocab_size: int,
        max_new_tokens: int,
        source: str = "allowed answers",
    ) -> "TokenTrie":
        """Builds the trie of some texts.

        Args:
            texts: The answers; the first stands on line 1.
            tokenise: Gives their tokens, start token first and end token last; fewer than three where a text has none.
            vocab_size: V.
            max_new_tokens: The longest output; a longer answer could not be written to its end.
            source: The file's name, for messages.

        Raises:
            DataError: A text that is empty, has no known token, or is too long; names it and its line.
        """
        for line, text in enumerate(texts, start=1):
            if not text.strip():
                raise DataError(f"{source}, line {line}: expected an allowed answer, came {text!r}. Remove the line.")
        if not texts:
            raise DataError(f"{source}: expected one allowed answer on each line, came none. Check the file.")
        answers = tokenise(texts)
        for line, (text, tokens) in enumerate(zip(texts, answers, strict=True), start=1):
            if len(tokens) < 3:
                raise DataError(
                    f"{source}, line {line}: expected an answer that the generator's tokenizer knows, came {text!r}, "
                    "of which it knows no token. Remove the line, or use a tokenizer of this language."
                )
            if len(tokens) - 1 > max_new_tokens:
                raise DataError(
                    f"{source}, line {line}: expected at most max_new_tokens = {max_new_tokens} tokens, came "
                    f"{text[:80]!r} of {len(tokens) - 1}. Raise decoding.max_new_tokens, or remove the line."
                )
        return cls.from_tokens(answers, vocab_size)

    def next_tokens(self, prefixes_NT: Int[Tensor, "N T"], vocab_size: int) -> Bool[Tensor, "N V"]:
        """Returns True on each token that may follow; none may after a prefix that is not in the trie.

        Args:
            prefixes_NT: The tokens so far, start token included.
            vocab_size: V.

        Raises:
            ConfigError: The trie was made for another vocabulary.
        """
        if vocab_size != self.vocab_size:
            raise ConfigError(
                f"expected a trie of the generator's vocabulary of {vocab_size} tokens, came one of {self.vocab_size}: "
                "build it with the tokenizer of this generator"
            )
        nodes_U, inverse_N = torch.unique(self._nodes(prefixes_NT), return_inverse=True)  # beams share their prefixes
        first_U = torch.searchsorted(self.edges_E, nodes_U * vocab_size)
        end_U = torch.searchsorted(self.edges_E, (nodes_U + 1) * vocab_size)
        count_U = torch.where(nodes_U >= 0, end_U - first_U, 0)
        rows_C = torch.arange(len(nodes_U), device=nodes_U.device).repeat_interleave(count_U)
        offsets_C = torch.arange(len(rows_C), device=rows_C.device) - (count_U.cumsum(dim=0) - count_U)[rows_C]
        allowed_UV = torch.zeros(len(nodes_U), vocab_size, dtype=torch.bool, device=nodes_U.device)
        allowed_UV[rows_C, self.edges_E[first_U[rows_C] + offsets_C] % vocab_size] = True
        return allowed_UV[inverse_N]

    def _nodes(self, prefixes_NT: Int[Tensor, "N T"]) -> Int[Tensor, "N"]:
        """Returns the node that each prefix leads to; -1 where it leads out of the trie."""
        nodes_N = torch.zeros_like(prefixes_NT[:, 0])
        for tokens_N in prefixes_NT.unbind(dim=1):
            keys_N = nodes_N * self.vocab_size + tokens_N
            places_N = torch.searchsorted(self.edges_E, keys_N).clamp(max=len(self.edges_E) - 1)
            found_N = self.edges_E[places_N] == keys_N  # below node -1 keys are negative, and never found
            nodes_N = torch.where(found_N, places_N + 1, -1)
        return nodes_N


def read_allowed(path: Path) -> list[str]:
    """Returns the lines of a file of allowed answers, the n-th from line n.

    Raises:
        MissingFileError: No such file.
        DataError: It is not UTF-8.
    """
    try:
        text = existing_file(path, "decoding.allowed").read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, one allowed answer on each line, came byte {error.object[error.start]:#04x} "
            f"at offset {error.start}. Convert the file to UTF-8."
        ) from error
    lines = text.split("\n")  # not splitlines, which also divides at characters that may stand in a name
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
