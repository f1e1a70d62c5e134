"""Passages left out, reworded, and hard negatives in the last places."""

import random

import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.heads.model import PassageChange
from rag_lightning.methods.augmentation import ChangedPassages, PassageSettings
from rag_lightning.types import Evidence, Hits, LabelledText, Passage, RelationMention, TaggedSentence

EXAMPLE = LabelledText("q", "text", "good")


def evidence(*titles, rows=1):
    """Returns hits whose ids are their places, with passages of these titles."""
    ids = torch.arange(len(titles)).repeat(rows, 1)
    found = tuple(Passage(str(n), title, "One is. Two are. Three were.") for n, title in enumerate(titles))
    return Evidence((found,) * rows, Hits(-ids.float(), ids, "a"))


def changed(seed=0, **settings):
    return ChangedPassages(PassageSettings(**settings), random.Random(seed))


def test_the_change_is_what_a_model_expects():
    assert isinstance(changed(), PassageChange)


def test_without_settings_nothing_changes():
    found = evidence("good", "bad", rows=2)
    change = changed()
    assert change.num_further == 0
    hits = change.chosen([EXAMPLE] * 2, found, 2)
    assert torch.equal(hits.ids_BK, found.hits.ids_BK)
    assert [list(row) for row in found.passages] == change.reworded(found.passages)


def test_dropout_leaves_out_its_share_and_never_all():
    rows = 400
    hits = changed(dropout=0.5).chosen([EXAMPLE] * rows, evidence("good", "bad", "bad", rows=rows), 3)
    assert hits.found_BK.any(dim=1).all()
    assert float(hits.found_BK[:, 1:].float().mean()) == pytest.approx(0.5, abs=0.06)
    assert torch.equal(hits.scores_BK == -torch.inf, ~hits.found_BK)


def test_hard_negatives_are_the_best_of_another_label_in_the_last_places():
    found = evidence("good", "good", "good", "good", "bad", "bad")
    change = changed(hard_negatives=1)
    assert change.num_further == 4
    hits = change.chosen([EXAMPLE], found, 2)
    assert hits.ids_BK.tolist() == [[0, 4]]
    assert hits.scores_BK.tolist() == [[0.0, -4.0]]
    none = evidence("good", "good", "good")
    assert change.chosen([EXAMPLE], none, 2).ids_BK.tolist() == [[0, 1]]


def test_labels_of_relations_are_compared_whole():
    example = RelationMention("q", "fire made smoke", (0, 4), (10, 15), "P1")
    found = evidence("P1 of a and b", "P10 of a and b", "P1 of c and d")
    assert changed(hard_negatives=1).chosen([example], found, 2).ids_BK.tolist() == [[0, 1]]


def test_sentences_are_put_in_another_order():
    (row,) = changed(shuffle=1.0, seed=1).reworded(evidence("good").passages)
    assert row[0].text != "One is. Two are. Three were."
    assert sorted(row[0].text.split()) == sorted("One is. Two are. Three were.".split())


def test_bad_settings_are_refused():
    for wrong in ({"dropout": 1.0}, {"shuffle": 2.0}, {"hard_negatives": -1}):
        with pytest.raises(ConfigError, match=f"passages.{next(iter(wrong))}: expected"):
            PassageSettings(**wrong)
    with pytest.raises(ConfigError, match="expected fewer than task.retrieval.num_passages=2, got 2"):
        changed(hard_negatives=2).chosen([EXAMPLE], evidence("good", "bad"), 2)
    with pytest.raises(ConfigError, match="expected examples with one label"):
        changed(hard_negatives=1).chosen([TaggedSentence("1", ("a",), ("O",))], evidence("a", "b"), 2)
