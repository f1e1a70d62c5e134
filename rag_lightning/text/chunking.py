"""Chunking: documents into passages of a fixed number of words.

DPR and RAG (Karpukhin et al. 2020, §4.1; Lewis et al. 2020, §3) cut Wikipedia articles into disjoint passages of 100
words; the title goes with each. Use it for raw documents; a corpus already cut is read as it is.
"""

from collections.abc import Iterable, Iterator

from rag_lightning.errors import ConfigError
from rag_lightning.types import Passage


def split_words(text: str, words_per_passage: int = 100) -> list[str]:
    """Returns disjoint runs of words in order, words joined by one space; the last may be shorter.

    Raises:
        ConfigError: ``words_per_passage`` is below 1.

    >>> split_words("one two  three", 2)
    ['one two', 'three']
    """
    if words_per_passage < 1:
        raise ConfigError(f"chunking: expected words_per_passage of at least 1, came {words_per_passage}. Raise it.")
    words = text.split()
    return [" ".join(words[start : start + words_per_passage]) for start in range(0, len(words), words_per_passage)]


def documents_to_passages(documents: Iterable[Passage], words_per_passage: int = 100) -> Iterator[Passage]:
    """Yields the passages of each document, titled as it is, with ids ``<document id>-<number from 0>``.

    Args:
        documents: Whole texts, as passages with any number of words; one without words gives no passage.
        words_per_passage: The length of a passage.

    >>> [p.id for p in documents_to_passages([Passage(id="d", title="T", text="one two three")], 2)]
    ['d-0', 'd-1']
    """
    for document in documents:
        for number, text in enumerate(split_words(document.text, words_per_passage)):
            yield Passage(id=f"{document.id}-{number}", title=document.title, text=text)
