"""Ways to spend a step: which weights move and how far, whose examples are read and how altered, edges measured."""

import copy

import lightning as L
import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.heads.reader import Reader
from rag_lightning.methods.augmentation import AugmentationSettings, PassageSettings
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.policies import RoundRobinPolicy
from rag_lightning.methods.curriculum.walk import Walk
from rag_lightning.training.tasks.activities import TrainingActivity, activity_from
from rag_lightning.training.tasks.estimation import estimated_graph
from rag_lightning.training.tasks.walking import WalkCallback
from tests.labelled_files import write_labelled
from tests.unit.heads import tiny
from tests.unit.training.tasks.tiny_run import Run, sst2, wikigold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def moved(run):
    """Trains, and returns the names of the weights that moved, and by how much at most."""
    before = copy.deepcopy(run.model.state_dict())
    run.fit()
    far = {name: float((value - before[name]).abs().max()) for name, value in run.model.state_dict().items()}
    return {name: distance for name, distance in far.items() if distance > 0}


def test_depths_count_from_the_top_and_embeddings_are_lowest():
    depths = tiny.reader(num_layers=3).depths()
    layers = {name: depth for name, depth in depths.items() if ".layer." in name}
    assert {depth for name, depth in layers.items() if ".layer.0." in name} == {2}
    assert {depth for name, depth in layers.items() if ".layer.2." in name} == {0}
    assert {depth for name, depth in depths.items() if "embeddings" in name} == {3}
    assert isinstance(tiny.reader(), Reader)


@pytest.mark.parametrize("scope", ["all", "top", "heads"])
def test_a_scope_lets_its_weights_move_and_no_others(scope, folder, tmp_path):
    names = moved(Run(tmp_path, [sst2(folder)], steps=2, num_layers=2, activities={"one": {"scope": scope}}))
    kinds = {
        "heads": any(name.startswith("heads.") for name in names),
        "top": any(".layer.1." in name for name in names),
        "low": any(".layer.0." in name or "embeddings" in name for name in names),
    }
    assert kinds == {"heads": True, "top": scope != "heads", "low": scope == "all"}


def test_lower_layers_learn_slower_by_the_decay_of_each_layer(folder, tmp_path):
    """AdamW's first step is about as long as its rate, whatever the gradient."""
    run = Run(tmp_path, [sst2(folder)], steps=1, num_layers=2, activities={"one": {"layer_decay": 0.1}})
    far = moved(run)
    top = max(distance for name, distance in far.items() if ".layer.1." in name)
    low = max(distance for name, distance in far.items() if ".layer.0." in name)
    embedded = max(distance for name, distance in far.items() if "embeddings" in name)
    assert top == pytest.approx(1e-2, rel=0.05)
    assert low / top == pytest.approx(0.1, rel=0.05)
    assert embedded / top == pytest.approx(0.01, rel=0.05)


def test_several_batches_of_a_step_are_one_batch_of_their_size(folder, tmp_path):
    task = sst2(folder, dropout=0.0)
    kept: list[list[torch.Tensor]] = []

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.append([parameter.grad.clone() for parameter in pl_module.model.parameters()])

    Run(tmp_path / "a", [task], steps=1, activities={"one": {"batches": 2}}, callbacks=[Keep()]).fit()
    whole = Run(tmp_path / "b", [task], steps=1, callbacks=[Keep()])
    whole.data.batch_size = 16  # all examples, which are two batches of 8
    whole.fit()
    several, one = kept
    for mine, theirs in zip(several, one, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_examples_are_altered_as_their_activity_says_and_alike_for_one_seed(folder, tmp_path):
    augment = (AugmentationSettings(kind="masking", rate=0.4), AugmentationSettings(kind="swap", rate=1.0))

    def first(root, **activity):
        run = Run(root, [wikigold(folder)], steps=1, activities={"one": activity})
        batches = []
        judge = run.module.judge
        run.module.judge = lambda batch, change=None: (batches.append(batch), judge(batch, change))[1]
        run.fit()
        return batches[0]

    plain, altered = first(tmp_path / "a"), first(tmp_path / "b", augment=augment)
    again = first(tmp_path / "c", augment=augment)
    assert altered.examples == again.examples
    assert [one.id for one in altered.examples] == [one.id for one in plain.examples]
    assert altered.examples != plain.examples
    assert tiny.tokenizer().mask_token in " ".join(word for one in altered.examples for word in one.words)
    for row, one in enumerate(altered.examples):
        assert int((altered.labels[row] >= 0).sum()) == len(one.words)


@pytest.mark.parametrize("num_passages", [0, 2])
def test_a_walk_over_all_kinds_of_activities_trains(num_passages, folder, tmp_path):
    activities = {
        "plain": {}, "swap": {"augment": (AugmentationSettings(kind="swap"),)}, "top": {"scope": "top"},
        "heads": {"scope": "heads"}, "wide": {"batches": 2},
    }  # fmt: skip
    if num_passages:
        activities["dropped"] = {"passages": PassageSettings(dropout=0.5, shuffle=1.0)}
        activities["negatives"] = {"passages": PassageSettings(hard_negatives=1)}
    graph = ActivityGraph.from_dict({"nodes": dict.fromkeys(activities)})
    callback = WalkCallback(walk=Walk(graph, RoundRobinPolicy(graph)), probe_size=8)
    run = Run(
        tmp_path, [sst2(folder)], steps=30, num_passages=num_passages, activities=activities, callbacks=[callback]
    )
    figures = run.fit().test()
    assert figures["test/accuracy"] > 0.9
    assert len(callback.walk.history) == 30
    edges = callback.walk.edge_rewards
    turns = [callback.walk.policy.probabilities(source)[target] * reward for (source, target), reward in edges.items()]
    assert callback.walk.expected_reward() == pytest.approx(sum(turns))


@pytest.mark.parametrize("by", ["gradients", "transfer"])
def test_edges_are_measured_and_leave_weights_and_order_as_they_were(by, folder, tmp_path):
    run = Run(tmp_path, [sst2(folder), wikigold(folder)])
    before = copy.deepcopy(run.model.state_dict())
    nodes = {"sst2": {"size": 16}, "wikigold": {"size": 12}}
    settings = {"num_batches": 2} if by == "gradients" else {"num_steps": 2, "probe_size": 8}
    graph = estimated_graph(run.module, run.data, nodes, by=by, **settings)
    again = estimated_graph(run.module, run.data, nodes, by=by, **settings)
    assert graph.edges == again.edges
    assert graph.nodes == ("sst2", "wikigold")
    assert graph.activity("sst2").size == 16
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert run.data.state_dict()["draws"] == {}


def test_bad_activities_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"nodes\.x: expected the name of a task or task: one of a, b, got None"):
        activity_from("x", {}, ["a", "b"])
    with pytest.raises(ConfigError, match=r"nodes\.a: expected reward_weight, size, task, augment.*'skope'"):
        activity_from("a", {"skope": "all"}, ["a"])
    with pytest.raises(ConfigError, match=r"nodes\.a: activity.batches: expected 1 or more, got 0"):
        activity_from("a", {"batches": 0}, ["a"])
    with pytest.raises(ConfigError, match=r"nodes\.a: augmentation.synonyms: expected lexicon, got none"):
        activity_from("a", {"augment": "synonyms"}, ["a"])
    assert activity_from("any", {"augment": ["swap", {"kind": "deletion", "rate": 0.2}]}, ["a"]).task == "a"
    for wrong, message in (
        ({"layer_decay": 0.0}, "expected a factor above 0"),
        ({"top_layers": 2}, "expected none with scope=all, which does not read it, got 2"),
        ({"scope": "heads", "layer_decay": 0.5}, "expected none with scope=heads, as no layer moves, got 0.5"),
        ({"top_layers": 0}, "expected 1 or more, got 0; heads alone are scope=heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingActivity(task="a", **wrong)
    negatives = {"x": {"passages": PassageSettings(hard_negatives=2)}}
    with pytest.raises(ConfigError, match=r"hard_negatives=2: expected fewer than task.retrieval.num_passages=2"):
        Run(tmp_path / "k", [sst2(folder)], num_passages=2, activities=negatives).fit()
    with pytest.raises(ConfigError, match=r"hard_negatives=2: expected task.passages=examples"):
        Run(tmp_path / "tags", [wikigold(folder)], num_passages=3, activities=negatives).fit()
    with pytest.raises(ConfigError, match="expected heads that retrieve, these are plain"):
        Run(tmp_path, [sst2(folder)], activities={"x": {"passages": PassageSettings(dropout=0.5)}})
