"""Another attention function for a transformers model, in place for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Attention = Callable[..., tuple[Tensor, None]]
sdpa: Attention = sdpa_attention_forward
USUAL = "sdpa"
"""The attention that can be replaced: the one that transformers' models take by default."""


def register(name: str, attention: Attention) -> None:
    """Makes an attention function known to transformers, with the masks that ``sdpa`` has.

    Args:
        name: For :func:`replaced_attention`.
        attention: Takes what :data:`sdpa` takes: module, queries ``[N, h, T, d]``, keys, values, mask, settings.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


@contextmanager
def replaced_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Lets the parts of a model that use ``sdpa`` use another attention within the block; leaves it as it was.

    Args:
        model: A transformers model, possibly wrapped.
        name: As it was given to :func:`register`.
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
