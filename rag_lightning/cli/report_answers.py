"""``rag-lightning report runs=DIR errors=true plots=true page=true``: what runs answered, and how they got there."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from rag_lightning.cli.console import table_console
from rag_lightning.cli.report_files import located
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.predictions import read_predictions
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.reports.calibration import reliability
from rag_lightning.reports.comparison import Cell, cells_of_groups
from rag_lightning.reports.comparison_tables import ERROR_HEADINGS, error_rows, latex, markdown, screen
from rag_lightning.reports.error_analysis import ErrorCounts, Judged, judge
from rag_lightning.reports.logs import read_log
from rag_lightning.reports.notes import commit_notes, data_notes
from rag_lightning.reports.page import write_page
from rag_lightning.reports.plots import plot_token_posteriors
from rag_lightning.reports.run_plots import plot_calibration, plot_index_age, plot_learning_curves
from rag_lightning.reports.runs import PREDICTIONS_FILE, Run
from rag_lightning.reports.scores import is_of_heads, language_of, questions_of
from rag_lightning.types import Passage, Prediction
from rag_lightning.utils.io import write_json

PAGE_FILE = "predictions.html"
ERRORS_TITLE = "Answers by verdict: number (% of all), over all seeds"
PAPERS_SHARE = (
    "Right of those whose answer is in no passage: Lewis et al. (2020, §4.1) report 11.8 % for RAG on NQ, where an "
    "extractive reader has 0."
)


def report_answers(config: DictConfig, folder: Path, runs: Sequence[Run]) -> None:
    """Judges the runs' answers and writes what was asked for: ``errors.md``, pictures, a page in each run's folder.

    Runs are read one after another: what one answered is forgotten before the next is read.

    Raises:
        MissingFileError: Answers are asked for, and no run's can be judged; says what each lacks.
        DataError: A bad line, or nothing to draw.
        MissingExtraError: ``plots`` without matplotlib.
    """
    groups = [cell for cell in cells_of_groups(runs, {}, ["exact_match"]) if cell.runs]
    lacking: dict[str, str] = {}
    seen: dict[str, list[tuple[ErrorCounts, list[float], list[bool]]]] = {}
    told: list[Prediction] = []
    for cell in groups:
        for run in cell.runs:
            found = _judged(run)
            if isinstance(found, str):
                lacking[run.name] = found
                continue
            judged, passages = found
            seen.setdefault(cell.name, []).append((ErrorCounts.of(judged), *_probabilities(judged)))
            told = told or [one.prediction for one in judged if one.prediction.token_posteriors is not None]
            if config.page:
                write_page(run.folder / PAGE_FILE, judged, passages, title=run.name, max_passages=config.page_passages)
                _say(f"written to {run.folder / PAGE_FILE}")
    if not seen and (config.errors or config.page):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in lacking.items())
        raise MissingFileError(f"report: expected runs whose answers can be judged, found none. {reasons}")
    if config.errors:
        judged_runs = [run for cell in groups for run in cell.runs if run.name not in lacking]
        notes = [*commit_notes(judged_runs), *data_notes(judged_runs)]
        notes += [f"Left out: {name} ({reason})." for name, reason in lacking.items()]
        _errors(folder, {name: ErrorCounts.sum([one[0] for one in parts]) for name, parts in seen.items()}, notes)
    if config.plots:
        _pictures(config, folder, groups, seen, told)


def page_of_file(config: DictConfig) -> None:
    """Writes the page of one file of predictions.

    Raises:
        ConfigError: No question file.
        DataError: A bad line, or questions or passages that are not those of the predictions.
    """
    if config.questions is None:
        raise ConfigError("predictions: expected questions=FILE with it, for the accepted answers; got none")
    path = Path(config.predictions)
    predictions = read_predictions(path)
    questions = {question.id: question for question in read_questions(config.questions)}
    retrieves = any(found.id for one in predictions for found in one.passages)
    if retrieves and config.passages is None:
        raise ConfigError("predictions: expected passages=FILE with it, for the passages' texts; got none")
    passages = _passages_by_id(located(config.passages)) if config.passages is not None else {}
    output = Path(config.output) if config.output is not None else path.with_suffix(".html")
    judged = judge(predictions, questions, passages)
    write_page(output, judged, passages, title=path.name, max_passages=config.page_passages)
    _say(f"written to {output}")


def _judged(run: Run) -> tuple[list[Judged], Mapping[str, Passage]] | str:
    """Returns a run's answers with verdicts, and the passages' texts; or why there are none."""
    path = run.folder / PREDICTIONS_FILE
    if not path.is_file():
        return f"no {PREDICTIONS_FILE}"
    if is_of_heads(path):
        return "labels, not answers"
    questions = questions_of(run, located)
    if questions is None:
        return f"no question file at {run.data_file('test')}; give questions=FILE"
    predictions = read_predictions(path)
    passages: Mapping[str, Passage] = {}
    if any(found.id for one in predictions for found in one.passages):
        place = run.data_file("passages")
        if place is None or not located(place).exists():
            return f"no passages at {place}; give passages=FILE"
        passages = _passages_by_id(located(place))
    return judge(predictions, questions, passages, language=language_of(run)), passages


@lru_cache(maxsize=1)
def _passages_by_id(path: Path) -> Mapping[str, Passage]:
    return {passage.id: passage for passage in PassageCorpus.read(path)}


def _probabilities(judged: Sequence[Judged]) -> tuple[list[float], list[bool]]:
    likelihoods = [min(0.0, one.prediction.log_likelihood) for one in judged]
    return np.exp(likelihoods).tolist(), [one.verdict == "right" for one in judged]


def _errors(folder: Path, counts: Mapping[str, ErrorCounts], differing: Sequence[str]) -> None:
    rows = error_rows(counts)
    notes = [PAPERS_SHARE, *differing]
    listed = "".join(f"\n- {note}" for note in notes)
    text = f"{ERRORS_TITLE}.\n\n{markdown(ERROR_HEADINGS, rows)}\n{listed}\n"
    (folder / "errors.md").write_text(text, encoding="utf-8")
    (folder / "errors.tex").write_text(
        latex(ERROR_HEADINGS, rows, caption=f"{ERRORS_TITLE}.", notes=notes) + "\n", encoding="utf-8"
    )
    write_json(folder / "errors.json", {name: told.as_dict() for name, told in counts.items()})
    table_console().print(screen(ERROR_HEADINGS, rows, ERRORS_TITLE))
    for note in notes:
        _say(note)


def _pictures(
    config: DictConfig,
    folder: Path,
    groups: Sequence[Cell],
    seen: Mapping[str, Sequence[tuple[ErrorCounts, list[float], list[bool]]]],
    told: Sequence[Prediction],
) -> None:
    """Draws what the runs have; says what they lack for the rest."""
    logs = {cell.name: [log for run in cell.runs if (log := read_log(run.folder))] for cell in groups}
    logs = {name: seeds for name, seeds in logs.items() if seeds}
    sure = {
        name: reliability(
            np.array([value for _, values, _ in parts for value in values]),
            np.array([value for _, _, values in parts for value in values]),
        )
        for name, parts in seen.items()
    }
    drawings: dict[str, Callable[[Path], None]] = {
        "learning_curves": lambda path: plot_learning_curves(logs, path=path),
        "index_age": lambda path: plot_index_age(logs, path=path),
        "calibration": lambda path: plot_calibration(sure, path=path),
    }
    for number, one in enumerate(told[: config.num_heatmaps], start=1):
        drawings[f"heatmap_{number}"] = partial(_heatmap, one)
    lacking = {name: reason for name, draw in drawings.items() if (reason := _drawn(draw, folder / f"{name}.png"))}
    if len(lacking) == len(drawings):
        raise DataError(f"plots: expected logs or answers of runs in {folder} to draw, found none. {lacking}")


def _heatmap(prediction: Prediction, path: Path) -> None:
    plot_token_posteriors(prediction, path=path)


def _drawn(draw: Callable[[Path], None], path: Path) -> str | None:
    """Draws a picture; returns why not, where the runs lack what it shows."""
    try:
        draw(path)
    except DataError as error:
        _say(f"{path.name} is not drawn: {error}")
        return str(error)
    _say(f"written to {path}")
    return None


def _say(text: str) -> None:
    table_console().print(text, markup=False, highlight=False, soft_wrap=True)
