"""A finished run of heads: measured on its test examples or others, or asked about one text."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from rag_lightning.cli.build import build_task_run, build_trainer, run_config, run_folder
from rag_lightning.cli.record import record_evaluation
from rag_lightning.corpora.relations import marked_text
from rag_lightning.errors import ConfigError, MissingFileError
from rag_lightning.heads.model import CONFIG_FILE, HeadedModel
from rag_lightning.heads.reading import TaskExample
from rag_lightning.text.tagging import bio_spans
from rag_lightning.training.tasks.callbacks import TaskOutputCallback
from rag_lightning.training.tasks.data import TaskDataModule
from rag_lightning.training.tasks.module import TaskLightningModule
from rag_lightning.types import LabelledText, RelationMention, TaggedSentence

logger = logging.getLogger(__name__)


def is_of_heads(checkpoint: str) -> bool:
    """Whether a run folder, or a saved model's folder, holds heads."""
    place = Path(checkpoint)
    return any((folder / CONFIG_FILE).is_file() for folder in (place, place / "model"))


def load(checkpoint: str, test: str | None = None) -> tuple[TaskLightningModule, TaskDataModule]:
    """Returns a run's modules with the weights, and the index, that it saved.

    Args:
        checkpoint: The run's folder, or its ``model/``.
        test: Other test examples, in the form of the task's own files.

    Raises:
        MissingFileError: No ``config.yaml`` beside the model, which says what its tasks are.
        ConfigError: Other examples for a run of several tasks.
    """
    place = Path(checkpoint)
    model_folder = place if (place / CONFIG_FILE).is_file() else place / "model"
    folder = run_folder(checkpoint) if place != model_folder else model_folder.parent
    if not (folder / "config.yaml").is_file():
        raise MissingFileError(f"checkpoint: expected {folder / 'config.yaml'} beside the heads, found none")
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    if snapshots := sorted(Path(config.data.index_dir).glob("step*")):
        config.data.index.snapshot = str(snapshots[-1])
    names = list(config.task.tasks)
    if test is not None:
        config.task.data.limit_eval = None
        if len(names) != 1:
            raise ConfigError(
                f"data.test: expected a run of one task, this one has {', '.join(names)}: whose examples are they?"
            )
        if config.task.tasks[names[0]].get("divide") is not None:
            raise ConfigError("data.test: expected a task with a test file; this one divides its training file")
        config.task.tasks[names[0]].test = test
    module, data = build_task_run(config)
    saved, labels = HeadedModel.from_pretrained(model_folder)
    if labels != module.labels:
        raise ConfigError(
            f"checkpoint: expected training files with the labels of the saved heads, {labels}, came {module.labels}. "
            "Put the files back that the run was trained on."
        )
    module.model.load_state_dict(saved.state_dict())
    return module.eval(), data


def evaluate(config: DictConfig) -> None:
    """``rag-lightning evaluate`` of heads: metrics.json and predictions.jsonl of the test examples."""
    _refuse_others("evaluate", ("checkpoint", "output", "data.test", "trainer", "paths"))
    module, data = load(config.checkpoint, config.data.test)
    for name, splits in data.examples.items():
        if "test" not in splits:
            raise ConfigError(f"data.test: expected test examples of task {name}, came none, and its run has none")
    record_evaluation(config, run_config(config.checkpoint), Path(config.output))
    trainer = build_trainer(config, None, [TaskOutputCallback(directory=config.output)])
    trainer.test(module, datamodule=data, weights_only=True)
    logger.info("metrics.json and predictions.jsonl are in %s", config.output)


@torch.no_grad()
def predict(config: DictConfig) -> None:
    """``rag-lightning predict`` of heads: what each says of one text.

    A tagger takes words with spaces between them; a relation is asked for with ``<e1>…</e1>`` and ``<e2>…</e2>``.
    """
    if config.question is None or config.questions is not None:
        raise ConfigError(
            'predict: expected question="…", a text to judge; for a file of examples use rag-lightning evaluate'
        )
    _refuse_others("predict", ("checkpoint", "question", "device"))
    module, data = load(config.checkpoint)
    module.to(torch.device(config.device))
    data.ensure_index()
    console = Console(highlight=False)
    for name, task in module.tasks.items():
        example = _example(str(config.question), task.kind)
        output = module.model(name, [example], data.retriever)
        best = output.log_probs[0].max(dim=-1)
        if isinstance(example, TaggedSentence):
            assert output.places is not None
            seen = (output.places[0, : len(example.words)] >= 0).tolist()
            numbers = best.indices.tolist()
            tags = [module.labels[name][number] if there else "O" for number, there in zip(numbers, seen, strict=False)]
            if not all(seen):
                console.print(f"(the reader has cut the text behind {sum(seen)} words)", markup=False)
            found = [f"{' '.join(example.words[start:end])} = {kind}" for start, end, kind in bio_spans(tags)]
            console.print(f"[bold]{name}[/bold]: {escape(', '.join(found) or 'no mention')}", soft_wrap=True)
        else:
            label, probability = module.labels[name][int(best.indices)], float(best.values.exp())
            console.print(f"[bold]{name}[/bold]: {escape(label)}   p(y|x) = {probability:.2f}", soft_wrap=True)
        if output.hits is not None and data.retriever is not None:
            (passages,) = data.retriever.evidence(output.hits).passages
            for passage, weight in zip(passages, output.log_prior_BK[0].exp().tolist(), strict=True):
                text = f"  p(z|x) {weight:5.1%}   {passage.title}: {passage.text[:90]}"
                console.print(text, markup=False, soft_wrap=True)


def _refuse_others(command: str, read: Sequence[str]) -> None:
    """Refuses settings of the command line that heads do not read.

    Raises:
        ConfigError: Names them.
    """
    keys = [override.lstrip("+~").split("=")[0] for override in HydraConfig.get().overrides.task]
    others = [key for key in keys if key not in read and key.split(".")[0] not in read]
    if others:
        raise ConfigError(
            f"{command}: of a run of heads expected {', '.join(read)}, got {', '.join(others)}: its own task.* "
            "settings hold. Leave these out."
        )


def _example(text: str, kind: str) -> TaskExample:
    if kind == "tagging":
        words = tuple(text.split())
        return TaggedSentence("question", words, ("O",) * len(words))
    if kind == "relation":
        plain, head, tail = marked_text(text, "question")
        return RelationMention("question", plain, head, tail, "")
    return LabelledText("question", text, "")
