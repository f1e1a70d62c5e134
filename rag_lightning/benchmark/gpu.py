"""What only a GPU is asked: its rate, the share of it that the reader reaches, how long it waits, on what it works."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rag_lightning.benchmark.flops import generator_flops
from rag_lightning.benchmark.lengths import LengthTables
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.sides import Run, ours_pass, training_step
from rag_lightning.benchmark.texts import made_texts
from rag_lightning.benchmark.timing import in_turn
from rag_lightning.benchmark.world import World, build_world
from rag_lightning.types import RagBatch

_MATMUL_SIZE, _MATMULS = 8192, 20
_PROFILED_STEPS, _TOP = 5, 10


def measure_gpu(
    shape: Shape, tables: LengthTables, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Returns the matrix-product rate, the reader's share of it, the idle share of a step and the longest kernels.

    Args:
        shape: The sizes; its device is CUDA.
        tables: The texts' lengths.
        folder: An existing folder to work in.
        say: Tells how far it is.
    """
    say("gpu: rate of matrix products")
    rate = matmul_rate(torch.device(shape.device))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        world = build_world(shape, made_texts(shape, tables), Path(place))
        say("gpu: reader")
        timings, exhausted = in_turn(
            {"reader": reader_pass(world)}, repeats=shape.repeats, warmup=2, synchronise=torch.cuda.synchronize
        )
        if exhausted:
            return {"matmul_tflops": rate / 1e12, "missing": exhausted}
        numbers = [number % len(world.batches) for number in range(shape.repeats)]
        shares = [
            reader_flops(world, number) / seconds / rate
            for number, seconds in zip(numbers, timings["reader"].seconds, strict=True)
        ]
        say("gpu: profile")
        return {
            "matmul_tflops": rate / 1e12,
            "reader_s": timings["reader"].median_s,
            "reader_flop_utilisation": sorted(shares)[len(shares) // 2],
            **profiled(training_step(world, ours_pass(world, "rag_token"))),
        }


def matmul_rate(device: torch.device) -> float:
    """Returns the operations per second of large bfloat16 matrix products, by CUDA events."""
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device=device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    for _ in range(3):
        left @ right
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_MATMULS):
        left @ right
    end.record()
    torch.cuda.synchronize()
    return _MATMULS * 2 * _MATMUL_SIZE**3 / (float(start.elapsed_time(end)) / 1e3)


def reader_pass(world: World) -> Run:
    """Returns forward and backward of the generator and the marginal alone: contexts and scores are given."""

    def run(number: int) -> Tensor:
        batch = world.padded[number % len(world.padded)]
        scores_BK = torch.zeros(batch.passages_BKD.shape[:2], device=batch.passages_BKD.device)
        with world.autocast():
            found = world.model.marginal(RagBatch(batch.contexts, scores_BK, batch.labels), objective="rag_token")
        loss = found.nll_B.sum()
        torch.autograd.backward(loss)
        world.zero_gradients()
        return loss.detach()

    return run


def reader_flops(world: World, number: int) -> int:
    """Returns what :func:`reader_pass` must compute for a batch."""
    batch = world.padded[number]
    pad_id = world.model.generator.pad_token_id
    written_N = (batch.labels[:, 1:] != pad_id).sum(dim=1).repeat_interleave(world.shape.num_passages)
    read_N = batch.contexts.attention_mask.sum(dim=1)
    return generator_flops(world.shape, read_N.tolist(), written_N.tolist())


def profiled(step: Run) -> dict[str, Any]:
    """Returns which share of some steps the GPU had nothing to do, and the kernels that took longest."""
    step(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for number in range(_PROFILED_STEPS):
            step(number)
        torch.cuda.synchronize()
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    by_kernel: dict[str, float] = {}
    for event, (start, end) in zip(events, spans, strict=True):
        by_kernel[event.name] = by_kernel.get(event.name, 0.0) + (end - start)
    total = sum(by_kernel.values())
    top = sorted(by_kernel.items(), key=lambda item: -item[1])[:_TOP]
    return {
        "idle_share": idle_share(spans),
        "top_kernels": [
            {"name": name, "share": time / total, "ms_per_step": time / 1e3 / _PROFILED_STEPS} for name, time in top
        ],
    }


def idle_share(spans: Sequence[tuple[float, float]] | Iterable[tuple[float, float]]) -> float:
    """Returns the share of the time between the first start and the last end that no span covers.

    >>> idle_share([(0.0, 4.0), (2.0, 5.0), (9.0, 10.0)])
    0.4
    """
    ordered = sorted(spans)
    if not ordered:
        return 1.0
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - covered / (reached - ordered[0][0])
