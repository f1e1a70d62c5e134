"""REINFORCE (Williams 1992): a softmax over the edges of each node, moved along the score function of what was chosen.

Its gradient has a closed form here, so nothing is differentiated. Rewards are put on a scale from 0 to 1
(:class:`.scaling.RewardScale`) as for the bandits (:mod:`.bandits`); against them, a node's own mean reward is taken
off, so that an activity is raised only if it is worth more than what is usual there.
"""

import math
from collections.abc import Mapping
from typing import Any

from rag_lightning.errors import ConfigError
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.policies import GraphPolicy, softmax
from rag_lightning.methods.curriculum.scaling import RewardScale

FIRST_BASELINE = 0.5


class ReinforcePolicy(GraphPolicy):
    """A softmax over learnable logits, with a learned baseline for each node and an entropy bonus.

    After ``chosen`` was worth ``r`` on the scale from 0 to 1, with the baseline ``b`` of the node, probabilities ``p``
    and their entropy ``H``, the logits move by ``rate * (r - b) * (onehot(chosen) - p)`` and by
    ``rate * entropy_bonus`` times the gradient of ``H``, which is ``-p_i * (log p_i + H)``; then ``b`` moves by
    ``baseline_rate * (r - b)``.

    Args:
        graph: Walked; the logarithms of the edge weights are the first logits.
        seed: Of the draws.
        rate: Of the logits.
        baseline_rate: Of the baseline, which starts at 1/2.
        entropy_bonus: What an entropy higher by 1 nat is worth; keeps every activity in play.
        rescale_tail: See :class:`RewardScale`.
        rescale_window: See :class:`RewardScale`.

    Raises:
        ConfigError: A setting out of range.
    """

    name = "reinforce"

    def __init__(
        self,
        graph: ActivityGraph,
        *,
        seed: int = 0,
        rate: float = 0.3,
        baseline_rate: float = 0.1,
        entropy_bonus: float = 0.1,
        rescale_tail: float = 0.2,
        rescale_window: int = 1000,
    ) -> None:
        super().__init__(graph, seed=seed)
        if not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"curriculum.policy.rate: expected a finite number above 0, got {rate}.")
        if not 0.0 <= baseline_rate <= 1.0:
            raise ConfigError(f"curriculum.policy.baseline_rate: expected a rate from 0 to 1, got {baseline_rate}.")
        if not (entropy_bonus >= 0 and math.isfinite(entropy_bonus)):
            raise ConfigError(
                f"curriculum.policy.entropy_bonus: expected a finite number of 0 or more, got {entropy_bonus}."
            )
        self.rate, self.baseline_rate, self.entropy_bonus = rate, baseline_rate, entropy_bonus
        self.scale = RewardScale(tail=rescale_tail, window=rescale_window)
        self.baselines = dict.fromkeys(graph.nodes, FIRST_BASELINE)
        self.logits = {
            node: {name: math.log(weight) for name, weight in graph.neighbours(node).items()} for node in graph.nodes
        }

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns the softmax of the node's logits."""
        names = list(self.graph.neighbours(node))
        return dict(zip(names, softmax([self.logits[node][name] for name in names]), strict=True))

    def _learn(self, node: str, chosen: str, reward: float, probability: float | None) -> None:
        scaled = self.scale(reward)
        advantage = scaled - self.baselines[node]
        probabilities = self.probabilities(node)
        logs = {name: math.log(max(one, 1e-300)) for name, one in probabilities.items()}
        entropy = -sum(one * logs[name] for name, one in probabilities.items())
        for name, one in probabilities.items():
            score = advantage * (float(name == chosen) - one)
            self.logits[node][name] += self.rate * (score - self.entropy_bonus * one * (logs[name] + entropy))
        self.baselines[node] += self.baseline_rate * advantage

    def _learned(self) -> dict[str, Any]:
        return {
            "logits": {node: dict(logits) for node, logits in self.logits.items()},
            "baselines": dict(self.baselines),
            "rewards": self.scale.state(),
        }

    def _load_learned(self, learned: Mapping[str, Any]) -> None:
        self.logits = {node: dict(logits) for node, logits in learned["logits"].items()}
        self.baselines = dict(learned["baselines"])
        self.scale.load_state(learned["rewards"])
