"""The first step of decoding, which all outputs of a context have in common.

Inputs: N encoded contexts. The start token is fed once for each; by that the decoder has read the contexts (projected
their keys and values, or run over the prompts). Searches, samples and scored outputs then begin from copies.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.generators.base import DecoderState, EncodedContexts, Generator


@dataclass(frozen=True)
class FirstStep:
    """What a generator knows after the start token; one row for each context.

    Attributes:
        generator: Whose it is.
        encoded: The contexts.
        log_probs_NV: Of the first token.
        state: Is never used up: outputs go on from :meth:`rows`.
    """

    generator: Generator
    encoded: EncodedContexts
    log_probs_NV: Float[Tensor, "N V"]
    state: DecoderState

    @classmethod
    @torch.no_grad()
    def of(cls, generator: Generator, encoded: EncodedContexts) -> "FirstStep":
        """Reads the contexts and the start token."""
        num_contexts, device = encoded.attention_mask_NL.shape[0], encoded.attention_mask_NL.device
        start_N = torch.full((num_contexts,), generator.start_token_id, device=device)
        log_probs_NV, state = generator.step(start_N, generator.start(encoded))
        return cls(generator, encoded, log_probs_NV, state)

    def rows(self, rows_M: Int[Tensor, "M"]) -> tuple[Float[Tensor, "M V"], DecoderState]:
        """Returns the log-probabilities and a state of outputs that begin, each under the context of its row."""
        return self.log_probs_NV[rows_M], self.generator.reorder(self.generator.fork(self.state), rows_M)

    def all_rows(self) -> tuple[Float[Tensor, "N V"], DecoderState]:
        """Returns those of one output for each context."""
        return self.log_probs_NV, self.generator.fork(self.state)
