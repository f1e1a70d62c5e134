"""``rag-lightning benchmark``: ours, transformers' RAG and the bare models side by side on this machine."""

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rag_lightning.benchmark.compare import check_comparable, compare, compared
from rag_lightning.benchmark.lengths import LengthTables
from rag_lightning.benchmark.parts import chosen_parts, chosen_sides
from rag_lightning.benchmark.run import Plan, run_benchmark
from rag_lightning.benchmark.scaling import ScalingSettings
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.table import markdown, reasons, screen
from rag_lightning.benchmark.texts import TextFiles
from rag_lightning.cli.console import table_console
from rag_lightning.corpora.passages import resolve
from rag_lightning.errors import ConfigError
from rag_lightning.utils.io import read_json, write_json

_LEAST_WIDTH = 120
"""Columns: a narrower table would cut its numbers."""


def run(config: DictConfig) -> None:
    """Measures, writes ``results.json`` and ``results.md`` after each part, and prints the table."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    plan = plan_of(settings)
    kept = read_json(resolve(settings["baseline"]), "baseline") if settings["baseline"] is not None else None
    if kept is not None:
        check_comparable(kept, plan.shape, "files" if plan.files is not None else "made up", settings["tolerance"])
    console = table_console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    output = Path(settings["output"])

    def keep(results: dict[str, Any]) -> None:
        write_json(output / "results.json", results)
        (output / "results.md").write_text(markdown(results), encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=settings["work_dir"]) as folder:
        results = run_benchmark(plan, Path(folder), say=say, keep=keep)
    console.print(screen(results))
    for line in reasons(results):
        say(line)
    say(f"written to {output / 'results.json'}")
    if kept is not None:
        _guard(results, kept, settings, say)


def _guard(
    results: Mapping[str, Any], kept: Mapping[str, Any], settings: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Says which ratios moved; ends the command with status 1 where one is worse."""
    moves = compare(results, kept, tolerance=settings["tolerance"])
    for move in moves:
        say(str(move))
    number = compared(results, kept)
    worse = sum(move.worse for move in moves)
    say(f"{number} ratios compared with {settings['baseline']}: {len(moves)} moved, {worse} of them worse")
    if number == 0:
        raise ConfigError("benchmark: baseline: expected at least one ratio in both results, came none. Choose parts.")
    if worse:
        sys.exit(f"error: {worse} of {number} ratios are worse than in {settings['baseline']}")


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """Returns what a configuration asks to measure.

    Raises:
        ConfigError: An unknown part or side, a size that cannot be, or only some of the files of real texts.
    """
    return Plan(
        shape=Shape.of(settings["shape"]),
        tables=LengthTables.of(settings["token_lengths"]),
        files=_files(settings),
        parts=chosen_parts(settings["parts"]),
        sides=chosen_sides(settings["sides"]),
        memory=bool(settings["memory"]),
        scaling=ScalingSettings.of(settings["scaling"], settings["scaling_points"]),
    )


def _files(settings: Mapping[str, Any]) -> TextFiles | None:
    given = {name: settings[name] for name in ("passages", "questions", "tokenizer") if settings[name] is not None}
    if not given:
        return None
    if len(given) < 3:
        raise ConfigError(
            f"benchmark: expected passages, questions and tokenizer together, came {', '.join(given)} alone. Give all "
            "three for real texts, or none."
        )
    return TextFiles(**given)
