"""The relation of two marked entities: from the states of their first signs (Baldini Soares et al. 2019, §3.2)."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.errors import ConfigError
from rag_lightning.heads.token_classification import states_at


class RelationHead(nn.Module):
    """Logits of C relations from the states of head and tail, one behind the other.

    Args:
        width: D, the width of the states.
        num_labels: C.
        dropout: On the two states.

    Raises:
        ConfigError: Fewer than two relations.
    """

    def __init__(self, *, width: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_labels < 2:
            raise ConfigError(f"task: expected two relations or more to choose among, got {num_labels}")
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * width, num_labels)

    def forward(
        self, states_NLD: Float[Tensor, "N L D"], mask_NL: Int[Tensor, "N L"], places_N2: Int[Tensor, "N 2"]
    ) -> Float[Tensor, "N C"]:
        """Returns the logits of each row.

        Args:
            states_NLD: The reader's states.
            mask_NL: Not looked at.
            places_N2: Where head and tail begin.
        """
        both_N2D = states_at(states_NLD, places_N2)
        logits_NC: Tensor = self.output(self.dropout(both_N2D.flatten(1)))
        return logits_NC
