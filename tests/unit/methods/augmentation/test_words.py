import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.methods.augmentation import changed, deletion, entities, masking, read_lexicon, swap, synonyms
from rag_lightning.text.tagging import bio_spans
from rag_lightning.types import LabelledText, RelationMention, TaggedSentence

CHANGES = {
    "deletion": deletion(0.5),
    "swap": swap(0.5),
    "masking": masking("[MASK]", rate=0.5),
    "synonyms": synonyms({"in": ["inside"]}, rate=0.5),
}
SENTENCE = TaggedSentence(
    "1", ("Anna", "Ash", "sings", "in", "the", "rain", "in", "Oslo"), ("B-PER", "I-PER", *"OOOOO", "B-LOC")
)
RELATION = RelationMention("1", "yes , Anna Ash sings in the rain in Oslo today", (6, 14), (36, 40), "in")


def mentions(sentence):
    return [(sentence.words[start:end], kind) for start, end, kind in bio_spans(sentence.tags)]


@pytest.mark.parametrize("name", CHANGES)
@given(seed=st.integers(0, 10_000))
def test_entities_stay_whatever_is_done_to_the_rest(name, seed):
    augment = changed(CHANGES[name])
    sentence = augment(SENTENCE, random.Random(seed))
    assert mentions(sentence) == mentions(SENTENCE)
    assert len(sentence.words) == len(sentence.tags)
    for mention in (RELATION, RelationMention("1", RELATION.text, RELATION.tail, RELATION.head, "in")):
        other = augment(mention, random.Random(seed))
        assert other.text[slice(*other.head)] == mention.text[slice(*mention.head)]
        assert other.text[slice(*other.tail)] == mention.text[slice(*mention.tail)]
        assert other.text == " ".join(other.text.split())


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_the_same_for_one_place_and_alters_something(name):
    text = LabelledText("1", "sings in the rain in the night in vain", "good")
    augment = changed(CHANGES[name])
    drawn = [augment(text, random.Random(seed)) for seed in range(20)]
    assert drawn == [augment(text, random.Random(seed)) for seed in range(20)]
    assert any(one.text != text.text for one in drawn)
    assert {one.label for one in drawn} == {"good"}


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 2.0), (0.3, 3.0), (0.5, 1.0)])
def test_about_the_share_of_words_is_masked_in_spans_of_about_the_length(rate, mean):
    words = ["w"] * 50_000
    found = masking("M", rate=rate, mean_span_words=mean)(words, random.Random(0))
    runs = "".join(found).split("w")
    spans = [len(run) for run in runs if run]
    assert found.count("M") / len(words) == pytest.approx(rate, rel=0.05)
    assert sum(spans) / len(spans) == pytest.approx(mean, rel=0.1)


def test_a_text_of_which_nothing_is_left_stays():
    assert changed(deletion(1.0))(LabelledText("1", "all gone", "a"), random.Random(0)).text == "all gone"


def test_a_mention_is_replaced_by_one_of_its_type():
    others = [TaggedSentence("2", ("New", "York", "and", "Ben"), ("B-LOC", "I-LOC", "O", "B-PER"))]
    found = entities(others, rate=1.0)(SENTENCE, random.Random(0))
    assert mentions(found) == [(("Ben",), "PER"), (("New", "York"), "LOC")]
    text = LabelledText("1", "a text", "good")
    assert entities(others)(text, random.Random(0)) is text


def test_chinese_is_altered_by_characters():
    example = LabelledText("1", "这部 NBA 电影很好", "good")
    assert changed(swap(1.0))(example, random.Random(0)).text == "部NBA电影很好这"
    for seed in range(20):
        masked = changed(masking("[MASK]", rate=0.5))(example, random.Random(seed)).text
        assert masked.replace("[MASK]", "") not in ("", example.text) or masked == example.text


def test_a_text_is_never_masked_whole():
    words = ["film"]
    assert all(masking("[MASK]", rate=0.5, mean_span_words=1.0)(words, random.Random(n)) == words for n in range(20))


def test_bad_input_is_refused(tmp_path):
    for make in (deletion, swap, lambda rate: masking("M", rate=rate), lambda rate: synonyms({}, rate=rate)):
        with pytest.raises(ConfigError, match="expected a rate above 0 and at most 1, got 1.5"):
            make(1.5)
    with pytest.raises(ConfigError, match="mean_span_words of 1 or more, got 0.5"):
        masking("M", mean_span_words=0.5)
    with pytest.raises(ConfigError, match="expected a rate of at most 0.67 with spans of 2.0 words, got 0.9"):
        masking("M", rate=0.9)
    with pytest.raises(DataError, match="expected training sentences with mentions, came none"):
        entities([TaggedSentence("1", ("a",), ("O",))])
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps({"film": "picture"}))
    with pytest.raises(DataError, match="expected an object such as"):
        read_lexicon(path)
    path.write_text(json.dumps({"Film": ["picture"]}))
    assert read_lexicon(path) == {"film": ["picture"]}
