import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import DataError
from rag_lightning.heads.reading import marked, read
from rag_lightning.types import LabelledText, Passage, RelationMention, TaggedSentence
from tests.unit.heads import tiny


@given(st.permutations([0, 1]), st.integers(0, 5), st.integers(1, 4), st.integers(0, 5), st.integers(1, 4))
def test_marks_stand_around_the_entities(order, gap, first, between, second):
    text = "x" * gap + "h" * first + "y" * between + "t" * second + "z"
    spans = [(gap, gap + first), (gap + first + between, gap + first + between + second)]
    head, tail = (spans[place] for place in order)
    written, head_at, tail_at = marked(RelationMention("1", text, head, tail, "R"))
    assert written[head_at:].startswith(f"@ {text[slice(*head)]} @")
    assert written[tail_at:].startswith(f"# {text[slice(*tail)]} #")
    assert written.replace("@ ", "").replace(" @", "").replace("# ", "").replace(" #", "") == text


@pytest.mark.parametrize("head", [(0, 9), (-1, 2), (2, 2), (1, 5)])
def test_spans_out_of_range_empty_or_overlapping_are_refused(head):
    with pytest.raises(DataError, match="relation '1': expected two spans that do not overlap within its 8 characters"):
        marked(RelationMention("1", "Anna met", head, (4, 8), "R"))


def test_words_are_found_at_their_first_piece_with_and_without_a_passage():
    tokens = tiny.tokenizer()
    sentences = [
        TaggedSentence("1", ("Anna", "sings", "unheard", "in", "Oslo"), ("O",) * 5),
        TaggedSentence("2", ("warm", "film"), ("O",) * 2),
    ]
    passages = [[Passage("a", "bad", "Oslo film"), Passage("b", "good", "Anna sings in Oslo")]] * 2
    for given_passages, repeats in ((None, 1), (passages, 2)):
        reading = read(tokens, sentences, given_passages, max_tokens=32)
        assert reading.places.shape == (2 * repeats, 5)
        for row, sentence in enumerate(one for one in sentences for _ in range(repeats)):
            for place, word in zip(reading.places[row].tolist(), sentence.words, strict=False):
                piece = tokens.convert_ids_to_tokens([int(reading.tokens.input_ids[row, place])])[0]
                assert tokens.tokenize(word)[0] == piece
        assert (reading.places[repeats:, 2:] == -1).all()


def test_words_that_are_cut_have_no_place():
    reading = read(tiny.tokenizer(), [TaggedSentence("1", ("warm",) * 9, ("O",) * 9)], None, max_tokens=6)
    assert (reading.places[0] >= 0).tolist() == [True] * 4 + [False] * 5


def test_entities_are_read_at_their_signs():
    tokens = tiny.tokenizer()
    mention = RelationMention("1", "Anna sings in Oslo", (0, 4), (14, 18), "R")
    reading = read(tokens, [mention], None, max_tokens=32)
    signs = tokens.convert_ids_to_tokens(reading.tokens.input_ids[0, reading.places[0]].tolist())
    assert [sign.strip("▁") for sign in signs] == ["@", "#"]
    with pytest.raises(DataError, match="cut before one. Raise reader.max_tokens"):
        read(tokens, [mention], None, max_tokens=6)


def test_a_long_passage_is_cut_and_the_text_stays():
    tokens = tiny.tokenizer()
    long = Passage("a", "good", "warm " * 100)
    reading = read(tokens, [LabelledText("1", "a funny film", "good")], [[long]], max_tokens=20)
    assert reading.tokens.input_ids.shape[1] == 20
    assert tokens.decode(reading.tokens.input_ids[0]).startswith("<s> a funny film</s> warm")


def test_a_context_stands_behind_the_text_and_before_the_passage():
    tokens = tiny.tokenizer()
    example = LabelledText("1", "made it", "good", context="warm songs")
    alone = tokens.decode(read(tokens, [example], None, max_tokens=32).tokens.input_ids[0])
    both = tokens.decode(
        read(tokens, [example], [[Passage("a", "bad", "cold film")]], max_tokens=32).tokens.input_ids[0]
    )
    assert alone == "<s> made it</s> warm songs</s>"
    assert both == "<s> made it</s> warm songs cold film : bad</s>"


def test_nothing_found_is_read_as_the_text_alone():
    reading = read(tiny.tokenizer(), [LabelledText("1", "made it", "good")], [[Passage("", "", "")]], max_tokens=32)
    plain = read(tiny.tokenizer(), [LabelledText("1", "made it", "good")], None, max_tokens=32)
    real = reading.tokens.input_ids[0][reading.tokens.attention_mask[0].bool()]
    assert torch.equal(real[: plain.tokens.input_ids.shape[1]], plain.tokens.input_ids[0])
