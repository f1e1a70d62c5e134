"""Pictures of runs: learning curves, accuracy by the age of the index, calibration.

Each group of runs has a colour of Okabe and Ito's, a line style and a marker of its own, the same in all pictures.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_lightning.errors import DataError
from rag_lightning.reports.calibration import Reliability
from rag_lightning.reports.groups import Spread
from rag_lightning.reports.logs import Row, curve
from rag_lightning.reports.plots import check_picture, look, new_figure, shortened

LEARNING_METRICS = ("train/loss", "val/exact_match", "val/recall@5")
AGE, AGED_METRICS = "val/index_age_steps", ("val/exact_match", "val/recall@5")
MAX_LABEL_CHARACTERS = 60
MAX_MARKERS = 12


def plot_learning_curves(
    logs: Mapping[str, Sequence[Sequence[Row]]], *, path: Path, metrics: Sequence[str] = LEARNING_METRICS
) -> None:
    """Draws metrics over optimiser steps, a panel for each: the mean over seeds, and one standard deviation as a band.

    Only steps that every seed of a group has logged are drawn, so that no line jumps where a run ends early.

    Args:
        logs: For each group of runs, the log of each seed, see :func:`~rag_lightning.reports.logs.read_log`.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.
        metrics: Those to draw, of which a group may lack some.

    Raises:
        ConfigError: A file of another kind.
        DataError: No group logged any of the metrics.
        MissingExtraError: matplotlib is not installed.
    """
    check_picture(path)
    drawn = [
        metric for metric in metrics if any(metric in row for seeds in logs.values() for log in seeds for row in log)
    ]
    if not drawn:
        raise DataError(f"learning curves: expected logs of {', '.join(metrics)}, found none. Train with logger=csv.")
    figure = new_figure(4.2 * len(drawn), 3.4 + 0.22 * len(logs), "drawing learning curves")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn, strict=True):
        for number, seeds in enumerate(logs.values()):
            _band(axes, _shared_points([curve(log, metric) for log in seeds]), number, percent=metric != "train/loss")
        axes.set_xlabel("optimiser steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(metric if metric == "train/loss" else f"{metric} (%)", fontsize="medium")
        axes.grid(alpha=0.3)
    _legend(figure, [f"{name} (n = {len(seeds)})" for name, seeds in logs.items()])
    figure.savefig(path, dpi=150)


def plot_index_age(logs: Mapping[str, Sequence[Sequence[Row]]], *, path: Path) -> None:
    """Draws exact match and recall@5 of validations by the age of the index in them.

    A small sign is one validation of one seed; the line joins the means by age. Of a run that never refreshes, age is
    the number of steps trained, so its line tells learning and ageing together: compare groups.

    Args:
        logs: As of :func:`plot_learning_curves`.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.

    Raises:
        ConfigError: A file of another kind.
        DataError: No validation told the age of its index.
        MissingExtraError: matplotlib is not installed.
    """
    check_picture(path)
    rows = {name: [row for log in seeds for row in log if AGE in row] for name, seeds in logs.items()}
    drawn = [metric for metric in AGED_METRICS if any(metric in row for group in rows.values() for row in group)]
    if not drawn:
        raise DataError(f"index age: expected validations that log {AGE}, found none. Validate while training.")
    figure = new_figure(4.6 * len(drawn), 3.4 + 0.22 * len(logs), "drawing accuracy by the age of the index")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn, strict=True):
        for number, group in enumerate(rows.values()):
            _by_age(axes, [(row[AGE], 100 * row[metric]) for row in group if metric in row], number)
        axes.set_xlabel("age of the index (steps)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"{metric} (%)", fontsize="medium")
        axes.grid(alpha=0.3)
    _legend(figure, list(logs))
    figure.savefig(path, dpi=150)


def plot_calibration(groups: Mapping[str, Reliability], *, path: Path) -> None:
    """Draws accuracy by the probability of the answer; below, how many answers were that probable.

    Args:
        groups: For each group, its answers over all seeds.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.

    Raises:
        ConfigError: A file of another kind.
        DataError: No group.
        MissingExtraError: matplotlib is not installed.
    """
    check_picture(path)
    if not groups:
        raise DataError("calibration: expected answers of at least one group of runs, came none.")
    figure = new_figure(5, 5.4 + 0.22 * len(groups), "drawing calibration")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="as probable as right")
    thickness = 0.8 / len(groups)
    for number, told in enumerate(groups.values()):
        known = told.counts > 0
        above.plot(told.confidence[known], told.accuracy[known], **look(number))
        width = np.diff(told.edges)
        left = told.edges[:-1] + width * (0.1 + thickness * number)
        shares = 100 * told.counts / told.counts.sum()
        below.bar(left, shares, width=width * thickness, align="edge", color=look(number)["color"])
    above.set_ylabel("share of right answers")
    above.set_ylim(-0.03, 1.03)
    above.grid(alpha=0.3)
    below.set_xlabel(r"probability of the answer, $p(y \mid x)$")
    below.set_ylabel("answers (%)")
    below.grid(axis="y", alpha=0.3)
    below.set_axisbelow(True)
    _legend(figure, [f"{name} (ECE {100 * told.error:.1f} %)" for name, told in groups.items()])
    figure.savefig(path, dpi=150)


def _shared_points(curves: Sequence[Mapping[int, float]]) -> dict[int, Spread]:
    """Returns the spread over seeds at each step that all of them have."""
    measured = [values for values in curves if values]
    if not measured:
        return {}
    steps = sorted(set.intersection(*(set(values) for values in measured)))
    return {step: Spread.of([values[step] for values in measured]) for step in steps}


def _band(axes: Any, points: Mapping[int, Spread], number: int, *, percent: bool) -> None:
    factor = 100.0 if percent else 1.0
    steps = list(points)
    means = np.array([factor * point.mean for point in points.values()])
    sds = np.array([0.0 if math.isnan(point.sd) else factor * point.sd for point in points.values()])
    axes.plot(steps, means, markevery=max(1, len(steps) // MAX_MARKERS), markersize=4, **look(number))
    axes.fill_between(steps, means - sds, means + sds, color=look(number)["color"], alpha=0.2, linewidth=0)


def _by_age(axes: Any, points: Sequence[tuple[float, float]], number: int) -> None:
    style = look(number)
    if not points:
        return
    axes.plot(
        *zip(*points, strict=True),
        linestyle="none",
        marker=style["marker"],
        color=style["color"],
        markersize=4,
        alpha=0.5,
    )
    ages = sorted({age for age, _ in points})
    means = [float(np.mean([value for other, value in points if other == age])) for age in ages]
    axes.plot(ages, means, color=style["color"], linestyle=style["linestyle"], marker=style["marker"], markersize=7)


def _legend(figure: Any, names: Sequence[str]) -> None:
    """Writes the groups' names below all panels, each with its line."""
    axes = figure.axes[0]
    lines = [axes.plot([], [], markersize=5, **look(number))[0] for number in range(len(names))]
    labels = [shortened(name.replace("$", r"\$"), MAX_LABEL_CHARACTERS) for name in names]
    figure.legend(lines, labels, loc="outside lower center", ncols=1 if len(names) < 4 else 2, fontsize="small")
