"""A curriculum: a graph says which training activity may follow which, a policy walks it, reward is what it gained.

The trunk of a model is shared by several activities (tasks, data sets, objectives), of which one is the target.
Spending a step on another one may help the target or harm it, and which of both changes as the model learns. So each
step asks where to go, and tells what it was worth::

    graph = ActivityGraph.from_dict({"nodes": {"target": {}, "titles": {}, "masking": {}}})
    walk = Walk(graph, Exp3Policy(graph, seed=0))
    for _ in range(num_steps):
        activity = walk.next()
        …                                        # a training step on it
        walk.reward(loss_before - loss_after)    # on held-out examples of the target

Nothing here trains or draws by itself: it is a library of names and numbers, deterministic from a seed, whose state is
plain values.

Graph: :class:`ActivityGraph`, :class:`Activity`; measured: :func:`graph_from_gradients`, :func:`graph_from_transfer`.
Policies (:class:`Policy`): :class:`UniformPolicy`, :class:`WeightedPolicy`, :class:`ProportionalPolicy`,
:class:`TemperaturePolicy`, :class:`RoundRobinPolicy`, :class:`Exp3Policy`, :class:`ThompsonPolicy`,
:class:`ReinforcePolicy`. Walk: :class:`Walk`, :class:`Step`, :func:`scheduled_weight`.
"""

from rag_lightning.methods.curriculum.bandits import Exp3Policy, ThompsonPolicy
from rag_lightning.methods.curriculum.estimate import graph_from_gradients, graph_from_transfer
from rag_lightning.methods.curriculum.graph import Activity, ActivityGraph
from rag_lightning.methods.curriculum.objective_weight import scheduled_weight
from rag_lightning.methods.curriculum.policies import (
    Policy,
    ProportionalPolicy,
    RoundRobinPolicy,
    TemperaturePolicy,
    UniformPolicy,
    WeightedPolicy,
)
from rag_lightning.methods.curriculum.reinforce import ReinforcePolicy
from rag_lightning.methods.curriculum.walk import Step, Walk

__all__ = [
    "Activity",
    "ActivityGraph",
    "Exp3Policy",
    "Policy",
    "ProportionalPolicy",
    "ReinforcePolicy",
    "RoundRobinPolicy",
    "Step",
    "TemperaturePolicy",
    "ThompsonPolicy",
    "UniformPolicy",
    "Walk",
    "WeightedPolicy",
    "graph_from_gradients",
    "graph_from_transfer",
    "scheduled_weight",
]
