"""``rag-lightning predict checkpoint=RUN question="…"``: answers with their passages and probabilities."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from rag_lightning.cli import heads
from rag_lightning.cli.build import load_checkpoint, run_config
from rag_lightning.cli.evaluate import apply_overrides
from rag_lightning.cli.prepared import ensure_prepared
from rag_lightning.corpora.passages import resolve
from rag_lightning.corpora.questions import read_questions, write_predictions
from rag_lightning.errors import ConfigError
from rag_lightning.rag import RagModel
from rag_lightning.reports.plots import check_picture, plot_token_posteriors
from rag_lightning.types import Prediction, Question


def run(config: DictConfig) -> None:
    """Answers one question on the screen, or a file of them into a file; draws where one answer comes from."""
    if heads.is_of_heads(config.checkpoint):
        heads.predict(config)
        return
    if (config.question is None) == (config.questions is None):
        raise ConfigError('predict: expected question="…" or questions=FILE, one of them')
    heatmap = Path(config.heatmap) if config.heatmap is not None else None
    if heatmap is not None:
        _check_heatmap(heatmap, config)
    ensure_prepared(run_config(config.checkpoint))
    model, _ = load_checkpoint(config.checkpoint)
    apply_overrides(model, config)
    model.to(torch.device(config.device)).eval()
    questions = _questions(config)
    predictions = _answer(model, questions, config.batch_size, token_posteriors=heatmap is not None)
    if heatmap is not None:
        heatmap.parent.mkdir(parents=True, exist_ok=True)
        plot_token_posteriors(predictions[0], path=heatmap)
    if config.output is not None:
        write_predictions(Path(config.output), predictions)
        Console().print(f"{len(predictions)} predictions written to {config.output}", markup=False, soft_wrap=True)
        return
    for question, prediction in zip(questions, predictions, strict=True):
        show(prediction, question)


def _check_heatmap(heatmap: Path, config: DictConfig) -> None:
    check_picture(heatmap)
    if config.question is None:
        raise ConfigError(
            f'predict: heatmap draws one answer: expected question="…" with it, got questions={config.questions}'
        )


def _questions(config: DictConfig) -> list[Question]:
    if config.question is not None:
        return [Question("question", str(config.question), ())]
    return read_questions(resolve(config.questions))[: config.limit]


def _answer(model: RagModel, questions: list[Question], batch_size: int, *, token_posteriors: bool) -> list[Prediction]:
    predictions: list[Prediction] = []
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(model.decoding_options.seed)  # one stream through all batches
    starts = range(0, len(questions), batch_size)
    for start in track(starts, description="answering", transient=True, disable=len(starts) < 2):
        predictions += model.generate(
            questions[start : start + batch_size], batch_size=batch_size, token_posteriors=token_posteriors, rng=rng
        )
    return predictions


def show(prediction: Prediction, question: Question) -> None:
    """Prints an answer, and its passages with prior and posterior."""
    console = Console(highlight=False)
    console.print(f"\n[bold]{escape(prediction.question)}[/bold]", soft_wrap=True)
    gold = escape(f"   (accepted: {', '.join(question.answers)})") if question.answers else ""
    answer = f"[bold]{escape(prediction.answer)}[/bold]"
    console.print(f"  answer: {answer}   log p(y|x) = {prediction.log_likelihood:.2f}{gold}", soft_wrap=True)
    for other in prediction.alternatives[1:]:
        console.print(f"      or: {escape(other.answer)}   log p(y|x) = {other.log_likelihood:.2f}", soft_wrap=True)
    for passage in prediction.passages:
        shown = f"{passage.title}: {passage.text[:90]}{'…' if len(passage.text) > 90 else ''}"
        console.print(
            f"  p(z|x) {passage.probability:5.1%}   p(z|x,y) {passage.posterior:5.1%}   "
            f"{shown if passage.id else '(no passage)'}",
            markup=False,
            soft_wrap=True,
        )
