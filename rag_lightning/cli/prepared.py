"""``task=multi30k`` and its like: a data set becomes files before the run that trains on them is built."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rag_lightning.cli.build import instantiate
from rag_lightning.corpora.generation.prepared import Preparation, keep, keep_tokenizer
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import CheckpointError, DataError
from rag_lightning.rag import RagModel
from rag_lightning.text.tagging import check_language

logger = logging.getLogger(__name__)
NUM_SAMPLED = 500  # questions and passages whose tokens are looked at


FOUND_BY_THE_RUN = ("prepared", "tokenizer")
"""Settings of ``task`` that :func:`with_prepared` gives their values."""


def prepares(config: DictConfig) -> bool:
    """Whether the run's task is a data set to write texts for; else it has heads, or no task at all."""
    return config.get("task") is not None and config.task.get("prepare") is not None


def with_prepared(config: DictConfig, *, resumed: bool = False) -> DictConfig:
    """Returns the configuration with ``task.prepared`` and ``task.tokenizer`` naming folders that are there.

    ``data.passages``, ``data.train`` and so on point into them unless the command line says otherwise. Each process of
    a run calls it: one prepares, the others wait. A sweep finds the same files again, and so must a resumed run.

    Raises:
        CheckpointError: A resumed run would read other files or another vocabulary than it began with.
        MissingFileError: A file of the data set is missing.
        DataError: A line of it is bad.
    """
    assert config.task.folder  # or it is told by its own name
    before = {name: config.task.get(name) for name in FOUND_BY_THE_RUN} if resumed else {}
    preparation = instantiate(config.task.prepare)
    assert isinstance(preparation, Preparation)
    folder = keep(preparation, config.paths.cache_dir)
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    # as interpolations, since where caches lie may be read from the environment, which no run folder is to learn
    config.task.prepared = f"${{paths.cache_dir}}/prepared/{folder.name}"
    if config.task.vocabulary is not None:
        tokenizer = keep_tokenizer(folder, **config.task.vocabulary)
        config.task.tokenizer = f"${{paths.cache_dir}}/prepared/{tokenizer.name}"
    for name, place in before.items():
        if place is not None and Path(place).name != Path(config.task[name]).name:
            raise CheckpointError(
                f"task.{name}: expected {Path(place).name}, which the run began with, came "
                f"{Path(config.task[name]).name}: the data set's files or task.prepare.* have changed since. Put them "
                "back, or start a new run."
            )
    return config


def ensure_prepared(config: DictConfig | None) -> None:
    """Prepares again what a finished run trained on, where its cache was cleared."""
    if config is not None and prepares(config) and not Path(config.task.prepared).is_dir():
        with_prepared(config)


def check_languages(config: DictConfig, model: RagModel) -> None:
    """Reports the share of unknown tokens in a sample of what is trained on, and refuses texts of another language.

    Raises:
        DataError: The generator's or the query encoder's tokenizer does not know them; names it and the share.
    """
    tokenizers = {"generator": model.generator.text_tokenizer}
    if model.encoder is not None:
        tokenizers["encoder"] = model.encoder.tokenizer
    for part, tokenizer in tokenizers.items():
        try:
            share = check_language(_sample(config), tokenizer, allow=config.task.allow_unknown)
        except DataError as error:
            raise DataError(f"{part}: {error} (task.allow_unknown=true)") from error
        logger.info("%s: %.2f %% of the tokens of a sample are unknown to it", part, 100 * share)


def _sample(config: DictConfig) -> Iterator[str]:
    for question in islice(read_questions(config.data.train), NUM_SAMPLED):
        yield question.question
        yield from question.answers[:1]
    if config.data.passages is not None:
        for passage in islice(PassageCorpus.read(config.data.passages), NUM_SAMPLED):
            yield passage.text
