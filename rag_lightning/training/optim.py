"""Who learns, how fast, and along which schedule: one parameter group for each part of the model."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.heads.model import HeadedModel
from rag_lightning.heads.reader import Reader
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.base import Retriever
from rag_lightning.training.eight_bit import adamw_8bit

Schedule = Literal["constant", "linear", "cosine", "polynomial"]
OptimizerName = Literal["adamw", "adamw_fused", "adamw_8bit"]
PARTS = ("query_encoder", "passage_encoder", "generator", "fusion", "reader", "heads")
Learner = RagModel | HeadedModel


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW with a learning rate for each part.

    Attributes:
        lr_query_encoder: Peak learning rate of the query tower.
        lr_passage_encoder: Peak learning rate of the passage tower.
        lr_generator: Peak learning rate of the generator.
        lr_fusion: Peak learning rate of a hybrid retriever's learned gate: a handful of weights from zero, so far above
            those of pretrained parts.
        lr_reader: Peak learning rate of the encoder that heads look at (``task=…``).
        lr_heads: Peak learning rate of heads, which start at random.
        layer_decay: Each layer of the reader learns so much slower than the one above it, embeddings slowest:
            discriminative fine-tuning (Howard and Ruder 2018, §3.2).
        train_query_encoder: False freezes the query tower.
        train_passage_encoder: True trains the passage tower too: the K retrieved passages are encoded again with
            gradient at each step. Wants ``reindex.schedule``, or the index goes stale.
        train_generator: False freezes the generator.
        train_fusion: False freezes the gate. Without effect on a model whose fusion learns nothing.
        train_reader: False freezes the encoder that heads look at.
        train_heads: False freezes heads.
        weight_decay: On matrices; biases and norms are left alone.
        beta1: First moment's decay.
        beta2: Second moment's decay.
        eps: Denominator's floor.
        schedule: What the learning rate does after warm-up.
        warmup_steps: Optimiser steps of linear warm-up from 0.
        power: Exponent of the polynomial schedule.
        name: ``adamw``; ``adamw_fused``, the same in one kernel for all parameters, equal up to rounding (in 16-mixed
            precision Lightning refuses it together with gradient clipping); or ``adamw_8bit``, which keeps a quarter of
            the state, see :mod:`rag_lightning.training.eight_bit`.
        checkpoint_activations: Parts that compute their activations again in the backward pass, and so keep few; see
            :mod:`rag_lightning.training.activations`.
    """

    lr_query_encoder: float = 1e-5
    lr_passage_encoder: float = 1e-5
    lr_generator: float = 3e-5
    lr_fusion: float = 1e-3
    lr_reader: float = 2e-5
    lr_heads: float = 1e-3
    layer_decay: float = 1.0
    train_query_encoder: bool = True
    train_passage_encoder: bool = False
    train_generator: bool = True
    train_fusion: bool = True
    train_reader: bool = True
    train_heads: bool = True
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    power: float = 1.0
    name: OptimizerName = "adamw"
    checkpoint_activations: Sequence[str] = ()

    def __post_init__(self) -> None:
        for part in PARTS:
            rate = getattr(self, f"lr_{part}")
            if not (math.isfinite(rate) and rate > 0):
                raise ConfigError(
                    f"optim.lr_{part}: expected a positive number, got {rate}; to freeze it set train_{part}=false"
                )
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay: expected a factor above 0 and at most 1, got {self.layer_decay}")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"optim.schedule: expected one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps: expected 0 or more, got {self.warmup_steps}")
        if self.name not in get_args(OptimizerName):
            raise ConfigError(f"optim.name: expected one of {', '.join(get_args(OptimizerName))}, got {self.name!r}")
        unknown = [part for part in self.checkpoint_activations if part not in PARTS[:3]]
        if unknown:
            raise ConfigError(
                f"optim.checkpoint_activations: expected some of {', '.join(PARTS[:3])}, got {', '.join(unknown)}"
            )

    def trained_parts(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Returns the parts of ``wanted`` that are not frozen."""
        return tuple(part for part in PARTS if part in set(wanted) and getattr(self, f"train_{part}"))


def modules_of(model: Learner) -> dict[str, nn.Module]:
    """Returns the model's parts by name; a shared tower counts as the query encoder, and so does a null passage."""
    if isinstance(model, HeadedModel):
        return model.parts()
    parts: dict[str, nn.Module] = {"generator": model.generator}
    if model.encoder is not None:
        query = model.encoder.query
        parts["query_encoder"] = query if model.null_passage is None else nn.ModuleList([query, model.null_passage])
        if model.encoder.passage is not None and not model.encoder.shared:
            parts["passage_encoder"] = model.encoder.passage
    if model.fusion is not None and any(True for _ in model.fusion.parameters()):
        parts["fusion"] = model.fusion
    return parts


def check_learns(model: RagModel, retriever: Retriever, trained: Iterable[str]) -> None:
    """Refuses to train a part that the loss cannot reach through this retriever: it would stay as it is, silently.

    For objectives that learn from retrieved passages (the marginals). One that scores passages of its own, such as the
    contrastive one, reaches the encoders whatever retrieves.

    Args:
        model: What is trained.
        retriever: What gives the document scores.
        trained: The parts that are to learn.

    Raises:
        ConfigError: Names the part and the setting that freezes it.
    """
    for part in sorted((set(trained) & set(modules_of(model))) - {"generator", *retriever.gradient_to}):
        taught = " and ".join(retriever.gradient_to) or "no part of the model"
        raise ConfigError(
            f"optim.train_{part}=true, but retriever {retriever.snapshot_id} gives a gradient to {taught}: its "
            f"document scores do not depend on the {part.replace('_', ' ')}, which would never learn. Set "
            f"optim.train_{part}=false, or choose a retriever that teaches it (dense, or hybrid with fusion convex or "
            "gate, whose scores move with the encoders)."
        )


def freeze_all_but(model: Learner, trained: Iterable[str]) -> None:
    """Switches gradients on for the trained parts and off for the others.

    Raises:
        ConfigError: Nothing is left to train, or one of two shared towers is to be frozen.
    """
    trained = set(trained)
    if model.encoder is not None and model.encoder.shared and len(trained & {"query_encoder", "passage_encoder"}) == 1:
        raise ConfigError(
            "the towers are shared (encoder.shared=true): train both or freeze both, by "
            "optim.train_query_encoder and optim.train_passage_encoder"
        )
    parts = modules_of(model)
    if not trained & set(parts):
        raise ConfigError(
            f"nothing to train: this objective trains {sorted(trained) or 'only frozen parts'}, the model has "
            f"{sorted(parts)}. Set one of {', '.join(f'optim.train_{part}' for part in PARTS if part in parts)}."
        )
    for part, module in parts.items():
        fixed: frozenset[str] = getattr(module, "fixed_parameters", frozenset())  # what lies under adapters
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(part in trained and name not in fixed)


def parameter_groups(model: Learner, settings: OptimSettings, *, by_layer: bool = False) -> list[dict[str, Any]]:
    """Returns AdamW groups of the parameters that require gradients, named after their part.

    Args:
        model: What learns.
        settings: Rates and decay.
        by_layer: A group for each layer of a reader, as ``settings.layer_decay`` asks for too; ``depth`` says how far
            below the top it is, 0 in all other groups.

    Raises:
        ConfigError: ``layer_decay`` for a model without a reader.
    """
    by_layer = by_layer or settings.layer_decay != 1
    if settings.layer_decay != 1 and not isinstance(model, HeadedModel):
        raise ConfigError(
            f"optim.layer_decay={settings.layer_decay}: expected 1 for a model without a reader (task=…), whose layers "
            "it is about. Leave it out."
        )
    groups: dict[str, dict[str, Any]] = {}
    for part, module in modules_of(model).items():
        depths = module.depths() if by_layer and isinstance(module, Reader) else {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            depth, decays = depths.get(name, 0), parameter.ndim >= 2
            key = part + (f"/depth{depth}" if depths else "") + ("" if decays else "/no_decay")
            rate = getattr(settings, f"lr_{part}") * settings.layer_decay**depth
            decay = settings.weight_decay if decays else 0.0
            new: dict[str, Any] = {"params": [], "lr": rate, "weight_decay": decay, "name": key, "depth": depth}
            groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: Learner, settings: OptimSettings, *, by_layer: bool = False) -> torch.optim.Optimizer:
    """Returns AdamW over :func:`parameter_groups`, in the form that ``settings.name`` says.

    Raises:
        MissingExtraError: ``adamw_8bit`` without bitsandbytes.
        ConfigError: ``adamw_8bit`` where nothing would keep 8 bits.
    """
    groups, betas = parameter_groups(model, settings, by_layer=by_layer), (settings.beta1, settings.beta2)
    if settings.name == "adamw_8bit":
        return adamw_8bit(groups, betas=betas, eps=settings.eps, model=model)
    fused = True if settings.name == "adamw_fused" else None  # None is torch's own choice among the plain ones
    return torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=fused)


def check_optimizer(settings: OptimSettings, saved_name: str) -> None:
    """Refuses to go on with another optimiser's state: torch would take the saved one's settings with it, unseen.

    Raises:
        CheckpointError: Names both.
    """
    if saved_name != settings.name:
        raise CheckpointError(
            f"checkpoint: expected the state of optim.name={settings.name}, came that of {saved_name}. Resume with "
            f"optim.name={saved_name}, or start a new run from its saved model."
        )


def rate_factor(settings: OptimSettings, total_steps: int) -> Callable[[int], float]:
    """Returns the learning rate's factor at each optimiser step.

    >>> factor = rate_factor(OptimSettings(schedule="linear", warmup_steps=2), total_steps=6)
    >>> [factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return float((1 - progress) ** (settings.power if settings.schedule == "polynomial" else 1.0))

    return factor


def build_scheduler(optimizer: torch.optim.Optimizer, settings: OptimSettings, total_steps: int) -> LambdaLR:
    """Returns the schedule, to be stepped after every optimiser step."""
    return LambdaLR(optimizer, rate_factor(settings, total_steps))
