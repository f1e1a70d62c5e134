"""Policies: which activity follows this one. What they share, and those that do not look at rewards.

Inputs: a graph, and the node that training stands at. A policy gives each neighbour a probability, draws one, and is
told what the step was worth. Draws depend on the seed and on how many were made before, nothing else, so that a run
resumed from a state is the run without the break.

========================  ==========================================================================================
:class:`UniformPolicy`    every neighbour alike: the baseline to beat
:class:`WeightedPolicy`   in proportion to the edge weights: for weights that were measured
:class:`ProportionalPolicy`  in proportion to sizes: as if all examples lay in one pile
:class:`TemperaturePolicy`   between the two: ``size^(1/T)``, as multilingual models are trained (arXiv 1907.05019)
:class:`RoundRobinPolicy`  in turn: no chance involved
``Exp3Policy``            a bandit that assumes nothing about rewards (:mod:`.bandits`)
``ThompsonPolicy``        a bandit that assumes Gaussian rewards, and learns faster where they are (:mod:`.bandits`)
``ReinforcePolicy``       a softmax trained by policy gradient (:mod:`.reinforce`)
========================  ==========================================================================================
"""

import math
from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar, Protocol, runtime_checkable

from rag_lightning.errors import CheckpointError, ConfigError, DataError
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.utils.seeding import rng_at


@runtime_checkable
class Policy(Protocol):
    """What a walk needs to know of a policy."""

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns how likely each neighbour of ``node`` follows it; they sum to 1."""

    def choose(self, node: str) -> str:
        """Draws what follows ``node``."""

    def update(self, node: str, chosen: str, reward: float, probability: float | None = None) -> None:
        """Learns what ``chosen`` was worth after ``node``.

        Args:
            node: Left.
            chosen: Followed.
            reward: Of the step, or its return; higher is better, on any scale.
            probability: With which it was chosen, where the policy was updated since; None if it was not.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values (numbers, strings, lists, mappings of strings) that a run is resumed from."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""


class GraphPolicy:
    """The template of the policies here: they fill in :meth:`probabilities`, and learn in :meth:`_learn` if they do.

    Args:
        graph: Walked.
        seed: Of the draws.
    """

    name: ClassVar[str]

    def __init__(self, graph: ActivityGraph, *, seed: int = 0) -> None:
        self.graph = graph
        self.seed = seed
        self.num_choices = 0
        self.num_updates = 0

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns how likely each neighbour of ``node`` follows it; they sum to 1.

        Raises:
            ConfigError: There is no such node.
        """
        raise NotImplementedError

    def choose(self, node: str) -> str:
        """Draws what follows ``node``.

        Raises:
            ConfigError: There is no such node.
        """
        chosen = self._draw(node, rng_at(self.seed, "curriculum", self.num_choices))
        self.num_choices += 1
        return chosen

    def update(self, node: str, chosen: str, reward: float, probability: float | None = None) -> None:
        """Learns what ``chosen`` was worth after ``node``; see :meth:`Policy.update`.

        Raises:
            ConfigError: No edge leads from ``node`` to ``chosen``, or a probability that nothing is chosen with.
            DataError: The reward is NaN or infinite. Nothing was updated.
        """
        if chosen not in self.graph.neighbours(node):
            raise ConfigError(
                f"curriculum.policy {self.name}: expected an activity that follows {node!r}, one of "
                f"{', '.join(map(repr, self.graph.neighbours(node)))}, got {chosen!r}."
            )
        if probability is not None and not 0.0 < probability <= 1.0:
            raise ConfigError(
                f"curriculum.policy {self.name}: expected the probability that {chosen!r} was chosen with, above 0 and "
                f"at most 1, got {probability}."
            )
        check_reward(reward, activity=chosen, step=self.num_updates)
        self._learn(node, chosen, float(reward), probability)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values that a run is resumed from."""
        return {
            "policy": self.name,
            "edges": [[source, target] for source, target, _ in self.graph.edges],
            "seed": self.seed,
            "num_choices": self.num_choices,
            "num_updates": self.num_updates,
            "learned": self._learned(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned, with its seed.

        Raises:
            CheckpointError: The state is of another policy, or of a graph with other edges.
        """
        if state["policy"] != self.name:
            raise CheckpointError(
                f"curriculum.policy: expected a state of {self.name!r}, got one of {state['policy']!r}. Resume with "
                "the policy that the checkpoint was trained with, or start anew."
            )
        own = [(source, target) for source, target, _ in self.graph.edges]
        saved = [(source, target) for source, target in state["edges"]]
        if own != saved:
            raise CheckpointError(
                f"curriculum.policy {self.name}: the checkpoint's graph has other edges. Here only: "
                f"{_arrows(own, saved)}; there only: {_arrows(saved, own)}. Resume with the same graph, its edges in "
                "the same order, or start anew."
            )
        self.seed, self.num_choices, self.num_updates = state["seed"], state["num_choices"], state["num_updates"]
        self._load_learned(state["learned"])

    def _draw(self, node: str, rng: Random) -> str:
        probabilities = self.probabilities(node)
        return rng.choices(list(probabilities), weights=list(probabilities.values()))[0]

    def _learn(self, node: str, chosen: str, reward: float, probability: float | None) -> None:
        return None

    def _learned(self) -> Any:
        return None

    def _load_learned(self, learned: Any) -> None:
        return None


class UniformPolicy(GraphPolicy):
    """Every neighbour alike, whatever the weights of the edges.

    >>> UniformPolicy(ActivityGraph.from_dict({"nodes": {"a": None, "b": None}})).probabilities("a")
    {'a': 0.5, 'b': 0.5}
    """

    name = "uniform"

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns ``1 / K`` for each of the K neighbours."""
        return _normalised(dict.fromkeys(self.graph.neighbours(node), 1.0))


class WeightedPolicy(GraphPolicy):
    """In proportion to the edge weights: a Markov chain, for weights that were measured (:mod:`.estimate`)."""

    name = "weighted"

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns each edge's share of the weights that leave ``node``."""
        return _normalised(self.graph.neighbours(node))


class TemperaturePolicy(GraphPolicy):
    """In proportion to ``size^(1/T)`` and to the edge weights, which are 1 unless somebody set them.

    Args:
        graph: Walked; its nodes have sizes.
        seed: Of the draws.
        temperature: 1 counts examples; higher values bring small activities up; with infinity only edge weights are
            left.

    Raises:
        ConfigError: A temperature of 0 or less, or a graph without sizes.

    >>> graph = ActivityGraph.from_dict({"nodes": {"small": {"size": 100}, "large": {"size": 10000}}})
    >>> policy = TemperaturePolicy(graph, temperature=2.0)
    >>> {name: round(probability, 3) for name, probability in policy.probabilities("small").items()}
    {'small': 0.091, 'large': 0.909}
    """

    name = "temperature"

    def __init__(self, graph: ActivityGraph, *, seed: int = 0, temperature: float = 1.0) -> None:
        super().__init__(graph, seed=seed)
        if not temperature > 0:
            raise ConfigError(f"curriculum.policy.temperature: expected a number above 0, got {temperature}.")
        self.temperature = temperature
        self._log_sizes = {}
        for node in graph.nodes:
            size = graph.activity(node).size
            if size is None:
                raise ConfigError(
                    f"curriculum.policy {self.name}: expected a size for every activity, got none for {node!r}. Set "
                    f"curriculum.graph.nodes.{node}.size to its number of examples."
                )
            self._log_sizes[node] = math.log(size)

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns the shares of ``size^(1/T) * weight``."""
        logits = {
            name: self._log_sizes[name] / self.temperature + math.log(weight)
            for name, weight in self.graph.neighbours(node).items()
        }
        return dict(zip(logits, softmax(list(logits.values())), strict=True))


class ProportionalPolicy(TemperaturePolicy):
    """In proportion to sizes and to the edge weights, which are 1 unless somebody set them: temperature 1.

    Args:
        graph: Walked; its nodes have sizes.
        seed: Of the draws.

    Raises:
        ConfigError: A graph without sizes.
    """

    name = "proportional"

    def __init__(self, graph: ActivityGraph, *, seed: int = 0) -> None:
        super().__init__(graph, seed=seed, temperature=1.0)


class RoundRobinPolicy(GraphPolicy):
    """In turn: the neighbour that was trained longest ago follows, and among new ones the first in the nodes' order.

    >>> policy = RoundRobinPolicy(ActivityGraph.from_dict({"nodes": {"a": None, "b": None, "c": None}}))
    >>> [policy.choose(node) for node in ("a", "b", "c", "a")]
    ['b', 'c', 'a', 'b']
    """

    name = "round_robin"

    def __init__(self, graph: ActivityGraph, *, seed: int = 0) -> None:
        super().__init__(graph, seed=seed)
        self._trained_at = dict.fromkeys(graph.nodes, -1)

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns 1 for the neighbour whose turn it is, 0 for the others."""
        neighbours = self.graph.neighbours(node)
        # the node itself was trained just now
        due = min(neighbours, key=lambda name: (name == node, self._trained_at[name], self.graph.nodes.index(name)))
        return {name: float(name == due) for name in neighbours}

    def _draw(self, node: str, rng: Random) -> str:
        chosen = super()._draw(node, rng)
        self._trained_at[node] = 2 * self.num_choices  # also where a walk starts, which nobody chose
        self._trained_at[chosen] = 2 * self.num_choices + 1
        return chosen

    def _learned(self) -> dict[str, int]:
        return dict(self._trained_at)

    def _load_learned(self, learned: Mapping[str, int]) -> None:
        self._trained_at = dict(learned)


# ---------------------------------------------------------------------- what all of them use


def check_reward(reward: float, *, activity: str, step: int) -> None:
    """Refuses a reward that nothing can be learned from.

    Raises:
        DataError: It is NaN or infinite.
    """
    if not math.isfinite(reward):
        raise DataError(
            f"curriculum: expected a finite reward for activity {activity!r} at step {step}, got {reward}. Nothing was "
            "updated. See whether the loss before or after the step is finite."
        )


def softmax(logits: list[float]) -> list[float]:
    """Returns ``exp(logit) / sum of exp(logit)``, without overflow.

    >>> softmax([1000.0, 1000.0])
    [0.5, 0.5]
    """
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _arrows(edges: list[tuple[str, str]], others: list[tuple[str, str]]) -> str:
    return ", ".join(f"{source} -> {target}" for source, target in edges if (source, target) not in others) or "none"
