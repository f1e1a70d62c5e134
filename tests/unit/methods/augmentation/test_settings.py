"""An augmentation by its name alters what it says, and refuses what it cannot."""

import random

import pytest

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.methods.augmentation import AugmentationSettings
from rag_lightning.types import LabelledText, TaggedSentence

TEXTS = [LabelledText(str(n), "one two three four five six seven eight", "a") for n in range(4)]
TAGGED = [TaggedSentence("1", ("Anna", "sings"), ("B-PER", "O")), TaggedSentence("2", ("Ben",), ("B-PER",))]


@pytest.mark.parametrize(("kind", "rate"), [("deletion", 0.5), ("swap", 1.0), ("masking", 0.5), ("synonyms", 1.0)])
def test_each_kind_alters_the_words(kind, rate, tmp_path):
    (tmp_path / "lexicon.json").write_text('{"two": ["2"]}')
    lexicon = str(tmp_path / "lexicon.json") if kind == "synonyms" else None
    augment = AugmentationSettings(kind=kind, rate=rate, lexicon=lexicon).build(mask="[MASK]", train=TEXTS)
    altered = augment(TEXTS, random.Random(0))
    assert [one.id for one in altered] == [one.id for one in TEXTS]
    assert all(one.text != TEXTS[0].text and one.label == "a" for one in altered)
    assert augment(TEXTS, random.Random(0)) == altered


def test_mentions_come_from_the_training_sentences():
    augment = AugmentationSettings(kind="entities", rate=1.0).build(mask=None, train=TAGGED)
    words = {augment(TAGGED, random.Random(seed))[0].words for seed in range(20)}
    assert words == {("Anna", "sings"), ("Ben", "sings")}


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="synonyms: expected lexicon, got none"):
        AugmentationSettings(kind="synonyms")
    with pytest.raises(ConfigError, match="back_translation: expected back, got none"):
        AugmentationSettings(kind="back_translation", there="run")
    with pytest.raises(ConfigError, match="swap: expected no lexicon, which it does not read"):
        AugmentationSettings(kind="swap", lexicon="file")
    with pytest.raises(ConfigError, match="swap: expected no mean_span_words, which it does not read"):
        AugmentationSettings(kind="swap", mean_span_words=3.0)
    with pytest.raises(ConfigError, match="expected a reader with a mask token"):
        AugmentationSettings(kind="masking").build(mask=None, train=TEXTS)
    (tmp_path / "lexicon.json").write_text('{"film": ["picture"]}')
    with pytest.raises(DataError, match="expected words of the training texts in .*lexicon.json, came none"):
        AugmentationSettings(kind="synonyms", lexicon=str(tmp_path / "lexicon.json")).build(mask=None, train=TEXTS)
    with pytest.raises(DataError, match="expected training sentences with mentions"):
        AugmentationSettings(kind="entities").build(mask=None, train=TEXTS)
