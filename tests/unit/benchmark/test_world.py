"""The sides do the same: equal losses and gradients, equal answers; a wrong path is not timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rag_lightning.benchmark import answering, corpus_work, sides
from rag_lightning.benchmark.answering import check_answers
from rag_lightning.benchmark.lengths import LengthTables
from rag_lightning.benchmark.parts import PARTS, chosen_parts, chosen_sides
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.texts import TextFiles, made_texts, read_texts
from rag_lightning.benchmark.world import World, build_world
from rag_lightning.cli.hydra_app import conf_dir
from rag_lightning.errors import ConfigError
from rag_lightning.training.objectives import MarginalObjective

TABLES = LengthTables(passages=[6, 20, 60], questions=[4, 6, 9], answers=[1, 2, 6])
KINDS = pytest.mark.parametrize("kind", ["rag_token", "rag_sequence"])


def shape(**changes: Any) -> Shape:
    return Shape.of({**yaml.safe_load((conf_dir() / "shape" / "tiny.yaml").read_text()), **changes})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    def build(**changes: Any) -> World:
        sizes = shape(**changes)
        return build_world(sizes, made_texts(sizes, TABLES), tmp_path)

    return build


@KINDS
def test_ours_and_transformers_agree(kind, make):
    figures = sides.check_same(make(), kind)
    assert set(figures) == {"loss", "query encoder's gradient", "generator's gradient"}
    assert all(value > 0 for value in figures.values())


@KINDS
def test_a_wrong_path_is_refused(kind, make, monkeypatch):
    world = make()
    right = sides.ours_pass(world, kind)
    monkeypatch.setattr(sides, "ours_pass", lambda world, kind: lambda number: 1.01 * right(number))
    with pytest.raises(sides.WrongPathError, match=f"expected the loss of both sides to agree .* in {kind}"):
        sides.check_same(world, kind)


def test_a_path_without_gradient_to_the_encoder_is_refused(make, monkeypatch):
    world = make()
    untaught = partial(MarginalObjective, teaches_retriever=False)
    monkeypatch.setattr(sides, "MarginalObjective", untaught)
    with pytest.raises(sides.WrongPathError, match="expected the query encoder's gradient .* came 0 of ours"):
        sides.check_same(world, "rag_token")


def test_a_step_leaves_no_gradient_and_moves_no_weight(make):
    world = make()
    before = {name: weight.clone() for name, weight in world.model.named_parameters()}
    for run in (sides.ours_pass(world, "rag_token"), sides.hf_pass(world, "rag_token"), sides.floor_pass(world)):
        sides.training_step(world, run)(1)
        assert all(weight.grad is None for weight in world.model.parameters())
        assert all(torch.equal(before[name], weight) for name, weight in world.model.named_parameters())


def test_the_sides_share_weights_and_the_floor_teaches_all_of_them(make):
    world = make()
    ours = {weight.data_ptr() for weight in world.model.parameters()}
    for model in (world.rag_token, world.rag_sequence):
        assert {weight.data_ptr() for weight in model.parameters()} == ours
    sides.floor_pass(world)(0)
    assert all(weight.grad is not None for weight in world.model.generator.parameters())
    assert world.model.encoder is not None
    assert all(weight.grad is not None for weight in world.model.encoder.query.parameters())


def test_padding_is_to_the_combined_length_and_to_the_longest(make):
    world = make()
    for batch in world.padded:
        lengths = batch.contexts.attention_mask.sum(dim=1)
        assert batch.contexts.input_ids.shape[1] == lengths.max()
        assert batch.padded.input_ids.shape[1] == world.shape.max_combined_length
        assert torch.equal(batch.padded.attention_mask.sum(dim=1), lengths)


def test_equal_lengths_have_no_padding(make):
    for batch in make(lengths="equal").padded:
        assert bool(batch.padded.attention_mask.all())
        assert len({tuple(row) for row in (batch.labels != 0).tolist()}) == 1


def test_questions_find_passages_of_their_own(make):
    world = make(num_passages=2)
    found = set()
    for batch in world.batches:
        hits, scores_BK = world.model.retrieve(batch.query, [q.question for q in batch.questions], world.retriever)
        found |= {tuple(row) for row in hits.ids_BK.tolist()}
        assert bool((scores_BK.softmax(dim=1).max(dim=1).values < 0.999).all()), "no passage is certain"
    assert len(found) == 4, "each of the four questions has other passages"


def test_the_same_seed_makes_the_same_world_and_another_another(tmp_path):
    worlds = []
    for number, seed in enumerate((0, 0, 1)):
        (tmp_path / str(number)).mkdir()
        sizes = shape(seed=seed)
        worlds.append(build_world(sizes, made_texts(sizes, TABLES), tmp_path / str(number)))
    first, same, other = (sides.figures_of_pass(world, sides.ours_pass(world, "rag_token"))["loss"] for world in worlds)
    assert first == same
    assert first != other


@pytest.mark.parametrize(("kind", "mode"), [("rag_token", "rag_token"), ("rag_sequence", "rag_sequence_thorough")])
def test_answers_are_as_many_tokens_and_as_likely(kind, mode, make):
    world = make()
    world.model.eval()
    notes = check_answers(world, kind, mode)()
    assert notes["new tokens"] == world.shape.max_new_tokens
    assert "generate" not in vars(world.rag_sequence.generator), "transformers' search is as it was"


def test_worse_answers_are_refused(make, monkeypatch):
    world = make()
    world.model.eval()
    bad_BT = answering.ours_answers(world, "rag_token")(0)
    bad_BT[:, 1:] = 7
    monkeypatch.setattr(answering, "ours_answers", lambda world, mode: lambda number: bad_BT)
    with pytest.raises(sides.WrongPathError, match="lower by"):
        answering.check_answers(world, "rag_token", "rag_token")()
    monkeypatch.setattr(answering, "ours_answers", lambda world, mode: lambda number: bad_BT[:, :-1])
    with pytest.raises(sides.WrongPathError, match="new tokens of both sides"):
        answering.check_answers(world, "rag_token", "rag_token")()


def test_both_encodings_agree(make):
    world = make()
    world.model.eval()
    assert corpus_work.check_encoding(world) == {"passages": 40}


def test_contexts_beyond_the_positions_leave_transformers_out(make):
    task = PARTS["training_step_token"].make(make(generator_positions=56, max_combined_length=60))
    assert "hf_rag" not in task.runs
    assert "the generator has 56 positions" in task.missing["hf_rag"]


def test_names_of_parts_and_sides():
    assert chosen_parts("all") == PARTS
    assert list(chosen_parts(["retrieval", "training_step_token"])) == ["training_step_token", "retrieval"]
    assert chosen_sides(["floor"]) == ("floor",)
    with pytest.raises(ConfigError, match="expected parts among training_step_token, .* came 'colour'"):
        chosen_parts(["colour"])
    with pytest.raises(ConfigError, match="expected sides among ours, .* came 'peer'"):
        chosen_sides(["peer"])
    with pytest.raises(ConfigError, match="came none"):
        chosen_parts([])


def test_real_texts(tiny_world, tmp_path):
    files = TextFiles(
        passages=str(tiny_world.passages), questions=str(tiny_world.train), tokenizer=str(tiny_world.tokenizer)
    )
    sizes = shape(num_corpus_passages=24)
    world = build_world(sizes, read_texts(sizes, files), tmp_path)
    assert len(world.texts.corpus) == 24
    sides.check_same(world, "rag_token")
    with pytest.raises(ConfigError, match="expected 2000 questions with answers"):
        read_texts(replace(sizes, batch_size=1000), files)
