"""Curves of a swept setting; the only module that imports matplotlib (extra: plots)."""

import math
from collections.abc import Mapping
from pathlib import Path

from rag_lightning.errors import MissingExtraError
from rag_lightning.reports.groups import Spread


def plot_curve(curves: Mapping[str, Mapping[str, Spread]], *, setting: str, path: Path) -> None:
    """Draws one line for each metric over the values of a setting, with a bar of one standard deviation.

    Args:
        curves: For each metric, its spread at each value of the setting, values in order.
        setting: Written under the axis.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: it keeps figures and wants a screen
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "drawing a curve") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for metric, points in curves.items():
        means = [100 * point.mean for point in points.values()]
        bars = [0.0 if math.isnan(point.sd) else 100 * point.sd for point in points.values()]
        axes.errorbar(list(points), means, yerr=bars, marker="o", capsize=3, label=metric)
    axes.set_xlabel(setting)
    axes.set_ylabel("%")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
