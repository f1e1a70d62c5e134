"""The smallest encoder that can learn to retrieve: a bag of word vectors with learned term weights.

Each token contributes ``exp(w_t) e_t``; mean pooling sums them up. The weight ``w_t`` is a learned counterpart of
BM25's inverse document frequency: training lowers it for words that tell passages apart badly. It trains in seconds
on a laptop and is a transformers model like any other (``AutoModel`` loads it, safetensors hold it).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class WordEmbeddingsConfig(PretrainedConfig):
    """Configuration of :class:`WordEmbeddingsModel`.

    Args:
        vocab_size: Rows of the embedding table.
        hidden_size: Embedding dimension D.
        weight_rate: How many times faster than a vector's entries a term weight learns: ``w_t`` is stored divided by
            it. Adam moves every parameter by about its learning rate, and a weight has to go as far as 3 or 4 where
            an entry has the size ``1/sqrt(D)``.
        pad_token_id: Padding token, whose vector is 0.
    """

    model_type = "rag_word_embeddings"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 128,
        weight_rate: float = 10.0,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.weight_rate = weight_rate
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class WordEmbeddingsModel(PreTrainedModel):
    """Looks up each token's vector and scales it by the token's learned weight."""

    config_class = WordEmbeddingsConfig
    base_model_prefix = "embeddings"

    def __init__(self, config: WordEmbeddingsConfig) -> None:
        super().__init__(config)
        self.vectors = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.log_weights = nn.Embedding(config.vocab_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.vectors:
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            with torch.no_grad():
                module.weight[self.config.pad_token_id].zero_()
        elif module is self.log_weights:
            nn.init.zeros_(module.weight)

    def forward(
        self,
        input_ids: Int[Tensor, "N L"],
        attention_mask: Int[Tensor, "N L"] | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """Returns token states ``[N, L, D]``; the mask is for the pooling and not needed here."""
        weights_NL1: Float[Tensor, "N L 1"] = (self.config.weight_rate * self.log_weights(input_ids)).exp()
        states_NLD: Float[Tensor, "N L D"] = self.vectors(input_ids) * weights_NL1
        return BaseModelOutput(last_hidden_state=states_NLD)


AutoConfig.register(WordEmbeddingsConfig.model_type, WordEmbeddingsConfig, exist_ok=True)
AutoModel.register(WordEmbeddingsConfig, WordEmbeddingsModel, exist_ok=True)
