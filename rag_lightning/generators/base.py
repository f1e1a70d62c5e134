"""What the objectives and the decoders need of a generator."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.types import GeneratorOutput, TensorRecord, TokenBatch
from rag_lightning.utils.lengths import LengthGroup

NO_FUSION = (
    "fid: expected an encoder-decoder, whose decoder attends to passages that were encoded apart, came a decoder-only "
    "generator. Use objective=prompt_stuffing (decoding.mode=stuffed), which writes all passages into one prompt, or a "
    "marginal."
)


@dataclass(frozen=True)
class EncodedContexts(TensorRecord):
    """Contexts as the generator's encoder left them, computed once for each (question, passage).

    Attributes:
        hidden_NLH: The encoder's states; a decoder-only generator has none, and these are its input embeddings.
        attention_mask_NL: 1 on real tokens.
        can_fuse: Whether a decoder can attend to several of them at once.
        lengths: Tokens of each up to its last real one, where they are known without asking the device.
    """

    hidden_NLH: Float[Tensor, "N L H"]
    attention_mask_NL: Int[Tensor, "N L"]
    can_fuse: bool = True
    lengths: tuple[int, ...] | None = None

    def rows(self, rows_M: Int[Tensor, "M"]) -> "EncodedContexts":
        """Returns the contexts of the given rows, which may repeat."""
        return EncodedContexts(self.hidden_NLH[rows_M], self.attention_mask_NL[rows_M], self.can_fuse)

    def group(self, group: LengthGroup) -> "EncodedContexts":
        """Returns the contexts of a group, cut on the right to its length."""
        hidden_NLH, mask_NL = self.hidden_NLH[:, : group.length], self.attention_mask_NL[:, : group.length]
        if group.rows_M is not None:  # its backward adds rows, where that of indexing sorts them first
            rows_M = group.rows_M.to(hidden_NLH.device)
            hidden_NLH, mask_NL = hidden_NLH.index_select(0, rows_M), mask_NL.index_select(0, rows_M)
        return EncodedContexts(hidden_NLH, mask_NL, self.can_fuse)

    def fused(self, found_BK: Bool[Tensor, "B K"]) -> "EncodedContexts":
        """Returns each question's K contexts behind one another, ``[B, K * L, H]``: fusion-in-decoder.

        The decoder then attends to all passages at once (Izacard and Grave 2021b, "Leveraging passage retrieval with
        generative models", §3). Contexts of passages that were not found are masked, unless none was found at all.

        Args:
            found_BK: False where a place holds no passage.

        Raises:
            ConfigError: The contexts are of a decoder-only generator, or not B·K.
        """
        if not self.can_fuse:
            raise ConfigError(NO_FUSION)
        batch_size, num_passages = found_BK.shape
        if self.hidden_NLH.shape[0] != found_BK.numel():
            raise ConfigError(
                f"fid: expected {found_BK.numel()} contexts, {num_passages} for each of {batch_size} questions, came "
                f"{self.hidden_NLH.shape[0]}: they must be encoded apart"
            )
        read_BK1 = (found_BK | ~found_BK.any(dim=1, keepdim=True))[..., None]
        mask_BKL = self.attention_mask_NL.view(batch_size, num_passages, -1) * read_BK1
        hidden_BLH = self.hidden_NLH.reshape(batch_size, -1, self.hidden_NLH.shape[-1])
        return EncodedContexts(hidden_BLH, mask_BKL.reshape(batch_size, -1))


@dataclass(frozen=True)
class DecoderState:
    """Where a batch of N partial outputs stands.

    Attributes:
        encoded: The contexts; a row for each partial output, or fewer where a family lets outputs share them.
        cache: Keys and values of the tokens so far; whatever the model family uses.
    """

    encoded: EncodedContexts
    cache: Any


@runtime_checkable
class Generator(Protocol):
    """Encodes contexts, scores targets, and extends partial outputs token by token."""

    pad_token_id: int
    start_token_id: int
    eos_token_id: int
    vocab_size: int

    def encode(self, contexts: TokenBatch) -> EncodedContexts:
        """Runs the encoder over N contexts."""
        ...

    def score(
        self,
        encoded: EncodedContexts,
        labels_BT1: Int[Tensor, "B T1"],
        num_passages: int,
        *,
        vocab_mean: bool = False,
        keep_logits: bool = False,
    ) -> GeneratorOutput:
        """Scores each target under each of its question's K passages.

        Args:
            encoded: ``B * K`` contexts, passages of one question adjacent.
            labels_BT1: Start token first, padding where unscored: the decoder reads ``labels[:, :-1]`` and is
                scored on ``labels[:, 1:]``.
            num_passages: K.
            vocab_mean: Also return the vocabulary's mean log-probability, for label smoothing.
            keep_logits: Also return the logits.
        """
        ...

    def start(self, encoded: EncodedContexts) -> DecoderState:
        """Returns the state before the first token."""
        ...

    def step(self, tokens_N: Int[Tensor, "N"], state: DecoderState) -> tuple[Float[Tensor, "N V"], DecoderState]:
        """Feeds one token to each row; returns the float32 log-probabilities of the next one, and the new state."""
        ...

    def score_step(
        self, tokens_N: Int[Tensor, "N"], state: DecoderState, rows_P: Int[Tensor, "P"], next_P: Int[Tensor, "P"]
    ) -> tuple[Float[Tensor, "P"], DecoderState]:
        """Like :meth:`step`, for who asks for the log-probabilities of P known tokens only.

        Args:
            tokens_N: One token for each row.
            state: The rows; used up.
            rows_P: Behind which of them each known token stands.
            next_P: The known tokens.
        """
        ...

    def reorder(self, state: DecoderState, rows_M: Int[Tensor, "M"]) -> DecoderState:
        """Returns the state of the given rows, which may repeat, shrink or grow the batch; the old one is used up."""
        ...

    def fork(self, state: DecoderState) -> DecoderState:
        """Returns a copy: whatever uses it up leaves the given one as it is."""
        ...
