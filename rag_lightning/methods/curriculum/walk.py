"""A walk over a graph of activities: which one is next, what the last one earned, and who gets the credit.

A training loop asks :meth:`Walk.next` for an activity, trains on it, measures how much the target improved, and tells
:meth:`Walk.reward`. The step's reward is ``improvement * reward_weight`` of its activity. The edge walked into step
``t`` is worth the return ``r_t + discount * r_{t+1} + discount^2 * r_{t+2} + …``: what a step earned is also credit of
those that led to it. A policy is told each return once, when all rewards that count in it are there (those of the next
``credit_steps`` steps), with the probability that the edge was chosen with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.objective_weight import check_schedule, scheduled_weight
from rag_lightning.methods.curriculum.policies import Policy, check_reward

NEGLIGIBLE = 0.05
"""Rewards whose discount is below this count no more: credit arrives sooner."""


class Step(NamedTuple):
    """A rewarded step: the activity, and ``improvement * reward_weight``."""

    activity: str
    reward: float


@dataclass(slots=True)
class _OpenReturn:
    """An edge whose return still waits for later rewards."""

    source: str
    target: str
    probability: float | None
    total: float = 0.0
    num_rewards: int = 0


class Walk:
    """A policy's walk, its rewards and their credit.

    Args:
        graph: Walked; the policy's.
        policy: Chooses each next activity.
        start: The first activity; None is the graph's first node.
        discount: Of later rewards in a return, at least 0 and below 1; 0 credits a step with its own reward only.
        alpha: The weight of an auxiliary objective, read by :meth:`objective_weight`.
        alpha_schedule: ``constant``, ``linear`` or ``cosine``.
        alpha_end: The last weight; for linear and cosine.
        alpha_steps: After how many steps it is reached; for linear and cosine.

    Attributes:
        credit_steps: How many later rewards count in a return: those with ``discount^n`` of at least 0.05.
        history: The rewarded steps, oldest first.

    Raises:
        ConfigError: An unknown start, or a setting out of range.

    >>> from rag_lightning.methods.curriculum.policies import RoundRobinPolicy
    >>> graph = ActivityGraph.from_dict({"nodes": {"a": None, "b": {"reward_weight": 2.0}}})
    >>> walk = Walk(graph, RoundRobinPolicy(graph))
    >>> [(walk.next(), walk.reward(0.5)) for _ in range(3)]
    [('a', 0.5), ('b', 1.0), ('a', 0.5)]
    """

    def __init__(
        self,
        graph: ActivityGraph,
        policy: Policy,
        *,
        start: str | None = None,
        discount: float = 0.0,
        alpha: float = 0.0,
        alpha_schedule: str = "constant",
        alpha_end: float | None = None,
        alpha_steps: int | None = None,
    ) -> None:
        if start is not None and start not in graph.nodes:
            names = ", ".join(map(repr, graph.nodes))
            raise ConfigError(f"curriculum.start: expected one of {names}, got {start!r}.")
        if not 0.0 <= discount < 1.0:
            raise ConfigError(f"curriculum.discount: expected a factor of at least 0 and below 1, got {discount}.")
        check_schedule(schedule=alpha_schedule, start=alpha, end=alpha_end, num_steps=alpha_steps)
        self.graph, self.policy = graph, policy
        self.start = start if start is not None else graph.nodes[0]
        self.discount = discount
        self.credit_steps = math.floor(math.log(NEGLIGIBLE) / math.log(discount) + 1e-9) if discount > 0 else 0
        self.alpha, self.alpha_end = alpha, alpha_end
        self.alpha_schedule, self.alpha_steps = alpha_schedule, alpha_steps
        self.node: str | None = None
        self._waits_for_reward = False
        self._open: list[_OpenReturn] = []
        self._forget()

    def next(self) -> str:
        """Returns the next activity, which then waits for its reward.

        Raises:
            ConfigError: The last activity has no reward yet, or the policy chose what cannot follow it.
        """
        if self._waits_for_reward:
            raise ConfigError(
                f"curriculum: expected the reward of activity {self.node!r} at step {len(self.history)} before the "
                "next activity, got none. Call reward(improvement); 0 says that nothing changed."
            )
        if self.node is None:
            chosen = self.start
        else:
            probabilities = self.policy.probabilities(self.node) if self.credit_steps > 0 else {}
            chosen = self.policy.choose(self.node)
            if chosen not in self.graph.neighbours(self.node):
                raise ConfigError(
                    f"curriculum.policy: expected an activity that follows {self.node!r}, one of "
                    f"{', '.join(map(repr, self.graph.neighbours(self.node)))}, got {chosen!r}. Give the policy the "
                    "walk's graph."
                )
            self._open.append(_OpenReturn(self.node, chosen, probabilities.get(chosen)))
        self.node = chosen
        self._waits_for_reward = True
        return chosen

    def reward(self, improvement: float) -> float:
        """Credits the last activity, and the edges that led to it.

        Args:
            improvement: How much better the target became by the step: the drop of its held-out loss, say.

        Returns:
            The step's reward, ``improvement * reward_weight``.

        Raises:
            ConfigError: No activity waits for a reward.
            DataError: The improvement is NaN or infinite. Nothing was updated.
        """
        if not self._waits_for_reward or self.node is None:
            raise ConfigError("curriculum: expected a call of next() before reward(), got none since the last reward.")
        reward = improvement * self.graph.activity(self.node).reward_weight
        check_reward(reward, activity=self.node, step=len(self.history))
        for one in self._open:
            one.total += self.discount**one.num_rewards * reward
            one.num_rewards += 1
        self._record(Step(self.node, reward))
        self._waits_for_reward = False
        while self._open and self._open[0].num_rewards > self.credit_steps:
            self._credit(self._open.pop(0))
        return reward

    def finish(self) -> None:
        """Credits the edges whose returns still wait for later rewards with what they earned until now.

        For the end of training, if its policy is used again; an edge whose own step has no reward yet is left waiting.
        """
        while self._open and self._open[0].num_rewards > 0:
            self._credit(self._open.pop(0))

    def _credit(self, one: _OpenReturn) -> None:
        self.policy.update(one.source, one.target, one.total, one.probability)
        credit = self._credits.setdefault((one.source, one.target), [0, 0.0])
        credit[0] += 1
        credit[1] += one.total

    def objective_weight(self, step: int) -> float:
        """Returns alpha of ``L + alpha * R`` at a training step, counted from 0.

        Raises:
            ConfigError: A negative step.
        """
        end = self.alpha_end if self.alpha_end is not None else self.alpha
        num_steps = self.alpha_steps if self.alpha_steps is not None else 1
        return scheduled_weight(step, schedule=self.alpha_schedule, start=self.alpha, end=end, num_steps=num_steps)

    # ------------------------------------------------------------------ what happened

    @property
    def unrewarded(self) -> str | None:
        """The activity that waits for its reward; None where none does."""
        return self.node if self._waits_for_reward else None

    @property
    def visits(self) -> dict[str, int]:
        """How many rewarded steps each activity had."""
        return dict(self._visits)

    @property
    def mean_rewards(self) -> dict[str, float]:
        """What a step of each activity earned on average; activities without a step are missing."""
        return {name: self._reward_sums[name] / count for name, count in self._visits.items() if count > 0}

    @property
    def edge_rewards(self) -> dict[tuple[str, str], float]:
        """What walking each edge returned on average, ``f_ij``; edges without a credited return are missing."""
        return {edge: total / count for edge, (count, total) in self._credits.items()}

    def expected_reward(self) -> float:
        """Returns ``R = sum of delta_ij f_ij`` over all edges: the policy's probabilities times what edges returned."""
        likely = {source: self.policy.probabilities(source) for source in dict.fromkeys(s for s, _ in self._credits)}
        return sum(likely[source][target] * reward for (source, target), reward in self.edge_rewards.items())

    @property
    def transitions(self) -> Int[Tensor, "A A"]:
        """How often an activity (row) was followed by another (column), among rewarded steps, in the graph's order."""
        return torch.tensor(
            [[self._transitions.get((source, target), 0) for target in self.graph.nodes] for source in self.graph.nodes]
        )

    def figures(self) -> dict[str, float]:
        """Returns what is logged: visits of all activities, mean rewards of those visited, counts of all edges."""
        return {
            **{f"curriculum/visits/{name}": count for name, count in self._visits.items()},
            **{f"curriculum/reward/{name}": reward for name, reward in self.mean_rewards.items()},
            **{
                f"curriculum/transition/{source}/{target}": self._transitions.get((source, target), 0)
                for source, target, _ in self.graph.edges
            },
        }

    def _record(self, step: Step) -> None:
        if self.history:
            edge = (self.history[-1].activity, step.activity)
            self._transitions[edge] = self._transitions.get(edge, 0) + 1
        self._visits[step.activity] += 1
        self._reward_sums[step.activity] += step.reward
        self.history.append(step)

    def _forget(self) -> None:
        self.history: list[Step] = []
        self._visits = dict.fromkeys(self.graph.nodes, 0)
        self._reward_sums = dict.fromkeys(self.graph.nodes, 0.0)
        self._transitions: dict[tuple[str, str], int] = {}
        self._credits: dict[tuple[str, str], list[Any]] = {}  # number of returns, their sum

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values that a walk is resumed from, its policy's state among them."""
        return {
            "nodes": list(self.graph.nodes),
            "discount": self.discount,
            "node": self.node,
            "waits_for_reward": self._waits_for_reward,
            "history": [list(step) for step in self.history],
            "credits": [[source, target, *credit] for (source, target), credit in self._credits.items()],
            "open": [[one.source, one.target, one.probability, one.total, one.num_rewards] for one in self._open],
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: The state is of a graph with other activities, of another discount, or of another policy.
        """
        for setting, own in (("nodes", list(self.graph.nodes)), ("discount", self.discount)):
            if state[setting] != own:
                raise CheckpointError(
                    f"curriculum: expected a checkpoint with {setting} {own}, got one with {state[setting]}. Resume "
                    "with the settings that it was trained with, or start anew."
                )
        self.policy.load_state_dict(state["policy"])
        self.node = state["node"]
        self._waits_for_reward = state["waits_for_reward"]
        self._forget()
        for activity, reward in state["history"]:
            self._record(Step(activity, reward))
        self._credits = {(source, target): [count, total] for source, target, count, total in state["credits"]}
        self._open = [_OpenReturn(*one) for one in state["open"]]
