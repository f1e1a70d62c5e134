"""Policies draw what they say, learn what the papers say, and go on from a state as if never stopped."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rag_lightning.errors import CheckpointError, ConfigError, DataError
from rag_lightning.methods.curriculum import (
    ActivityGraph,
    Exp3Policy,
    Policy,
    ProportionalPolicy,
    ReinforcePolicy,
    RoundRobinPolicy,
    TemperaturePolicy,
    ThompsonPolicy,
    UniformPolicy,
    WeightedPolicy,
)
from rag_lightning.methods.curriculum.scaling import RewardScale

SIZES = {"a": 10, "b": 200, "c": 1000}
GRAPH = ActivityGraph.from_dict({"nodes": {name: {"size": size} for name, size in SIZES.items()}})
SPARSE = ActivityGraph.from_dict(
    {
        "nodes": {name: {"size": size} for name, size in SIZES.items()},
        "edges": [
            {"from": "a", "to": "c", "weight": 2.0},
            {"from": "a", "to": "a", "weight": 0.5},
            {"from": "b", "to": "a", "weight": 1.0},
            {"from": "c", "to": "b", "weight": 4.0},
            {"from": "c", "to": "a", "weight": 1.0},
            {"from": "c", "to": "c", "weight": 2.0},
        ],
    }
)
Make = Callable[..., Policy]
LEARNERS: list[Make] = [Exp3Policy, ThompsonPolicy, ReinforcePolicy]
ALL: list[Make] = [UniformPolicy, WeightedPolicy, ProportionalPolicy, TemperaturePolicy, RoundRobinPolicy, *LEARNERS]
by_name = pytest.mark.parametrize("make", ALL, ids=lambda make: make.name)
by_learner = pytest.mark.parametrize("make", LEARNERS, ids=lambda make: make.name)


def walk(policy: Policy, num_steps: int, node: str = "a", seed: int = 0) -> list[str]:
    """Walks with noisy rewards (a: low, c: high) that depend on the step's place only."""
    path = []
    for step in range(num_steps):
        chosen = policy.choose(node)
        policy.update(node, chosen, {"a": -1.0, "b": 0.0, "c": 1.0}[chosen] + random.Random(seed + step).gauss(0, 1))
        path.append(chosen)
        node = chosen
    return path


# ---------------------------------------------------------------------- all of them


@by_name
@pytest.mark.parametrize("graph", [GRAPH, SPARSE], ids=["complete", "sparse"])
def test_probabilities_are_those_of_the_neighbours_and_sum_to_one(make, graph):
    policy = make(graph, seed=3)
    walk(policy, 40)
    for node in graph.nodes:
        probabilities = policy.probabilities(node)
        assert list(probabilities) == list(graph.neighbours(node))
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(probabilities.values()) >= 0.0


@pytest.mark.parametrize("make", [make for make in ALL if make is not RoundRobinPolicy], ids=lambda make: make.name)
def test_draws_have_the_probabilities(make):
    """Chi-square at one point of learning; round robin, which has no chance, has a test of its own."""
    policy = make(SPARSE, seed=7)
    walk(policy, 12)
    expected = policy.probabilities("c")
    counts = Counter(policy.choose("c") for _ in range(4000))
    observed = [counts[name] for name in expected]
    assert chisquare(observed, [4000 * share for share in expected.values()]).pvalue > 0.001


@by_name
def test_a_seed_decides_the_walk(make):
    one, same = walk(make(SPARSE, seed=5), 60), walk(make(SPARSE, seed=5), 60)
    assert one == same
    if make is not RoundRobinPolicy:
        assert one != walk(make(SPARSE, seed=6), 60)


@by_name
def test_a_resumed_policy_is_the_uninterrupted_one(make):
    whole = make(SPARSE, seed=5)
    path = walk(whole, 80)
    first = make(SPARSE, seed=5)
    start = walk(first, 33)
    saved = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = make(SPARSE, seed=99)  # the state's seed counts
    second.load_state_dict(saved)
    assert start + walk(second, 47, node=start[-1], seed=33) == path
    assert second.state_dict() == whole.state_dict()


@by_name
def test_states_are_safe_for_torch(make, tmp_path):
    policy = make(SPARSE)
    walk(policy, 9)
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == policy.state_dict()


@by_name
def test_a_state_shares_nothing_with_its_policy(make):
    policy = make(SPARSE)
    walk(policy, 9)
    state = policy.state_dict()
    kept = json.dumps(state)
    walk(policy, 9)
    other = make(SPARSE)
    other.load_state_dict(state)
    walk(other, 9)
    assert json.dumps(state) == kept


@by_name
def test_states_of_other_policies_and_graphs_are_refused(make):
    policy = make(SPARSE)
    state = policy.state_dict()
    with pytest.raises(CheckpointError, match=f"expected a state of '{policy.name}', got one of 'other'"):
        policy.load_state_dict({**state, "policy": "other"})
    with pytest.raises(CheckpointError, match=r"other edges\. Here only: a -> b, b -> b, b -> c; there only: none"):
        make(GRAPH).load_state_dict(state)


@by_name
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_no_numbers_are_refused_and_change_nothing(make, reward):
    policy = make(SPARSE)
    walk(policy, 4)
    before = policy.state_dict()
    message = rf"finite reward for activity 'c' at step 4, got {reward}\. Nothing was updated"
    with pytest.raises(DataError, match=message):
        policy.update("a", "c", reward)
    assert policy.state_dict() == before


@by_name
def test_updates_of_what_was_not_chosen_are_refused(make):
    policy = make(SPARSE)
    with pytest.raises(ConfigError, match="expected an activity that follows 'a', one of 'c', 'a', got 'b'"):
        policy.update("a", "b", 1.0)
    with pytest.raises(ConfigError, match="the probability that 'c' was chosen with, above 0 and at most 1, got 0.0"):
        policy.update("a", "c", 1.0, probability=0.0)


# ---------------------------------------------------------------------- those that do not learn


def test_uniform_ignores_weights():
    assert UniformPolicy(SPARSE).probabilities("c") == pytest.approx({"b": 1 / 3, "a": 1 / 3, "c": 1 / 3})


def test_weighted_follows_weights():
    assert WeightedPolicy(SPARSE).probabilities("c") == pytest.approx({"b": 4 / 7, "a": 1 / 7, "c": 2 / 7})


def test_proportional_follows_sizes_and_weights():
    total = sum(SIZES.values())
    assert ProportionalPolicy(GRAPH).probabilities("a") == pytest.approx({n: s / total for n, s in SIZES.items()})
    shares = {"b": 200 * 4.0, "a": 10 * 1.0, "c": 1000 * 2.0}
    expected = {name: share / sum(shares.values()) for name, share in shares.items()}
    assert ProportionalPolicy(SPARSE).probabilities("c") == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_temperature_is_a_root_of_sizes(temperature):
    roots = {name: size ** (1 / temperature) for name, size in SIZES.items()}
    expected = {name: root / sum(roots.values()) for name, root in roots.items()}
    assert TemperaturePolicy(GRAPH, temperature=temperature).probabilities("b") == pytest.approx(expected)


def test_an_infinite_temperature_leaves_edge_weights():
    policy = TemperaturePolicy(SPARSE, temperature=math.inf)
    assert policy.probabilities("c") == pytest.approx(WeightedPolicy(SPARSE).probabilities("c"))


@pytest.mark.parametrize("make", [ProportionalPolicy, TemperaturePolicy])
def test_sizes_have_to_be_there(make):
    graph = ActivityGraph.from_dict({"nodes": {"a": None, "b": None}})
    with pytest.raises(ConfigError, match="a size for every activity, got none for 'a'. Set curriculum.graph.nodes.a"):
        make(graph)


def test_round_robin_takes_turns():
    assert walk(RoundRobinPolicy(GRAPH), 7) == list("bcabcab")


def test_round_robin_on_a_sparse_graph_leaves_no_edge_out_for_long():
    hub = ActivityGraph.from_dict(
        {
            "nodes": dict.fromkeys("abcd"),
            "edges": [{"from": "a", "to": one} for one in "dbc"] + [{"from": one, "to": "a"} for one in "bcd"],
        }
    )
    policy = RoundRobinPolicy(hub)
    node, path = "a", []
    for _ in range(12):
        node = policy.choose(node)
        path.append(node)
    assert "".join(path) == "bacadabacada"


# ---------------------------------------------------------------------- the scale of rewards


def test_rewards_are_scaled_by_the_quantiles_of_the_last_ones():
    rewards = [random.Random(seed).gauss(0, 3) for seed in range(40)]
    scale = RewardScale(tail=0.1, window=15)
    for place, reward in enumerate(rewards):
        recent = sorted(rewards[max(0, place - 14) : place + 1])
        low, high = (quantile_by_hand(recent, share) for share in (0.1, 0.9))
        expected = 0.5 if high == low else min(max((reward - low) / (high - low), 0.0), 1.0)
        assert scale(reward) == pytest.approx(expected, abs=1e-12)


def quantile_by_hand(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


# ---------------------------------------------------------------------- EXP3


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("rate", [None, 0.4])
@pytest.mark.parametrize("graph", [GRAPH, SPARSE], ids=["complete", "sparse"])
def test_exp3_is_the_papers_loop(graph, rate, share):
    """Auer et al. 2002, EXP3 and EXP3.S with plain weights; rewards scaled by the smallest and largest until now."""
    gamma = 0.2
    policy = Exp3Policy(graph, seed=1, gamma=gamma, rate=rate, share=share, rescale_tail=0.0)
    weights = {node: dict(graph.neighbours(node)) for node in graph.nodes}
    node, seen = "a", []
    for step in range(120):
        w = weights[node]
        count, total = len(w), sum(w.values())
        p = {name: (1 - gamma) * w[name] / total + gamma / count for name in w}
        assert policy.probabilities(node) == pytest.approx(p, rel=1e-9)
        chosen = policy.choose(node)
        reward = {"a": 0.1, "b": 0.5, "c": 0.9}[chosen] + random.Random(step).random()
        policy.update(node, chosen, reward)
        seen.append(reward)
        x = (reward - min(seen)) / (max(seen) - min(seen)) if max(seen) > min(seen) else 0.5
        eta = gamma / count if rate is None else rate
        weights[node] = {
            name: w[name] * math.exp(eta * (x / p[name] if name == chosen else 0.0)) + math.e * share / count * total
            for name in w
        }
        node = chosen


def test_exp3_takes_the_probability_of_long_ago():
    one, other = Exp3Policy(GRAPH, share=0.0), Exp3Policy(GRAPH, share=0.0)
    one.update("a", "b", 1.0)
    other.update("a", "b", 1.0, probability=1 / 3)
    assert one.state_dict() == other.state_dict()
    other.update("a", "b", 2.0, probability=0.1)
    one.update("a", "b", 2.0)
    assert other.probabilities("a")["b"] > one.probabilities("a")["b"]


def test_exp3_neither_overflows_nor_forgets_to_explore():
    policy = Exp3Policy(GRAPH, gamma=0.01, rate=10.0, share=0.0)
    for step in range(5000):
        policy.update("a", "c" if step % 2 else "b", 1.0 if step % 2 else 0.0, probability=0.01)
    assert policy.probabilities("a") == pytest.approx({"a": 0.01 / 3, "b": 0.01 / 3, "c": 0.99 + 0.01 / 3})
    assert json.dumps(policy.state_dict(), allow_nan=False)


def test_a_share_brings_an_activity_back():
    """After a change of the rewards EXP3.S turns round sooner than EXP3."""

    def last_share(share: float) -> float:
        policy = Exp3Policy(GRAPH, seed=2, share=share, rescale_tail=0.0)
        for step in range(900):
            chosen = policy.choose("a")
            good = "b" if step < 600 else "c"
            policy.update("a", chosen, float(chosen == good))
        return policy.probabilities("a")["c"]

    assert last_share(0.01) > 0.7 > last_share(0.0) + 0.2


# ---------------------------------------------------------------------- Thompson sampling


def test_thompson_has_the_posterior_of_discounted_rewards():
    policy = ThompsonPolicy(SPARSE, noise=0.3, forgetting=0.9, prior_count=2.0, rescale_tail=0.0)
    seen, rewards = [], []
    for step in range(25):
        chosen = policy.choose("c")
        reward = random.Random(step).random()
        policy.update("c", chosen, reward)
        rewards.append(reward)
        spread = max(rewards) - min(rewards)
        seen.append((chosen, (reward - min(rewards)) / spread if spread > 0 else 0.5))
    weights = {"b": 4.0, "a": 1.0, "c": 2.0}
    for name, weight in weights.items():
        prior = 0.5 + 0.3 * math.log(weight / (7 / 3))
        ages = [(len(seen) - 1 - place, value) for place, (chosen, value) in enumerate(seen) if chosen == name]
        count = 2.0 + sum(0.9**age for age, _ in ages)
        mean = (2.0 * prior + sum(0.9**age * value for age, value in ages)) / count
        assert policy.posterior("c")[name] == pytest.approx((mean, 0.3 / math.sqrt(count)))
    assert policy.posterior("a")["a"][0] == pytest.approx(0.5 + 0.3 * math.log(0.5 / 1.25))


def test_thompson_probabilities_of_two_are_in_closed_form():
    policy = ThompsonPolicy(SPARSE, noise=0.2)
    for reward in (0.1, 0.9, 0.3, 0.4):
        policy.update("a", "c" if reward < 0.35 else "a", reward)
    (mean, sd), (other_mean, other_sd) = policy.posterior("a").values()
    expected = 0.5 * (1 + math.erf((mean - other_mean) / math.sqrt(2 * (sd**2 + other_sd**2))))
    assert policy.probabilities("a")["c"] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------- REINFORCE


def test_reinforce_moves_along_the_gradient():
    rate, bonus, baseline_rate = 0.7, 0.3, 0.25
    settings = {"rate": rate, "entropy_bonus": bonus, "baseline_rate": baseline_rate, "rescale_tail": 0.0}
    policy = ReinforcePolicy(SPARSE, seed=4, **settings)
    logits = {
        node: torch.tensor([math.log(weight) for weight in SPARSE.neighbours(node).values()], dtype=torch.float64)
        for node in SPARSE.nodes
    }
    baselines, seen, node = dict.fromkeys(SPARSE.nodes, 0.5), [], "a"
    for step in range(40):
        names = list(SPARSE.neighbours(node))
        chosen = policy.choose(node)
        reward = random.Random(step).random() + ord(chosen)
        seen.append(reward)
        x = (reward - min(seen)) / (max(seen) - min(seen)) if max(seen) > min(seen) else 0.5
        theta = logits[node].clone().requires_grad_()
        log_p = theta.log_softmax(0)
        objective = (x - baselines[node]) * log_p[names.index(chosen)] - bonus * (log_p.exp() * log_p).sum()
        objective.backward()
        logits[node] = (theta + rate * theta.grad).detach()
        baselines[node] += baseline_rate * (x - baselines[node])
        policy.update(node, chosen, reward)
        assert list(policy.logits[node].values()) == pytest.approx(logits[node].tolist(), abs=1e-10)
        assert policy.baselines == pytest.approx(baselines)
        node = chosen


def test_an_entropy_bonus_keeps_activities_in_play():
    def least(entropy_bonus: float) -> float:
        policy = ReinforcePolicy(GRAPH, seed=0, entropy_bonus=entropy_bonus)
        walk(policy, 400)
        return min(policy.probabilities("c").values())

    assert least(0.3) > 5 * least(0.0)


# ---------------------------------------------------------------------- those that learn


@by_learner
def test_learners_find_the_better_activity(make):
    policy = make(GRAPH, seed=0)
    path = walk(policy, 600)
    assert path[-300:].count("c") > 0.6 * 300
    assert path[-300:].count("c") > 2 * path[-300:].count("b")


@by_learner
def test_the_size_of_rewards_does_not_matter(make):
    """A bare power of two: the numbers are scaled without rounding."""
    one, other = make(GRAPH, seed=0), make(GRAPH, seed=0)
    node = "a"
    for step in range(60):
        chosen = one.choose(node)
        assert other.choose(node) == chosen
        reward = random.Random(step).gauss(0, 1)
        one.update(node, chosen, reward)
        other.update(node, chosen, reward / 2**20)
        node = chosen


@by_learner
def test_edge_weights_are_priors(make):
    probabilities = make(SPARSE).probabilities("c")
    assert probabilities["b"] > probabilities["c"] > probabilities["a"]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (TemperaturePolicy, {"temperature": 0.0}, "policy.temperature: expected a number above 0, got 0.0"),
        (TemperaturePolicy, {"temperature": math.nan}, "policy.temperature: expected a number above 0, got nan"),
        (Exp3Policy, {"gamma": 0.0}, "policy.gamma: expected a share above 0 and at most 1, got 0.0"),
        (Exp3Policy, {"gamma": 1.5}, "policy.gamma: .* got 1.5"),
        (Exp3Policy, {"rate": 0.0}, "policy.rate: expected a finite number above 0, or none, got 0.0"),
        (Exp3Policy, {"rate": math.inf}, "policy.rate: .* got inf"),
        (Exp3Policy, {"share": -0.1}, "policy.share: expected a share of at least 0 and below 1, got -0.1"),
        (ThompsonPolicy, {"noise": 0.0}, "policy.noise: expected a finite number above 0, got 0.0"),
        (ThompsonPolicy, {"prior_count": math.nan}, "policy.prior_count: expected a finite number above 0, got nan"),
        (ThompsonPolicy, {"forgetting": 0.0}, "policy.forgetting: expected a factor above 0 and at most 1, got 0.0"),
        (ReinforcePolicy, {"rate": -1.0}, "policy.rate: expected a finite number above 0, got -1.0"),
        (ReinforcePolicy, {"baseline_rate": 2.0}, "policy.baseline_rate: expected a rate from 0 to 1, got 2.0"),
        (ReinforcePolicy, {"entropy_bonus": -0.1}, "policy.entropy_bonus: expected .* of 0 or more, got -0.1"),
        *(
            (make, setting, message)
            for make in LEARNERS
            for setting, message in (
                ({"rescale_tail": 0.5}, "policy.rescale_tail: expected a share of at least 0 and below 0.5, got 0.5"),
                ({"rescale_window": 1}, "policy.rescale_window: expected at least 2 rewards, got 1"),
            )
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=f"curriculum.{message}"):
        make(GRAPH, **settings)


def test_extreme_logits_stay_finite():
    policy = ReinforcePolicy(GRAPH, rate=1e4)
    for step in range(200):
        policy.update("a", "abc"[step % 3], float(step % 3))
    assert all(np.isfinite(list(policy.logits["a"].values())))
    assert sum(policy.probabilities("a").values()) == pytest.approx(1.0)
