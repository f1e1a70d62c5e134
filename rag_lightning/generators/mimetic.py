"""A start for small generators that are trained from nothing: ready to copy, before the first step.

A reader must say words it has never said, so it must copy. Copying needs three things: the attended token's embedding
has to reach the output layer, positions have to be told apart, and attention has to find the place. With random
weights all three are learned together, each of use only when the others are there, which takes thousands of steps. The
first two can be given: Trockman and Kolter (2023) found the products of value and output matrices of trained
transformers close to a multiple of the identity, and start small ones so, with sinusoidal positions ("Mimetic
initialization of self-attention layers"). Here the same is done to cross-attention, where copying happens.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rag_lightning.errors import ConfigError


@torch.no_grad()
def start_mimetic(model: PreTrainedModel) -> None:
    """Sets the cross-attentions' value and output matrices so that ``W_O W_V = I``, and positions to sinusoids.

    Args:
        model: A randomly initialised model of BART's shape (bart, mbart); altered in place. Its output layer has to be
            its embedding table, or a copied embedding would say nothing there.

    Raises:
        ConfigError: A model of another shape, or one with an output layer of its own.
    """
    parts = [getattr(getattr(model, "model", None), name, None) for name in ("encoder", "decoder")]
    tables = [table for part in parts if isinstance(table := getattr(part, "embed_positions", None), nn.Embedding)]
    layers: list[Any] = list(getattr(parts[1], "layers", ()))
    copying = [layer.encoder_attn for layer in layers if hasattr(layer, "encoder_attn")]
    if len(tables) < len(parts) or not copying:
        raise ConfigError(
            "mimetic_init: expected a model of BART's shape (bart, mbart), got "
            f"model_type={model.config.model_type!r}: leave mimetic_init out for it"
        )
    if not model.config.tie_word_embeddings:
        raise ConfigError("mimetic_init: expected tied embeddings (tie_word_embeddings: true), or nothing is copied")
    for table in tables:
        table.weight.copy_(sinusoids(*table.weight.shape))
    for attention in copying:
        size = attention.v_proj.weight.shape[0]
        rotation_DD, _ = torch.linalg.qr(torch.randn(size, size))
        attention.v_proj.weight.copy_(rotation_DD)
        attention.out_proj.weight.copy_(rotation_DD.T)


def sinusoids(num_positions: int, dimension: int) -> Float[Tensor, "P D"]:
    """Returns the position vectors of Vaswani et al. 2017, §3.5: sines at even places, cosines at odd ones.

    >>> sinusoids(2, 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    rates = 10_000.0 ** (-torch.arange(0, dimension, 2) / dimension)
    angles = torch.arange(num_positions)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dimension]
