import json
import logging
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.text import token_store
from rag_lightning.text.token_store import TokenStore, open_or_build, store_key
from rag_lightning.text.tokenizers import train_word_tokenizer

TEXTS = ["one two three four", "two", "", "four three two one one", "one one"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer(TEXTS * 2, vocab_size=100)


def build(tmp_path, tokenizer, texts=TEXTS, max_tokens=10, **changes):
    return TokenStore.build(
        texts, tokenizer, directory=tmp_path / "store", key="k", max_tokens=max_tokens, progress=False, **changes
    )


def cached(tmp_path, tokenizer, texts=TEXTS, **changes):
    settings = {"corpus_hash": "c", "template_key": "t", "max_tokens": 10} | changes
    return open_or_build(texts, tokenizer, cache_dir=tmp_path, progress=False, **settings)


class MustNotBeRead:
    def __iter__(self):
        raise AssertionError("the texts were read although a store exists")


@pytest.mark.parametrize("block_size", [1, 2, 1000])
def test_rows_are_the_tokenizers_ids(tmp_path, tokenizer, monkeypatch, block_size):
    monkeypatch.setattr(token_store, "BLOCK_SIZE", block_size)
    store = build(tmp_path, tokenizer, texts=iter(TEXTS))
    assert len(store) == len(TEXTS)
    assert [store[row].tolist() for row in range(len(store))] == tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert store.num_truncated == 0


def test_files_are_memory_mapped_arrays(tmp_path, tokenizer):
    store = build(tmp_path, tokenizer)
    tokens = np.load(tmp_path / "store" / "tokens.npy", allow_pickle=False)
    expected = [number for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"] for number in ids]
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == expected
    assert isinstance(store._tokens, np.memmap)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["meta.json", "offsets.npy", "store", "tokens.npy"]


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_ids_are_as_small_as_the_vocabulary_allows(tmp_path, size, dtype):
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(large) == size
    store = build(tmp_path, large, texts=[f"w{size - 1} w1"])
    assert store[0].dtype == dtype
    assert store[0].tolist() == [size - 1, 1]


def test_long_texts_are_cut_counted_and_reported_once(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        store = build(tmp_path, tokenizer, max_tokens=2)
    whole = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert [store[row].tolist() for row in range(len(store))] == [ids[:2] for ids in whole]
    assert store.num_truncated == 2
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 5 passages were longer than max_passage_tokens=2 and were cut there (longest: 5 tokens)."
    ]
    caplog.clear()
    assert TokenStore.open(store.directory).num_truncated == 2
    assert not caplog.records


def test_gather_takes_rows_in_order_and_nothing_for_not_found(tmp_path, tokenizer):
    store = build(tmp_path, tokenizer)
    gathered = store.gather(np.array([[3, -1], [0, 3]]))
    assert [ids.tolist() for ids in gathered] == [store[3].tolist(), [], store[0].tolist(), store[3].tolist()]


@pytest.mark.parametrize("row", [5, -2])
def test_rows_outside_are_refused(tmp_path, tokenizer, row):
    store = build(tmp_path, tokenizer)
    with pytest.raises(IndexError, match=f"expected a row from 0 to 4, came {row}"):
        store.gather(np.array([0, row]))


def test_a_store_of_nothing_but_empty_texts_opens(tmp_path, tokenizer):
    store = build(tmp_path, tokenizer, texts=["", ""])
    assert [store[0].tolist(), store[1].tolist()] == [[], []]


def test_a_worker_opens_the_map_anew(tmp_path, tokenizer):
    store = build(tmp_path, tokenizer, texts=["one two"] * 2000)
    message = pickle.dumps(store)  # what a spawned data loader worker receives
    assert len(message) < 500
    assert pickle.loads(message)[1999].tolist() == store[1999].tolist()


def test_no_texts_and_bad_arguments_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="at least one text, came none"):
        build(tmp_path, tokenizer, texts=[])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="max_tokens of at least 1, came 0"):
        build(tmp_path, tokenizer, max_tokens=0)
    build(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="not to exist yet"):
        build(tmp_path, tokenizer)


def test_a_failure_while_building_leaves_nothing(tmp_path, tokenizer):
    def texts():
        yield "one"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build(tmp_path, tokenizer, texts=texts())
    assert list(tmp_path.iterdir()) == []


def test_open_or_build_builds_once(tmp_path, tokenizer):
    first = cached(tmp_path, tokenizer)
    again = cached(tmp_path, tokenizer, texts=MustNotBeRead())
    assert again.directory == first.directory
    assert again[3].tolist() == first[3].tolist()


@pytest.mark.parametrize("changes", [{"corpus_hash": "d"}, {"template_key": "u"}, {"max_tokens": 9}])
def test_the_key_follows_everything_that_matters(tokenizer, changes):
    settings = {"corpus_hash": "c", "template_key": "t", "max_tokens": 10}
    other = settings | changes
    key = store_key(settings.pop("corpus_hash"), tokenizer, **settings)
    assert store_key(other.pop("corpus_hash"), tokenizer, **other) != key


def test_the_key_follows_the_tokenizer(tokenizer):
    other = train_word_tokenizer(TEXTS[:1], vocab_size=100)
    settings = {"template_key": "t", "max_tokens": 10}
    assert store_key("c", other, **settings) != store_key("c", tokenizer, **settings)


def cut_tokens(directory):
    path = directory / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-3])


def shorten_offsets(directory):
    np.save(directory / "offsets.npy", np.arange(3))


def shift_offsets(directory):
    np.save(directory / "offsets.npy", np.arange(6))


def tear_meta(directory):
    (directory / "meta.json").write_text('{"format')


def remove_tokens(directory):
    (directory / "tokens.npy").unlink()


def age_format(directory):
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))


def empty_tokens(directory):
    (directory / "tokens.npy").write_bytes(b"")


DAMAGE = {
    cut_tokens: r"tokens\.npy is torn",
    empty_tokens: r"tokens\.npy is torn",
    shorten_offsets: r"expected 6 entries in .*offsets\.npy, came shape \(3,\)",
    shift_offsets: r"offsets\.npy to end at 12 tokens, came 5",
    tear_meta: r"meta\.json is torn",
    remove_tokens: r"expected the file tokens\.npy in .*, found none",
    age_format: r"expected format version 1 in .*, came 99",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_store_is_refused_by_open_and_rebuilt_with_the_reason(tmp_path, tokenizer, caplog, damage):
    store = cached(tmp_path, tokenizer)
    expected = [store[row].tolist() for row in range(5)]
    damage(store.directory)
    with pytest.raises(DataError, match=DAMAGE[damage]):
        TokenStore.open(store.directory)
    with caplog.at_level(logging.WARNING):
        mended = cached(tmp_path, tokenizer)
    assert [mended[row].tolist() for row in range(5)] == expected
    assert len(caplog.records) == 1
    assert "is not usable and is built again" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [mended.directory.name]


def test_a_store_under_a_wrong_name_is_rebuilt(tmp_path, tokenizer, caplog):
    store = cached(tmp_path, tokenizer)
    other = store_key("other", tokenizer, template_key="t", max_tokens=10)
    store.directory.rename(tmp_path / other)
    with caplog.at_level(logging.WARNING):
        assert cached(tmp_path, tokenizer, texts=["two"], corpus_hash="other")[0].tolist() == store[1].tolist()
    assert f"made from {store.key}, not {other}" in caplog.text


def test_open_names_a_missing_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"expected the file meta\.json in .*gone, found none"):
        TokenStore.open(tmp_path / "gone")
