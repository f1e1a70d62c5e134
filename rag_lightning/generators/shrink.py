"""Fewer layers of a trained model: a student that starts from what it already knows.

Shleifer and Rush 2020, "Pre-trained summarization distillation" (arXiv:2010.13002), "shrink and fine-tune": copy some
layers of a trained encoder-decoder and train on. It needs no teacher; with one it is a good start for its student.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rag_lightning.errors import ConfigError


def keep_layers(
    model: PreTrainedModel, *, encoder: Sequence[int] | None = None, decoder: Sequence[int] | None = None
) -> None:
    """Drops all layers but some, in place; configuration and cache places follow.

    Args:
        model: Of BART's shape (bart, mbart).
        encoder: Numbers of the encoder's layers to keep, from 0; None keeps all.
        decoder: The same of the decoder.

    Raises:
        ConfigError: A model of another shape, or numbers that are not its layers'.
    """
    for side, kept in (("encoder", encoder), ("decoder", decoder)):
        if kept is None:
            continue
        part: Any = getattr(getattr(model, "model", None), side, None)
        layers = getattr(part, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(model.config, f"{side}_layers"):
            raise ConfigError(
                f"generator.{side}_layers: expected a model of BART's shape (bart, mbart) to drop layers of, got "
                f"model_type={model.config.model_type!r}: leave {side}_layers out for it"
            )
        if not kept or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < len(layers):
            raise ConfigError(
                f"generator.{side}_layers: expected rising numbers of layers from 0 to {len(layers) - 1}, got {kept}"
            )
        part.layers = nn.ModuleList(layers[number] for number in kept)
        setattr(model.config, f"{side}_layers", len(kept))
        for place, layer in enumerate(part.layers):  # where a decoder's keys and values are cached
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place
    model.config.num_hidden_layers = model.config.encoder_layers
