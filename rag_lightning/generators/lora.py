"""Low-rank adapters on a generator (Hu et al. 2022, "LoRA"), by the peft library; the one module that imports it.

The model under the adapters stays as it is, so its optimiser state, gradients and most of its memory fall away. A saved
model has its adapters merged: what reads it need not know of them.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rag_lightning.errors import ConfigError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """How adapters are made.

    Attributes:
        rank: Columns of each low-rank factor.
        alpha: The adapter's output is multiplied by ``alpha / rank``.
        dropout: On the adapter's input, in training.
        target_modules: Ends of the names of the layers that get an adapter (``q_proj``), or ``all-linear``; None for
            what peft knows of the model family.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"peft.rank: expected 1 or more, got {self.rank}")
        if self.alpha < 1:
            raise ConfigError(f"peft.alpha: expected 1 or more, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"peft.dropout: expected 0 <= p < 1, got {self.dropout}")


def add_lora(generator: Any, settings: LoraSettings) -> None:
    """Puts adapters into a generator's model, in place; from then on they alone learn.

    Args:
        generator: A :class:`~rag_lightning.generators.pretrained.PretrainedGenerator`.
        settings: What kind.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: The model has none of the layers named.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft", "LoRA (peft=lora)") from error
    targets = settings.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]  # peft takes a single name for a pattern of whole names
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets) if targets is not None and not isinstance(targets, str) else targets,
    )
    try:
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that it has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            generator.model = peft.get_peft_model(generator.model, config)
    except ValueError as error:
        layers = sorted({name.rsplit(".", 1)[-1] for name, part in generator.model.named_modules() if _linear(part)})
        raise ConfigError(
            f"peft.target_modules={targets!r}: {str(error).splitlines()[0]} The model's linear layers end in: "
            f"{', '.join(layers)}."
        ) from error
    generator.fixed_parameters = frozenset(name for name, p in generator.named_parameters() if not p.requires_grad)


def merged(model: Any) -> Any:
    """Returns a model without adapters that computes the same: a copy where there are some, else the model itself."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return copy.deepcopy(model).merge_and_unload()


def _linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear)
