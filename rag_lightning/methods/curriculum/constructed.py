"""A constructed problem that tells a good curriculum from a bad one; ``python -m`` this module prints a table.

Made by formula, so there is no source or licence. Three regression tasks share a linear trunk of two dimensions under
inputs of thirty: ``prediction = head(trunk(x))``, squared error, plain gradient descent.

- ``target``: one label, a mixture of two true features of ``x``, with noise; 20 examples, fewer than ``x`` has
  dimensions;
- ``helpful``: four other mixtures of the same two features, both alike; 2,000 examples;
- ``harmful``: four mixtures of two features orthogonal to those; 2,000 examples, labels twice as large.

The trunk has room for two features, so what the harmful task puts there is lost to the target. One step of the walk is
a few batches of one task. Its reward is the drop of the target's loss on validation examples; what is judged is the
loss on test examples, which no policy sees, as a share of the labels' variance (0 is perfect, 1 is predicting the
mean).

Where learners fail: rewards are immediate. In some seeds (17 is one) the target overfits and the helpful task gains
nothing until the trunk has found the true features; the harmful task, which at first changes nothing, then looks best.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rag_lightning.methods.curriculum.bandits import Exp3Policy, ThompsonPolicy
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.policies import Policy, RoundRobinPolicy, UniformPolicy
from rag_lightning.methods.curriculum.reinforce import ReinforcePolicy
from rag_lightning.methods.curriculum.walk import Walk

TASKS = ("target", "helpful", "harmful")
NUM_INPUTS, NUM_FEATURES = 30, 2
NUM_LABELS = {"target": 1, "helpful": 4, "harmful": 4}
NUM_EXAMPLES = {"target": 20, "helpful": 2000, "harmful": 2000}
NUM_HELD_OUT = 500
NOISE_SD = 0.3
HARMFUL_SCALE = 2.0
BATCH_SIZE, BATCHES_PER_STEP = 16, 2
LEARNING_RATE = 0.02
NUM_STEPS = 600

PolicyMaker = Callable[[ActivityGraph, int], Policy]
POLICIES: dict[str, PolicyMaker] = {
    "uniform": lambda graph, seed: UniformPolicy(graph, seed=seed),
    "round_robin": lambda graph, seed: RoundRobinPolicy(graph, seed=seed),
    "exp3": lambda graph, seed: Exp3Policy(graph, seed=seed),
    "thompson": lambda graph, seed: ThompsonPolicy(graph, seed=seed),
    "reinforce": lambda graph, seed: ReinforcePolicy(graph, seed=seed),
}

Examples = tuple[Float[Tensor, "N I"], Float[Tensor, "N Y"]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave.

    Attributes:
        useful_share: Of steps spent on the target or the helpful task.
        test_loss: Of the target at the end, as a share of the variance of its labels.
        walk: With its history.
    """

    useful_share: float
    test_loss: float
    walk: Walk


class Problem:
    """The data of a seed, and a model to train on them.

    Args:
        seed: Of the features, the examples, the model's first weights and the batches.
    """

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        axes, _ = torch.linalg.qr(self._normal(NUM_INPUTS, 2 * NUM_FEATURES))
        true, false = axes[:, :NUM_FEATURES], axes[:, NUM_FEATURES:]
        self.labellers = {
            "target": true @ F.normalize(self._normal(NUM_FEATURES, NUM_LABELS["target"]), dim=0),
            "helpful": true @ self._mixtures(NUM_LABELS["helpful"]),
            "harmful": HARMFUL_SCALE * false @ self._mixtures(NUM_LABELS["harmful"]),
        }
        self.examples = {task: self._examples(task, NUM_EXAMPLES[task]) for task in TASKS}
        self.validation = self._examples("target", NUM_HELD_OUT)
        self.test = self._examples("target", NUM_HELD_OUT)
        self.trunk = (self._normal(NUM_INPUTS, NUM_FEATURES) / NUM_INPUTS**0.5).requires_grad_()
        # from zero, so that heads grow along the trunk that is there, and no task meets another's random signs
        self.heads = {task: torch.zeros(NUM_FEATURES, NUM_LABELS[task], requires_grad=True) for task in TASKS}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def _mixtures(self, count: int) -> Float[Tensor, "F Y"]:
        """Returns mixtures in which all features count alike, of variance 1 on average."""
        directions: Tensor = torch.linalg.qr(self._normal(count, NUM_FEATURES))[0]
        scale: float = (count / NUM_FEATURES) ** 0.5
        return directions.T * scale

    def _examples(self, task: str, count: int) -> Examples:
        inputs = self._normal(count, NUM_INPUTS)
        labels = inputs @ self.labellers[task]
        return inputs, labels + NOISE_SD * self._normal(*labels.shape)

    def loss(self, task: str, examples: Examples) -> Float[Tensor, ""]:
        """Returns the mean squared error of a task's head."""
        inputs, labels = examples
        return F.mse_loss(inputs @ self.trunk @ self.heads[task], labels)

    def train(self, task: str) -> None:
        """Takes the batches of one step on a task."""
        inputs, labels = self.examples[task]
        parameters = [self.trunk, self.heads[task]]
        for _ in range(BATCHES_PER_STEP):
            rows = torch.randint(len(inputs), (BATCH_SIZE,), generator=self.rng)
            gradients = torch.autograd.grad(self.loss(task, (inputs[rows], labels[rows])), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= LEARNING_RATE * gradient

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Returns the target's loss on the examples that rewards are measured on."""
        return float(self.loss("target", self.validation))

    @torch.no_grad()
    def test_loss(self) -> float:
        """Returns the target's loss on test examples, as a share of the variance of their labels."""
        return float(self.loss("target", self.test) / self.test[1].var())


def run(policy: PolicyMaker, *, seed: int, num_steps: int = NUM_STEPS) -> Outcome:
    """Trains on a seed's problem along a policy's walk.

    Args:
        policy: Makes one from a graph and a seed.
        seed: Of the problem and of the policy.
        num_steps: How many steps the walk takes.
    """
    problem = Problem(seed)
    graph = ActivityGraph.from_dict({"nodes": dict.fromkeys(TASKS)})
    walk = Walk(graph, policy(graph, seed))
    before = problem.validation_loss()
    for _ in range(num_steps):
        problem.train(walk.next())
        after = problem.validation_loss()
        walk.reward(before - after)
        before = after
    return Outcome(1.0 - walk.visits["harmful"] / num_steps, problem.test_loss(), walk)


def main(seeds: range = range(10)) -> None:
    """Prints test losses and shares of useful steps, by policy and seed."""
    outcomes = {name: [run(policy, seed=seed) for seed in seeds] for name, policy in POLICIES.items()}
    print("policy      |" + "".join(f"  seed {seed} " for seed in seeds) + "| better than uniform")
    for name, several in outcomes.items():
        better = sum(one.test_loss < other.test_loss for one, other in zip(several, outcomes["uniform"], strict=True))
        figures = "".join(f" {one.test_loss:.2f}/{one.useful_share:4.0%}" for one in several)
        print(f"{name:<11} |{figures} | {better}")


if __name__ == "__main__":
    main()
