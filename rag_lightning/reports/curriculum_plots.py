"""A picture of a curriculum: the graph with the edges that were walked, and how rewards and shares went over time.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles and markers say the same in
print.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.walk import Step
from rag_lightning.reports.plots import check_picture, look, new_figure, shortened

UNWALKED = "0.6"
WALKED = "0.25"
NODE_POINTS = (22.0, 52.0)  # diameters of the least and the most visited activity
EDGE_POINTS = (0.8, 6.0)
NUM_MARKERS = 8


def plot_walk(graph: ActivityGraph, history: Sequence[Step], *, path: Path, window: int | None = None) -> None:
    """Draws a walk: left its graph, right rewards and shares of steps over time.

    A node is as large as its activity's share of steps, an edge as thick as it was often walked; edges that never were
    are dotted. Rewards and shares are means over the last ``window`` steps.

    Args:
        graph: Walked.
        history: Of a :class:`rag_lightning.methods.curriculum.Walk`.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.
        window: In steps; None is a tenth of the walk, at least 5.

    Raises:
        ConfigError: A file of another kind, a window of no step, or a history of another graph.
        DataError: The history is empty.
        MissingExtraError: matplotlib is not installed.
    """
    check_picture(path)
    if window is not None and window < 1:
        raise ConfigError(f"window: expected at least 1 step, got {window}.")
    if not history:
        raise DataError("picture of a curriculum: expected a walk of at least one rewarded step, got none. Train.")
    strange = [name for name in dict.fromkeys(step.activity for step in history) if name not in graph.nodes]
    if strange:
        raise ConfigError(
            f"picture of a curriculum: expected activities of the graph, {', '.join(map(repr, graph.nodes))}, got "
            f"{', '.join(map(repr, strange))}. Give the graph that was walked."
        )
    figure = new_figure(11, 5, "drawing a curriculum")
    left, right = figure.subfigures(1, 2, width_ratios=[1.0, 1.2])
    _draw_graph(left.subplots(), graph, history)
    _draw_courses(right.subplots(2, 1, sharex=True), graph, history, window or max(5, len(history) // 10))
    figure.savefig(path, dpi=150)


def moving_means(
    graph: ActivityGraph, history: Sequence[Step], window: int
) -> tuple[Float[np.ndarray, "A S"], Float[np.ndarray, "A S"]]:
    """Returns, for each activity and step, its mean reward and its share among the last ``window`` steps.

    Rewards are NaN where an activity has no step in the window; at the start, windows are as long as the walk is.
    """
    rewards_S = np.array([step.reward for step in history])
    chosen_AS = np.array([[step.activity == name for step in history] for name in graph.nodes], dtype=np.float64)
    counts_AS, sums_AS = _window_sums(chosen_AS, window), _window_sums(chosen_AS * rewards_S, window)
    lengths_S = np.minimum(np.arange(1, len(history) + 1), window)
    means_AS = np.divide(sums_AS, counts_AS, out=np.full_like(sums_AS, np.nan), where=counts_AS > 0)
    return means_AS, counts_AS / lengths_S


def _window_sums(values_AS: Float[np.ndarray, "A S"], window: int) -> Float[np.ndarray, "A S"]:
    sums_AS = np.cumsum(values_AS, axis=1)
    earlier_AS = np.zeros_like(sums_AS)
    earlier_AS[:, window:] = sums_AS[:, :-window]
    return np.asarray(sums_AS - earlier_AS)


def _draw_courses(axes: Any, graph: ActivityGraph, history: Sequence[Step], window: int) -> None:
    means_AS, shares_AS = moving_means(graph, history, window)
    steps = np.arange(1, len(history) + 1)
    every = max(1, len(history) // NUM_MARKERS)
    for number, name in enumerate(graph.nodes):
        offset = number * every // len(graph.nodes)  # markers of lines that lie on each other stay apart
        style = {**look(number), "markevery": (offset, every), "markersize": 5, "linewidth": 1.5}
        axes[0].plot(steps, means_AS[number], label=shortened(name, 24), **style)
        axes[1].plot(steps, 100 * shares_AS[number], **style)
    axes[0].axhline(0.0, color="0.5", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("mean reward")
    axes[1].set_ylabel("share of steps, %")
    axes[1].set_ylim(-3, 103)
    axes[1].set_xlabel(f"step  (means over the last {window})")
    for one in axes:
        one.grid(axis="y", alpha=0.3)
    columns = min(len(graph.nodes), 3)
    legend = axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_graph(axes: Any, graph: ActivityGraph, history: Sequence[Step]) -> None:
    activities = [step.activity for step in history]
    walked: dict[tuple[str, str], int] = {}
    for edge in pairwise(activities):
        walked[edge] = walked.get(edge, 0) + 1
    count = len(graph.nodes)
    angles = {name: math.pi / 2 - 2 * math.pi * number / count for number, name in enumerate(graph.nodes)}
    places = {name: (math.cos(angle), math.sin(angle)) for name, angle in angles.items()}
    shares = {name: activities.count(name) / len(activities) for name in graph.nodes}
    smallest, largest = NODE_POINTS
    sizes = {name: smallest + (largest - smallest) * math.sqrt(shares[name]) for name in graph.nodes}
    most = max(walked.values(), default=1)
    for source, target, _ in graph.edges:
        share = walked.get((source, target), 0) / most
        _draw_edge(axes, places, (source, target), (sizes[source] / 2, sizes[target] / 2), share)
    for number, name in enumerate(graph.nodes):
        axes.scatter(*places[name], s=sizes[name] ** 2, color=look(number)["color"], edgecolors="black", zorder=3)
        _draw_name(
            axes, f"{shortened(name, 20)}\n{shares[name]:.0%}", places[name], loop=graph.digraph.has_edge(name, name)
        )
    axes.set_aspect("equal")
    axes.set_xlim(-2.5, 2.5)
    axes.set_ylim(-2.1, 2.1)
    axes.set_axis_off()
    axes.set_title("steps by activity, and by edge")


def _draw_name(axes: Any, text: str, place: tuple[float, float], *, loop: bool) -> None:
    """Writes a node's name outside the circle of nodes, where no edge is, and beyond the node's loop."""
    across, up = place
    away = 1.65 if loop else 1.35
    sideways = "left" if across > 0.3 else "right" if across < -0.3 else "center"
    upright = "bottom" if up > 0.3 else "top" if up < -0.3 else "center"
    axes.text(away * across, away * up, text, ha=sideways, va=upright, parse_math=False)


def _draw_edge(
    axes: Any,
    places: dict[str, tuple[float, float]],
    edge: tuple[str, str],
    radii: tuple[float, float],
    share: float,
) -> None:
    """Draws an arrow, or a loop away from the middle; ``share`` is its walks beside those of the commonest."""
    thin, thick = EDGE_POINTS
    line = {
        "linewidth": thin + (thick - thin) * share,
        "color": WALKED if share > 0 else UNWALKED,
        "linestyle": "-" if share > 0 else ":",
    }
    source, target = edge
    across, up = places[source]
    if source == target:
        turn = np.linspace(0, 2 * math.pi, 60)
        axes.plot(1.3 * across + 0.25 * np.cos(turn), 1.3 * up + 0.25 * np.sin(turn), zorder=1, **line)
        return
    arrow = {
        "arrowstyle": "-|>",
        "mutation_scale": 10 + 8 * share,
        "connectionstyle": "arc3,rad=0.18",
        "shrinkA": radii[0],
        "shrinkB": radii[1],
        **line,
    }
    axes.annotate("", places[target], xytext=(across, up), arrowprops=arrow, zorder=2)
