"""Token store: every passage tokenised once, memory-mapped, so a training step only gathers ids.

A store is a folder of ``tokens.npy`` (all ids in a row, uint16 where the vocabulary allows it, else int32),
``offsets.npy`` (int64, where each text starts and the last ends) and ``meta.json`` (counts, and the key it was made
from). It is published whole by rename, so a reader never sees half of one. :func:`open_or_build` names the folder by
what decides its content (corpus, tokenizer, template, limit), so one of another vocabulary is never read.

Tokenising runs in parallel over the texts of a block inside the Rust tokenizers (all cores, unless
``TOKENIZERS_PARALLELISM=false``), so no further processes are started. Where several processes train together, let one
build before the others open: two that build at once both succeed, but work twice.
"""

import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import accumulate, chain, islice
from operator import index
from pathlib import Path
from typing import IO, Any, SupportsIndex

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.text.tokenizers import tokenizer_hash
from rag_lightning.utils.hashing import hash_texts
from rag_lightning.utils.io import atomic_directory, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
BLOCK_SIZE = 1000  # texts handed to the tokenizer at once
TOKENS, OFFSETS, META = "tokens.npy", "offsets.npy", "meta.json"


class TokenStore:
    """Ids of many texts, without special tokens; make one with :meth:`build`, :meth:`open` or :func:`open_or_build`.

    Attributes:
        directory: Where the store lies.
        key: What it was made from.
        max_tokens: The limit that longer texts were cut to.
        num_truncated: How many texts were longer.
    """

    def __init__(self, directory: Path, meta: dict[str, Any], tokens: np.ndarray, offsets: np.ndarray) -> None:
        self.directory = directory
        self.key: str = meta["key"]
        self.max_tokens: int = meta["max_tokens"]
        self.num_truncated: int = meta["num_truncated"]
        self._tokens = tokens
        self._offsets = offsets

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        directory: Path,
        key: str,
        max_tokens: int,
        progress: bool = True,
        replace: bool = False,
    ) -> "TokenStore":
        """Tokenises texts into a new folder and opens it.

        Texts longer than ``max_tokens`` are cut there, counted, and reported once in a logged warning.

        Args:
            texts: Read once, in order; the position of a text is its row.
            tokenizer: Adds no special tokens here.
            directory: The folder to publish; it must not exist unless ``replace`` is set.
            key: What the content depends on, kept in ``meta.json``.
            max_tokens: The longest row.
            progress: Whether to show a progress bar.
            replace: Put the new folder in the place of an existing one.

        Raises:
            ConfigError: ``max_tokens`` is below 1, or the folder exists and ``replace`` is not set.
            DataError: There is no text.
        """
        if max_tokens < 1:
            raise ConfigError(f"token store: expected max_tokens of at least 1, came {max_tokens}. Raise it.")
        if directory.exists() and not replace:
            raise ConfigError(f"token store: expected {directory} not to exist yet. Open it, or remove it first.")
        with atomic_directory(directory, replace=replace) as part:
            meta = _write_store(part, texts, tokenizer, key=key, max_tokens=max_tokens, progress=progress)
        if meta["num_truncated"] > 0:
            logger.warning(
                "%d of %d passages were longer than max_passage_tokens=%d and were cut there (longest: %d tokens).",
                meta["num_truncated"],
                meta["num_texts"],
                max_tokens,
                meta["longest"],
            )
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> "TokenStore":
        """Opens a store; its ids stay on disk until they are read.

        Raises:
            MissingFileError: No such folder, or a file of it is missing.
            DataError: A file is torn, altered in size, or of another format; names the file.
        """
        for name in (META, OFFSETS, TOKENS):
            if not (directory / name).is_file():
                raise MissingFileError(f"token store: expected the file {name} in {directory}, found none. Rebuild it.")
        try:
            meta = json.loads((directory / META).read_text(encoding="utf-8"))
            found = meta["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"token store: {directory / META} is torn: {error!r}. Remove the folder.") from error
        if found != FORMAT_VERSION:
            raise DataError(
                f"token store: expected format version {FORMAT_VERSION} in {directory}, came {found}. "
                "Remove the folder."
            )
        offsets = _load_array(directory / OFFSETS, meta["num_texts"] + 1)
        tokens = _load_array(directory / TOKENS, meta["num_tokens"])
        if int(offsets[-1]) != meta["num_tokens"]:
            raise DataError(
                f"token store: expected {directory / OFFSETS} to end at {meta['num_tokens']} tokens, came "
                f"{int(offsets[-1])}. Remove the folder."
            )
        return cls(directory, meta, tokens, offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: SupportsIndex) -> np.ndarray:
        """Returns the ids of one text.

        Raises:
            IndexError: ``row`` is negative or past the end.
        """
        row = index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"token store: expected a row from 0 to {len(self) - 1}, came {row}.")
        return np.asarray(self._tokens[self._offsets[row] : self._offsets[row + 1]])

    def gather(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the ids of several texts, in the order of the flattened rows; empty for the row -1 (not found).

        Raises:
            IndexError: A row is below -1 or past the end.
        """
        nothing = self._tokens[:0]
        return [nothing if row == -1 else self[row] for row in np.asarray(rows).reshape(-1).tolist()]

    def __reduce__(self) -> tuple[Callable[[Path], "TokenStore"], tuple[Path]]:
        # a data loader worker opens the map anew instead of receiving a copy of every token
        return TokenStore.open, (self.directory,)


def store_key(corpus_hash: str, tokenizer: PreTrainedTokenizerBase, *, template_key: str, max_tokens: int) -> str:
    """Returns the name of a store's folder: a hash of everything that decides its content."""
    parts = (f"v{FORMAT_VERSION}", corpus_hash, tokenizer_hash(tokenizer), template_key, str(max_tokens))
    return f"tokens-{hash_texts(parts)[:20]}"


def open_or_build(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path,
    corpus_hash: str,
    template_key: str,
    max_tokens: int,
    progress: bool = True,
) -> TokenStore:
    """Opens the store that fits, or builds it; a torn one is rebuilt, with the reason logged.

    Args:
        texts: The rendered passages; read only when a store is built.
        tokenizer: The vocabulary.
        cache_dir: The folder that holds the stores.
        corpus_hash: Names the passages, such as ``PassageCorpus.hash``.
        template_key: Names how they were rendered, such as ``Prompt.passage_key``.
        max_tokens: The longest row.
        progress: Whether to show a progress bar.

    Raises:
        DataError: There is no text to build from.
    """
    key = store_key(corpus_hash, tokenizer, template_key=template_key, max_tokens=max_tokens)
    directory = cache_dir / key
    if directory.exists():
        try:
            store = TokenStore.open(directory)
            if store.key == key:
                return store
            reason = f"it was made from {store.key}, not {key}"
        except DataError as error:
            reason = str(error)
        logger.warning("token store in %s is not usable and is built again: %s", directory, reason)
    return TokenStore.build(
        texts, tokenizer, directory=directory, key=key, max_tokens=max_tokens, progress=progress, replace=True
    )


def _write_store(
    directory: Path,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str,
    max_tokens: int,
    progress: bool,
) -> dict[str, Any]:
    """Writes the three files, one block of texts in memory at a time; returns the meta record."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    offsets = array("q", [0])
    num_truncated = longest = 0
    with (directory / TOKENS).open("wb") as stream:
        _write_header(stream, dtype, 0)
        for block in _blocks(texts, progress):
            ids_of = tokenizer(block, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            lengths = [len(ids) for ids in ids_of]
            num_truncated += sum(length > max_tokens for length in lengths)
            longest = max(longest, *lengths)
            kept = [ids[:max_tokens] for ids in ids_of]
            np.fromiter(chain.from_iterable(kept), dtype=dtype).tofile(stream)
            offsets.extend(list(accumulate(map(len, kept), initial=offsets[-1]))[1:])
        stream.seek(0)
        _write_header(stream, dtype, offsets[-1])
    if len(offsets) == 1:
        raise DataError("token store: expected at least one text, came none. Check the corpus.")
    np.save(directory / OFFSETS, np.frombuffer(offsets, dtype=np.int64), allow_pickle=False)
    meta = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "num_texts": len(offsets) - 1,
        "num_tokens": offsets[-1],
        "max_tokens": max_tokens,
        "num_truncated": num_truncated,
        "longest": longest,
    }
    write_json(directory / META, meta)
    return meta


def _write_header(stream: IO[bytes], dtype: np.dtype[Any], length: int) -> None:
    """Writes an npy header; numpy leaves room for the first axis to grow, so a later one has the same size."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]


def _blocks(texts: Iterable[str], progress: bool) -> Iterator[list[str]]:
    total = len(texts) if isinstance(texts, Sized) else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    remaining = iter(texts)
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("Tokenising passages", total=total)
        while block := list(islice(remaining, BLOCK_SIZE)):
            yield block
            bar.advance(task, len(block))


def _load_array(path: Path, length: int) -> np.ndarray:
    try:
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"token store: {path} is torn: {error}. Remove the folder.") from error
    if values.shape != (length,):
        raise DataError(
            f"token store: expected {length} entries in {path}, came shape {values.shape}. Remove the folder."
        )
    return values
