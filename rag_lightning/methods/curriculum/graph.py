"""A graph of training activities: what may follow what.

An activity is anything that a training step can be spent on: a task, a data set, an objective. An edge from ``a`` to
``b`` says that ``b`` may be trained right after ``a``; its weight says how good an idea that seems beforehand. A policy
(:mod:`rag_lightning.methods.curriculum.policies`) walks the edges. Inputs are names and numbers, as a YAML file gives
them::

    nodes:
      answering: {reward_weight: 1.0, size: 3610}
      titles:    {size: 20000}
    edges:
      - {from: answering, to: titles, weight: 2.0}
      - {from: titles, to: answering}
      - {from: answering, to: answering}

Without ``edges`` every activity may follow every one, itself included.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from rag_lightning.errors import ConfigError

Edge = tuple[str, str, float]
NODE_KEYS = ("reward_weight", "size")
EDGE_KEYS = ("from", "to", "weight")


@dataclass(frozen=True, slots=True)
class Activity:
    """A node of the graph.

    Attributes:
        name: Unique in its graph.
        reward_weight: What an improvement measured after training on it is multiplied by; 0 or more.
        size: Its number of examples, read by the proportional and temperature policies; None where nobody asks.
    """

    name: str
    reward_weight: float = 1.0
    size: int | None = None


class ActivityGraph:
    """Activities, and the edges along which training may go from one to the next.

    Args:
        activities: The nodes; policies that know no better keep their order.
        edges: Source, target and weight. An edge of weight 0 is never walked, so it is left out. None makes the
            complete graph: every activity may follow every one, itself included, with equal weights.

    Attributes:
        nodes: The activities' names, in the order given.
        digraph: The networkx graph, frozen; edges have a ``weight``.

    Raises:
        ConfigError: No node, or a name twice; a node's number out of range, or sizes for some nodes only; an edge of an
            unknown node, twice, or with a weight that is no finite number of 0 or more; a node without any edge,
            without an edge that leaves it, or all of whose leaving edges have weight 0.

    >>> graph = ActivityGraph([Activity("read"), Activity("write")], [("read", "write", 2.0), ("write", "write", 1.0)])
    >>> graph.neighbours("read")
    {'write': 2.0}
    >>> graph.order()
    ('read', 'write')
    """

    def __init__(self, activities: Sequence[Activity], edges: Sequence[Edge] | None = None) -> None:
        self._activities = {activity.name: activity for activity in activities}
        self.nodes = tuple(self._activities)
        _check_activities(activities)
        if edges is None:
            edges = [(source, target, 1.0) for source in self.nodes for target in self.nodes]
        _check_edges(self.nodes, edges)
        digraph = nx.DiGraph()
        digraph.add_nodes_from(self.nodes)
        digraph.add_weighted_edges_from((source, target, float(weight)) for source, target, weight in edges if weight)
        self.digraph = nx.freeze(digraph)

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> "ActivityGraph":
        """Builds a graph from plain values.

        Args:
            description: ``nodes``, a mapping of names to ``reward_weight`` and ``size`` (or to nothing), and ``edges``,
                a list of ``from``, ``to`` and ``weight`` (1 where it is left out), or None.

        Raises:
            ConfigError: A key is missing or unknown, or the graph does not hold together.

        >>> ActivityGraph.from_dict({"nodes": {"a": None, "b": None}}).neighbours("a")
        {'a': 1.0, 'b': 1.0}
        """
        _check_keys("curriculum.graph", description, required=("nodes",), known=("nodes", "edges"))
        activities = []
        for name, settings in (description["nodes"] or {}).items():
            place = f"curriculum.graph.nodes.{name}"
            _check_keys(place, settings or {}, required=(), known=NODE_KEYS)
            activities.append(Activity(str(name), **{key: settings[key] for key in settings or {}}))
        if description.get("edges") is None:
            return cls(activities)
        edges = []
        for number, edge in enumerate(description["edges"]):
            _check_keys(f"curriculum.graph.edges[{number}]", edge, required=EDGE_KEYS[:2], known=EDGE_KEYS)
            edges.append((str(edge["from"]), str(edge["to"]), edge.get("weight", 1.0)))
        return cls(activities, edges)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that :meth:`from_dict` builds the same graph from."""
        nodes = {
            name: {"reward_weight": one.reward_weight, **({} if one.size is None else {"size": one.size})}
            for name, one in self._activities.items()
        }
        edges = [{"from": source, "to": target, "weight": weight} for source, target, weight in self.edges]
        return {"nodes": nodes, "edges": edges}

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges that may be walked, by source, each with its weight."""
        return tuple((source, target, weight) for source, target, weight in self.digraph.edges.data("weight"))

    def activity(self, name: str) -> Activity:
        """Returns a node's settings.

        Raises:
            ConfigError: There is no such node.
        """
        if name not in self._activities:
            raise ConfigError(f"curriculum.graph: expected one of {_names(self.nodes)}, got {name!r}.")
        return self._activities[name]

    def neighbours(self, node: str) -> dict[str, float]:
        """Returns what may follow ``node``: names, in the order of their edges, with weights above 0.

        Raises:
            ConfigError: There is no such node.
        """
        self.activity(node)
        return {target: edge["weight"] for target, edge in self.digraph.adj[node].items()}

    def order(self) -> tuple[str, ...]:
        """Returns the nodes so that every edge leads forwards; what no edge decides stays as it was given.

        Self loops, by which an activity is trained again, are no obstacle.

        Raises:
            ConfigError: The graph has a cycle of more than one node.
        """
        forwards = nx.DiGraph(self.digraph)
        forwards.remove_edges_from(list(nx.selfloop_edges(forwards)))
        try:
            return tuple(nx.lexicographical_topological_sort(forwards, key=self.nodes.index))
        except nx.NetworkXUnfeasible:
            cycle = [source for source, _ in nx.find_cycle(forwards)]
            raise ConfigError(
                f"curriculum.graph: expected edges that only lead forwards, for an order of the activities, got the "
                f"cycle {' -> '.join([*cycle, cycle[0]])}. Remove one of its edges."
            ) from None


# ---------------------------------------------------------------------- what is refused


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(place: str, found: Any, *, required: Sequence[str], known: Sequence[str]) -> None:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{place}: expected a mapping with {', '.join(known)}, got {found!r}.")
    missing = [key for key in required if key not in found]
    unknown = [str(key) for key in found if key not in known]
    if missing or unknown:
        wrong = " and ".join(
            [f"no {', '.join(missing)}"] * bool(missing) + [f"the unknown {', '.join(unknown)}"] * bool(unknown)
        )
        raise ConfigError(f"{place}: expected {', '.join(known)}, got {wrong}.")


def _check_activities(activities: Sequence[Activity]) -> None:
    if not activities:
        raise ConfigError("curriculum.graph.nodes: expected at least one activity, got none.")
    names = [activity.name for activity in activities]
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise ConfigError(f"curriculum.graph.nodes: expected each name once, got {_names(twice)} again.")
    for one in activities:
        place = f"curriculum.graph.nodes.{one.name}"
        if not _is_number(one.reward_weight) or one.reward_weight < 0:
            raise ConfigError(f"{place}.reward_weight: expected a finite number of 0 or more, got {one.reward_weight}.")
        if one.size is not None and not (_is_number(one.size) and one.size >= 1):
            raise ConfigError(f"{place}.size: expected a number of examples of 1 or more, got {one.size}.")
    without = [one.name for one in activities if one.size is None]
    if 0 < len(without) < len(activities):
        raise ConfigError(
            f"curriculum.graph.nodes: expected a size for every activity or for none, got none for {_names(without)}. "
            "Add theirs, or leave out the others'."
        )


def _check_edges(nodes: Sequence[str], edges: Sequence[Edge]) -> None:
    seen: set[tuple[str, str]] = set()
    for number, (source, target, weight) in enumerate(edges):
        place = f"curriculum.graph.edges[{number}]"
        for name in (source, target):
            if name not in nodes:
                raise ConfigError(f"{place}: expected nodes among {_names(nodes)}, got {name!r}. Add it to the nodes.")
        if (source, target) in seen:
            raise ConfigError(f"{place}: expected each edge once, got {source!r} -> {target!r} again. Remove one.")
        if not _is_number(weight) or weight < 0:
            raise ConfigError(
                f"{place}: expected a finite weight of 0 or more, got {weight} for {source!r} -> {target!r}."
            )
        seen.add((source, target))
    for node in nodes:
        leaving = [weight for source, _, weight in edges if source == node]
        entering = any(target == node for _, target, _ in edges)
        if not leaving and not entering and len(nodes) > 1:
            raise ConfigError(
                f"curriculum.graph: activity {node!r} is isolated: no edge leads to it or from it, so it would never "
                "be trained. Add edges, or remove it."
            )
        if not leaving:
            raise ConfigError(
                f"curriculum.graph: no edge leaves activity {node!r}, so the walk would end there. Add an edge to what "
                "may follow it, or a self loop."
            )
        if sum(leaving) <= 0:
            raise ConfigError(
                f"curriculum.graph: the edges that leave activity {node!r} all have weight 0, so nothing could follow "
                "it. Give one of them a weight above 0."
            )
