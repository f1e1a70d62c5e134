"""What a FAISS factory string takes: each part of it contributes what FAISS writes for it.

The grammar is FAISS's (its wiki, "The index factory"): transforms, then a coarse quantizer or a graph, then codes, then
a refinement, with commas between. The arithmetic is checked against the files of real indexes in the tests.
"""

import re
from dataclasses import dataclass, replace

from rag_lightning.errors import ConfigError

_TRANSFORM = re.compile(r"(OPQ|PCA|PCAR|PCAW|PCAWR|RR|ITQ)(\d+)(?:_(\d+))?")
_LISTS = re.compile(r"IVF(\d+)(?:_HNSW(\d+)|\(HNSW(\d+)(?:,Flat)?\))?")
_GRAPH = re.compile(r"HNSW(\d+)(?:_(\w+))?")
_PRODUCT = re.compile(r"PQ(\d+)(?:\+\d+)?(?:x(\d+))?(np|fs|fsr)?")
_SCALAR_BITS = {"SQ8": 8, "SQ6": 6, "SQ4": 4, "SQfp16": 16, "SQbf16": 16}
_REFINEMENTS = ("RFlat", "Refine(Flat)")


@dataclass(frozen=True, kw_only=True)
class IndexSize:
    """What a FAISS factory takes, apart from the number of vectors.

    Attributes:
        bytes_per_vector: Code, id and graph links of one vector.
        fixed_bytes: Matrices, codebooks and centroids.
        num_lists: Inverted lists; 0 without any.
        graph_links: M of an HNSW graph over all vectors; 0 without one.
        trains: Whether the factory needs training vectors.
    """

    bytes_per_vector: float = 0.0
    fixed_bytes: float = 0.0
    num_lists: int = 0
    graph_links: int = 0
    trains: bool = False

    @property
    def graph_bytes(self) -> float:
        """Of ``bytes_per_vector``, those of the graph."""
        return _graph_bytes(self.graph_links) if self.graph_links > 0 else 0.0

    def bytes_for(self, num_vectors: int) -> int:
        """Returns the size of the index file."""
        return round(self.bytes_per_vector * num_vectors + self.fixed_bytes)


def index_size(factory: str, dimension: int) -> IndexSize:
    """Returns what an index of a FAISS factory takes, from its parts.

    Raises:
        ConfigError: A part that is not known here, or no part that holds vectors.

    >>> index_size("IVF1024,PQ48", 384).bytes_per_vector
    56.0
    """
    size, inner, has_codes = IndexSize(), dimension, False
    for part in _parts(factory):
        if match := _TRANSFORM.fullmatch(part):
            size, inner = _with_transform(size, match, inner)
        elif match := _LISTS.fullmatch(part):
            size = _with_lists(size, match, inner)
        elif match := _GRAPH.fullmatch(part):
            size = replace(_grown(size, _graph_bytes(int(match[1]))), graph_links=int(match[1]))
            if match[2]:
                size, has_codes = _with_codes(size, match[2], inner, factory), True
        elif part in _REFINEMENTS:
            size = _grown(size, 4 * dimension)
        elif part != "L2norm":
            size, has_codes = _with_codes(size, part, inner, factory), True
    if not has_codes:
        if size.graph_links == 0:
            raise _unknown(factory, factory)
        size = _with_codes(size, "Flat", inner, factory)
    return size


def _with_transform(size: IndexSize, match: re.Match[str], inner: int) -> tuple[IndexSize, int]:
    """Adds a matrix; also returns the dimension behind it."""
    kind, number, target = match[1], int(match[2]), match[3]
    wanted = int(target) if target else (inner if kind == "OPQ" else number)
    matrix = 4 * inner * wanted
    if kind.startswith("PCA"):  # keeps the whole basis, its values and the mean too
        matrix += 4 * inner * (inner + 3)
    return replace(size, fixed_bytes=size.fixed_bytes + matrix, trains=size.trains or kind != "RR"), wanted


def _with_lists(size: IndexSize, match: re.Match[str], inner: int) -> IndexSize:
    """Adds the centroids, in a graph where asked for, and an id for each vector."""
    num_lists, links = int(match[1]), int(match[2] or match[3] or 0)
    centroid = 4 * inner + 8 + (_graph_bytes(links) if links > 0 else 0)
    fixed = size.fixed_bytes + num_lists * centroid
    return replace(_grown(size, 8), fixed_bytes=fixed, num_lists=num_lists, trains=True)


def _with_codes(size: IndexSize, part: str, inner: int, factory: str) -> IndexSize:
    code, codebook, in_blocks = 4 * inner, 0, False
    if part in _SCALAR_BITS:
        code, codebook = -(-_SCALAR_BITS[part] * inner // 8), 8 * inner
    elif match := _PRODUCT.fullmatch(part):
        in_blocks = match[3] in ("fs", "fsr")
        bits = int(match[2] or (4 if in_blocks else 8))
        code, codebook = -(-int(match[1]) * bits // 8), 4 * inner * 2**bits
    elif part != "Flat":
        raise _unknown(factory, part)
    filling = 16 * code * size.num_lists if in_blocks else 0  # lists are filled up to blocks of 32 codes
    fixed = size.fixed_bytes + codebook + filling
    return replace(_grown(size, code), fixed_bytes=fixed, trains=size.trains or codebook > 0)


def _grown(size: IndexSize, bytes_per_vector: float) -> IndexSize:
    return replace(size, bytes_per_vector=size.bytes_per_vector + bytes_per_vector)


def _graph_bytes(links: int) -> float:
    """Links of a node: 2 M below, M on each level above, which it reaches with probability 1/M; level and offset."""
    return 8 * links + 4 * links / max(links - 1, 1) + 12


def _parts(factory: str) -> list[str]:
    """Splits at the commas outside parentheses."""
    return re.split(r",(?![^(]*\))", factory.replace(" ", ""))


def _unknown(factory: str, part: str) -> ConfigError:
    return ConfigError(
        f"index factory {factory!r}: expected parts whose size is known (OPQ, PCA, RR, ITQ, IVF, HNSW, Flat, SQ, PQ, "
        f"RFlat), came {part!r}. Its size cannot be planned: measure a smaller index, build with limits.check=false."
    )
