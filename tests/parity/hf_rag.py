"""Tiny random RAG models of transformers, and inputs for them: the oracle of the parity tests.

``tiny_bart_config``, ``tiny_t5_config`` and ``tiny_question_encoder_config`` are the parts; ``hf_rag_model`` joins
them into a ``RagTokenForGeneration`` or ``RagSequenceForGeneration``; ``RagInputs`` are the tensors that their
``forward`` and ``generate`` take without a retriever.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    DPRConfig,
    PreTrainedConfig,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    T5Config,
)

Family = Literal["bart", "t5"]
VOCAB_SIZE = 48
FAMILIES: tuple[Family, ...] = ("bart", "t5")


def tiny_question_encoder_config() -> DPRConfig:
    return DPRConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
    )


def tiny_bart_config(forced_bos_token_id: int | None = None, forced_eos_token_id: int | None = None) -> BartConfig:
    """Pad 1, start 2 = end 2, bos 0; weights large enough that passages and prefixes matter."""
    return BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.5,
        dropout=0.0,
        forced_bos_token_id=forced_bos_token_id,
        forced_eos_token_id=forced_eos_token_id,
    )


def tiny_t5_config() -> T5Config:
    """Pad 0 = start 0, end 1; ``bos_token_id`` must be there for transformers' RAG-Sequence scoring."""
    return T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )


def hf_rag_model(
    sequence: bool,
    generator_config: PreTrainedConfig,
    *,
    num_passages: int,
    seed: int,
    eos_shift: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Returns a random model in evaluation mode.

    Args:
        sequence: RAG-Sequence, otherwise RAG-Token.
        generator_config: A tiny BART or T5 configuration.
        num_passages: K.
        seed: Of the weights.
        eos_shift: Added to the end token's logit, so that outputs end at various lengths. The padding token's logit is
            20 lower than it would be: a model that has learnt anything never says it.
        dtype: Of the weights.
    """
    torch.manual_seed(seed)
    config = RagConfig.from_question_encoder_generator_configs(
        tiny_question_encoder_config(), generator_config, n_docs=num_passages
    )
    model = (RagSequenceForGeneration if sequence else RagTokenForGeneration)(config).eval()
    bias = torch.randn(VOCAB_SIZE) * 0.5
    bias[generator_config.pad_token_id] = -20.0
    bias[generator_config.eos_token_id] += eos_shift
    # transformers 5 ties T5's output layer whatever the configuration says; tied, tiny models repeat their last token
    lm_head = model.generator.lm_head
    lm_head.weight = torch.nn.Parameter(0.5 * torch.randn_like(lm_head.weight))
    lm_head.weight.data[generator_config.eos_token_id] *= 2  # so that outputs end here and there, not all at once
    if generator_config.model_type == "bart":
        model.generator.model.decoder.embed_positions.weight.data *= 2
        model.generator.final_logits_bias.copy_(bias)
    else:
        _give_t5_an_output_bias(model.generator, bias)
    return model.to(dtype)


@torch.no_grad()
def _give_t5_an_output_bias(generator: Any, bias: Tensor) -> None:
    """Keeps feature 0 of the decoder's residual stream constant, so that column 0 of the output layer is a bias."""
    generator.lm_head.weight[:, 0] = bias
    generator.shared.weight[:, 0] = 2.0  # the decoder's input embeddings too
    for name, weight in generator.decoder.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight[0] = 0.0


@dataclass(frozen=True)
class RagInputs:
    """Contexts ``[B * K, L]``, padded at the end, and raw scores ``[B, K]``."""

    context_input_ids: Tensor
    context_attention_mask: Tensor
    doc_scores: Tensor

    @classmethod
    def random(
        cls,
        *,
        batch_size: int,
        num_passages: int,
        pad_token_id: int,
        seed: int,
        length: int = 7,
        dtype: torch.dtype = torch.float64,
    ) -> "RagInputs":
        rng = torch.Generator().manual_seed(seed)
        num_contexts = batch_size * num_passages
        ids = torch.randint(4, VOCAB_SIZE, (num_contexts, length), generator=rng)
        lengths = torch.randint(3, length + 1, (num_contexts, 1), generator=rng)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        scores = 2 * torch.randn(batch_size, num_passages, generator=rng, dtype=torch.float64)
        return cls(ids.masked_fill(mask == 0, pad_token_id), mask, scores.to(dtype))

    def generate(self, model: Any, **options: Any) -> Tensor:
        """Returns what transformers generates from these contexts."""
        sequences: Tensor = model.generate(
            context_input_ids=self.context_input_ids,
            context_attention_mask=self.context_attention_mask,
            doc_scores=self.doc_scores,
            n_docs=self.doc_scores.shape[1],
            **options,
        )
        return sequences


def answers(sequences: Tensor, pad_token_id: int, eos_token_id: int) -> list[list[int]]:
    """Returns each row's tokens after the start token up to its first end token, without padding at the end.

    transformers pads T5's beams with the end token, and to various widths; this is what two outputs must share.
    """
    found = []
    for row in sequences[:, 1:].tolist():
        tokens = row[: row.index(eos_token_id) + 1] if eos_token_id in row else row
        while tokens and tokens[-1] == pad_token_id:
            tokens = tokens[:-1]
        found.append(tokens)
    return found
