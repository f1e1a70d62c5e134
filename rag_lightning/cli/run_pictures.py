"""Pictures of a run that has just finished, left in its folder for its trackers to take."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rag_lightning.cli.report_files import located
from rag_lightning.corpora.predictions import read_predictions
from rag_lightning.errors import DataError, MissingExtraError
from rag_lightning.reports.calibration import reliability
from rag_lightning.reports.logs import Row
from rag_lightning.reports.plots import new_figure, plot_token_posteriors
from rag_lightning.reports.run_plots import plot_calibration, plot_index_age, plot_learning_curves
from rag_lightning.reports.runs import PREDICTIONS_FILE, find_runs
from rag_lightning.reports.scores import is_of_heads, question_scores

logger = logging.getLogger(__name__)


def draw_run(folder: Path, history: Sequence[Row], *, name: str) -> None:
    """Draws learning curves, exact match by the age of the index, calibration, and one heat map where there can be one.

    A picture that cannot be drawn is no reason to lose a finished run: what the run lacks for it is told in one line,
    and any other failure is a warning.

    Args:
        folder: The run's; the pictures are written into it.
        history: What the run logged, its figures by name, ``step`` among them.
        name: The run's, for the legends.
    """
    drawings: dict[str, Callable[[Path], None]] = {
        "learning_curves": lambda path: plot_learning_curves({name: [history]}, path=path),
        "index_age": lambda path: plot_index_age({name: [history]}, path=path),
        "calibration": lambda path: _calibration(folder, name, path),
        "heatmap_1": lambda path: _heatmap(folder, path),
    }
    drawn, lacking = [], []
    try:
        new_figure(1, 1, "drawing the run")
        for title, draw in drawings.items():
            try:
                draw(folder / f"{title}.png")
                drawn.append(f"{title}.png")
            except DataError as error:
                lacking.append(f"{title}: {str(error).partition('. ')[0]}")
    except MissingExtraError as error:
        logger.info("the run is not drawn: %s", error)
        return
    except Exception:  # of a library that draws; the run itself is done
        logger.warning("the run could not be drawn; rag-lightning report runs=%s plots=true", folder, exc_info=True)
        return
    told = f"; not {'; '.join(lacking)}" if lacking else ""
    logger.info("drawn in %s: %s%s", folder, ", ".join(drawn) if drawn else "nothing", told)


def _calibration(folder: Path, name: str, path: Path) -> None:
    (run,) = find_runs(folder)
    scores = question_scores(run, "exact_match", located)
    if not scores:
        raise DataError("calibration: expected answers and their questions, found none.")
    likelihoods = {one.id: one.log_likelihood for one in read_predictions(folder / PREDICTIONS_FILE)}
    told = [min(0.0, likelihoods[question]) for question in scores]
    right = np.array(list(scores.values())) > 0
    plot_calibration({name: reliability(np.exp(np.array(told)), right)}, path=path)


def _heatmap(folder: Path, path: Path) -> None:
    file = folder / PREDICTIONS_FILE
    told = read_predictions(file) if file.is_file() and not is_of_heads(file) else []
    found = next((one for one in told if one.token_posteriors is not None), None)
    if found is None:
        raise DataError("heat map: expected token posteriors, found none. Ask for them: module.token_posteriors=true")
    plot_token_posteriors(found, path=path)
