"""Curves of a swept setting, and heat maps of answers; the only module that imports matplotlib (extra: plots)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_lightning.errors import ConfigError, DataError, MissingExtraError
from rag_lightning.reports.groups import Spread
from rag_lightning.types import Prediction

MAX_TITLE_CHARACTERS = 40
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#000000", "#56B4E9", "#8C6D00", "#009E73", "#D55E00")
"""Those of Okabe and Ito, which colour-blind readers tell apart; the green and the red stand last, far from each other
in use. Line styles and markers say the same in print."""
LINES = ("-", "--", "-.", ":")
MARKERS = "os^DvPX*"
PICTURES = (".png", ".svg", ".pdf")


def plot_curve(curves: Mapping[str, Mapping[str, Spread]], *, setting: str, path: Path) -> None:
    """Draws one line for each metric over the values of a setting, with a bar of one standard deviation.

    Values that are no numbers have no distance from each other: they stand below each other, a bar for each metric.

    Args:
        curves: For each metric, its spread at each value of the setting, values in order.
        setting: Written under the axis.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    values = list(dict.fromkeys(value for points in curves.values() for value in points))
    if not any(_is_number(value) for value in values):
        _plot_bars(curves, values, setting=setting, path=path)
        return
    figure = new_figure(6, 4, "drawing a curve")
    axes = figure.subplots()
    for number, (metric, points) in enumerate(curves.items()):
        means = [100 * point.mean for point in points.values()]
        bars = [0.0 if math.isnan(point.sd) else 100 * point.sd for point in points.values()]
        axes.errorbar(list(points), means, yerr=bars, capsize=3, label=metric, **look(number))
    axes.set_xlabel(setting)
    axes.set_ylabel("%")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _plot_bars(curves: Mapping[str, Mapping[str, Spread]], values: Sequence[str], *, setting: str, path: Path) -> None:
    figure = new_figure(7, 1 + 0.22 * len(values) * (len(curves) + 1), "drawing bars")
    axes = figure.subplots()
    thickness = 0.8 / len(curves)
    for number, (metric, points) in enumerate(curves.items()):
        places = [values.index(value) + (number - (len(curves) - 1) / 2) * thickness for value in points]
        means = [100 * point.mean for point in points.values()]
        bars = [0.0 if math.isnan(point.sd) else 100 * point.sd for point in points.values()]
        axes.barh(
            places,
            means,
            height=thickness,
            xerr=bars,
            label=metric,
            color=COLOURS[number % len(COLOURS)],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_yticks(range(len(values)), list(values), parse_math=False)
    axes.invert_yaxis()
    axes.set_ylabel(setting)
    axes.set_xlabel("%")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(curves))
    figure.savefig(path, dpi=150)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def plot_token_posteriors(prediction: Prediction, *, path: Path) -> None:
    """Draws which passage each token of an answer comes from, as figure 2 of Lewis et al. 2020.

    Tokens stand along the answer, passages below each other in the order of retrieval, with their priors; a cell is
    ``p(z | x, y_<=t)`` on a scale from 0 to 1.

    Args:
        prediction: Made with ``token_posteriors``.
        path: A ``.png``, ``.svg`` or ``.pdf`` file to write.

    Raises:
        ConfigError: A file of another kind.
        DataError: The prediction has no token-wise posteriors, or no token.
        MissingExtraError: matplotlib is not installed.
    """
    check_picture(path)
    posteriors = prediction.token_posteriors
    if posteriors is None or not posteriors.tokens:
        raise DataError(
            f"heat map of {prediction.question!r}: expected an answer with tokens, and passages that were read apart, "
            f"came {prediction.answer!r} without. Ask a model that retrieves, and does not read them in one prompt "
            "(decoding.mode=stuffed), by rag-lightning predict heatmap=… or generate(token_posteriors=True)."
        )
    num_tokens, num_passages = len(posteriors.tokens), len(posteriors.probabilities)
    width = 5 + 0.5 * num_tokens
    figure = new_figure(width, 2.2 + 0.35 * num_passages, "drawing a heat map")
    axes = figure.subplots()
    image = axes.imshow(posteriors.probabilities, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    titles = [
        f"{shortened(passage.title or passage.id) or '(no passage)'}  ({passage.probability:.2f})"
        for passage in prediction.passages
    ]
    # names are no formulas: a dollar sign stands for itself
    tokens = [token.strip() or repr(token) for token in posteriors.tokens]
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if num_tokens > 4 else {}
    axes.set_xticks(range(num_tokens), tokens, parse_math=False, **slant)
    axes.set_yticks(range(num_passages), titles, parse_math=False)
    axes.set_ylabel(r"passage $z$  (prior $p(z \mid x)$)")
    figure.suptitle(shortened(prediction.question, int(10 * width)), fontsize="medium", parse_math=False)
    figure.colorbar(image, ax=axes, label=r"$p(z \mid x, y_{\leq t})$")
    figure.savefig(path, dpi=150)


def look(number: int) -> dict[str, Any]:
    """Returns how the n-th line of a picture is drawn: colour, line style and marker; no two of 32 look alike."""
    line = LINES[(number + number // len(COLOURS)) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": line, "marker": MARKERS[number % len(MARKERS)]}


def check_picture(path: Path) -> None:
    """Refuses a file that no picture can be written to.

    Raises:
        ConfigError: Its name does not end as a picture's.
    """
    if path.suffix not in PICTURES:
        raise ConfigError(f"picture: expected a file ending in {', '.join(PICTURES)}, got {str(path)!r}. Rename it.")


def shortened(text: str, length: int = MAX_TITLE_CHARACTERS) -> str:
    """Returns the text, its end cut off where it is longer than that.

    >>> shortened("The Adventures of Robin Hood", 15)
    'The Adventures…'
    """
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def new_figure(width: float, height: float, purpose: str) -> Any:
    """Returns an empty figure, its sides in inches.

    Raises:
        MissingExtraError: matplotlib is not installed; ``purpose`` is what it was needed for.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: it keeps figures and wants a screen
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", purpose) from error
    return Figure(figsize=(width, height), layout="constrained")
