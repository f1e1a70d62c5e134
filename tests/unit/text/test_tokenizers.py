import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.text.tokenizers import load_tokenizer, special_affixes, tokenizer_hash, train_word_tokenizer

NAMES = [
    "Miles O'Brien",
    "Spider-Man 2",
    "J.J. Abrams",
    "Amélie (2001)",
    "What's Up, Doc?",
    "## $9.99 / x_y",
    "M*A*S*H",
]
FILMS = Path(__file__).parents[3] / "rag_lightning" / "corpora" / "films" / "passages.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer(NAMES * 2, vocab_size=300)


def plain(vocabulary):
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="u")


@pytest.mark.parametrize("text", [*NAMES, "", "o'brien, j.j. and spider-man"])
def test_decoding_restores_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.lower().split())


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=[*sorted(set("".join(NAMES))), "\n"], max_size=40))
def test_decoding_restores_any_text_over_the_alphabet(text):
    tokenizer = cached_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == " ".join(text.lower().split())


def cached_tokenizer(box=[]):  # noqa: B006 (a module-wide cache: Hypothesis cannot take a function fixture)
    if not box:
        box.append(train_word_tokenizer(NAMES, vocab_size=120))
    return box[0]


def test_case_is_kept_when_asked():
    tokenizer = train_word_tokenizer(NAMES, vocab_size=300, lowercase=False)
    assert tokenizer.decode(tokenizer("Spider-Man 2")["input_ids"], skip_special_tokens=True) == "Spider-Man 2"


def test_special_tokens_come_first_and_wrap(tokenizer):
    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    ids = tokenizer("abrams <mask> 中")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁abrams", "<mask>", "<unk>", "</s>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (3, 4)


def test_frequent_words_are_whole(tokenizer):
    assert tokenizer.tokenize("spider-man 2") == ["▁spider", "-", "man", "▁2"]


def test_rare_words_fall_to_pieces_within_the_vocabulary_size():
    texts = ["common common common", "zebra"]
    tokenizer = train_word_tokenizer(texts, vocab_size=5 + 2 * len(set("▁comnzebra")) + 1)
    assert tokenizer.tokenize("common") == ["▁common"]
    assert len(tokenizer.tokenize("zebra")) > 1
    assert len(tokenizer) == 26


def test_equal_texts_give_equal_tokenizers(tokenizer):
    assert tokenizer_hash(train_word_tokenizer(iter(NAMES * 2), vocab_size=300)) == tokenizer_hash(tokenizer)


def test_most_words_of_the_bundled_films_are_one_token():
    if not FILMS.exists():
        pytest.skip("the bundled films are not there")
    with gzip.open(FILMS, "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream][:1000]
    tokenizer = train_word_tokenizer(texts, vocab_size=5000)
    num_words = sum(
        len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("▁" + "▁".join(t.split()))) for t in texts
    )
    num_tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert num_tokens / num_words < 1.1
    assert [tokenizer.decode(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] == [
        " ".join(text.lower().split()) for text in texts
    ]


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size of at least 13 .* came 12"):
        train_word_tokenizer(["abc"], vocab_size=12)
    assert len(train_word_tokenizer(["abc"], vocab_size=13)) == 13


def test_no_words_are_refused():
    with pytest.raises(DataError, match="at least one word"):
        train_word_tokenizer(["", "  "], vocab_size=50)


def test_save_and_load_is_the_identity(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert [loaded(name)["input_ids"] for name in NAMES] == [tokenizer(name)["input_ids"] for name in NAMES]
    assert loaded.decode(loaded("O'Brien")["input_ids"], skip_special_tokens=True) == "o'brien"


def test_hash_does_not_change_with_use(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == before


def test_hash_tells_vocabularies_and_special_tokens_apart():
    one, other = plain({"u": 0, "a": 1, "b": 2}), plain({"u": 0, "a": 2, "b": 1})
    padded = plain({"u": 0, "a": 1, "b": 2})
    padded.pad_token = "a"
    assert len({tokenizer_hash(each) for each in (one, other, padded)}) == 3


def test_special_affixes(tokenizer):
    assert special_affixes(tokenizer) == ([1], [2])
    assert special_affixes(plain({"u": 0, "a": 1})) == ([], [])


def test_special_affixes_refuses_a_tokenizer_without_ids():
    silent = plain({"u": 0, "a": 1})
    silent.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(ConfigError, match="expected the ids of a text to stand unchanged"):
        special_affixes(silent)


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"expected a directory saved with save_pretrained, found none at .*gone"
    ):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(DataError, match=r"expected a directory with tokenizer files.*Save one there"):
        load_tokenizer(tmp_path)


def test_chinese_characters_are_words_of_their_own():
    texts = ["安娜在2004年导演了《雪》。", "anna met Ben 在 NBA"] * 2
    tokenizer = train_word_tokenizer(texts, vocab_size=200, lowercase=False, split_ideographs=True)
    assert tokenizer.tokenize("安娜 anna年") == ["▁", "安", "娜", "▁anna", "年"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    unseen = tokenizer("安娜龘在", add_special_tokens=False)["input_ids"]
    assert unseen.count(tokenizer.unk_token_id) == 1
    assert "##安" not in tokenizer.get_vocab()
    whole = train_word_tokenizer(texts, vocab_size=200, lowercase=False)
    assert whole("安娜龘在", add_special_tokens=False)["input_ids"] == [whole.unk_token_id]
