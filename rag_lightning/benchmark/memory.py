"""Peak memory of one side of one part: of a process that does nothing else.

``python -m rag_lightning.benchmark.memory`` reads a request as JSON from standard input and writes
``{"peak_mb": …, "idle_mb": …}`` as its last line. On a GPU that is what torch's allocator had at most; elsewhere the
highest resident memory, libraries included. A MB is 10⁶ bytes.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from rag_lightning.benchmark.lengths import LengthTables
from rag_lightning.benchmark.parts import PARTS
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.texts import TextFiles, made_texts, read_texts
from rag_lightning.benchmark.world import build_world
from rag_lightning.errors import ConfigError
from rag_lightning.utils.memory import peak_memory

_RUNS = 2
"""The second step finds the first one's memory fragmented, as every later one does."""


def peak_of(part: str, side: str, *, shape: Shape, tables: LengthTables, files: TextFiles | None) -> dict[str, float]:
    """Returns the peak memory of one side in a fresh process, in MB, and what it had before the first run.

    Raises:
        ConfigError: The process failed; its last words are given.
    """
    request = {
        "part": part,
        "side": side,
        "shape": asdict(shape),
        "tables": asdict(tables),
        "files": asdict(files) if files is not None else None,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "rag_lightning.benchmark.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if done.returncode != 0:
        raise ConfigError(
            f"benchmark: the process that measures the memory of {side} in {part} ended with {done.returncode}. Lower "
            f"the shape if memory ran out, or set memory=false. Its last words: {done.stderr.strip()[-1000:]}"
        )
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measure(request: dict[str, object]) -> dict[str, float]:
    """Does what a request asks for, in this process."""
    shape = Shape.of(request["shape"])  # type: ignore[arg-type]
    tables = LengthTables.of(request["tables"])  # type: ignore[arg-type]
    files = TextFiles(**request["files"]) if request["files"] else None  # type: ignore[arg-type]
    torch.set_num_threads(int(str(request["threads"])))
    with tempfile.TemporaryDirectory() as folder:
        texts = read_texts(shape, files) if files is not None else made_texts(shape, tables)
        world = build_world(shape, texts, Path(folder))
        run = PARTS[str(request["part"])].make(world).runs[str(request["side"])]
        _forget_peak(shape)
        idle = _peak(shape)
        for number in range(_RUNS):
            run(number)
        return {"peak_mb": _peak(shape), "idle_mb": idle}


def _forget_peak(shape: Shape) -> None:
    """Lets the peak begin where memory is now: building the world may have taken more than a step does."""
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").is_file():
        Path("/proc/self/clear_refs").write_text("5")


def _peak(shape: Shape) -> float:
    if shape.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_memory() / 1e6


def main() -> None:
    """Measures what standard input asks for."""
    print(json.dumps(measure(json.loads(sys.stdin.read()))))


if __name__ == "__main__":
    main()
