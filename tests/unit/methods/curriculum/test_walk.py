"""Walks credit steps as a double loop would, resume exactly, and spend their steps well on the constructed problem."""

import json
import math
import random
from itertools import pairwise

import pytest

from rag_lightning.errors import CheckpointError, ConfigError, DataError
from rag_lightning.methods.curriculum import (
    ActivityGraph,
    Exp3Policy,
    ProportionalPolicy,
    ReinforcePolicy,
    RoundRobinPolicy,
    Step,
    TemperaturePolicy,
    ThompsonPolicy,
    UniformPolicy,
    Walk,
    WeightedPolicy,
    scheduled_weight,
)
from rag_lightning.methods.curriculum.constructed import POLICIES, run

GRAPH = ActivityGraph.from_dict(
    {"nodes": {"a": {"size": 5}, "b": {"size": 7, "reward_weight": 0.5}, "c": {"size": 9, "reward_weight": 2.0}}}
)
ALL = [
    UniformPolicy,
    WeightedPolicy,
    ProportionalPolicy,
    TemperaturePolicy,
    RoundRobinPolicy,
    Exp3Policy,
    ThompsonPolicy,
    ReinforcePolicy,
]


class Told(UniformPolicy):
    """A uniform policy that keeps what it is told."""

    def __init__(self, graph: ActivityGraph, *, seed: int = 0) -> None:
        super().__init__(graph, seed=seed)
        self.told = []

    def update(self, node, chosen, reward, probability=None):
        super().update(node, chosen, reward, probability)
        self.told.append((node, chosen, reward, probability))


def improvement(step: int) -> float:
    return random.Random(step).gauss(0.1, 1)


def go(walk: Walk, steps: range) -> list[str]:
    path = []
    for step in steps:
        path.append(walk.next())
        walk.reward(improvement(step))
    return path


def test_a_walk_starts_where_it_is_told():
    assert Walk(GRAPH, UniformPolicy(GRAPH)).next() == "a"
    assert Walk(GRAPH, UniformPolicy(GRAPH), start="c").next() == "c"


def test_rewards_are_weighted_by_activity():
    walk = Walk(GRAPH, RoundRobinPolicy(GRAPH))
    assert [(walk.next(), walk.reward(0.5)) for _ in range(3)] == [("a", 0.5), ("b", 0.25), ("c", 1.0)]
    assert walk.history == [Step("a", 0.5), Step("b", 0.25), Step("c", 1.0)]


@pytest.mark.parametrize(("discount", "credit_steps"), [(0.0, 0), (0.04, 0), (0.5, 4), (0.9, 28)])
def test_edges_are_credited_with_discounted_later_rewards(discount, credit_steps):
    policy = Told(GRAPH, seed=2)
    walk = Walk(GRAPH, policy, discount=discount)
    num_steps = 40
    path = go(walk, range(num_steps))
    walk.finish()
    assert walk.credit_steps == credit_steps
    rewards = [improvement(step) * {"a": 1.0, "b": 0.5, "c": 2.0}[name] for step, name in enumerate(path)]
    assert len(policy.told) == num_steps - 1
    for step in range(1, num_steps):
        expected = 0.0
        for later in range(step, num_steps):
            if discount ** (later - step) >= 0.05:
                expected += discount ** (later - step) * rewards[later]
        node, chosen, credit, probability = policy.told[step - 1]
        assert (node, chosen) == (path[step - 1], path[step])
        assert credit == pytest.approx(expected)
        assert probability is None if credit_steps == 0 else probability == pytest.approx(1 / 3)


def test_credit_waits_for_no_longer_than_it_has_to():
    policy = Told(GRAPH)
    walk = Walk(GRAPH, policy, discount=0.5)
    told = []
    for step in range(8):
        go(walk, range(step, step + 1))
        told.append(len(policy.told))
    assert told == [0, 0, 0, 0, 0, 1, 2, 3]


def test_finishing_leaves_an_unrewarded_step_waiting():
    policy = Told(GRAPH)
    walk = Walk(GRAPH, policy, discount=0.5)
    go(walk, range(3))
    walk.next()
    walk.finish()
    assert len(policy.told) == 2
    walk.reward(1.0)
    walk.finish()
    assert len(policy.told) == 3


def test_figures_count_what_happened():
    walk = Walk(GRAPH, Exp3Policy(GRAPH, seed=3), start="b")
    path = go(walk, range(50))
    rewards = [step.reward for step in walk.history]
    assert [step.activity for step in walk.history] == path
    figures = walk.figures()
    for name in "abc":
        own = [reward for reward, activity in zip(rewards, path, strict=True) if activity == name]
        assert figures[f"curriculum/visits/{name}"] == walk.visits[name] == len(own)
        assert figures[f"curriculum/reward/{name}"] == pytest.approx(sum(own) / len(own))
        for other in "abc":
            count = sum(edge == (name, other) for edge in pairwise(path))
            assert figures[f"curriculum/transition/{name}/{other}"] == count
            assert walk.transitions["abc".index(name), "abc".index(other)] == count
    assert int(walk.transitions.sum()) == 49
    assert len(figures) == 15


def test_activities_without_a_step_have_no_mean():
    figures = Walk(GRAPH, UniformPolicy(GRAPH)).figures()
    assert [name for name in figures if "/reward/" in name] == []
    assert figures["curriculum/visits/c"] == 0


@pytest.mark.parametrize("discount", [0.0, 0.6])
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("make", ALL, ids=lambda make: make.name)
def test_a_resumed_walk_is_the_uninterrupted_one(make, pending, discount):
    whole = Walk(GRAPH, make(GRAPH, seed=1), discount=discount)
    path = go(whole, range(60))
    first = Walk(GRAPH, make(GRAPH, seed=1), discount=discount)
    start = go(first, range(25))
    if pending:
        start.append(first.next())
    second = Walk(GRAPH, make(GRAPH, seed=8), discount=discount)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    if pending:
        second.reward(improvement(25))
    assert start + go(second, range(len(start), 60)) == path
    assert second.state_dict() == whole.state_dict()
    assert second.figures() == whole.figures()


def test_checkpoints_of_other_walks_are_refused():
    state = Walk(GRAPH, UniformPolicy(GRAPH), discount=0.5).state_dict()
    with pytest.raises(CheckpointError, match=r"expected a checkpoint with discount 0\.0, got one with 0\.5"):
        Walk(GRAPH, UniformPolicy(GRAPH)).load_state_dict(state)
    other = ActivityGraph.from_dict({"nodes": {"a": None, "z": None}})
    with pytest.raises(CheckpointError, match=r"with nodes \['a', 'z'\], got one with \['a', 'b', 'c'\]"):
        Walk(other, UniformPolicy(other), discount=0.5).load_state_dict(state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_improvements_that_are_no_numbers_are_refused_and_change_nothing(value):
    walk = Walk(GRAPH, Exp3Policy(GRAPH), discount=0.5)
    go(walk, range(7))
    name = walk.next()
    before = walk.state_dict()
    with pytest.raises(DataError, match=rf"for activity '{name}' at step 7, got {value}\. Nothing was updated"):
        walk.reward(value)
    assert walk.state_dict() == before
    walk.reward(0.0)


def test_calls_out_of_turn_are_refused():
    walk = Walk(GRAPH, UniformPolicy(GRAPH))
    with pytest.raises(ConfigError, match=r"expected a call of next\(\) before reward\(\)"):
        walk.reward(0.1)
    walk.next()
    with pytest.raises(ConfigError, match=r"expected the reward of activity 'a' at step 0 before the next activity"):
        walk.next()
    walk.reward(0.1)
    with pytest.raises(ConfigError, match=r"expected a call of next\(\) before reward\(\)"):
        walk.reward(0.1)


def test_a_policy_of_another_graph_is_found_out():
    chain, other = (
        ActivityGraph.from_dict({"nodes": dict.fromkeys("ab"), "edges": [{"from": one, "to": end} for one in "ab"]})
        for end in "ba"
    )
    walk = Walk(chain, UniformPolicy(other))
    go(walk, range(1))
    with pytest.raises(ConfigError, match="that follows 'a', one of 'b', got 'a'. Give the policy the walk's graph"):
        walk.next()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "z"}, "curriculum.start: expected one of 'a', 'b', 'c', got 'z'"),
        ({"discount": 1.0}, "curriculum.discount: expected a factor of at least 0 and below 1, got 1.0"),
        ({"discount": -0.1}, "curriculum.discount: .* got -0.1"),
        ({"alpha": -1.0}, "curriculum.alpha: expected a finite weight of 0 or more, got -1.0"),
        ({"alpha_schedule": "steps"}, "alpha_schedule: expected one of constant, linear, cosine, got 'steps'"),
        ({"alpha_schedule": "linear", "alpha_end": 1.0}, "a weight and a number of steps .* got 1.0 and None"),
        ({"alpha_schedule": "linear", "alpha_end": math.nan, "alpha_steps": 3}, "curriculum.alpha_end: .* got nan"),
        ({"alpha_schedule": "cosine", "alpha_steps": 0, "alpha_end": 1.0}, "got 1.0 and 0. Set both"),
        ({"alpha_end": 1.0}, "expected none with alpha_schedule=constant, got 1.0 and None"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Walk(GRAPH, UniformPolicy(GRAPH), **settings)


# ---------------------------------------------------------------------- the weight of an auxiliary objective


def test_objective_weights_follow_their_schedules():
    constant = Walk(GRAPH, UniformPolicy(GRAPH), alpha=0.3)
    assert [constant.objective_weight(step) for step in (0, 1, 1000)] == [0.3, 0.3, 0.3]
    linear = Walk(GRAPH, UniformPolicy(GRAPH), alpha=1.0, alpha_schedule="linear", alpha_end=0.0, alpha_steps=10)
    assert [linear.objective_weight(step) for step in (0, 1, 5, 10, 50)] == pytest.approx([1.0, 0.9, 0.5, 0.0, 0.0])
    cosine = Walk(GRAPH, UniformPolicy(GRAPH), alpha=0.2, alpha_schedule="cosine", alpha_end=0.6, alpha_steps=8)
    expected = [0.2 + 0.4 * (1 - math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert [cosine.objective_weight(step) for step in range(9)] == pytest.approx(expected)
    assert cosine.objective_weight(10**6) == 0.6


def test_negative_steps_have_no_weight():
    with pytest.raises(ConfigError, match="expected a step of 0 or more, got -1"):
        scheduled_weight(-1, schedule="constant", start=1.0, end=1.0, num_steps=1)


# ---------------------------------------------------------------------- the constructed problem


@pytest.fixture(scope="module")
def uniform_losses() -> list[float]:
    return [run(POLICIES["uniform"], seed=seed).test_loss for seed in range(10)]


@pytest.mark.parametrize("name", ["exp3", "thompson", "reinforce"])
def test_learners_leave_the_harmful_task_and_beat_uniform_sampling(name, uniform_losses):
    outcomes = [run(POLICIES[name], seed=seed) for seed in range(10)]
    assert min(one.useful_share for one in outcomes) >= 0.7
    assert sum(one.test_loss < other for one, other in zip(outcomes, uniform_losses, strict=True)) >= 9


def test_a_run_is_decided_by_its_seed():
    one, same = (run(POLICIES["thompson"], seed=4, num_steps=40) for _ in range(2))
    assert one.walk.state_dict() == same.walk.state_dict()
    assert one.test_loss == same.test_loss
