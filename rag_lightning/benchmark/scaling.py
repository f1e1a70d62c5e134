"""How the cost grows with K, with the batch and with the corpus, and the exponent that fits best.

An exponent of 1 is proportional cost. ``k`` and ``batch`` are training steps of RAG-Token; ``passages`` is one exact
search for a batch over made-up vectors of N passages. ``k`` tells the cost per passage besides, for each K from 5 on
as a multiple of the first: seconds for each token of the contexts, since it is chance which passages are drawn. It
falls where a step has a part that all passages share; what a further passage costs is told without that part.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from operator import truediv
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from rag_lightning.benchmark.fit import free_bytes, too_large
from rag_lightning.benchmark.lengths import LengthTables
from rag_lightning.benchmark.parts import FLOOR, HF, OURS, PARTS
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.sides import Run
from rag_lightning.benchmark.texts import made_texts
from rag_lightning.benchmark.timing import in_turn, synchroniser
from rag_lightning.benchmark.world import build_world
from rag_lightning.errors import ConfigError
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.generated import GeneratedVectors

Series = Literal["k", "batch", "passages"]
_CONSTANT_FROM = 5
"""Cost per passage is compared from this K on."""
_SEARCH_ROOM = 1.3
"""Vectors, and what the search works with, as a multiple of the vectors."""


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """Which series are measured.

    Attributes:
        series: Some of ``k``, ``batch``, ``passages``; none by default.
        num_passages: Values of K.
        batch_sizes: Values of B.
        corpus_sizes: Values of N.
        k_batch_size: B of the series over K; smaller than the shape's, so that a large K fits.
        repeats: Measurements of each point.
    """

    series: tuple[Series, ...] = ()
    num_passages: Sequence[int] = (1, 5, 10, 20, 50)
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16)
    corpus_sizes: Sequence[int] = (10_000, 100_000, 1_000_000)
    k_batch_size: int = 4
    repeats: int = 5

    @classmethod
    def of(cls, wanted: str | Sequence[str], settings: Mapping[str, Any]) -> "ScalingSettings":
        """Returns the settings of a configuration.

        Args:
            wanted: ``none``, ``all``, or a list.
            settings: The fields except ``series``.

        Raises:
            ConfigError: An unknown series, or fewer than two points of one.
        """
        known = get_args(Series)
        names = {"none": [], "all": list(known)}.get(wanted, [wanted]) if isinstance(wanted, str) else list(wanted)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(
                f"benchmark: expected scaling none, all or some of {', '.join(known)}, came "
                f"{', '.join(map(repr, unknown))}. Choose some of them."
            )
        made = cls(series=tuple(name for name in known if name in names), **settings)
        for name in ("num_passages", "batch_sizes", "corpus_sizes"):
            values = list(getattr(made, name))
            if len(set(values)) < 2 or min(values) < 1:
                raise ConfigError(
                    f"benchmark: scaling_points.{name}: expected at least two different numbers of 1 or more, came "
                    f"{values}. An exponent needs two points."
                )
        return made


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Returns the exponent a of ``cost = c · size^a``, by least squares of the logarithms; None of a single point.

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float)), 1)[0])


def further_costs(cost_per_passage: Mapping[int, float]) -> list[float]:
    """Returns what a further passage costs between each K and the next, as multiples of their mean.

    All are 1 where a step costs a fixed part and an equal part for each passage. Fewer than two K have none.

    Args:
        cost_per_passage: Cost of a step divided by K, by ascending K.

    >>> [round(each, 6) for each in further_costs({5: 13.0 / 5, 10: 23.0 / 10, 50: 103.0 / 50})]
    [1.0, 1.0]
    """
    steps = [(size, size * cost) for size, cost in cost_per_passage.items()]
    slopes = [(cost - before) / (size - smaller) for (smaller, before), (size, cost) in pairwise(steps)]
    return [slope / statistics.mean(slopes) for slope in slopes]


def check_series(shape: Shape, settings: ScalingSettings) -> None:
    """Refuses a series of which no more than one point fits, before anything is built.

    Raises:
        ConfigError: A K larger than the corpus, or the smallest point of a series does not fit into memory.
    """
    for series in settings.series:
        if series != "passages":
            too_large(_shapes(shape, settings, series)[0], ())


def measure_series(
    series: Series,
    shape: Shape,
    tables: LengthTables,
    settings: ScalingSettings,
    folder: Path,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns a series: points, seconds and exponent by side, and why points are missing.

    Args:
        series: Which.
        shape: The sizes that stay as they are.
        tables: The texts' lengths.
        settings: The points.
        folder: An existing folder to work in.
        say: Tells how far it is.
    """
    if series == "passages":
        return _searches(shape, settings, say)
    return _steps(shape, tables, settings, series, folder, say)


def _shapes(shape: Shape, settings: ScalingSettings, series: Series) -> list[Shape]:
    common = replace(shape, repeats=settings.repeats, num_batches=settings.repeats)
    if series == "k":
        common = replace(common, batch_size=settings.k_batch_size)
        return [replace(common, num_passages=size) for size in settings.num_passages]
    return [replace(common, batch_size=size) for size in settings.batch_sizes]


def _steps(
    shape: Shape,
    tables: LengthTables,
    settings: ScalingSettings,
    series: Series,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    sizes = list(settings.num_passages if series == "k" else settings.batch_sizes)
    runs: dict[str, Run] = {}
    missing: dict[str, dict[int, str]] = {}
    tokens: dict[int, Sequence[int]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for size, point in zip(sizes, _shapes(shape, settings, series), strict=True):
            say(f"scaling: {series} {size}")
            try:
                blocked = too_large(point, (HF, FLOOR))
            except ConfigError as error:
                missing.setdefault(OURS, {})[size] = str(error)
                continue
            own = Path(place) / str(size)
            own.mkdir()
            world = build_world(point, made_texts(point, tables), own)
            task = PARTS["training_step_token"].make(world)
            tokens[size] = [int(batch.contexts.attention_mask.sum()) for batch in world.padded]
            for side in (OURS, HF, FLOOR):
                reason = {**task.missing, **blocked}.get(side)
                if reason is None:
                    runs[_name(side, size)] = task.runs[side]
                else:
                    missing.setdefault(side, {})[size] = reason
        say(f"scaling: {series}, all points in turn")  # so that a slow minute of the machine meets all of them
        timings, exhausted = in_turn(
            runs, repeats=settings.repeats, warmup=shape.warmup, synchronise=synchroniser(shape.device)
        )
    for side in (OURS, HF, FLOOR):
        for size in sizes:
            if _name(side, size) in exhausted:
                missing.setdefault(side, {})[size] = exhausted[_name(side, size)]
    found: dict[str, Any] = {
        side: _line({size: timings[_name(side, size)].median_s for size in sizes if _name(side, size) in timings})
        for side in (OURS, HF, FLOOR)
    }
    if series == "k":
        per_token = {
            size: statistics.median(map(truediv, timings[_name(OURS, size)].seconds, cycle(tokens[size])))
            for size in sizes
            if size >= _CONSTANT_FROM and _name(OURS, size) in timings
        }
        found["cost_per_passage"] = [each / next(iter(per_token.values())) for each in per_token.values()]
        found["cost_per_further_passage"] = further_costs(per_token)
    return {**found, "missing": missing}


def _name(side: str, size: int) -> str:
    return f"{side} {size}"


def _line(points: Mapping[int, float]) -> dict[str, Any]:
    sizes, seconds = list(points), list(points.values())
    return {"sizes": sizes, "median_s": seconds, "exponent": exponent(sizes, seconds)}


def _searches(shape: Shape, settings: ScalingSettings, say: Callable[[str], None]) -> dict[str, Any]:
    seconds: dict[int, float] = {}
    missing: dict[int, str] = {}
    for size in settings.corpus_sizes:
        say(f"scaling: passages {size}")
        needed, available = _SEARCH_ROOM * 4 * size * shape.encoder_width, free_bytes(shape)
        if needed > available or size < shape.num_passages:
            missing[size] = f"needs {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB, and at least K passages"
            continue
        seconds[size] = _search_seconds(shape, size, settings.repeats)
    return {OURS: _line(seconds), "missing": {OURS: missing} if missing else {}}


def _search_seconds(shape: Shape, size: int, repeats: int) -> float:
    vectors = GeneratedVectors(num_vectors=size, dimension=shape.encoder_width, seed=shape.seed)
    rows_ND = torch.empty(size, shape.encoder_width)
    first = 0
    for block in vectors.blocks():
        rows_ND[first : first + len(block)] = block
        first += len(block)
    index = ExactIndex(rows_ND, device=shape.device if shape.device == "cuda" else None)
    queries_BD = vectors.queries(shape.batch_size).to(shape.device)
    runs = {OURS: lambda _: index.search(queries_BD, shape.num_passages)}
    timings, exhausted = in_turn(runs, repeats=repeats, synchronise=synchroniser(shape.device))
    if exhausted:
        raise ConfigError(f"benchmark: scaling over passages {exhausted[OURS]}. Lower scaling_points.corpus_sizes.")
    return timings[OURS].median_s
