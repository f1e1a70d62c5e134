"""Activation checkpointing by part: a layer keeps its input, and the rest is computed again in the backward pass.

Chen et al. 2016, "Training deep nets with sublinear memory cost". Losses and gradients are the same, with dropout too;
it costs one more forward pass of the part. Use it where a batch's activations do not fit.

The layers of transformers' models (its ``GradientCheckpointingLayer``) are changed one by one and in place, so weights
keep their names, and only where a gradient is asked for: in validation, tests, refreshes and decoding a layer runs as
ever, and so does one that is given a cache, which must not be written twice. transformers' own switch goes by the
training mode instead: it would drop the cache of answers that are drawn in that mode, and do nothing for a policy's
likelihood, which is taken in evaluation mode.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from rag_lightning.errors import ConfigError
from rag_lightning.rag import RagModel


def checkpoint_activations(model: RagModel, parts: Sequence[str], trained: Sequence[str]) -> None:
    """Makes the layers of some parts keep their input only, and those of all others run as ever.

    Args:
        model: Whose parts.
        parts: Their names; a shared tower has two.
        trained: The parts that learn.

    Raises:
        ConfigError: A part that is not there or does not learn, or whose model has no such layers.
    """
    backbones = backbones_of(model)
    for backbone in backbones.values():
        for layer in layers_of(backbone):
            layer.__dict__.pop("forward", None)  # of an earlier module around the same model
    for part in parts:
        for layer in _layers_to_set(part, backbones, trained):
            object.__setattr__(layer, "forward", partial(_forward, layer))


def backbones_of(model: RagModel) -> dict[str, nn.Module]:
    """Returns the transformers models of a model's parts by name; shared towers stand under both."""
    backbones: dict[str, nn.Module] = {"generator": model.generator.model}
    if model.encoder is not None:
        backbones["query_encoder"] = model.encoder.query.backbone
        if model.encoder.passage is not None:
            backbones["passage_encoder"] = model.encoder.passage.backbone
    return backbones


def layers_of(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yields the repeated layers of a transformers model."""
    return (module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer))


def _layers_to_set(part: str, backbones: dict[str, nn.Module], trained: Sequence[str]) -> Sequence[nn.Module]:
    name = part.replace("_", " ")
    if part not in backbones or part not in trained:
        why = "does not learn in this run" if part in backbones else "is no part of this model"
        raise ConfigError(
            f"optim.checkpoint_activations: the {name} {why}, so it would do nothing there. Expected some of "
            f"{', '.join(name for name in backbones if name in trained) or 'no part'}: leave {part} out, or train it."
        )
    layers = list(layers_of(backbones[part]))
    if not layers:
        raise ConfigError(
            f"optim.checkpoint_activations: expected a {name} made of transformers' layers that keep activations, "
            f"came {type(backbones[part]).__name__}, which has none of them: leave {part} out"
        )
    return layers


def _forward(layer: nn.Module, *arguments: Any, **settings: Any) -> Any:
    """Stands for a layer's forward. Bound by ``partial``, so that a deep copy of the layer calls itself."""
    forward: Callable[..., Any] = partial(type(layer).forward, layer)
    has_cache = any(isinstance(value, Cache) for value in (*arguments, *settings.values()))
    if has_cache or not torch.is_grad_enabled():
        return forward(*arguments, **settings)
    modes = {module: module.training for module in layer.modules()}
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=True,
        context_fn=lambda: (nullcontext(), _in_modes(modes)),
        **settings,
    )


@contextmanager
def _in_modes(modes: dict[nn.Module, bool]) -> Iterator[None]:
    """Puts modules into the modes of the forward pass: a policy's was in evaluation mode, its backward pass is not."""
    now = {module: module.training for module in modes}
    for module, mode in modes.items():
        module.training = mode
    try:
        yield
    finally:
        for module, mode in now.items():
            module.training = mode
