"""Another attention function for a transformers model, in place for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

USUAL = "sdpa"
"""The attention that can be replaced: the one that transformers' models take by default."""


@contextmanager
def replaced_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Lets the parts of a model that use ``sdpa`` use another attention within the block; leaves it as it was.

    Args:
        model: A transformers model, possibly wrapped.
        name: As registered with transformers' ``AttentionInterface`` and ``AttentionMaskInterface``.
    """
    configs: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    usual = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    try:
        for config, before in usual:
            if before == USUAL:
                config._attn_implementation = name
        yield
    finally:
        for config, before in usual:
            if before is not None:
                config._attn_implementation = before
