"""Tags of words: logits at the first piece of each word (Devlin et al. 2019, §5.3)."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.errors import ConfigError


class TokenClassificationHead(nn.Module):
    """Logits of C tags for each word.

    Args:
        width: D, the width of the states.
        num_labels: C.
        dropout: On the states.

    Raises:
        ConfigError: Fewer than two tags.
    """

    tags_words = True

    def __init__(self, *, width: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_labels < 2:
            raise ConfigError(f"task: expected two tags or more to choose among, got {num_labels}")
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, num_labels)

    def forward(
        self, states_NLD: Float[Tensor, "N L D"], mask_NL: Int[Tensor, "N L"], places_NW: Int[Tensor, "N W"]
    ) -> Float[Tensor, "N W C"]:
        """Returns the logits at the places; those of a place ``-1`` mean nothing.

        Args:
            states_NLD: The reader's states.
            mask_NL: Not looked at.
            places_NW: Where each word begins.
        """
        logits_NWC: Tensor = self.output(self.dropout(states_at(states_NLD, places_NW)))
        return logits_NWC


def states_at(states_NLD: Float[Tensor, "N L D"], places_NW: Int[Tensor, "N W"]) -> Float[Tensor, "N W D"]:
    """Returns the states at some places; the first token's for a place ``-1``."""
    index_NWD = places_NW.clamp(min=0)[..., None].expand(-1, -1, states_NLD.shape[-1])
    return states_NLD.gather(1, index_NWD)
