"""The output layer on scored positions alone, a chunk of the vocabulary's logits at a time.

Inputs: a decoder's last states ``[M, H]`` at the positions that a target scores, the output layer's weight ``[V, H]``.
Training needs ``log p(y_t)`` of one token for each position (design §8.3), but the plain way makes ``[B, K, T, V]``
logits of every position, padding included, and keeps them, their log-softmax and its gradient. Here no more than one
chunk of logits exists at a time: forward keeps one normaliser for each position, and backward makes the logits again.
Where all of them fit into one chunk, their softmax is kept instead, and nothing is made twice.

The layer's weight is used directly where logits are ``W h + b`` and no more; where a model does more (soft-capped or
scaled logits), or its weights are spread over processes, the model's own code runs on the scored positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rag_lightning.utils.distributed import is_sharded

MAX_CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""


class OutputLayer:
    """Where a model's logits come from.

    Args:
        model: A transformers model with a language-model head.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_linear: bool | None = None

    def is_linear(self, forward: Callable[[], Float[Tensor, "N X V"]]) -> bool:
        """Returns whether :meth:`log_probs` gives what the model would: tried once, with a state of large entries.

        Args:
            forward: Runs the model on some input and returns its logits; without effect on gradients and randomness.
        """
        layer = self._layer
        if type(layer) is not nn.Linear or not isinstance(layer.weight, nn.Parameter) or is_sharded(layer):
            return False
        if self._is_linear is None:
            devices = [layer.weight.device] if layer.weight.is_cuda else []
            with torch.no_grad(), torch.random.fork_rng(devices), replaced_input(layer, _large_state):
                logits_11V = forward()
            torch.clear_autocast_cache()  # before torch 2.11, weights cast without gradient were used again with it
            self._is_linear = self._agrees(logits_11V)
        return self._is_linear

    def states(self, forward: Callable[[], Float[Tensor, "N X V"]]) -> Float[Tensor, "N X H"]:
        """Returns what the output layer is given when the model runs; the layer itself is given nothing."""
        taken: list[Tensor] = []

        def take(states: Tensor) -> Tensor:
            taken.append(states)
            return states[:, :0]

        with replaced_input(self._layer, take):
            forward()
        (states_NXH,) = taken
        return states_NXH

    def logits_at(
        self, forward: Callable[[], Float[Tensor, "1 M V"]], mask_NT: Bool[Tensor, "N T"]
    ) -> Float[Tensor, "M V"]:
        """Returns the model's own logits of the positions in the mask, which is that of the last T states.

        Or of all states where these are fewer: the mask's further positions are False then.
        A model that gives its output layer more than ``[N, T, H]``, or has none, runs it on all positions.
        """
        num_targets, picked = mask_NT.shape[1], False

        def masked(rows: Tensor) -> Tensor:
            last = rows[:, -num_targets:]
            return last[mask_NT[:, : last.shape[1]]]

        def pick(states: Tensor) -> Tensor:
            nonlocal picked
            picked = states.ndim == 3
            return masked(states)[None] if picked else states

        with nullcontext() if self._layer is None else replaced_input(self._layer, pick):
            logits = forward()
        logits_SV: Tensor = logits[0] if picked else masked(logits)
        assert logits_SV.shape[0] == int(mask_NT.sum())
        return logits_SV

    def log_probs(
        self, states_MH: Float[Tensor, "M H"], targets_M: Int[Tensor, "M"], *, vocab_mean: bool = False
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"] | None]:
        """Returns the log-probability of each position's target and, if asked, the vocabulary's mean.

        Args:
            states_MH: From :meth:`states`.
            targets_M: One token for each.
            vocab_mean: For label smoothing.
        """
        return linear_log_probs(states_MH, self._layer.weight, self._bias(), targets_M, vocab_mean=vocab_mean)

    @property
    def _layer(self) -> Any:
        return self._model.get_output_embeddings()

    def _bias(self) -> Float[Tensor, "V"] | None:
        own: Tensor | None = self._layer.bias
        further: Tensor | None = getattr(self._model, "final_logits_bias", None)  # BART and its kin
        if further is None:
            return own
        return further[0] if own is None else own + further[0]

    @torch.no_grad()
    def _agrees(self, logits_11V: Tensor) -> bool:
        weight_VH, bias_V = self._layer.weight, self._bias()
        state_1H = _large_state(weight_VH[None])[0]
        ours_1V = nn.functional.linear(state_1H, weight_VH)
        ours_1V = ours_1V if bias_V is None else ours_1V + bias_V
        tolerance = 1e-3 if logits_11V.dtype in (torch.float32, torch.float64) else 3e-2
        scale = float(ours_1V.abs().max())
        if logits_11V.shape != (1, *ours_1V.shape):
            return False
        return torch.allclose(logits_11V[0].float(), ours_1V.float(), rtol=tolerance, atol=tolerance * scale)


def _large_state(states: Tensor) -> Tensor:
    """Returns one state of large entries, as wide as the given ones: a soft cap or a scale would show."""
    if states.ndim != 3:
        return states
    wave_H = torch.arange(states.shape[-1], device=states.device).float().mul(1.7).sin() * 50
    return wave_H.to(states.dtype)[None, None]


@contextmanager
def replaced_input(layer: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, a layer is given something made of its input instead."""
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: (replace(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def linear_log_probs(
    states_MH: Float[Tensor, "M H"],
    weight_VH: Float[Tensor, "V H"],
    bias_V: Float[Tensor, "V"] | None,
    targets_M: Int[Tensor, "M"],
    *,
    vocab_mean: bool = False,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"] | None]:
    """Returns ``log softmax(W h + b)`` at one token for each state, and if asked its mean over the vocabulary.

    In float32 at least. Memory besides inputs and gradients: one chunk of logits and two numbers for each state, as in
    Wijmans et al. 2025 ("Cut your losses in large-vocabulary language models"), here in plain torch.

    Args:
        states_MH: The decoder's last states.
        weight_VH: The output layer's weight.
        bias_V: Its bias.
        targets_M: One token for each.
        vocab_mean: Also the mean.
        max_chunk_elements: Logits that exist at a time.

    >>> states, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> linear_log_probs(states, weight, None, torch.tensor([0, 3]))[0].exp()
    tensor([0.2500, 0.2500])
    """
    if torch.is_autocast_enabled(states_MH.device.type):
        dtype = torch.get_autocast_dtype(states_MH.device.type)
        states_MH, weight_VH = states_MH.to(dtype), weight_VH.to(dtype)
    log_probs_M, mean_M = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        states_MH, weight_VH, bias_V, targets_M, vocab_mean, max_chunk_elements
    )
    return log_probs_M, mean_M if vocab_mean else None


class _LinearLogProbs(torch.autograd.Function):
    """With ``p = softmax(W h + b)``: ``d log p(y) / d logits = e_y - p``, ``d mean / d logits = 1/V - p``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        states_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        vocab_mean: bool,
        max_elements: int,
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, max_elements // weight_VH.shape[0])
        kept_p: Tensor | None = None
        log_probs, means, normalisers = [], [], []
        for start in range(0, max(1, states_MH.shape[0]), rows):
            chunk = slice(start, start + rows)
            logits_CV = _logits(states_MH[chunk], weight_VH, bias_V)
            normaliser_C = logits_CV.logsumexp(dim=-1)
            log_probs.append(logits_CV.gather(1, targets_M[chunk, None])[:, 0] - normaliser_C)
            means.append(logits_CV.mean(dim=-1) - normaliser_C if vocab_mean else torch.zeros_like(normaliser_C))
            normalisers.append(normaliser_C)
            if states_MH.shape[0] <= rows and any(ctx.needs_input_grad[:3]):
                kept_p = logits_CV.sub_(normaliser_C[:, None]).exp_()
        ctx.save_for_backward(states_MH, weight_VH, bias_V, targets_M, torch.cat(normalisers), kept_p)
        ctx.vocab_mean, ctx.rows = vocab_mean, rows
        return torch.cat(log_probs), torch.cat(means)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, grad_mean_M: Tensor) -> tuple[Tensor | None, ...]:
        states_MH, weight_VH, bias_V, targets_M, normaliser_M, kept_p = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_mean_M = grad_mean_M if ctx.vocab_mean else torch.zeros_like(grad_M)
        grad_states = torch.empty_like(states_MH) if wants_states else None
        # accumulated in float32: chunks are many, and half precision would lose the later ones
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V, dtype=normaliser_M.dtype) if wants_bias else None
        for start in range(0, states_MH.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            states_CH, targets_C = states_MH[chunk], targets_M[chunk]
            share_C1 = grad_mean_M[chunk, None] / weight_VH.shape[0]
            if kept_p is None:
                p_CV = _logits(states_CH, weight_VH, bias_V).sub_(normaliser_M[chunk, None]).exp_()
            else:
                p_CV = kept_p
            down_CV = p_CV * -(grad_M + grad_mean_M)[chunk, None]
            if ctx.vocab_mean:
                down_CV += share_C1
            down_CV.scatter_add_(1, targets_C[:, None], grad_M[chunk, None])
            if grad_bias is not None:
                grad_bias += down_CV.sum(dim=0)
            down_CV = down_CV.to(states_MH.dtype)
            if grad_states is not None:
                grad_states[chunk] = down_CV @ weight_VH
            if wants_weight:
                grad_weight = _with_product(grad_weight, down_CV, states_CH, normaliser_M.dtype)
        if wants_weight:
            grad_weight = grad_weight.to(weight_VH.dtype) if grad_weight is not None else torch.zeros_like(weight_VH)
        grad_bias = grad_bias.to(bias_V.dtype) if grad_bias is not None else None
        return grad_states, grad_weight, grad_bias, None, None, None


def _logits(states_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Float[Tensor, "C V"]:
    with torch.autocast(states_CH.device.type, enabled=False):
        logits_CV = nn.functional.linear(states_CH, weight_VH.to(states_CH.dtype))
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _with_product(total_VH: Tensor | None, left_CV: Tensor, right_CH: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``total + left^T right``; in place where it can be."""
    if total_VH is None:
        return (left_CV.T @ right_CH).to(dtype)
    if total_VH.dtype == left_CV.dtype:
        return total_VH.addmm_(left_CV.T, right_CH)
    return total_VH.add_(left_CV.T @ right_CH)
