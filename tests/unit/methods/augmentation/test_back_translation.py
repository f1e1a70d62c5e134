"""Texts there and back: translated once, remembered, kept where nothing comes back."""

import random

import pytest

from rag_lightning.errors import ConfigError
from rag_lightning.methods.augmentation.back_translation import back_translation, translator
from rag_lightning.types import LabelledText, TaggedSentence


def texts(*words):
    return [LabelledText(str(n), word, "a") for n, word in enumerate(words)]


class Recorder:
    def __init__(self, change):
        self.change, self.asked = change, []

    def __call__(self, words):
        self.asked += words
        return [self.change(word) for word in words]


def test_a_text_is_translated_once_and_keeps_its_label():
    there, back = Recorder(str.upper), Recorder(lambda word: f"{word.lower()} again")
    augment = back_translation(there, back)
    for _ in range(2):
        altered = augment(texts("one", "two", "one"), random.Random(0))
        assert [one.text for one in altered] == ["one again", "two again", "one again"]
        assert {one.label for one in altered} == {"a"}
    assert there.asked == ["one", "two"]
    assert back.asked == ["ONE", "TWO"]


def test_a_text_that_comes_back_empty_stays():
    augment = back_translation(lambda words: words, lambda words: [" "] * len(words))
    assert augment(texts("one"), random.Random(0)) == texts("one")


def test_a_rate_leaves_the_others_as_they_are():
    augment = back_translation(lambda words: words, lambda words: ["new"] * len(words), rate=0.5)
    altered = augment(texts(*map(str, range(200))), random.Random(0))
    assert 70 < sum(one.text == "new" for one in altered) < 130


def test_a_saved_model_translates(tiny_model, tmp_path):
    model = tiny_model()
    model.settings = type(model.settings)(num_passages=0, objective="rag_sequence", decoding="rag_sequence_thorough")
    model.encoder = None
    model.save_pretrained(tmp_path / "model")
    answers = translator(str(tmp_path / "model"))(["who made Amber", "where is Amber"])
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)


def test_tagged_sentences_are_refused():
    with pytest.raises(ConfigError, match="expected texts with one label, got a TaggedSentence"):
        back_translation(list, list)([TaggedSentence("1", ("a",), ("O",))], random.Random(0))
