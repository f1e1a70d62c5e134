"""The whole benchmark: parts, sides, memory; returns what ``results.json`` holds.

::

    {part: {"ours" | "hf_rag" | "floor" | "hf_rag_longest": {"median_s", "spread", "peak_mb"}},
     "ratios": {part: {"ours/hf_rag": …}},       medians of paired ratios, see benchmark/timing.py
     "missing": {part: {side: reason}},          a side that does not exist is no win
     "notes": {part: {…}},                       what was checked, and further figures
     "scaling": {series: {…}},                   see benchmark/scaling.py
     "gpu": {…},                                 see benchmark/gpu.py; null without one
     "asked": {…}, "shape": {…}, "texts": …, "machine": {…}, "versions": {…}, "commit": …}
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rag_lightning.benchmark.fit import free_bytes, too_large
from rag_lightning.benchmark.gpu import measure_gpu
from rag_lightning.benchmark.lengths import LengthTables
from rag_lightning.benchmark.machine import commit, machine, versions
from rag_lightning.benchmark.memory import peak_of
from rag_lightning.benchmark.parts import HF_LONGEST, OURS, Part
from rag_lightning.benchmark.scaling import ScalingSettings, check_series, measure_series
from rag_lightning.benchmark.shape import Lengths, Shape
from rag_lightning.benchmark.texts import TextFiles, Texts, made_texts, read_texts
from rag_lightning.benchmark.timing import in_turn, ratio, synchroniser
from rag_lightning.benchmark.world import World, build_world
from rag_lightning.errors import ConfigError

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        shape: The sizes.
        tables: The texts' lengths, where they are made up.
        files: Real texts; None makes them up.
        parts: By name.
        sides: Those wanted; ours always runs.
        memory: Whether peak memory is measured.
        scaling: Which series are measured besides.
    """

    shape: Shape
    tables: LengthTables
    files: TextFiles | None
    parts: Mapping[str, Part]
    sides: tuple[str, ...]
    memory: bool
    scaling: ScalingSettings


class Bench:
    """Builds each world once and measures parts on it.

    Args:
        plan: What to measure.
        folder: An existing folder for token stores and indexes.
        say: Tells how far it is.

    Raises:
        ConfigError: A training step does not fit into memory, or the device is not there; nothing has been built.
    """

    def __init__(self, plan: Plan, folder: Path, say: Say) -> None:
        self.plan, self.say = plan, say
        self._folder = folder
        self._worlds: dict[Lengths, World] = {}
        free_bytes(plan.shape)  # refuses a device that is not there
        self._blocked = {
            name: too_large(self.shape(part.lengths), {*plan.sides} & {*part.sides})
            for name, part in plan.parts.items()
            if part.trains
        }

    def world(self, lengths: Lengths | None = None) -> World:
        """Returns the world with texts of the given lengths; by default the shape's."""
        shape = self.shape(lengths)
        if shape.lengths not in self._worlds:
            folder = self._folder / shape.lengths
            folder.mkdir()
            self._worlds.clear()  # one at a time: the peak of two would refuse shapes that fit
            self._worlds[shape.lengths] = build_world(shape, self._texts(shape), folder)
        return self._worlds[shape.lengths]

    def close(self) -> None:
        """Lets go of the world."""
        self._worlds.clear()

    def shape(self, lengths: Lengths | None) -> Shape:
        """Returns the shape with texts of the given lengths."""
        return self.plan.shape if lengths is None else replace(self.plan.shape, lengths=lengths)

    def files(self, shape: Shape) -> TextFiles | None:
        """Returns the real texts; texts of equal lengths are always made up."""
        return self.plan.files if shape.lengths == "drawn" else None

    def _texts(self, shape: Shape) -> Texts:
        files = self.files(shape)
        return read_texts(shape, files) if files is not None else made_texts(shape, self.plan.tables)

    def measure(self, name: str, part: Part) -> dict[str, Any]:
        """Returns the figures of one part: ``sides``, ``ratios``, ``missing``, ``notes``."""
        shape = self.shape(part.lengths)
        world = self.world(part.lengths)
        task = part.make(world)
        blocked = self._blocked.get(name, {})
        wanted = ({OURS, *self.plan.sides} & {*part.sides}) - {*blocked}
        runs = {side: run for side, run in task.runs.items() if side in wanted}
        notes = dict(task.check()) if len(runs) > 1 else {}
        timings, exhausted = in_turn(
            runs, repeats=shape.repeats, warmup=shape.warmup, synchronise=synchroniser(shape.device)
        )
        sides: dict[str, dict[str, float | None]] = {
            side: {"median_s": timing.median_s, "spread": timing.spread, "peak_mb": None}
            for side, timing in timings.items()
        }
        if self.plan.memory and part.peak:
            for side in [side for side in sides if side != HF_LONGEST]:
                self.say(f"{name}: memory of {side}")
                if shape.device == "cuda":
                    torch.cuda.empty_cache()
                try:
                    peak = peak_of(name, side, shape=shape, tables=self.plan.tables, files=self.files(shape))
                except ConfigError as error:  # what was timed is kept
                    notes[f"memory of {side}"] = str(error)
                    continue
                sides[side]["peak_mb"] = peak["peak_mb"]
        ratios = {
            f"{OURS}/{side}": ratio(timings[OURS], timings[side])
            for side in timings
            if side != OURS and OURS in timings
        }
        ratios |= {
            f"peak {OURS}/{side}": sides[OURS]["peak_mb"] / figures["peak_mb"]  # type: ignore[operator]
            for side, figures in sides.items()
            if side != OURS and figures["peak_mb"] and sides[OURS]["peak_mb"]
        }
        missing = {**task.missing, **blocked, **exhausted}
        return {"sides": sides, "ratios": ratios, "missing": missing, "notes": notes}


def run_benchmark(
    plan: Plan, folder: Path, *, say: Say = lambda _: None, keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measures all parts of a plan and returns what ``results.json`` holds.

    Args:
        plan: What to measure.
        folder: An existing folder for token stores and indexes.
        say: Tells how far it is.
        keep: Given all that is known after each part and each series: a run that is cut loses no more than one.

    Raises:
        ConfigError: As :class:`Bench`, or a length of a series that cannot be.
    """
    about = {
        "asked": {"sides": list(plan.sides), "memory": plan.memory},
        "shape": asdict(plan.shape),
        "texts": "files" if plan.files is not None else "made up",
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    bench = Bench(plan, folder, say)
    check_series(plan.shape, plan.scaling)
    parts: dict[str, Any] = {}
    further: dict[str, dict[str, Any]] = {"ratios": {}, "missing": {}, "notes": {}}
    scaling: dict[str, Any] = {}
    gpu: dict[str, Any] | None = None

    def known() -> dict[str, Any]:
        ordered = {name: parts[name] for name in plan.parts if name in parts}
        return {**ordered, **further, "scaling": scaling, "gpu": gpu, **about}

    for name in sorted(plan.parts, key=lambda name: str(plan.parts[name].lengths or "")):  # each world is built once
        say(name)
        found = bench.measure(name, plan.parts[name])
        parts[name] = found["sides"]
        for key, kept in further.items():
            kept[name] = found[key]
        keep(known())
    _add_share(parts, further["notes"])
    bench.close()
    for series in plan.scaling.series:
        scaling[series] = measure_series(series, plan.shape, plan.tables, plan.scaling, folder, say=say)
        keep(known())
    if plan.shape.device == "cuda":
        gpu = measure_gpu(plan.shape, plan.tables, folder, say=say)
    keep(known())
    return known()


def _add_share(results: Mapping[str, Any], notes: dict[str, dict[str, Any]]) -> None:
    """Adds which share of a training step is search and context assembly, where both were measured.

    A note, not a ratio to be guarded: it rises when the rest of the step gets faster.
    """
    if "retrieval" in results and "training_step_token" in results:
        times = [results[part][OURS]["median_s"] for part in ("retrieval", "training_step_token")]
        notes["retrieval"]["share of training_step_token"] = times[0] / times[1]
