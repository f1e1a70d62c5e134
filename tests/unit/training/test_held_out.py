"""Warm-up never reads a passage that a validation or test question is about."""

import logging
import random
from types import SimpleNamespace

import pytest

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.types import Passage, Question


@pytest.fixture
def data() -> RagDataModule:
    module = RagDataModule()
    module._corpus = PassageCorpus.from_passages([Passage(name, name, "A film.") for name in "abc"])
    module.questions = {
        "train": [Question("1", "who?", ("x",), ("c",))],
        "validation": [Question("2", "who?", ("x",), ("a",))],
        "test": [Question("3", "who?", ("x",), ("b",))],
    }
    return module


def test_passages_of_held_out_questions_are_left_out(data: RagDataModule) -> None:
    assert data._rows_to_practise_on() == [2]


@pytest.mark.parametrize("kind", ["inverse_cloze", "denoising"])
def test_every_kind_of_warm_up_keeps_to_them(kind, data: RagDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans to repeat were once taken from all passages, although the list of those to read was at hand."""
    monkeypatch.setattr(RagDataModule, "assembler", SimpleNamespace(tokenizer=None))
    data.denoising = {"copy_share": 1.0, "rename_share": 0.0}
    examples = data._examples("train", kind)
    assert {examples.draw(0, random.Random(seed)).passage.id for seed in range(50)} == {"c"}


def test_a_missing_test_file_is_told(data: RagDataModule, caplog: pytest.LogCaptureFixture) -> None:
    """Once a warm-up ran with data.test=null, and quietly practised on the passages of the test questions."""
    del data.questions["test"]
    with caplog.at_level(logging.WARNING):
        assert data._rows_to_practise_on() == [1, 2]
    assert "data.test is not given" in caplog.text
