"""Graphs refuse what no walk could use; estimated weights are those of loops over single pairs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.methods.curriculum import Activity, ActivityGraph, graph_from_gradients, graph_from_transfer

NODES = {"answers": {"reward_weight": 2.0, "size": 30}, "titles": {"size": 100}, "masking": {"size": 7}}
EDGES = [
    {"from": "answers", "to": "titles", "weight": 3.0},
    {"from": "answers", "to": "answers"},
    {"from": "titles", "to": "masking", "weight": 0.5},
    {"from": "masking", "to": "masking"},
]


def edge(source: str, target: str, weight: Any = 1.0) -> dict[str, Any]:
    return {"from": source, "to": target, "weight": weight}


def test_a_description_becomes_a_graph_and_comes_back():
    graph = ActivityGraph.from_dict({"nodes": NODES, "edges": EDGES})
    assert graph.nodes == ("answers", "titles", "masking")
    assert graph.activity("answers") == Activity("answers", 2.0, 30)
    assert list(graph.neighbours("answers").items()) == [("titles", 3.0), ("answers", 1.0)]
    assert graph.edges[2] == ("titles", "masking", 0.5)
    again = ActivityGraph.from_dict(graph.to_dict())
    assert again.edges == graph.edges
    assert again.to_dict() == graph.to_dict()


@pytest.mark.parametrize("description", [{}, {"edges": None}])
def test_without_edges_every_activity_follows_every_one(description):
    graph = ActivityGraph.from_dict({"nodes": {"a": None, "b": {}, "c": None}, **description})
    for node in graph.nodes:
        assert graph.neighbours(node) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_one_activity_follows_itself():
    assert ActivityGraph.from_dict({"nodes": {"only": None}}).neighbours("only") == {"only": 1.0}


def test_an_edge_of_weight_zero_is_never_walked():
    graph = ActivityGraph([Activity("a"), Activity("b")], [("a", "a", 1), ("a", "b", 0), ("b", "a", 2)])
    assert graph.neighbours("a") == {"a": 1.0}
    assert graph.edges == (("a", "a", 1.0), ("b", "a", 2.0))


def test_the_networkx_graph_is_frozen():
    graph = ActivityGraph([Activity("a")])
    with pytest.raises(Exception, match="Frozen graph"):
        graph.digraph.add_edge("a", "b")


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        ({}, None, "nodes: expected at least one activity, got none"),
        (None, None, "nodes: expected at least one activity, got none"),
        ({"a": {"reward_weight": -1.0}}, None, r"nodes\.a\.reward_weight: expected a finite .* of 0 or more, got -1"),
        ({"a": {"reward_weight": math.nan}}, None, r"nodes\.a\.reward_weight: expected a finite number .* got nan"),
        ({"a": {"size": 0}}, None, r"nodes\.a\.size: expected a number of examples of 1 or more, got 0"),
        ({"a": {"size": 3}, "b": {}}, None, "expected a size for every activity or for none, got none for 'b'"),
        ({"a": {"rate": 3}}, None, r"nodes\.a: expected reward_weight, size, got the unknown rate"),
        ({"a": 3}, None, r"nodes\.a: expected a mapping with reward_weight, size, got 3"),
        ({"a": {}}, [edge("a", "b")], r"edges\[0\]: expected nodes among 'a', got 'b'\. Add it to the nodes"),
        ({"a": {}}, [edge("b", "a")], r"edges\[0\]: expected nodes among 'a', got 'b'"),
        ({"a": {}}, [{"from": "a"}], r"edges\[0\]: expected from, to, weight, got no to\."),
        ({"a": {}}, [{"from": "a", "too": "a"}], r"edges\[0\]: .* got no to and the unknown too"),
        ({"a": {}}, [edge("a", "a", -0.5)], "expected a finite weight of 0 or more, got -0.5 for 'a' -> 'a'"),
        ({"a": {}}, [edge("a", "a", math.nan)], "expected a finite weight of 0 or more, got nan"),
        ({"a": {}}, [edge("a", "a", math.inf)], "expected a finite weight of 0 or more, got inf"),
        ({"a": {}}, [edge("a", "a", 0.0)], "edges that leave activity 'a' all have weight 0"),
        ({"a": {}}, [edge("a", "a"), edge("a", "a")], r"edges\[1\]: expected each edge once, got 'a' -> 'a' again"),
        ({"a": {}, "b": {}}, [edge("a", "a")], "activity 'b' is isolated: no edge leads to it or from it"),
        ({"a": {}, "b": {}}, [edge("a", "b")], "no edge leaves activity 'b', so the walk would end.*or a self loop"),
        ({"a": {}}, [], "no edge leaves activity 'a'"),
    ],
)
def test_graphs_that_cannot_be_walked_are_refused(nodes, edges, message):
    with pytest.raises(ConfigError, match=message):
        ActivityGraph.from_dict({"nodes": nodes, "edges": edges})


def test_descriptions_with_other_keys_are_refused():
    with pytest.raises(ConfigError, match="graph: expected nodes, edges, got no nodes and the unknown node."):
        ActivityGraph.from_dict({"node": {}})


def test_a_name_given_twice_is_refused():
    with pytest.raises(ConfigError, match="expected each name once, got 'a' again"):
        ActivityGraph([Activity("a"), Activity("a")])


def test_unknown_nodes_are_named():
    graph = ActivityGraph.from_dict({"nodes": NODES})
    with pytest.raises(ConfigError, match="expected one of 'answers', 'titles', 'masking', got 'reading'"):
        graph.neighbours("reading")


def test_the_order_follows_edges_and_otherwise_the_nodes():
    edges = [edge("c", "a"), edge("a", "b"), edge("b", "b"), edge("d", "b")]
    graph = ActivityGraph.from_dict({"nodes": dict.fromkeys("abcd"), "edges": edges})
    assert graph.order() == ("c", "a", "d", "b")


def test_a_cycle_has_no_order_and_is_named():
    edges = [edge("a", "b"), edge("b", "c"), edge("c", "b")]
    graph = ActivityGraph.from_dict({"nodes": dict.fromkeys("abc"), "edges": edges})
    with pytest.raises(ConfigError, match=r"got the cycle (b -> c -> b|c -> b -> c)\. Remove one of its edges"):
        graph.order()


# ---------------------------------------------------------------------- measured weights


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.double().numpy(), other.double().numpy()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_gradient_weights_are_mean_cosines_of_pairs():
    rng = torch.Generator().manual_seed(0)
    directions = {"a": 0.0, "b": 0.6, "c": -0.8}
    gradients = {
        name: [shift + torch.randn(12, generator=rng) for _ in range(count)]
        for (name, shift), count in zip(directions.items(), (4, 3, 2), strict=True)
    }
    graph = graph_from_gradients(gradients)
    for source in gradients:
        for target in gradients:
            cosines = [
                cosine(one, other)
                for i, one in enumerate(gradients[source])
                for j, other in enumerate(gradients[target])
                if source != target or i != j
            ]
            expected = sum(cosines) / len(cosines)
            found = graph.neighbours(source).get(target, 0.0)
            assert found == pytest.approx(max(expected, 0.0), abs=1e-6), (source, target)
    assert "c" not in graph.neighbours("b")


def test_an_activity_against_all_others_keeps_its_self_loop():
    right = torch.tensor([1.0, 0.0])
    graph = graph_from_gradients({"a": [right], "b": [-right, right]}, nodes={"a": {"size": 3}, "b": {"size": 4}})
    assert graph.edges == (("a", "a", 1.0), ("b", "b", 1.0))
    assert graph.activity("b").size == 4


def test_half_precision_gradients_do_not_overflow():
    large = torch.full((4096,), 6e4, dtype=torch.float16)
    assert graph_from_gradients({"a": [large], "b": [large]}).neighbours("a")["b"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": []}, "gradients of activity 'a': expected at least one, got none"),
        (
            {"a": [torch.ones(3)], "b": [torch.ones(4)]},
            "gradients of activity 'b': expected 3 numbers, as the first of 'a' has, got 4",
        ),
        ({"a": [torch.ones(3), torch.zeros(3)]}, "finite numbers that are not all 0, got a gradient of norm 0"),
        ({"a": [torch.tensor([1.0, math.nan])]}, "finite numbers that are not all 0, got a gradient of norm nan"),
    ],
)
def test_gradients_without_direction_are_refused(gradients, message):
    with pytest.raises(DataError, match=message):
        graph_from_gradients(gradients)


def test_transfer_weights_are_gains():
    gains = {("a", "b"): 0.25, ("b", "a"): -0.5, ("b", "b"): 0.125, ("c", "a"): 0.0, ("a", "c"): 1.0}
    graph = graph_from_transfer(gains)
    assert graph.edges == (("a", "b", 0.25), ("a", "c", 1.0), ("b", "b", 0.125), ("c", "c", 1.0))


def test_gains_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="gain of 'b' from 'a': expected a finite number, got nan"):
        graph_from_transfer({("a", "b"): math.nan})
    with pytest.raises(DataError, match="expected one for each pair that was measured, got none"):
        graph_from_transfer({})


def test_nodes_have_to_be_those_that_were_measured():
    with pytest.raises(ConfigError, match="expected nodes among 'a', got 'b'"):
        graph_from_transfer({("a", "b"): 1.0}, nodes={"a": {}})
