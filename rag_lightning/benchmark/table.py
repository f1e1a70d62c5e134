"""The results for people: one row for each part, on the screen and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rag_lightning.benchmark.parts import FLOOR, HF, HF_LONGEST, OURS, PARTS

NONE = "none"
NOTHING = "-"
_SIDES = {OURS: "ours, s", HF: "HF RAG, s", FLOOR: "bare, s"}
"""HF RAG is transformers' RagTokenForGeneration or RagSequenceForGeneration."""


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table's cells, headings first; a side that does not exist is ``none``."""
    names = [name for name in PARTS if name in results]
    heads = ["part", *_SIDES.values(), "÷ HF", "÷ bare", "peak MB"]
    return [heads, *(_row(name, results) for name in names)]


def _row(name: str, results: Mapping[str, Any]) -> list[str]:
    sides, ratios = results[name], results["ratios"].get(name, {})
    times = [_time(sides.get(side)) for side in _SIDES]
    peaks = " / ".join(_peak(sides.get(side)) for side in _SIDES)
    shares = [_ratio(ratios.get(f"{OURS}/{side}")) for side in (HF, FLOOR)]
    return [name, *times, *shares, peaks if peaks.strip("-/ ") else NOTHING]


def _time(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return NONE
    return f"{figures['median_s']:.3g} ± {figures['spread']:.2g}"


def _peak(figures: Mapping[str, Any] | None) -> str:
    return NOTHING if figures is None or figures["peak_mb"] is None else f"{figures['peak_mb']:.0f}"


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def reasons(results: Mapping[str, Any]) -> list[str]:
    """Returns a line for each side that does not exist, and for what was noted of a part."""
    lines = [
        f"{part}: no {side}: {reason}"
        for part, missing in results.get("missing", {}).items()
        for side, reason in missing.items()
    ]
    for part, notes in results.get("notes", {}).items():
        if notes:
            lines.append(f"{part}: " + ", ".join(f"{name} {_told(value)}" for name, value in notes.items()))
    for part in PARTS:
        longest = results.get("ratios", {}).get(part, {}).get(f"{OURS}/{HF_LONGEST}")
        if longest is not None:
            lines.append(f"{part}: {longest:.3f} of transformers, were its contexts padded to the longest only")
    return [*lines, *_scaling_lines(results.get("scaling") or {}), *_gpu_lines(results.get("gpu") or {})]


def _scaling_lines(scaling: Mapping[str, Any]) -> list[str]:
    lines = []
    for series, found in scaling.items():
        for side, line in found.items():
            if not isinstance(line, Mapping) or not line.get("sizes"):  # reasons, or costs
                continue
            points = ", ".join(
                f"{size}: {seconds:.3g} s" for size, seconds in zip(line["sizes"], line["median_s"], strict=True)
            )
            power = NOTHING if line["exponent"] is None else f"{line['exponent']:.2f}"
            lines.append(f"scaling with {series}, {side}: {points}; exponent {power}")
        if found.get("cost_per_passage"):
            costs = ", ".join(f"{cost:.3f}" for cost in found["cost_per_passage"])
            lines.append(f"cost per passage, for each K from 5 on, as a multiple of the first: {costs}")
        if found.get("cost_per_further_passage"):
            costs = ", ".join(f"{cost:.3f}" for cost in found["cost_per_further_passage"])
            lines.append(f"cost of a further passage between these K, as multiples of the mean: {costs}")
        for side, missing in found["missing"].items():
            lines += [f"scaling with {series}: no {side} at {size}: {reason}" for size, reason in missing.items()]
    return lines


def _gpu_lines(gpu: Mapping[str, Any]) -> list[str]:
    if "reader_s" not in gpu:
        return [f"gpu: {gpu['missing']}"] if gpu else []
    lines = [
        f"bfloat16 matrix products: {gpu['matmul_tflops']:.0f} TFLOP/s measured; generator forward and backward reach "
        f"{100 * gpu['reader_flop_utilisation']:.1f} % of it, padding not counted",
        f"the GPU is idle for {100 * gpu['idle_share']:.1f} % of a training step",
    ]
    return lines + [
        f"kernel {place}: {100 * kernel['share']:.1f} %, {kernel['ms_per_step']:.2f} ms a step: {kernel['name'][:100]}"
        for place, kernel in enumerate(gpu["top_kernels"], start=1)
    ]


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def heading(results: Mapping[str, Any]) -> str:
    """Returns what was measured, and on what."""
    shape, machine, versions = results["shape"], results["machine"], results["versions"]
    place = machine["gpu"] if shape["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"shape {shape['name']}: query encoder {shape['encoder_layers']} x {shape['encoder_width']}, generator "
        f"{shape['generator_layers']} + {shape['generator_layers']} x {shape['generator_width']}, V "
        f"{shape['vocab_size']}, B {shape['batch_size']}, K {shape['num_passages']}, combined length "
        f"{shape['max_combined_length']}, {shape['dtype']}; texts {results['texts']}; {place}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}; commit {results['commit']}; "
        f"median ± interquartile range of {shape['repeats']} repeats"
    )


def screen(results: Mapping[str, Any]) -> Table:
    """Returns the table for a terminal."""
    heads, *body = rows(results)
    table = Table(title="benchmark", caption=heading(results))
    for head in heads:
        first = head == "part"
        table.add_column(head, justify="left" if first else "right", no_wrap=first)
    for row in body:
        table.add_row(*row)
    return table


def markdown(results: Mapping[str, Any]) -> str:
    """Returns heading, table and reasons as Markdown."""
    heads, *body = rows(results)
    lines = [heading(results), "", *_table(heads, body), ""]
    return "\n".join([*lines, *(f"- {line}" for line in reasons(results))]).rstrip() + "\n"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *body)]
