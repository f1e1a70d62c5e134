"""Bandits: one for each node, whose arms are the edges that leave it.

Both put rewards on a scale from 0 to 1 (:class:`.scaling.RewardScale`), start from the edge weights, and can follow
rewards that change while the model learns. :class:`Exp3Policy` assumes nothing about them, and keeps exploring at a
fixed rate; :class:`ThompsonPolicy` explores what it is unsure of, and so settles sooner where rewards are noisy but
kind. :class:`.reinforce.ReinforcePolicy` is their sibling without importance weights.
"""

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from rag_lightning.errors import ConfigError
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.policies import GraphPolicy, softmax
from rag_lightning.methods.curriculum.scaling import RewardScale

QUADRATURE_POINTS = 801
QUADRATURE_SDS = 8.0


class Exp3Policy(GraphPolicy):
    """EXP3 and EXP3.S of Auer et al. 2002 ("The nonstochastic multiarmed bandit problem"), as in Graves et al. 2017.

    With K neighbours and weights ``w``, neighbour ``i`` is chosen with ``p_i = (1 - gamma) w_i / sum(w) + gamma / K``.
    After a reward ``x`` from 0 to 1, ``w_chosen`` is multiplied by ``exp(rate * x / p_chosen)``, and each weight then
    gains ``e * share / K`` times the sum of the weights before. Weights are kept as logarithms, the largest at 0.

    Args:
        graph: Walked; the edge weights are the first ``w``.
        seed: Of the draws.
        gamma: The share of choices made uniformly.
        rate: Of learning; None is the paper's ``gamma / K``, which is made for walks of many thousand steps.
        share: What a weight gets of all, so that an activity that was useless can come back; 0 is EXP3, more EXP3.S.
        rescale_tail: See :class:`RewardScale`.
        rescale_window: See :class:`RewardScale`.

    Raises:
        ConfigError: A setting out of range.
    """

    name = "exp3"

    def __init__(
        self,
        graph: ActivityGraph,
        *,
        seed: int = 0,
        gamma: float = 0.15,
        rate: float | None = 0.2,
        share: float = 0.01,
        rescale_tail: float = 0.2,
        rescale_window: int = 1000,
    ) -> None:
        super().__init__(graph, seed=seed)
        if not 0.0 < gamma <= 1.0:
            raise ConfigError(f"curriculum.policy.gamma: expected a share above 0 and at most 1, got {gamma}.")
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"curriculum.policy.rate: expected a finite number above 0, or none, got {rate}.")
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"curriculum.policy.share: expected a share of at least 0 and below 1, got {share}.")
        self.gamma, self.rate, self.share = gamma, rate, share
        self.scale = RewardScale(tail=rescale_tail, window=rescale_window)
        self._log_weights = {
            node: {name: math.log(weight) for name, weight in graph.neighbours(node).items()} for node in graph.nodes
        }

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns the weights' shares, mixed with the uniform distribution."""
        names = list(self.graph.neighbours(node))
        shares = softmax([self._log_weights[node][name] for name in names])
        explored = self.gamma / len(names)
        return {name: (1 - self.gamma) * share + explored for name, share in zip(names, shares, strict=True)}

    def _learn(self, node: str, chosen: str, reward: float, probability: float | None) -> None:
        probability = probability if probability is not None else self.probabilities(node)[chosen]
        log_weights = self._log_weights[node]
        count = len(log_weights)
        highest = max(log_weights.values())
        log_total = highest + math.log(sum(math.exp(one - highest) for one in log_weights.values()))
        rate = self.rate if self.rate is not None else self.gamma / count
        log_weights[chosen] += rate * self.scale(reward) / probability
        if self.share > 0:
            gift = 1.0 + math.log(self.share / count) + log_total
            for name, one in log_weights.items():
                log_weights[name] = float(np.logaddexp(one, gift))
        highest = max(log_weights.values())
        for name in log_weights:
            log_weights[name] -= highest

    def _learned(self) -> dict[str, Any]:
        return {
            "log_weights": {node: dict(weights) for node, weights in self._log_weights.items()},
            "rewards": self.scale.state(),
        }

    def _load_learned(self, learned: Mapping[str, Any]) -> None:
        self._log_weights = {node: dict(weights) for node, weights in learned["log_weights"].items()}
        self.scale.load_state(learned["rewards"])


class ThompsonPolicy(GraphPolicy):
    """Thompson sampling with Gaussian rewards and a discount for the past (Raj & Kalyani 2017, arXiv 1707.09727).

    An edge's mean reward, on the scale from 0 to 1, has a Gaussian posterior: with ``n`` rewards that sum to ``s``
    (both multiplied by ``forgetting`` whenever their node is left), and a prior worth ``prior_count`` rewards of ``m``,
    its mean is ``(prior_count * m + s) / (prior_count + n)`` and its variance ``noise^2 / (prior_count + n)``. A mean
    is drawn for each edge, and the highest followed. ``m`` is 1/2, plus ``noise`` times the logarithm of the edge's
    weight over the mean weight.

    Args:
        graph: Walked; the edge weights set the priors.
        seed: Of the draws.
        noise: The standard deviation of rewards on the scale from 0 to 1.
        forgetting: 1 remembers every reward alike; ``1 / (1 - forgetting)`` is about how many count.
        prior_count: How many rewards the prior is worth.
        rescale_tail: See :class:`RewardScale`.
        rescale_window: See :class:`RewardScale`.

    Raises:
        ConfigError: A setting out of range.
    """

    name = "thompson"

    def __init__(
        self,
        graph: ActivityGraph,
        *,
        seed: int = 0,
        noise: float = 0.4,
        forgetting: float = 0.98,
        prior_count: float = 1.0,
        rescale_tail: float = 0.2,
        rescale_window: int = 1000,
    ) -> None:
        super().__init__(graph, seed=seed)
        for setting, value in (("noise", noise), ("prior_count", prior_count)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"curriculum.policy.{setting}: expected a finite number above 0, got {value}.")
        if not 0.0 < forgetting <= 1.0:
            raise ConfigError(
                f"curriculum.policy.forgetting: expected a factor above 0 and at most 1, got {forgetting}."
            )
        self.noise, self.forgetting, self.prior_count = noise, forgetting, prior_count
        self.scale = RewardScale(tail=rescale_tail, window=rescale_window)
        self._counts = {node: dict.fromkeys(graph.neighbours(node), 0.0) for node in graph.nodes}
        self._sums = {node: dict.fromkeys(graph.neighbours(node), 0.0) for node in graph.nodes}

    def posterior(self, node: str) -> dict[str, tuple[float, float]]:
        """Returns mean and standard deviation of what each neighbour of ``node`` is worth, on the scale from 0 to 1.

        Raises:
            ConfigError: There is no such node.
        """
        weights = self.graph.neighbours(node)
        mean_weight = sum(weights.values()) / len(weights)
        found = {}
        for name, weight in weights.items():
            prior = 0.5 + self.noise * math.log(weight / mean_weight)
            count = self.prior_count + self._counts[node][name]
            mean = (self.prior_count * prior + self._sums[node][name]) / count
            found[name] = (mean, self.noise / math.sqrt(count))
        return found

    def probabilities(self, node: str) -> dict[str, float]:
        """Returns how likely each neighbour's drawn mean is the highest, by quadrature (to about 1e-6)."""
        found = self.posterior(node)
        chances = _chances_of_being_highest(np.array(list(found.values())))
        return dict(zip(found, chances.tolist(), strict=True))

    def _draw(self, node: str, rng: Random) -> str:
        drawn = {name: rng.gauss(mean, sd) for name, (mean, sd) in self.posterior(node).items()}
        return max(drawn, key=lambda name: drawn[name])

    def _learn(self, node: str, chosen: str, reward: float, probability: float | None) -> None:
        scaled = self.scale(reward)
        for kept in (self._counts[node], self._sums[node]):
            for name in kept:
                kept[name] *= self.forgetting
        self._counts[node][chosen] += 1.0
        self._sums[node][chosen] += scaled

    def _learned(self) -> dict[str, Any]:
        return {
            "counts": {node: dict(counts) for node, counts in self._counts.items()},
            "sums": {node: dict(sums) for node, sums in self._sums.items()},
            "rewards": self.scale.state(),
        }

    def _load_learned(self, learned: Mapping[str, Any]) -> None:
        self._counts = {node: dict(counts) for node, counts in learned["counts"].items()}
        self._sums = {node: dict(sums) for node, sums in learned["sums"].items()}
        self.scale.load_state(learned["rewards"])


def _chances_of_being_highest(moments_K2: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, " K"]:
    """Returns for K independent Gaussians (mean, sd) how likely each is the highest.

    The chance of ``i`` is the integral of its density times the others' distribution functions; the midpoint rule over
    its own quantiles of a fixed grid converges faster than any power of the step, as all derivatives vanish at the
    ends.
    """
    points = np.linspace(-QUADRATURE_SDS, QUADRATURE_SDS, QUADRATURE_POINTS)
    density = np.exp(-0.5 * points**2)
    density /= density.sum()
    means_K, sds_K = moments_K2[:, 0], moments_K2[:, 1]
    values_KP = means_K[:, None] + sds_K[:, None] * points
    standardised_KKP = (values_KP[:, None, :] - means_K[:, None]) / sds_K[:, None]
    below_KKP = torch.special.ndtr(torch.from_numpy(standardised_KKP)).numpy()
    below_KKP[np.arange(len(means_K)), np.arange(len(means_K))] = 1.0
    chances_K = (below_KKP.prod(axis=1) * density).sum(axis=1)
    return np.asarray(chances_K / chances_K.sum())
