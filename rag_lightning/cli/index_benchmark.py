"""``rag-lightning index benchmark vectors=generated:1000000x384``: planned and measured costs of kinds of index.

Each row is built and searched by processes of its own, so that its memory is its own.
"""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from rag_lightning.errors import ConfigError
from rag_lightning.utils.io import read_json, write_json

Row = dict[str, Any]

COLUMNS: dict[str, Callable[[Row], str]] = {
    "index": lambda row: row["name"],
    "build s (planned)": lambda row: f"{row['build']['seconds']:.0f} ({row['plan']['total_s']:.0f})",
    "disk GB (planned)": lambda row: f"{row['build']['disk_bytes'] / 1e9:.3f} ({row['plan']['disk_bytes'] / 1e9:.3f})",
    "peak GB building (planned)": lambda row: (
        f"{row['build']['peak_memory_bytes'] / 1e9:.2f} ({row['plan']['build_ram_bytes'] / 1e9:.2f})"
    ),
    "peak GB searching (planned)": lambda row: (
        f"{row['verify']['peak_memory_bytes'] / 1e9:.2f} ({row['plan']['ram_bytes'] / 1e9:.2f})"
    ),
    "queries/s": lambda row: f"{row['verify']['queries_per_s']:.0f}",
    "recall": lambda row: f"{row['verify']['recall_of_originals']:.4f}",
}


def run(config: DictConfig) -> None:
    """Measures every row of ``rows`` and prints the table; ``figures`` keeps all numbers."""
    if config.vectors is None:
        raise ConfigError("index action=benchmark: expected vectors=generated:NUMBERxDIMENSION, came none")
    rows = []
    for entry in config.rows:
        rows.append(_measured(config, {str(key): value for key, value in entry.items()}))
        if config.figures is not None:
            write_json(Path(config.figures), {"vectors": config.vectors, "seed": config.seed, "rows": rows})
    Console(highlight=False).print(markdown(rows), markup=False, soft_wrap=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the measured rows as a Markdown table, the planned values in parentheses."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(config: DictConfig, index: dict[str, Any]) -> dict[str, Any]:
    shared = [
        f"vectors={config.vectors}",
        f"seed={config.seed}",
        f"recall_at={config.recall_at}",
        f"sample={config.sample}",
        *(f"limits.{key}={'null' if value is None else value}" for key, value in config.limits.items()),
        *(f"index.{key}={_quoted(value)}" for key, value in index.items()),
    ]
    with tempfile.TemporaryDirectory(dir=config.benchmark_dir) as folder:
        place = f"output={folder}/index"
        plan = _command("plan", folder, [*shared, place])
        plan["total_s"] = plan["build_s"] + plan["encode_s"]
        build = _command("build", folder, [*shared, place])
        verify = _command("verify", folder, [*shared, f"snapshot={build['snapshot']}"])
    name = f"{index['factory']}, {index.get('storage', 'float32')}"
    return {"name": name, "index": index, "plan": plan, "build": build, "verify": verify}


def _command(action: str, folder: str, settings: list[str]) -> dict[str, Any]:
    """Runs a command in a process of its own and returns its figures."""
    figures = Path(folder) / f"{action}.json"
    words = [sys.executable, "-m", "rag_lightning", "index", f"action={action}", *settings, f"figures={figures}"]
    done = subprocess.run([*words, f"hydra.run.dir={folder}/run"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"index benchmark: {shlex.join(words)} failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = read_json(figures)
    return found


def _quoted(value: object) -> str:
    """Returns a value as Hydra reads it: a factory's commas would otherwise divide it into several."""
    return f'"{value}"' if isinstance(value, str) else str(value)
