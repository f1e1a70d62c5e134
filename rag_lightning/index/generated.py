"""Made-up vectors of any number, for measuring indexes: a mixture like a corpus's, made block by block from a seed.

Vectors of a trained encoder lie near a space of few dimensions and in clusters, and an index's recall and speed depend
on both, so plain Gaussian noise would tell nothing. Here a row is

    x = normalise((c_k + s z) A + e),    z ~ N(0, Λ),  e ~ N(0, 0.02² I)

with one of ``num_clusters`` centres ``c_k ~ N(0, Λ)`` drawn evenly, ``A`` a fixed orthonormal map of 64 latent
dimensions into D, ``Λ`` falling as 1/j over the latent dimensions, and a spread ``s`` of 0.6 within a cluster. Queries
are further draws of the same mixture.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.utils.hashing import hash_texts
from rag_lightning.utils.seeding import derived_seed

PREFIX = "generated:"
BLOCK_ROWS = 10_000
_LATENT, _SPREAD, _NOISE = 64, 0.6, 0.02


class GeneratedVectors:
    """A mixture of clusters on the unit sphere; any block of it is made alone, so nothing is kept.

    Args:
        num_vectors: N.
        dimension: D.
        num_clusters: How many centres.
        seed: Decides every number.

    Raises:
        ConfigError: A number below 1.

    >>> vectors = GeneratedVectors(num_vectors=5, dimension=8)
    >>> [tuple(block.shape) for block in vectors.blocks()], vectors.queries(2).norm(dim=1).allclose(torch.ones(2))
    ([(5, 8)], True)
    """

    def __init__(self, *, num_vectors: int, dimension: int, num_clusters: int = 1000, seed: int = 0) -> None:
        if min(num_vectors, dimension, num_clusters) < 1:
            raise ConfigError(
                f"generated vectors: expected at least 1 vector, dimension and cluster, came {num_vectors}, "
                f"{dimension} and {num_clusters}."
            )
        self.num_vectors, self.dimension = num_vectors, dimension
        self._num_clusters, self._seed = num_clusters, seed
        rng = self._rng("mixture")
        latent = min(_LATENT, dimension)
        self._scale_H = np.arange(1, latent + 1, dtype=np.float32) ** -0.5
        self._map_HD = np.linalg.qr(rng.standard_normal((dimension, latent)))[0].T.astype(np.float32)
        self._centres_CH = rng.standard_normal((num_clusters, latent), dtype=np.float32) * self._scale_H

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> "GeneratedVectors":
        """Reads ``generated:1000000x384``.

        Raises:
            ConfigError: Not of that form.

        >>> GeneratedVectors.parse("generated:20x4").num_vectors
        20
        """
        numbers = text.removeprefix(PREFIX).split("x")
        if not text.startswith(PREFIX) or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise ConfigError(f"vectors: expected {PREFIX}NUMBERxDIMENSION such as {PREFIX}1000000x384, came {text!r}.")
        return cls(num_vectors=int(numbers[0]), dimension=int(numbers[1]), seed=seed)

    @property
    def hash(self) -> str:
        """Names the content, in the place of a corpus's and an encoder's hash."""
        return hash_texts([PREFIX, *map(str, (self.num_vectors, self.dimension, self._num_clusters, self._seed))])

    def blocks(self, rows: range | None = None) -> Iterator[Float[Tensor, "M D"]]:
        """Yields the rows in order, at most :data:`BLOCK_ROWS` at a time.

        Args:
            rows: Which; all by default. A row is the same whatever part it is asked for in.
        """
        rows = range(self.num_vectors) if rows is None else rows
        for number in range(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS)):
            first = number * BLOCK_ROWS
            block_MD = self._draw(BLOCK_ROWS, self._rng("block", number))
            yield torch.from_numpy(block_MD[max(rows.start - first, 0) : rows.stop - first])

    def queries(self, num_queries: int) -> Float[Tensor, "P D"]:
        """Returns further draws from the same mixture."""
        return torch.from_numpy(self._draw(num_queries, self._rng("queries")))

    def _draw(self, num_rows: int, rng: np.random.Generator) -> Float[np.ndarray, "M D"]:
        latent = len(self._scale_H)
        rows_MH = self._centres_CH[rng.integers(0, self._num_clusters, num_rows)]
        rows_MH = rows_MH + _SPREAD * self._scale_H * rng.standard_normal((num_rows, latent), dtype=np.float32)
        rows_MD = rows_MH @ self._map_HD
        rows_MD += _NOISE * rng.standard_normal(rows_MD.shape, dtype=np.float32)
        unit_MD: np.ndarray = rows_MD / np.linalg.norm(rows_MD, axis=1, keepdims=True)
        return unit_MD

    def _rng(self, *place: int | str) -> np.random.Generator:
        return np.random.default_rng(derived_seed(self._seed, "generated vectors", *place))
