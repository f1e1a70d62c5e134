import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError
from rag_lightning.text.chunking import documents_to_passages, split_words
from rag_lightning.types import Passage


@settings(deadline=None)
@given(st.text(alphabet="ab \n\t", max_size=80), st.integers(1, 7))
def test_chunks_keep_every_word_in_order(text, size):
    chunks = split_words(text, size)
    assert " ".join(chunks).split() == text.split()
    assert [len(chunk.split()) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert all(1 <= len(chunk.split()) <= size for chunk in chunks)


def test_default_is_a_hundred_words():
    assert [len(chunk.split()) for chunk in split_words("word " * 250)] == [100, 100, 50]


@pytest.mark.parametrize("size", [0, -3])
def test_size_below_one_is_refused(size):
    with pytest.raises(ConfigError, match=f"words_per_passage of at least 1, came {size}"):
        split_words("a b", size)


def test_documents_become_numbered_passages():
    documents = [Passage("x", "X", "one two three"), Passage("empty", "E", "  "), Passage("y", "Y", "four")]
    assert list(documents_to_passages(documents, 2)) == [
        Passage("x-0", "X", "one two"),
        Passage("x-1", "X", "three"),
        Passage("y-0", "Y", "four"),
    ]
