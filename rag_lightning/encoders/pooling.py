"""From token states to one vector for each text."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError

Pooling = Literal["cls", "mean", "dpr_pooler"]


def check_pooling(name: str) -> None:
    """Refuses a pooling that does not exist.

    Raises:
        ConfigError: ``name`` is not one of ``cls``, ``mean``, ``dpr_pooler``.
    """
    if name not in get_args(Pooling):
        raise ConfigError(f"expected pooling to be one of {', '.join(get_args(Pooling))}, got {name!r}")


def pool_cls(states_NLD: Float[Tensor, "N L D"]) -> Float[Tensor, "N D"]:
    """Returns the first token's state."""
    return states_NLD[:, 0]


def pool_mean(states_NLD: Float[Tensor, "N L D"], mask_NL: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
    """Returns the mean state of the real tokens; a row without any gives zeros.

    >>> pool_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    weights_NL1 = mask_NL[..., None].to(states_NLD.dtype)
    return (states_NLD * weights_NL1).sum(dim=1) / weights_NL1.sum(dim=1).clamp(min=1.0)


def unit_length(vectors_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Returns the vectors scaled to length 1 (a zero vector stays zero)."""
    return torch.nn.functional.normalize(vectors_ND, dim=-1)
