"""What a snapshot will cost, before anything starts: bytes by arithmetic, and whether they fit this machine.

Seconds are extrapolated from small builds by :mod:`~rag_lightning.index.calibrate`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rag_lightning.errors import ConfigError
from rag_lightning.index.factory import IndexSize, index_size
from rag_lightning.index.faiss import training_sample_size
from rag_lightning.index.vectors import DTYPES, Storage, block_rows

BASE_BYTES = 580 * 2**20
"""Memory of a process that has imported torch, Lightning, transformers and FAISS and built nothing yet."""
SEARCH_BATCH = 64
_BLOCKS_HELD: dict[Storage, int] = {"float32": 1, "float16": 5, "int8": 7}
"""Blocks of float32 in memory while rows are searched: one as mapped; else widened ones, scaled, and what malloc keeps
(measured)."""
GPU_WORKSPACE_BYTES = 1536 * 2**20
"""What FAISS reserves on each GPU for temporary results."""


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """What a snapshot costs.

    Attributes:
        factory: ``exact`` or a FAISS factory string.
        storage: How the vectors are stored.
        num_vectors: N.
        dimension: D.
        vectors_bytes: The vectors' file.
        index_bytes: The FAISS index's file; 0 for ``exact``, which is its vectors.
        ram_bytes: Resident memory of a process that searches.
        cache_bytes: File pages that a search reads through each time; memory must be free to cache them.
        build_ram_bytes: Highest resident memory while building.
        build_disk_bytes: Highest use of the disk while building.
        vram_bytes: GPU memory of each process to search there; None where FAISS has no GPU form.
        num_shards: Processes among which the vectors are divided on GPUs.
        encode_s: Seconds to encode the corpus; None where not measured.
        build_s: Seconds to write, train, fill and verify; None where not measured.
    """

    factory: str
    storage: Storage
    num_vectors: int
    dimension: int
    vectors_bytes: int
    index_bytes: int
    ram_bytes: int
    cache_bytes: int
    build_ram_bytes: int
    build_disk_bytes: int
    vram_bytes: int | None
    num_shards: int = 1
    encode_s: float | None = None
    build_s: float | None = None

    @property
    def disk_bytes(self) -> int:
        """What the published snapshot takes; a refresh needs it twice, as the old one stays until the swap."""
        return self.vectors_bytes + self.index_bytes

    @property
    def needed_ram_bytes(self) -> int:
        """Memory to build, and to search without reading the disk each time."""
        return max(self.build_ram_bytes, self.ram_bytes + self.cache_bytes)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a machine has to give.

    Attributes:
        ram_bytes: Available memory.
        disk_bytes: Free space where the snapshot will lie.
    """

    ram_bytes: int
    disk_bytes: int


def plan_index(
    num_vectors: int,
    dimension: int,
    *,
    factory: str = "exact",
    storage: Storage = "float32",
    num_training_vectors: int | None = None,
    shard_rows: int = 50_000,
    num_shards: int = 1,
    base_bytes: int = BASE_BYTES,
    encode_s: float | None = None,
    build_s: float | None = None,
) -> IndexPlan:
    """Returns what a snapshot of N x D vectors costs.

    Args:
        num_vectors: N.
        dimension: D.
        factory: ``exact`` or a FAISS factory string.
        storage: How the vectors are stored.
        num_training_vectors: Rows that train a FAISS index; None is its default.
        shard_rows: Vectors that one process collects before it writes them.
        num_shards: Processes that divide the vectors among their GPUs.
        base_bytes: Memory that the process takes anyway.
        encode_s: Handed through, as ``build_s``.
        build_s: See :class:`IndexPlan`.

    Raises:
        ConfigError: No vectors, or a factory with a part that is not known here.

    >>> plan = plan_index(21_000_000, 768, storage="float16")
    >>> round(plan.disk_bytes / 1e9, 1), round(plan_index(21_000_000, 768, num_shards=8).vram_bytes / 1e9, 1)
    (32.3, 8.1)
    """
    if min(num_vectors, dimension, num_shards, shard_rows) < 1:
        raise ConfigError(
            "index plan: expected num_vectors, dimension, num_shards and shard_rows of at least 1, came "
            f"{num_vectors}, {dimension}, {num_shards} and {shard_rows}."
        )
    vectors_bytes = num_vectors * vector_bytes(dimension, storage)
    block_bytes = 4 * dimension * block_rows(dimension)
    # the first shard becomes the file, every other is copied to its end before it is removed
    shard_bytes = shard_rows * vector_bytes(dimension, storage) if num_vectors > shard_rows else 0
    scores_bytes = 4 * SEARCH_BATCH * block_rows(dimension)
    exact = factory == "exact"
    size = None if exact else index_size(factory, dimension)
    index_bytes = 0 if size is None else size.bytes_for(num_vectors)
    collected_bytes = 4 * dimension * min(num_vectors, shard_rows) + block_bytes
    growth_bytes = 0 if size is None else _build_memory(size, num_vectors, dimension, num_training_vectors)
    vram = None
    if exact:
        vram = -(-vectors_bytes // num_shards) + block_bytes + 2 * scores_bytes
    elif size is not None and size.graph_links == 0:
        vram = -(-index_bytes // num_shards) + GPU_WORKSPACE_BYTES
    return IndexPlan(
        factory=factory,
        storage=storage,
        num_vectors=num_vectors,
        dimension=dimension,
        vectors_bytes=vectors_bytes,
        index_bytes=index_bytes,
        ram_bytes=base_bytes + (_BLOCKS_HELD[storage] * block_bytes + scores_bytes if exact else index_bytes),
        cache_bytes=vectors_bytes if exact else 0,
        build_ram_bytes=base_bytes + max(collected_bytes, growth_bytes),
        build_disk_bytes=max(vectors_bytes + shard_bytes, vectors_bytes + index_bytes),
        vram_bytes=vram,
        num_shards=num_shards,
        encode_s=encode_s,
        build_s=build_s,
    )


def vector_bytes(dimension: int, storage: Storage) -> int:
    """Returns the bytes of one stored vector; int8 has a float32 scale beside it.

    >>> [vector_bytes(384, storage) for storage in ("float32", "float16", "int8")]
    [1536, 768, 388]
    """
    return dimension * DTYPES[storage].itemsize + (4 if storage == "int8" else 0)


def refusal(plan: IndexPlan, limits: Limits, *, num_training_vectors: int | None = None) -> str | None:
    """Returns why a plan does not fit and which do, or None where it fits."""
    lacking = [
        f"{what} {gigabytes(needed)} (there are {gigabytes(given)})"
        for what, needed, given in (
            ("memory", plan.needed_ram_bytes, limits.ram_bytes),
            ("disk", plan.build_disk_bytes, limits.disk_bytes),
        )
        if needed > given
    ]
    if not lacking:
        return None
    fitting = [
        f"index.storage={other.storage} index.factory={other.factory} (memory {gigabytes(other.needed_ram_bytes)}, "
        f"disk {gigabytes(other.build_disk_bytes)})"
        for other in alternatives(plan)
        if other.needed_ram_bytes <= limits.ram_bytes and other.build_disk_bytes <= limits.disk_bytes
    ]
    advice = f"These fit: {'; '.join(fitting)}." if fitting else "No other kind of index fits either."
    return (
        f"index {plan.factory!r} with storage {plan.storage!r} over {plan.num_vectors} x {plan.dimension} vectors "
        f"needs {' and '.join(lacking)}. {advice} Or take a larger machine, or divide the vectors among several."
    )


def check_fits(plan: IndexPlan, limits: Limits) -> None:
    """Refuses a plan that this machine cannot carry out.

    Raises:
        ConfigError: Too little memory or disk; names what is needed, what there is, and what would fit.
    """
    text = refusal(plan, limits)
    if text is not None:
        raise ConfigError(text)


def alternatives(plan: IndexPlan) -> Iterator[IndexPlan]:
    """Yields plans of smaller indexes over the same vectors, the least lossy first."""
    lists = 2 ** max(4, min(16, round(plan.num_vectors**0.5 * 2).bit_length() - 1))
    codes = next((m for m in (plan.dimension // 4, plan.dimension // 8) if m > 0 and plan.dimension % m == 0), None)
    kinds: list[tuple[Storage, str]] = [
        ("float16", "exact"),
        ("int8", "exact"),
        ("float16", "HNSW32_SQ8"),
        ("int8", "HNSW32_SQ8"),
        ("int8", f"IVF{lists},SQ8"),
        ("int8", f"IVF{lists},SQ4"),
    ]
    if codes is not None:
        kinds += [("int8", f"IVF{lists},PQ{codes}np"), ("int8", f"OPQ{codes},IVF{lists},PQ{codes}np")]
    for storage, factory in kinds:
        if (storage, factory) != (plan.storage, plan.factory):
            yield plan_index(
                plan.num_vectors, plan.dimension, factory=factory, storage=storage, num_shards=plan.num_shards
            )


def gigabytes(num_bytes: float) -> str:
    """Returns bytes for people, in units of 10^9 as disks are sold.

    >>> gigabytes(64_512_000_000), gigabytes(5_000_000)
    ('64.5 GB', '5.0 MB')
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _build_memory(size: IndexSize, num_vectors: int, dimension: int, num_training_vectors: int | None) -> int:
    """Highest memory of training and of filling: whichever is more, beside what the process takes anyway."""
    rows = num_training_vectors
    rows = training_sample_size(num_vectors, dimension, size.num_lists) if rows is None else min(rows, num_vectors)
    # the sample, and once more what is normalised, rotated or left after the coarse quantizer
    training = 2 * 4 * dimension * rows if size.trains else 0
    block = 2 * 4 * dimension * min(num_vectors, block_rows(dimension))
    # room is made for all codes at once, and lists grow one by one; a graph's links are one array that grows
    codes = round((size.bytes_per_vector - size.graph_bytes) * num_vectors)
    grown = codes + _growth_peak(num_vectors, block_rows(dimension), size.graph_bytes)
    return round(max(training, grown + block) + size.fixed_bytes)


def _growth_peak(num_vectors: int, block: int, row_bytes: float) -> int:
    """Highest memory of an array that grows block by block: when full it is copied into one twice as large."""
    size, capacity, peak = 0, 0, 0
    while size < num_vectors:
        added = min(block, num_vectors - size)
        if size + added > capacity:
            capacity = size + max(size, added)
            peak = max(peak, size + size + added)
        size += added
    return round(max(peak, size) * row_bytes)
