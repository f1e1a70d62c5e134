"""The reader: a pretrained encoder whose token states the heads look at, shared by all tasks of a run."""

import re
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rag_lightning.corpora.places import model_place
from rag_lightning.errors import ConfigError
from rag_lightning.heads.reading import Reading
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import TokenBatch
from rag_lightning.utils.lengths import embedded_once, lengths_of, model_length_groups, restored, widened
from rag_lightning.utils.memory import aligned

_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")  # where transformers' encoders keep their layers


class Reader(nn.Module):
    """Any transformers encoder with its tokenizer.

    Args:
        backbone: Returns ``last_hidden_state``.
        tokenizer: A fast one.
        max_tokens: Longest input, special tokens included.

    Raises:
        ConfigError: ``max_tokens`` above the model's positions.
    """

    def __init__(self, *, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 128) -> None:
        super().__init__()
        positions = getattr(backbone.config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise ConfigError(
                f"reader.max_tokens={max_tokens}: expected at most {positions}, the model has no more positions"
            )
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # its output is not used; idle parameters would stall distributed training
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @classmethod
    def from_source(cls, *, source: str, tokenizer: str | None = None, max_tokens: int = 128) -> "Reader":
        """Loads a folder, a hub id, a ``bundled:`` folder, or ``minilm`` (the ``minilm`` extra).

        Args:
            source: Where the model is.
            tokenizer: Where its tokenizer is, if not in the same place.
            max_tokens: See the class.
        """
        place = model_place(source)
        tokens = load_tokenizer(model_place(tokenizer) if tokenizer is not None else place)
        return cls(backbone=aligned(AutoModel.from_pretrained(place)), tokenizer=tokens, max_tokens=max_tokens)

    @property
    def width(self) -> int:
        """D, the width of the states."""
        return int(self.backbone.config.hidden_size)

    def depths(self) -> dict[str, int]:
        """Returns how far below the top each parameter is: 0 in the uppermost layer, most in embeddings.

        What belongs to no layer and is no embedding (a last norm) counts as top.

        Raises:
            ConfigError: No parameter's name says which layer it is of (ALBERT shares one among all).
        """
        names = [name for name, _ in self.named_parameters()]
        layers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
        if not layers:
            raise ConfigError(
                f"reader: expected numbered layers among the weights of {type(self.backbone).__name__}, to let upper "
                "ones learn alone or faster, found none. Use scope=all or heads, and layer_decay=1."
            )
        num_layers = max(layers.values()) + 1
        below = {name: num_layers if "embed" in name else 0 for name in names}
        return below | {name: num_layers - 1 - layer for name, layer in layers.items()}

    def forward(self, reading: Reading) -> Float[Tensor, "N L D"]:
        """Returns the last states of each token; texts of like length run together, and padding behind them is 0."""
        tokens, width = reading.tokens, reading.tokens.input_ids.shape[1]
        groups = model_length_groups(self.backbone, lengths_of(tokens), width)
        if len(groups) == 1:
            return self._states(tokens, reading.token_type_ids)
        embedded, parts = embedded_once(self.backbone, tokens.input_ids), []
        for group in groups:
            kinds = reading.token_type_ids
            if kinds is not None:
                kinds = kinds[:, : group.length] if group.rows_M is None else kinds[group.rows_M, : group.length]
            with embedded(group):
                parts.append(widened(self._states(group.of(tokens), kinds), width))
        return restored(parts, groups)

    def _states(self, tokens: TokenBatch, kinds_NL: Int[Tensor, "N L"] | None) -> Float[Tensor, "N L D"]:
        kinds = {} if kinds_NL is None else {"token_type_ids": kinds_NL}
        output = self.backbone(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, return_dict=True, **kinds
        )
        states_NLD: Tensor = output.last_hidden_state
        return states_NLD

    def save(self, directory: Path) -> None:
        """Writes model and tokenizer in the transformers layout."""
        self.backbone.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
