"""Edge weights from measurements: which activities pull a shared model the same way, and which help which.

Siblings: :func:`graph_from_gradients` needs only gradients at one point of training, is symmetric, and compares
directions; :func:`graph_from_transfer` costs a short training for each activity, and sees what held-out data say of it.
Both give a graph whose edges of no use are missing; where nothing is of use to an activity, its self loop is kept.
Gradient cosines between tasks: Du et al. 2018 (arXiv 1812.02224); transfer between pairs: Standley et al. 2020.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import DataError
from rag_lightning.methods.curriculum.graph import ActivityGraph


def graph_from_gradients(
    gradients: Mapping[str, Sequence[Float[Tensor, " _"]]], nodes: Mapping[str, Any] | None = None
) -> ActivityGraph:
    """Builds a graph whose edge weights are mean cosines between the gradients of two activities.

    The weight of ``a -> b`` is the mean of ``cos(g, h)`` over the gradients ``g`` of ``a`` and ``h`` of ``b``; that of
    a self loop, over pairs of two different gradients of ``a`` (1 where there is only one). A mean of 0 or less makes
    no edge; an activity that would have none keeps its self loop with weight 1.

    Args:
        gradients: For each activity, gradients of the shared parameters at the same point of training, each flat [P]
            and of another batch.
        nodes: The ``nodes`` of :meth:`ActivityGraph.from_dict`; None for activities without settings.

    Raises:
        DataError: An activity without a gradient, lengths that differ, or a gradient that is zero or not finite.
        ConfigError: ``nodes`` are not the activities that have gradients.

    >>> right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> graph = graph_from_gradients({"a": [right], "b": [right, right + up], "c": [-right]})
    >>> {name: round(weight, 3) for name, weight in graph.neighbours("a").items()}
    {'a': 1.0, 'b': 0.854}
    """
    means: dict[str, Tensor] = {}
    own: dict[str, float] = {}
    lengths: dict[str, int] = {}
    for name, several in gradients.items():
        if not several:
            raise DataError(f"gradients of activity {name!r}: expected at least one, got none.")
        units = [_unit(name, gradient, lengths) for gradient in several]
        means[name] = torch.stack(units).mean(dim=0)
        count = len(units)
        # |Σu|² holds each of the n unit vectors with itself once
        total = float(torch.dot(means[name], means[name])) * count**2
        own[name] = (total - count) / (count * (count - 1)) if count > 1 else 1.0
    weights = {
        (source, target): own[source] if source == target else float(torch.dot(means[source], means[target]))
        for source in means
        for target in means
    }
    return _graph(list(means), weights, nodes)


def graph_from_transfer(
    gains: Mapping[tuple[str, str], float], nodes: Mapping[str, Any] | None = None
) -> ActivityGraph:
    """Builds a graph whose edge weights are what training on one activity gave another.

    Args:
        gains: For ``(a, b)``, how much ``b``'s held-out metric rose after a small budget on ``a``, the same budget for
            all. A gain of 0 or less makes no edge; an activity that would have none keeps its self loop with weight 1.
        nodes: The ``nodes`` of :meth:`ActivityGraph.from_dict`; None for activities without settings.

    Raises:
        DataError: No gain, or one that is not finite.
        ConfigError: ``nodes`` are not the activities that have gains.

    >>> graph_from_transfer({("titles", "answers"): 0.3, ("answers", "titles"): -0.1}).edges
    (('titles', 'answers', 0.3), ('answers', 'answers', 1.0))
    """
    if not gains:
        raise DataError("gains: expected one for each pair that was measured, got none.")
    for (source, target), gain in gains.items():
        if not math.isfinite(gain):
            raise DataError(
                f"gain of {target!r} from {source!r}: expected a finite number, got {gain}. Leave out what was not "
                "measured."
            )
    return _graph(list(dict.fromkeys(name for pair in gains for name in pair)), gains, nodes)


def _unit(name: str, gradient: Tensor, lengths: dict[str, int]) -> Float[Tensor, " _"]:
    """Returns a gradient of length 1, in float32 at least; ``lengths`` collects the first length of each activity."""
    lengths.setdefault(name, len(gradient))
    first, expected = next(iter(lengths.items()))
    if len(gradient) != expected:
        raise DataError(
            f"gradients of activity {name!r}: expected {expected} numbers, as the first of {first!r} has, got "
            f"{len(gradient)}. Take all gradients over the same shared parameters."
        )
    gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    norm = float(gradient.norm())
    if not (math.isfinite(norm) and norm > 0):
        raise DataError(
            f"gradients of activity {name!r}: expected finite numbers that are not all 0, got a gradient of norm "
            f"{norm}. It has no direction: leave the batch out, or see why the shared parameters get none."
        )
    return gradient / norm


def _graph(
    names: Sequence[str], weights: Mapping[tuple[str, str], float], nodes: Mapping[str, Any] | None
) -> ActivityGraph:
    edges = []
    for source in names:
        row = {target: float(weights.get((source, target), 0.0)) for target in names}
        useful = {target: weight for target, weight in row.items() if weight > 0} or {source: 1.0}
        edges += [{"from": source, "to": target, "weight": weight} for target, weight in useful.items()]
    return ActivityGraph.from_dict({"nodes": nodes if nodes is not None else dict.fromkeys(names), "edges": edges})
