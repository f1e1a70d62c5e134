"""Entity tags against seqeval and by hand; the places of words among pieces against encoding each word alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOBES, Entities
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.tagging import (
    bio_spans,
    check_language,
    check_words,
    entity_type,
    first_pieces,
    from_bioes,
    from_iob1,
    is_tag,
    repaired,
    tag_scheme,
    to_bioes,
    unknown_share,
)
from rag_lightning.text.tokenizers import train_word_tokenizer

TYPES = ("LOC", "creative-work")
bio_tags = st.lists(st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in TYPES)]), max_size=9)
all_tags = st.lists(st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in TYPES)]), max_size=9)


def seqeval_spans(tags):
    return [(start, end + 1, kind) for kind, start, end in get_entities(list(tags))]


@given(bio_tags)
def test_mentions_are_those_of_seqeval(tags):
    """Broken tags included: seqeval's default mode is conlleval's."""
    assert bio_spans(tags) == seqeval_spans(tags)


@given(bio_tags)
def test_repairing_keeps_the_mentions_and_leaves_nothing_to_repair(tags):
    mended, num_repairs = repaired(tags)
    assert bio_spans(mended) == bio_spans(tags)
    assert repaired(mended) == (mended, 0)
    assert num_repairs == sum(old != new for old, new in zip(tags, mended, strict=True))
    assert all(new == old or (old[0], new[0]) == ("I", "B") for old, new in zip(tags, mended, strict=True))


@given(bio_tags)
def test_bioes_and_back_is_the_identity(tags):
    clean, _ = repaired(tags)
    ends = to_bioes(clean)
    assert from_bioes(ends) == clean
    strict = [(e.start, e.end, e.tag) for e in Entities([list(ends)], IOBES).entities[0]]
    assert strict == bio_spans(clean)  # a strict reader of BIOES finds the same mentions


@given(bio_tags)
def test_iob1_and_back_is_the_identity(tags):
    clean, _ = repaired(tags)
    old = []
    for position, tag in enumerate(clean):
        touches = tag[0] == "B" and position > 0 and clean[position - 1][2:] == tag[2:]
        old.append(tag if tag == "O" or touches else f"I-{tag[2:]}")
    assert from_iob1(old) == clean
    assert [(e.start, e.end, e.tag) for e in Entities([old], IOB1).entities[0]] == bio_spans(clean)
    if any(tag != "O" for tag in old):
        assert tag_scheme([old]) == "IOB1"


@given(all_tags)
def test_any_tags_become_clean_bio_that_keeps_types(tags):
    converted = from_bioes(tags)
    assert repaired(converted)[1] == 0
    assert [entity_type(tag) for tag in converted] == [entity_type(tag) for tag in tags]


@given(bio_tags)
def test_clean_bio_is_known_as_bio(tags):
    clean, _ = repaired(tags)
    assert tag_scheme([clean, ("B-LOC", "O")]) == "BIO"


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ([], "BIO"),
        (["O O"], "BIO"),
        (["I-LOC O"], "IOB1"),
        (["I-LOC B-LOC I-LOC", "O I-PER"], "IOB1"),
        (["I-LOC B-PER"], "BIO"),  # a B- that touches another type is none of IOB1's
        (["I-LOC", "B-LOC"], "BIO"),
        (["B-LOC I-LOC", "O S-PER"], "BIOES"),
        (["I-LOC E-LOC"], "BIOES"),
    ],
)
def test_schemes_are_told_apart(sentences, scheme):
    assert tag_scheme([sentence.split() for sentence in sentences]) == scheme


def test_tags_are_known_by_their_form():
    assert all(is_tag(tag) for tag in ("O", "B-LOC", "I-creative-work", "E-x", "S-x"))
    assert not any(is_tag(tag) for tag in ("", "B", "B-", "B- ", "LOC", "o", "X-LOC", "b-LOC"))


def bert_like():
    """A word-piece tokenizer that drops control characters and splits signs off words, as BERT's does."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", "new", "york", "play", "##ing", "##ed", "u", "s", ".", "a", "b", "1", "the"]
    pieces += [",", "叶", "老"]
    backend = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


BERT = bert_like()


def aligned_words(tokenizer, words, max_tokens=64):
    """The pieces of a sentence and the place of each word's first."""
    encoding = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=max_tokens)
    return encoding["input_ids"], first_pieces(encoding.word_ids(), len(words))


vocabulary_words = st.lists(
    st.sampled_from(["New", "York", "playing", "played,", "U.S.", "\u200b", "\x01", " ", "zzz", "叶老", "a\x01b"]),
    min_size=1,
    max_size=8,
)


@given(vocabulary_words, st.integers(3, 20))
def test_first_pieces_are_where_encoding_each_word_alone_puts_them(words, max_tokens):
    ids, firsts = [1], []
    for word in words:
        pieces = BERT(word, add_special_tokens=False)["input_ids"]
        firsts.append(len(ids) if pieces else -1)
        ids += pieces
    found_ids, found_firsts = aligned_words(BERT, words, max_tokens)
    kept = max_tokens - 1
    assert found_ids == [*ids[:kept], 2]
    assert found_firsts == [first if first < kept else -1 for first in firsts]


def test_words_without_a_piece_shift_nothing():
    ids, firsts = aligned_words(BERT, ("New", "\u200b", "\x01", "playing", "York"))
    assert BERT.convert_ids_to_tokens(ids) == ["[CLS]", "new", "play", "##ing", "york", "[SEP]"]
    assert firsts == [1, -1, -1, 2, 4]


def test_the_word_tokenizer_of_this_package_aligns_too():
    tokenizer = train_word_tokenizer(["New York is playing the U.S. 1 a ."] * 2, vocab_size=200)
    words = ["New", "York", "\u200b", " ", "U.S."]
    ids, firsts = aligned_words(tokenizer, words)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert [pieces[first] for first in firsts if first >= 0][0:2] == ["▁new", "▁york"]
    assert pieces[firsts[4]] == "▁u"


def byte_level(add_prefix_space):
    vocabulary = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_words_without_their_space_are_refused():
    """A byte-level tokenizer without add_prefix_space would run all words together, and train wrong silently."""
    with pytest.raises(ConfigError, match=r"leaves out their space\. Load it with add_prefix_space=True"):
        check_words(byte_level(False))
    check_words(byte_level(True))
    assert aligned_words(byte_level(True), ["ab", "c"])[1] == [0, 3]


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="expected a fast tokenizer, which knows where words are, came Canine"):
        check_words(CanineTokenizer())


def test_the_share_of_unknown_tokens_is_counted_without_special_ones():
    assert unknown_share(["new york", "zzz playing"], BERT) == pytest.approx(1 / 5)
    assert unknown_share(["[CLS] new"], BERT) == 0.0
    assert unknown_share(["叶桂"], BERT) == 0.5
    assert unknown_share(["叶桂"], byte_level(True)) == 0.0
    with pytest.raises(DataError, match="expected texts with at least one token of .*, came 2 texts without"):
        unknown_share(["", "\x01"], BERT)


def test_a_language_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(DataError, match=r"at most 20% unknown tokens; came 75% with .*Choose a tokenizer and model of"):
        check_language(["叶桂认为"], BERT)
    assert check_language(["叶桂认为"], BERT, allow=True) == 0.75
    assert check_language(["叶桂认为"], BERT, limit=0.75) == 0.75
    assert check_language(["new york"], BERT) == 0.0


@settings(max_examples=25)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6))
def test_any_words_align_in_order(words):
    ids, found = aligned_words(BERT, words)
    firsts = [first for first in found if first >= 0]
    assert len(found) == len(words)
    assert firsts == sorted(set(firsts))
    assert all(1 <= first < len(ids) - 1 for first in firsts)
