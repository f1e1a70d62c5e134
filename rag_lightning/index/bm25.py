"""BM25 through bm25s (Lù 2024, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring").

The only module that imports bm25s. For a question x and a passage z,

    BM25(x, z) = Σ_{t in x}  ln(1 + (N − n_t + 0.5) / (n_t + 0.5)) · f_tz / (f_tz + k1 · (1 − b + b · |z| / mean |z|))

where ``n_t`` of the N passages hold the term t, ``f_tz`` times in z, and a term that a question repeats counts as
often. It is the formula of Robertson and Zaragoza 2009 ("The Probabilistic Relevance Framework: BM25 and Beyond") with
Lucene's inverse document frequency, which is never negative, and without a factor ``k1 + 1`` that changes no order
(Kamphuis et al. 2020, "Lucene (accurate)"). bm25s computes the summands once, when the index is built, so a search only
adds them up, and nothing can be added to a finished index.

Terms, of passages (title and text) and of questions alike: Unicode NFKC, lower case, then every maximal run of letters
and digits is one term; a CJK character is a term by itself, as Lucene's standard tokenizer has it, since no space parts
words there. No stemming. ``stop_words="english"`` drops the 33 words that Lucene's English analyzer drops. Scripts that
write vowels as combining marks (Devanagari, Thai) are cut at them, in questions and passages alike.
"""

import logging
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingExtraError, MissingFileError
from rag_lightning.index.base import MISSING_ID
from rag_lightning.types import Passage
from rag_lightning.utils.hashing import hash_file, hash_texts
from rag_lightning.utils.io import atomic_directory, read_json, write_json

logger = logging.getLogger(__name__)

StopWords = Literal["none", "english"]
FORMAT_VERSION = 1
META_FILE = "bm25.json"
_LUCENE_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
ENGLISH_STOP_WORDS = frozenset(_LUCENE_STOP_WORDS.split())
_CJK = "\u2e80-\u9fff\uf900-\ufaff"
_TERM = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


@dataclass(frozen=True, kw_only=True)
class Bm25Settings:
    """What decides the scores besides the passages.

    Attributes:
        k1: Saturation of the term frequency. 0.9 with ``b`` 0.4 is the standard of open-domain question answering:
            Anserini's, and so of the published BM25 rows beside DPR and in BEIR. Lucene's and bm25s' own, 1.2 to 1.5
            with ``b`` 0.75, suit long documents of uneven length.
        b: How far a long passage is discounted, 0 (not) to 1.
        stop_words: ``none`` or ``english``.

    Raises:
        ConfigError: A number out of its range, or stop words that do not exist.
    """

    k1: float = 0.9
    b: float = 0.4
    stop_words: StopWords = "english"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.k1) and self.k1 >= 0):
            raise ConfigError(f"bm25 k1: expected a number of at least 0, came {self.k1}. 0.9 is usual.")
        if not 0 <= self.b <= 1:
            raise ConfigError(f"bm25 b: expected a number from 0 to 1, came {self.b}. 0.4 is usual.")
        if self.stop_words not in get_args(StopWords):
            raise ConfigError(
                f"bm25 stop_words: expected one of {', '.join(get_args(StopWords))}, came {self.stop_words!r}."
            )


def terms_of(text: str, stop_words: StopWords = "english") -> list[str]:
    """Returns a text's terms, in order; see the module's description.

    >>> terms_of("The C-3PO of the Café, 42!")
    ['c', '3po', 'café', '42']
    """
    terms = _TERM.findall(unicodedata.normalize("NFKC", text).lower())
    return [term for term in terms if term not in ENGLISH_STOP_WORDS] if stop_words == "english" else terms


def indexed_text(passage: Passage) -> str:
    """Returns what of a passage is searched: its title and its text."""
    return f"{passage.title} {passage.text}"


class Bm25Index:
    """N passages that can be searched by words; made by :meth:`build`, :meth:`load` or :func:`open_or_build`.

    Row numbers are passage numbers. A built index holds 8 bytes for each pair of a passage and one of its terms
    (memory-mapped after :meth:`load`) and the vocabulary; while it is built, 4 bytes more for each word.

    Attributes:
        settings: What it was built with.
        corpus_hash: Of the passages it was built from.
        num_passages: N.
    """

    def __init__(self, bm25: Any, *, settings: Bm25Settings, corpus_hash: str, num_passages: int) -> None:
        self._bm25 = bm25
        self.settings = settings
        self.corpus_hash = corpus_hash
        self.num_passages = num_passages

    @classmethod
    def build(
        cls, corpus: PassageCorpus, settings: Bm25Settings | None = None, *, progress: bool = False
    ) -> "Bm25Index":
        """Builds the index in memory.

        Raises:
            DataError: Not one term in the whole corpus.
            MissingExtraError: bm25s is not installed.
        """
        settings = settings if settings is not None else Bm25Settings()
        bm25s = _import_bm25s()
        vocabulary: dict[str, int] = {}
        rows = []
        for passage in track(corpus, description="reading terms", disable=not progress, transient=True):
            terms = terms_of(indexed_text(passage), settings.stop_words)
            rows.append(array("i", (vocabulary.setdefault(term, len(vocabulary)) for term in terms)))
        if not vocabulary:
            raise DataError(f"bm25: expected words in the {len(corpus)} passages of {corpus.source}, came none at all.")
        bm25 = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene", backend="numpy")
        bm25.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        return cls(bm25, settings=settings, corpus_hash=corpus.hash, num_passages=len(corpus))

    @property
    def id(self) -> str:
        """``bm25-<hash>`` of what decides every score: passages and settings."""
        return f"bm25-{_key(self.corpus_hash, self.settings)[:8]}"

    @torch.no_grad()
    def search(self, questions: Sequence[str], num_passages: int) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds the K best rows for each question.

        Returns:
            ``scores_BK`` (float32, larger is better, best first, equal scores by ascending row) and ``ids_BK``
            (int64); ``-inf`` and ``-1`` where fewer than K passages share a term with the question.

        Raises:
            ConfigError: More passages than rows, or fewer than one.
        """
        if not 1 <= num_passages <= self.num_passages:
            raise ConfigError(
                f"num_passages: expected 1 to {self.num_passages}, the passages in the index; came {num_passages}. "
                "Ask for fewer passages, or index a larger corpus."
            )
        scores_BK = np.full((len(questions), num_passages), -np.inf, dtype=np.float32)
        ids_BK = np.full((len(questions), num_passages), MISSING_ID, dtype=np.int64)
        for row, question in enumerate(questions):
            term_ids = self._term_ids(question)
            if term_ids:
                scores_N = self._bm25.get_scores_from_ids(term_ids)
                ids = _best_rows(scores_N, num_passages)
                scores_BK[row, : len(ids)] = scores_N[ids]
                ids_BK[row, : len(ids)] = ids
        return torch.from_numpy(scores_BK), torch.from_numpy(ids_BK)

    def scores_of(self, questions: Sequence[str], ids_BM: Int[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """Returns the scores of given rows, those that :meth:`search` gives: 0 where no term is shared.

        Each term's passages are looked up by bisection, so the cost grows with ``M log N``, not with N.

        Args:
            questions: The B texts.
            ids_BM: Rows for each question; ``-1`` gives ``-inf``.

        Raises:
            DataError: Another number of questions than of rows of ids, or an id that is no row of this index.
        """
        ids = ids_BM.detach().cpu().numpy()
        if len(questions) != len(ids):
            raise DataError(f"bm25: expected ids for each of {len(questions)} questions, came ids for {len(ids)}.")
        if ids.size > 0 and (ids.min() < MISSING_ID or ids.max() >= self.num_passages):
            raise DataError(
                f"bm25: expected passage numbers within -1..{self.num_passages - 1}, came {ids.min()}..{ids.max()}. "
                "The hits are of another corpus."
            )
        scores_BM = np.zeros(ids.shape, dtype=np.float32)
        for row, question in enumerate(questions):
            for term_id in self._term_ids(question):  # in this order, so that rounding is the same as in a search
                scores_BM[row] += self._summand(term_id, ids[row])
        scores_BM[ids == MISSING_ID] = -np.inf
        return torch.from_numpy(scores_BM).to(ids_BM.device)

    def add(self, passages: Sequence[Passage]) -> None:
        """Refuses: every score depends on the whole corpus.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"bm25: {len(passages)} passages cannot be added to a finished index: the scores of all terms are computed "
            "in advance from the number and the mean length of all passages. Build it again from the whole corpus."
        )

    def save(self, directory: Path) -> None:
        """Writes the index into an existing folder: bm25s' own files (npy, JSON) and ``bm25.json``."""
        self._bm25.save(directory, show_progress=False)
        checksums = {path.name: hash_file(path) for path in sorted(directory.iterdir()) if path.name != META_FILE}
        meta = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "tokenisation": "NFKC, lower case, runs of letters and digits, CJK characters alone, no stemming",
            "corpus_hash": self.corpus_hash,
            "num_passages": self.num_passages,
            "checksums": checksums,
        }
        write_json(directory / META_FILE, meta)

    @classmethod
    def load(cls, directory: Path, *, mmap: bool = True, verify: bool = True) -> "Bm25Index":
        """Opens what :meth:`save` wrote.

        Args:
            directory: The folder.
            mmap: Leave the scores on disk until they are read.
            verify: Read every file and compare its checksum; False trusts them, as right after building.

        Raises:
            MissingFileError: No index there.
            CorruptSnapshotError: A file is missing, torn or altered, or of another format.
            MissingExtraError: bm25s is not installed.
        """
        settings, meta = _read_meta(directory)
        for name, digest in meta["checksums"].items():
            if not (directory / name).is_file() or (verify and hash_file(directory / name) != digest):
                raise CorruptSnapshotError(
                    f"{directory / name}: the BM25 index is torn: expected the file whose checksum is {digest[:12]}…. "
                    "Remove the folder and build it again."
                )
        try:
            bm25 = _import_bm25s().BM25.load(directory, mmap=mmap, show_progress=False)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise CorruptSnapshotError(
                f"{directory}: bm25s cannot read its files: {error!r}. Remove the folder and build it again."
            ) from error
        return cls(bm25, settings=settings, corpus_hash=meta["corpus_hash"], num_passages=meta["num_passages"])

    def _term_ids(self, question: str) -> list[int]:
        vocabulary = self._bm25.vocab_dict
        terms = terms_of(question, self.settings.stop_words)
        return [vocabulary[term] for term in terms if term in vocabulary]

    def _summand(self, term_id: int, ids_M: NDArray[np.int64]) -> Float[np.ndarray, "M"]:
        """Returns what one term adds to the score of each row; bm25s keeps a term's rows in ascending order."""
        scores = self._bm25.scores
        start, stop = int(scores["indptr"][term_id]), int(scores["indptr"][term_id + 1])
        rows = scores["indices"][start:stop]
        places = np.minimum(np.searchsorted(rows, ids_M), len(rows) - 1)
        return np.where(rows[places] == ids_M, scores["data"][start:stop][places], np.float32(0.0))


def open_or_build(
    corpus: PassageCorpus, *, cache_dir: Path, settings: Bm25Settings | None = None, progress: bool = False
) -> Bm25Index:
    """Opens the index of these passages and settings in ``cache_dir``, or builds it there; a torn one is rebuilt.

    It is published by rename, so a reader never sees half of one. Where several processes run, let one build first: two
    that build at once both succeed, but work twice.

    Args:
        corpus: The passages.
        cache_dir: The folder that holds the indexes.
        settings: Field standards by default.
        progress: Show a progress bar.

    Raises:
        DataError: Not one term in the whole corpus.
        MissingExtraError: bm25s is not installed.
    """
    settings = settings if settings is not None else Bm25Settings()
    directory = index_folder(corpus, cache_dir, settings)
    if directory.exists():
        try:
            return Bm25Index.load(directory)
        except (CorruptSnapshotError, MissingFileError) as error:
            logger.warning("the BM25 index in %s is not usable and is built again: %s", directory, error)
    with atomic_directory(directory, replace=directory.exists()) as part:
        Bm25Index.build(corpus, settings, progress=progress).save(part)
    return Bm25Index.load(directory, verify=False)


def index_folder(corpus: PassageCorpus, cache_dir: Path, settings: Bm25Settings) -> Path:
    """Returns where :func:`open_or_build` keeps the index of these passages and settings."""
    return cache_dir / f"bm25-{_key(corpus.hash, settings)[:20]}"


def _key(corpus_hash: str, settings: Bm25Settings) -> str:
    return hash_texts([f"bm25 v{FORMAT_VERSION}", corpus_hash, *(f"{k}={v}" for k, v in asdict(settings).items())])


def _best_rows(scores_N: Float[np.ndarray, "N"], num_passages: int) -> NDArray[np.int64]:
    """Returns the rows of at most K positive scores, best first, equal scores by ascending row."""
    rows = np.flatnonzero(scores_N > 0)  # every term's weight is positive: 0 is a passage without any
    scores = scores_N[rows]
    if len(rows) > num_passages:
        kth = np.partition(scores, len(rows) - num_passages)[len(rows) - num_passages]
        rows, scores = rows[scores >= kth], scores[scores >= kth]
    return rows[np.argsort(-scores, kind="stable")[:num_passages]]


def _read_meta(directory: Path) -> tuple[Bm25Settings, dict[str, Any]]:
    if not (directory / META_FILE).is_file():
        raise MissingFileError(f"BM25 index: no file {META_FILE} in {directory}. Check the path, or build the index.")
    try:
        meta = read_json(directory / META_FILE, "BM25 index")
        version = meta["format_version"]
        if version != FORMAT_VERSION:
            raise CorruptSnapshotError(
                f"{directory}: expected BM25 index format {FORMAT_VERSION}, came {version!r}. Build it again."
            )
        settings = Bm25Settings(**meta["settings"])
        if not (isinstance(meta["corpus_hash"], str) and isinstance(meta["num_passages"], int)):
            raise TypeError("corpus_hash or num_passages")
        if any(Path(name).name != name for name in meta["checksums"]):
            raise ValueError("checksums of files elsewhere")
        return settings, meta
    except (DataError, ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptSnapshotError(
            f"{directory / META_FILE}: expected what a BM25 index was made from: {error!r}. Remove the folder and "
            "build it again."
        ) from error


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("bm25s", "bm25", "BM25 retrieval") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import asks for every debugging line
    return bm25s
