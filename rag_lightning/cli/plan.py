"""``rag-lightning index plan``: what an index will cost here, and a refusal where it does not fit."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.index.calibrate import calibrate
from rag_lightning.index.plan import BASE_BYTES, IndexPlan, Limits, check_fits, gigabytes, plan_index
from rag_lightning.training.encode_corpus import BuildSettings
from rag_lightning.utils.memory import available_memory

_ACTIVATIONS = 12
"""Vectors of the hidden size that a transformer layer holds for each token without gradient, roughly."""


def plan_of(
    config: DictConfig, settings: BuildSettings, num_vectors: int, dimension: int, encoder: BiEncoder | None = None
) -> IndexPlan:
    """Returns the arithmetic part of the plan: bytes, without anything measured."""
    return plan_index(
        num_vectors,
        dimension,
        factory=settings.factory,
        storage=settings.storage,
        num_training_vectors=settings.num_training_vectors,
        shard_rows=config.shard_rows,
        num_shards=config.num_shards,
        base_bytes=BASE_BYTES + (weight_bytes(encoder) if encoder is not None else 0),
    )


def timed(plan: IndexPlan, settings: BuildSettings, folder: Path, encode_s: float | None = None) -> IndexPlan:
    """Returns the plan with the seconds to build, measured on small indexes."""
    speed = calibrate(
        plan.factory,
        plan.dimension,
        num_vectors=plan.num_vectors,
        metric=settings.metric,
        storage=plan.storage,
        folder=folder,
        seed=settings.seed,
    )
    build_s = speed.build_s(
        plan.num_vectors, plan.dimension, plan.factory, num_training_vectors=settings.num_training_vectors
    )
    return replace(plan, encode_s=encode_s, build_s=build_s)


def check_plan(config: DictConfig, plan: IndexPlan) -> None:
    """Refuses a plan that does not fit this machine, or what ``limits`` says of it.

    Raises:
        ConfigError: Too little memory or disk.
    """
    ram, disk = config.limits.ram_bytes, config.limits.disk_bytes
    limits = Limits(
        ram_bytes=available_memory() if ram is None else int(ram),
        disk_bytes=free_disk(Path(config.output)) if disk is None else int(disk),
    )
    check_fits(plan, limits)


def free_disk(folder: Path) -> int:
    """Returns the free bytes of the disk that a folder lies on, or will."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(place).free


def weight_bytes(encoder: BiEncoder) -> int:
    """Returns what an encoder's weights take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())


def show_plan(plan: IndexPlan, config: DictConfig, encoder: BiEncoder | None) -> None:
    """Prints a plan, a line for each cost."""
    vram = gigabytes(plan.vram_bytes) if plan.vram_bytes is not None else "no GPU form in FAISS"
    of_each = f" for each of {plan.num_shards} processes" if plan.num_shards > 1 else ""
    cache = f", and {gigabytes(plan.cache_bytes)} free for the file cache" if plan.cache_bytes else ""
    index = f" + index {gigabytes(plan.index_bytes)}" if plan.index_bytes else ""
    lines = {
        "disk": f"{gigabytes(plan.disk_bytes)} (vectors {gigabytes(plan.vectors_bytes)}{index}), "
        f"{gigabytes(plan.build_disk_bytes)} while building",
        "memory": f"{gigabytes(plan.build_ram_bytes)} to build, {gigabytes(plan.ram_bytes)} to search{cache}",
        "GPU": f"{vram}{of_each} to search there",
        "encode": _duration(plan.encode_s),
        "build": _duration(plan.build_s),
    }
    if encoder is not None:
        lines["GPU"] += f", about {gigabytes(_encoding_bytes(encoder, config.batch_size))} to encode there"
    console = Console(highlight=False)
    console.print(
        f"index {plan.factory!r}, storage {plan.storage}, over {plan.num_vectors} x {plan.dimension} vectors",
        markup=False,
        soft_wrap=True,
    )
    for name, text in lines.items():
        console.print(f"  {name:<8}{text}", markup=False, soft_wrap=True)


def figures_of(plan: IndexPlan) -> dict[str, float | int | str | None]:
    """Returns a plan as plain JSON."""
    return {**asdict(plan), "disk_bytes": plan.disk_bytes, "needed_ram_bytes": plan.needed_ram_bytes}


def _encoding_bytes(encoder: BiEncoder, batch_size: int) -> int:
    """Estimates the GPU memory of encoding: the weights, and the activations of the longest batch."""
    hidden = encoder.passage_tower().backbone.config.hidden_size
    activations: int = 4 * _ACTIVATIONS * batch_size * encoder.max_passage_tokens * hidden
    return weight_bytes(encoder) + activations


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured: give encoder=… and passages=…"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
