"""The output layer on scored positions alone, a block of the logits at a time.

Inputs: a decoder's last states ``[M, H]`` at the positions that a target scores, the output layer's weight ``[V, H]``.
Training needs ``log p(y_t)`` of one token for each position (design §8.3), but the plain way makes ``[B, K, T, V]``
logits of every position, padding included, and keeps them, their log-softmax and its gradient. Here no more than one
block of logits exists at a time: forward keeps one normaliser for each position, and backward makes the logits again.

A block is some positions by some of the vocabulary. On a CPU it is narrow, so that it is read from the cache it was
just written to; on a GPU it is as wide as the vocabulary, and where one block holds all logits their softmax is kept.

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

MAX_BLOCK_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""
_CPU_BLOCK_WIDTH = 1024
"""Tokens of the vocabulary whose logits a CPU makes at a time; 512 to 2048 take the same."""
_LARGE_LOGIT = 100.0
"""What is added to a larger one is rounded to more than 1e-5 in float32."""


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

    @torch.no_grad()
    def log_probs_of_pairs(
        self, states_NH: Float[Tensor, "N H"], rows_P: Int[Tensor, "P"], tokens_P: Int[Tensor, "P"]
    ) -> Float[Tensor, "P"]:
        """Returns the log-probability of some tokens after some states, without gradient.

        Args:
            states_NH: From :meth:`states`.
            rows_P: A state for each of P tokens; they may repeat.
            tokens_P: The tokens.
        """
        weight_VH = self._layer.weight
        states_NH, weight_VH = _in_autocast_dtype(states_NH, weight_VH)
        picked_P, normaliser_N, _ = _normalised(
            states_NH, weight_VH, self._bias(), rows_P, tokens_P, vocab_mean=False, max_elements=MAX_BLOCK_ELEMENTS
        )
        return picked_P - normaliser_N[rows_P]

    @torch.no_grad()
    def log_probs_of_all(self, states_NH: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Returns the log-probabilities of all tokens after some states, without gradient.

        Args:
            states_NH: From :meth:`states`.
        """
        states_NH, weight_VH = _in_autocast_dtype(states_NH, self._layer.weight)
        bias_V = self._bias()
        dtype = torch.float64 if states_NH.dtype == torch.float64 else torch.float32
        log_probs_NV = states_NH.new_empty(states_NH.shape[0], weight_VH.shape[0], dtype=dtype)
        normaliser_N = states_NH.new_full((states_NH.shape[0],), -torch.inf, dtype=dtype)
        for rows, tokens in _blocks(states_NH.shape[0], weight_VH, MAX_BLOCK_ELEMENTS):
            logits_CW = _logits(states_NH[rows], weight_VH[tokens], None if bias_V is None else bias_V[tokens])
            normaliser_N[rows] = torch.logaddexp(normaliser_N[rows], _log_sum_exp(logits_CW))
            log_probs_NV[rows, tokens] = logits_CW
        return log_probs_NV.sub_(normaliser_N[:, None])

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
    max_block_elements: int = MAX_BLOCK_ELEMENTS,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"] | None]:
    """Returns ``log softmax(W h + b)`` at one token for each state, and if asked its mean over the vocabulary.

    In float32 at least. Memory besides inputs and gradients: one block of logits and two numbers for each state, as in
    Wijmans et al. 2025 ("Cut your losses in large-vocabulary language models"), here in plain torch.

    Args:
        states_MH: The decoder's last states.
        weight_VH: The output layer's weight.
        bias_V: Its bias.
        targets_M: One token for each.
        vocab_mean: Also the mean.
        max_block_elements: Logits that exist at a time.

    >>> states, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> linear_log_probs(states, weight, None, torch.tensor([0, 3]))[0].exp()
    tensor([0.2500, 0.2500])
    """
    states_MH, weight_VH = _in_autocast_dtype(states_MH, weight_VH)
    log_probs_M, mean_M = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        states_MH, weight_VH, bias_V, targets_M, vocab_mean, max_block_elements
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
        ctx.vocab_mean, ctx.max_elements = vocab_mean, max_elements
        rows_M = torch.arange(len(targets_M), device=targets_M.device)
        kept: list[Tensor] | None = [] if any(ctx.needs_input_grad[:3]) else None
        picked_M, normaliser_M, mean_M = _normalised(
            states_MH, weight_VH, bias_V, rows_M, targets_M, vocab_mean=vocab_mean, max_elements=max_elements, kept=kept
        )
        p_MV = kept[0].sub_(normaliser_M[:, None]).exp_() if kept else None
        ctx.save_for_backward(states_MH, weight_VH, bias_V, targets_M, normaliser_M, p_MV)
        return picked_M - normaliser_M, mean_M - normaliser_M if vocab_mean else mean_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, grad_mean_M: Tensor) -> tuple[Tensor | None, ...]:
        states_MH, weight_VH, bias_V, targets_M, normaliser_M, kept_p = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_mean_M = grad_mean_M if ctx.vocab_mean else torch.zeros_like(grad_M)
        # accumulated in float32: blocks are many, and half precision would lose the later ones
        dtype = normaliser_M.dtype
        grad_states = torch.zeros_like(states_MH, dtype=dtype) if wants_states else None
        grad_weight = torch.zeros_like(weight_VH, dtype=dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=dtype) if wants_bias else None
        for rows, tokens in _blocks(len(targets_M), weight_VH, ctx.max_elements):
            states_CH, weight_WH = states_MH[rows], weight_VH[tokens]
            if kept_p is None:
                bias_W = None if bias_V is None else bias_V[tokens]
                p_CW = _logits(states_CH, weight_WH, bias_W).sub_(normaliser_M[rows, None]).exp_()
            else:
                p_CW = kept_p
            down_CW = p_CW * -(grad_M + grad_mean_M)[rows, None]
            if ctx.vocab_mean:
                down_CW += grad_mean_M[rows, None] / weight_VH.shape[0]
            place_C, inside_C = _places(targets_M[rows], tokens)
            down_CW.scatter_add_(1, place_C[:, None], (grad_M[rows] * inside_C)[:, None])
            if grad_bias is not None:
                grad_bias[tokens] += down_CW.sum(dim=0)
            down_CW = down_CW.to(states_MH.dtype)
            if grad_states is not None:
                _add_product(grad_states[rows], down_CW, weight_WH)
            if grad_weight is not None:
                _add_product(grad_weight[tokens], down_CW.T, states_CH)
        return (
            grad_states.to(states_MH.dtype) if grad_states is not None else None,
            grad_weight.to(weight_VH.dtype) if grad_weight is not None else None,
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
        )


def _normalised(
    states_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    rows_P: Tensor,
    tokens_P: Tensor,
    *,
    vocab_mean: bool,
    max_elements: int,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns P logits, the M states' normalisers ``log Σ_v exp``, and their mean logits, or zeros if not asked.

    Args:
        states_MH: The states.
        weight_VH: The output layer's weight.
        bias_V: Its bias.
        rows_P: A state for each logit, in ascending order where there is more than one block of states.
        tokens_P: Whose logits.
        vocab_mean: Also the mean.
        max_elements: Logits that exist at a time.
        kept: Takes the logits if one block as wide as the vocabulary holds all of them.
    """
    num_rows, num_tokens = states_MH.shape[0], weight_VH.shape[0]
    dtype = torch.float64 if states_MH.dtype == torch.float64 else torch.float32
    picked_P = states_MH.new_zeros(len(rows_P), dtype=dtype)
    normaliser_M = states_MH.new_full((num_rows,), -torch.inf, dtype=dtype)
    sum_M = states_MH.new_zeros(num_rows, dtype=dtype)
    for rows, tokens in _blocks(num_rows, weight_VH, max_elements):
        logits_CW = _logits(states_MH[rows], weight_VH[tokens], None if bias_V is None else bias_V[tokens])
        place_P, here_P = _places(tokens_P, tokens)
        row_P, in_rows_P = _places(rows_P, rows)
        picked_P = torch.where(here_P & in_rows_P, logits_CW[row_P, place_P], picked_P)
        normaliser_M[rows] = torch.logaddexp(normaliser_M[rows], _log_sum_exp(logits_CW))
        if vocab_mean:
            sum_M[rows] += logits_CW.sum(dim=1)
        if kept is not None and logits_CW.shape == (num_rows, num_tokens):
            kept.append(logits_CW)
    return picked_P, normaliser_M, sum_M / num_tokens


def _log_sum_exp(logits_CW: Float[Tensor, "C W"]) -> Float[Tensor, "C"]:
    """Returns ``log Σ exp`` of each row; on a CPU by log-softmax, which reads the rows once where it can be done so."""
    first_C = logits_CW[:, 0]
    if logits_CW.is_cpu and bool((first_C.abs() <= _LARGE_LOGIT).all()):
        return first_C - logits_CW.log_softmax(dim=1)[:, 0]
    return logits_CW.logsumexp(dim=1)


def _blocks(num_rows: int, weight_VH: Tensor, max_elements: int) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of logits: which positions, which tokens."""
    num_tokens = weight_VH.shape[0]
    width = min(_CPU_BLOCK_WIDTH, num_tokens) if weight_VH.is_cpu else num_tokens
    height = max(1, max_elements // width)
    for start in range(0, num_rows, height):
        for first in range(0, num_tokens, width):
            yield slice(start, min(start + height, num_rows)), slice(first, min(first + width, num_tokens))


def _places(numbers_N: Int[Tensor, "N"], part: slice) -> tuple[Int[Tensor, "N"], Bool[Tensor, "N"]]:
    """Returns where numbers stand in a part, 0 for those that do not, and which do."""
    inside_N = (numbers_N >= part.start) & (numbers_N < part.stop)
    return (numbers_N - part.start).where(inside_N, 0), inside_N


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _logits(states_CH: Tensor, weight_WH: Tensor, bias_W: Tensor | None) -> Float[Tensor, "C W"]:
    with torch.autocast(states_CH.device.type, enabled=False):
        logits_CW = nn.functional.linear(states_CH, weight_WH.to(states_CH.dtype))
        logits_CW = logits_CW if logits_CW.dtype == torch.float64 else logits_CW.float()
        return logits_CW if bias_W is None else logits_CW.add_(bias_W)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left @ right`` to a view, in the view's precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
