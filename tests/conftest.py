"""Fixtures shared by all tests: a hermetic environment, and a tiny world small enough to train in seconds.

The tiny world is 24 films with one sentence each, questions about who made them, a word tokenizer, and builders of
models with one layer of 16 dimensions. Everything is made from code, so an expected value never hides in a file.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the default tier never asks a network
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
os.environ["USE_LIBUV"] = "0"

import hypothesis
import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.training.callbacks import InterruptCallback, RandomStateCallback
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.objectives import MarginalObjective, Objective
from rag_lightning.training.optim import OptimSettings
from rag_lightning.training.reindex import ReindexCallback

hypothesis.settings.register_profile("rag_lightning", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("rag_lightning")

TITLES = ("Amber Bridge Copper Dawn Ember Forest Glass Harbour Iron Jade Kite Lantern Marble North Ocean Paper Quartz "
          "River Silver Tower Umber Velvet Winter Yellow").split()  # fmt: skip
FIRST = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
LAST = ("Ash", "Birch", "Cedar", "Dogwood")


THIRD_PARTY_WARNINGS = (
    # Lightning's advice on settings that a tiny run has on purpose
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.*frozen modules? in eval mode:UserWarning",
    "ignore:Found .* module.s. in eval mode at the start of training:UserWarning",
    "ignore:GPU available but not used:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except these, which this package cannot mend."""
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves no Hydra, signal handler or thread setting of one test to the next."""
    import signal

    handler = signal.getsignal(signal.SIGINT)
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    for name in (
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "PL_GLOBAL_SEED",
        "RAG_LIGHTNING_COMMAND",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------- the tiny world


@dataclass(frozen=True)
class TinyWorld:
    """Where the tiny world's files are."""

    root: Path
    passages: Path
    train: Path
    validation: Path
    test: Path
    tokenizer: Path


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def json_lines() -> Callable[[Path, Sequence[dict[str, Any]]], Path]:
    """Returns the writer of JSON lines."""
    return write_lines


@pytest.fixture(scope="session")
def tiny_passages() -> list[dict[str, Any]]:
    """The 24 films: title, maker, year."""
    return [
        {
            "id": f"film-{number}",
            "title": title,
            "text": f"{title} was made by {FIRST[number % 6]} {LAST[number // 6]}. It came out in {1950 + number}.",
        }
        for number, title in enumerate(TITLES)
    ]


@pytest.fixture(scope="session")
def tiny_questions() -> list[dict[str, Any]]:
    """One question for each film; two accepted answers each."""
    return [
        {
            "id": f"q-{number}",
            "question": f"who made {title}",
            "answers": [f"{FIRST[number % 6]} {LAST[number // 6]}", LAST[number // 6]],
            "positive_passage_ids": [f"film-{number}"],
        }
        for number, title in enumerate(TITLES)
    ]


@pytest.fixture(scope="session")
def tiny_world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_passages: list[dict[str, Any]],
    tiny_questions: list[dict[str, Any]],
) -> TinyWorld:
    """The files: 13 questions to train on (an odd number), 5 to validate, 5 to test."""
    root = tmp_path_factory.mktemp("tiny_world")
    texts = [f"{row['title']} / {row['text']}" for row in tiny_passages]
    tokenizer = train_word_tokenizer(texts + [f" // {row['question']}" for row in tiny_questions], vocab_size=300)
    tokenizer.save_pretrained(root / "tokenizer")
    return TinyWorld(
        root=root,
        passages=write_lines(root / "passages.jsonl", tiny_passages),
        train=write_lines(root / "train.jsonl", tiny_questions[:13]),
        validation=write_lines(root / "validation.jsonl", tiny_questions[13:18]),
        test=write_lines(root / "test.jsonl", tiny_questions[18:23]),
        tokenizer=root / "tokenizer",
    )


ModelBuilder = Callable[..., RagModel]


@pytest.fixture(scope="session")
def tiny_encoder(tiny_world: TinyWorld) -> Callable[..., BiEncoder]:
    """Returns a builder of one-layer BERT towers: ``tiny_encoder(dropout=0.0, shared=False, tokenizer=None)``."""

    def build(*, dropout: float = 0.0, shared: bool = False, tokenizer: str | None = None) -> BiEncoder:
        settings = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }
        place = tokenizer if tokenizer is not None else str(tiny_world.tokenizer)
        return BiEncoder.from_config(
            model_type="bert", settings=settings, tokenizer=place, shared=shared, max_passage_tokens=40
        )

    return build


@pytest.fixture(scope="session")
def tiny_generator(tiny_world: TinyWorld) -> Callable[..., Seq2SeqGenerator]:
    """Returns a builder of 1+1-layer BARTs: ``tiny_generator(dropout=0.0, tokenizer=None)``."""

    def build(*, dropout: float = 0.0, tokenizer: str | None = None) -> Seq2SeqGenerator:
        settings = {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 80,
            "dropout": dropout,
            "attention_dropout": dropout,
        }
        place = tokenizer if tokenizer is not None else str(tiny_world.tokenizer)
        return Seq2SeqGenerator.from_config(model_type="bart", settings=settings, tokenizer=place)

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_encoder: Callable[..., BiEncoder], tiny_generator: Callable[..., Seq2SeqGenerator]) -> ModelBuilder:
    """Returns a builder of seeded models; K = 3."""

    def build(
        *,
        seed: int = 0,
        dropout: float = 0.0,
        shared: bool = False,
        num_passages: int = 3,
        tokenizer: str | None = None,
    ) -> RagModel:
        torch.manual_seed(seed)
        encoder = tiny_encoder(dropout=dropout, shared=shared, tokenizer=tokenizer) if num_passages > 0 else None
        return RagModel(
            encoder=encoder,
            generator=tiny_generator(dropout=dropout, tokenizer=tokenizer),
            prompt=Prompt(max_passage_tokens=40, max_tokens=64),
            settings=RagSettings(num_passages=num_passages, temperature=0.1, max_target_tokens=8),
            decoding_options=DecodingOptions(max_new_tokens=6),
        )

    return build


# ---------------------------------------------------------------------- training in it


class Recorder(L.Callback):
    """Keeps what each optimiser step and each micro-batch logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.snapshots: list[str] = []
        self.ages: list[float] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.losses.append(float(metrics["train/loss"]))
        self.steps.append(trainer.global_step)
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        if "index/age_steps" in metrics:
            self.ages.append(float(metrics["index/age_steps"]))
        dense = trainer.datamodule.dense
        if dense is not None:
            self.snapshots.append(dense.snapshot_id)


@dataclass
class TinyRun:
    """A module, its data and a trainer, ready to fit."""

    module: RagLightningModule
    data: RagDataModule
    trainer: L.Trainer
    recorder: Recorder

    def fit(self, checkpoint: str | Path | None = None) -> "TinyRun":
        path = str(checkpoint) if checkpoint is not None else None
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=path, weights_only=True)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.module.model.state_dict().items()}


@pytest.fixture
def tiny_run(tiny_world: TinyWorld, tiny_model: ModelBuilder, tmp_path: Path) -> Callable[..., TinyRun]:
    """Returns a builder of runs.

    ``tiny_run(model=…, objective=…, optim={…}, data={…}, module={…}, schedule=…, callbacks=[…], **trainer settings)``;
    by default RAG-Token trains all parts but the passage encoder for 4 steps of 4 questions, without validation.
    """
    runs = 0

    def build(
        *,
        model: RagModel | None = None,
        objective: Objective | None = None,
        optim: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        module: dict[str, Any] | None = None,
        schedule: str | int | None = None,
        reindex: dict[str, Any] | None = None,
        callbacks: Sequence[L.Callback] = (),
        index_dir: Path | None = None,
        **trainer: Any,
    ) -> TinyRun:
        nonlocal runs
        runs += 1
        model = model if model is not None else tiny_model()
        objective = objective if objective is not None else MarginalObjective(kind="rag_token")
        rates = {"lr_query_encoder": 1e-2, "lr_passage_encoder": 1e-2, "lr_generator": 1e-2}
        lightning_module = RagLightningModule(
            model=model,
            objective=objective,
            optim=OptimSettings(**{**rates, **(optim or {})}),
            **{"recall_at": (1, 3), **(module or {})},
        )
        settings = {
            "passages": str(tiny_world.passages),
            "train": str(tiny_world.train),
            "validation": None,
            "test": None,
            "batch_size": 4,
            "eval_batch_size": 4,
            "cache_dir": str(tiny_world.root / "cache"),
            "index_dir": str(index_dir if index_dir is not None else tmp_path / f"index-{runs}"),
            "progress": False,
        }
        datamodule = RagDataModule(**{**settings, **(data or {})})
        datamodule.bind(
            model,
            train_kind=objective.examples,
            eval_kind=objective.eval_examples,
            retrieves=objective.reads == "retrieved",
            num_negatives=objective.num_negatives,
            cross_process=objective.cross_process,
        )
        recorder = Recorder()
        usual = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **({} if datamodule.paths["validation"] is not None else {"limit_val_batches": 0}),
            "use_distributed_sampler": False,
            "default_root_dir": str(tmp_path),
        }
        own = [
            ReindexCallback(schedule=schedule, **(reindex or {})),
            RandomStateCallback(),
            recorder,
            InterruptCallback(),
        ]
        torch.manual_seed(1)  # dropout; the same in every run
        return TinyRun(
            lightning_module, datamodule, L.Trainer(**{**usual, **trainer}, callbacks=[*own, *callbacks]), recorder
        )

    return build


# ---------------------------------------------------------------------- the command line in it


@pytest.fixture(scope="session")
def tiny_model_overrides(tiny_world: TinyWorld) -> list[str]:
    """Command-line settings of a tiny random model: word vectors and a 1+1-layer BART of 16 dimensions, K = 3."""
    small = "d_model=16 encoder_layers=1 decoder_layers=1 encoder_attention_heads=2 decoder_attention_heads=2"
    small += " encoder_ffn_dim=24 decoder_ffn_dim=24 max_position_embeddings=80"
    return [
        "encoder=word_embeddings",
        f"encoder.tokenizer={tiny_world.tokenizer}",
        "encoder.settings.hidden_size=16",
        "generator=bart_tiny",
        f"generator.tokenizer={tiny_world.tokenizer}",
        *(f"generator.settings.{setting}" for setting in small.split()),
        "model.num_passages=3",
        "model.prompt.max_passage_tokens=40",
        "model.prompt.max_tokens=64",
    ]


@pytest.fixture(scope="session")
def tiny_data_overrides(tiny_world: TinyWorld) -> list[str]:
    """Command-line settings of the tiny world's files."""
    return [
        "data=base",
        f"data.passages={tiny_world.passages}",
        f"data.train={tiny_world.train}",
        f"data.validation={tiny_world.validation}",
        f"data.test={tiny_world.test}",
        "data.batch_size=4",
        "data.eval_batch_size=4",
        f"paths.cache_dir={tiny_world.root / 'cache'}",
        "decoding.max_new_tokens=6",
        "trainer.enable_progress_bar=false",
    ]


def run_command(command: str, folder: Path, *arguments: str) -> None:
    """Runs ``rag-lightning COMMAND …`` in this process; what Hydra writes goes to ``folder``."""
    from rag_lightning.cli.__main__ import main

    before = sys.argv
    place = "hydra.sweep.dir" if "-m" in arguments else "hydra.run.dir"
    quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none", f"{place}={folder}")
    sys.argv = ["rag-lightning", command, *arguments, *quiet]
    try:
        main()
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def cli() -> Callable[..., None]:
    """Returns :func:`run_command`: ``cli(command, folder, *arguments)``."""
    return run_command


@pytest.fixture(scope="session")
def tiny_train(tiny_model_overrides: list[str], tiny_data_overrides: list[str]) -> list[str]:
    """Command-line settings of a two-step training in the tiny world, which draws no pictures: they take a second."""
    return ["debug=fast", *tiny_model_overrides, *tiny_data_overrides, "tracking.plots=false"]
