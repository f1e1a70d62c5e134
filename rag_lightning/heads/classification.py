"""Classes of a text: from token states through a pooling to logits.

Inputs: the reader's states of a text, alone or with a passage behind it. The plain head of Devlin et al. 2019 (§4.1)
with a choice of pooling; see :mod:`rag_lightning.heads.pooling` for ``attention``.
"""

from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.encoders.pooling import pool_cls, pool_mean
from rag_lightning.errors import ConfigError
from rag_lightning.heads.pooling import AttentionPooling, pool_passages

HeadPooling = Literal["cls", "mean", "attention"]


class ClassificationHead(nn.Module):
    """Logits of C classes.

    Args:
        width: D, the width of the states.
        num_labels: C.
        pooling: ``cls``, ``mean`` or ``attention``.
        dropout: On the pooled vector.

    Raises:
        ConfigError: An unknown pooling, or fewer than two classes.
    """

    def __init__(self, *, width: int, num_labels: int, pooling: HeadPooling = "cls", dropout: float = 0.1) -> None:
        super().__init__()
        if pooling not in get_args(HeadPooling):
            raise ConfigError(f"task.pooling: expected one of {', '.join(get_args(HeadPooling))}, got {pooling!r}")
        if num_labels < 2:
            raise ConfigError(f"task: expected two labels or more to choose among, got {num_labels}")
        self.pooling = pooling
        self.attention = AttentionPooling(width) if pooling == "attention" else None
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, num_labels)

    def forward(
        self,
        states_NLD: Float[Tensor, "N L D"],
        mask_NL: Int[Tensor, "N L"],
        places_NW: Int[Tensor, "N W"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """Returns the logits of each row; ``places_NW`` is not looked at."""
        if self.attention is not None:
            pooled_ND, _ = self.attention(states_NLD, mask_NL)
        else:
            pooled_ND = pool_mean(states_NLD, mask_NL) if self.pooling == "mean" else pool_cls(states_NLD)
        logits_NC: Tensor = self.output(self.dropout(pooled_ND))
        return logits_NC

    def over_passages(
        self, states_NLD: Float[Tensor, "N L D"], mask_NL: Int[Tensor, "N L"], log_prior_BK: Float[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B K L"]]:
        """Returns the logits from all tokens of a question's passages at once, and the weights of the tokens.

        Raises:
            ConfigError: The pooling is not ``attention``.
        """
        if self.attention is None:
            raise ConfigError(f"task.reads=attention: expected task.pooling=attention with it, got {self.pooling!r}")
        pooled_BD, weights_BKL = pool_passages(self.attention, states_NLD, mask_NL, log_prior_BK)
        return self.output(self.dropout(pooled_BD)), weights_BKL
