"""Cross-attention to the encoder's states themselves, where targets are short.

Inputs: a decoder's queries ``[N, h, T, d]`` and the states ``x`` of N contexts, ``[N, L, H]``. The usual way projects
every token of every context to a key and a value in every layer, ``2 H h d`` products for each, though only T queries
read them. But a score is ``q · (W_k x + b_k) = (W_kᵀ q) · x + q · b_k``, whose last number is the same for all tokens
of the context, so that the softmax drops it; and what is read is ``W_v (Σ p x) + b_v``. So ``T h`` queries as wide as
the states read the states, ``2 H T h`` products for each token, and nothing is projected: less work where ``T < d``.

DeepSeek-AI 2024 ("DeepSeek-V2", §2.1.2) absorb projections in this way in decoding. Here the training step profits,
whose targets have a few tokens and whose contexts hundreds; a token of the context then costs the decoder so little
that contexts of all lengths can run together, and its runs are grouped by the length of the targets instead.

It is an attention function of transformers, in place only while a decoder runs; the states reach it as the keys of an
``EncoderDecoderCache`` that counts as filled, so that the model's own code projects nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from rag_lightning.generators.attention_function import USUAL, register, replaced_attention, sdpa
from rag_lightning.utils.distributed import is_sharded

NAME = "sdpa_absorbed"
_CROSS = ("encoder_attn", "EncDecAttention", "crossattention.self")
"""What BART-like, T5-like and BERT-like decoders call their cross-attention."""
_PROJECTIONS = (("k_proj", "v_proj"), ("k", "v"), ("key", "value"))
_WIDTHS = ("head_dim", "key_value_proj_dim", "attention_head_size")
_DEVICES = frozenset({"cpu"})
"""Where it was measured to pay. A GPU's fused attention takes no heads as wide as the states."""
_DTYPES = frozenset({torch.float32, torch.float64})
"""In bfloat16 it rounded several times as much as the plain way."""


@dataclass
class _Reading:
    """Which states are read, and while it is tried out, which layers would read them.

    Attributes:
        states: Taken for keys, ``[N, 1, L, H]``; or, while it is tried out, what layers should project, ``[N, L, H]``.
        tried: None, or the layers that have come by with keys that are projections of the states.
    """

    states: Tensor
    tried: list[nn.Module] | None = field(default=None)


_reading: ContextVar[_Reading | None] = ContextVar("reading_states", default=None)


class AbsorbedAttention:
    """Whether a model's decoder can read states, and how it is made to.

    Args:
        model: An encoder-decoder of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._works: bool | None = None

    @property
    def may_pay(self) -> bool:
        """Whether the model has cross-attention that is known here, on a device where reading states can pay."""
        return next(self._model.parameters()).device.type in _DEVICES and bool(self._layers)

    def pays(self, lengths: Sequence[int], target_lengths: Sequence[int]) -> bool:
        """Returns whether reading states costs less than projecting them.

        Args:
            lengths: Tokens of each context.
            target_lengths: Tokens of each target, one for each context.
        """
        if not self.may_pay:
            return False
        return sum(target_lengths) * max(lengths) < _head_width(self._layers[0]) * sum(lengths)

    def works(self, states_NLH: Float[Tensor, "N L H"], forward: Callable[[], Any]) -> bool:
        """Returns whether reading states gives what the model would: seen in one run of its own code.

        Args:
            states_NLH: The states of some contexts.
            forward: Runs the decoder on them.
        """
        layers = self._layers
        if torch.is_autocast_enabled(states_NLH.device.type) or states_NLH.dtype not in _DTYPES:
            return False
        if is_sharded(self._model) or _is_checkpointed(self._model) or not all(map(_is_plain, layers)):
            return False
        if self._works is None:
            reading = _Reading(states_NLH, tried=[])
            devices = [states_NLH.device] if states_NLH.is_cuda else []
            with torch.no_grad(), torch.random.fork_rng(devices), _attention(self._model, reading):
                forward()
            self._works = reading.tried == layers
        return self._works

    @contextmanager
    def reading(self, states_NLH: Float[Tensor, "N L H"]) -> Iterator[EncoderDecoderCache]:
        """Lets the decoder read states within the block; yields the cache to run it with."""
        cross, states_N1LH = DynamicCache(), states_NLH[:, None]
        for _ in self._layers:
            layer = DynamicLayer()
            layer.keys = layer.values = states_N1LH
            layer.is_initialized = True
            cross.layers.append(layer)
        with _attention(self._model, _Reading(states_N1LH)):
            yield EncoderDecoderCache(DynamicCache(), cross)

    @property
    def _layers(self) -> list[nn.Module]:
        return [module for name, module in self._model.named_modules() if name.endswith(_CROSS)]


def absorbed_attention(
    module: nn.Module,
    query_NhTd: Float[Tensor, "N h T d"],
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Answers for transformers' ``sdpa``, and for cross-attention to states.

    Returns:
        What was read, ``[N, T, h, d]``, and no weights.
    """
    reading = _reading.get()
    if reading is None or key is not reading.states:
        if reading is not None and reading.tried is not None and _projects(module, reading.states, key):
            reading.tried.append(module)
        return sdpa(module, query_NhTd, key, value, attention_mask, **settings)
    keys, values = _projections(module)
    num_rows, num_heads, num_targets, width = query_NhTd.shape
    wide_NhTH = torch.einsum("nhtd,hdx->nhtx", query_NhTd, keys.weight.view(num_heads, width, -1))
    read_N1XH = F.scaled_dot_product_attention(
        wide_NhTH.reshape(num_rows, 1, num_heads * num_targets, -1),
        key,
        key,
        attn_mask=None if attention_mask is None else attention_mask[:, :, :1],  # it is the same for every target token
        dropout_p=settings.get("dropout", 0.0),
        scale=settings["scaling"],
    )
    read_NhTH = read_N1XH.view(num_rows, num_heads, num_targets, -1)
    read_NThd = torch.einsum("nhtx,hdx->nthd", read_NhTH, values.weight.view(num_heads, width, -1))
    if values.bias is not None:
        read_NThd = read_NThd + values.bias.view(num_heads, width)
    if keys.bias is not None:  # its gradient is zero and not missing: distributed training waits for it
        read_NThd = read_NThd + 0.0 * keys.bias.view(num_heads, width)
    return read_NThd, None


@contextmanager
def _attention(model: nn.Module, reading: _Reading) -> Iterator[None]:
    token = _reading.set(reading)
    try:
        with replaced_attention(model, NAME):
            yield
    finally:
        _reading.reset(token)


def _projections(module: Any) -> tuple[Any, Any]:
    names = next((pair for pair in _PROJECTIONS if hasattr(module, pair[0])), _PROJECTIONS[0])
    return tuple(getattr(module, name, None) for name in names)  # type: ignore[return-value]


def _head_width(module: nn.Module) -> int:
    return next((int(getattr(module, name)) for name in _WIDTHS if hasattr(module, name)), 0)


def _projects(module: nn.Module, states_NLH: Tensor, key: Tensor) -> bool:
    """Returns whether a layer's keys are plain projections of the states: nothing is done to them before or after."""
    layer, _ = _projections(module)
    if not isinstance(layer, nn.Linear) or layer.in_features != states_NLH.shape[-1] or key.ndim != 4:
        return False
    expected = layer(states_NLH).view(*states_NLH.shape[:2], -1, key.shape[-1]).transpose(1, 2)
    return expected.shape == key.shape and torch.equal(expected, key)


def _is_plain(module: Any) -> bool:
    """Returns whether a layer's projections are just that, now: no adapters, nobody who watches, no sum that drops."""
    keys, values = _projections(module)
    if not (_is_unwatched(keys) and _is_unwatched(values)):
        return False
    dropout = getattr(module, "dropout", 0.0)
    rate = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    drops = module.training and rate > 0  # then probabilities do not sum to 1, and a bias is not added in full
    biased = getattr(module, "has_relative_attention_bias", False)
    usual = getattr(getattr(module, "config", None), "_attn_implementation", None) == USUAL
    return usual and not biased and not (drops and values.bias is not None)


def _is_unwatched(layer: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(layer) is nn.Linear
        and isinstance(layer.weight, nn.Parameter)
        and "forward" not in layer.__dict__
        and not any(getattr(layer, name) for name in hooks)
    )


def _is_checkpointed(model: nn.Module) -> bool:
    """Returns whether layers run again in the backward pass, when the attention is the usual one again."""
    layers = (layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))
    return any("forward" in layer.__dict__ or layer.gradient_checkpointing for layer in layers)


register(NAME, absorbed_attention)
