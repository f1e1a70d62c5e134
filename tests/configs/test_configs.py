"""Every YAML file under ``conf/`` is found, composed and instantiated; one without coverage fails.

Files that would download a model get a tiny saved one of the same type in its place; trainers that need a GPU are built
as far as they can be without one, and must fail for that reason alone.
"""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    PreTrainedTokenizerFast,
)

from rag_lightning.benchmark.parts import PARTS
from rag_lightning.cli.benchmark import plan_of
from rag_lightning.cli.build import (
    build_run,
    build_task_run,
    build_trainer,
    build_walk,
    check_task_choices,
    decoding_of,
    instantiate,
    recordable,
)
from rag_lightning.cli.hydra_app import conf_dir, register_resolvers
from rag_lightning.cli.prepared import check_languages, prepares, with_prepared
from rag_lightning.cli.sweeping.grid import GridSweeper
from rag_lightning.cli.sweeping.search import SearchSweeper
from rag_lightning.corpora.fetch.sources import read_sources
from rag_lightning.corpora.passages import resolve
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError, MissingFileError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.build import build_index
from rag_lightning.rag_parts import RagSettings
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.objectives import KnowledgeDistillation
from rag_lightning.training.optim import OptimSettings
from rag_lightning.training.reindex import ReindexCallback
from rag_lightning.training.study import PruningCallback
from rag_lightning.training.tasks.callbacks import TaskOutputCallback
from rag_lightning.training.tasks.data import TaskDataModule
from rag_lightning.training.tasks.module import TaskLightningModule
from rag_lightning.training.tasks.walking import WalkCallback
from rag_lightning.training.tracking import TrackingCallback
from tests.generation_files import write_generation
from tests.labelled_files import write_labelled

CONF = conf_dir()
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
NUM_FILES = 254
Compose = Callable[..., DictConfig]

REPLACEMENTS = {
    "distill/posterior": ("distill.teacher={teacher}",),
    "distill/soft": ("distill.teacher={teacher}",),
    "encoder/bert_base": ("encoder.source={bert}",),
    "encoder/contriever": ("encoder.source={bert}",),
    "encoder/realm": ("encoder.source={bert}",),
    "encoder/dpr": ("encoder.source={dpr_query}", "encoder.passage_source={dpr_passage}"),
    "encoder/films": ("encoder.source={bert}", "encoder.tokenizer={bert}"),
    "encoder/hf": ("encoder.source={bert}",),
    "encoder/minilm": ("encoder.source={bert}",),
    "encoder/own_vocabulary": ("encoder.tokenizer={tokenizer}",),
    "encoder/word_embeddings": ("encoder.tokenizer={tokenizer}",),
    "experiment/films/student_answers": ("data.answers_from=F",),
    "experiment/films/student_posterior": ("distill.teacher={teacher}",),
    "experiment/films/student_soft": ("distill.teacher={teacher}",),
    "generator/bart_base": ("generator.source={bart}",),
    "generator/bart_large": ("generator.source={bart}",),
    "generator/bart_tiny": ("generator.tokenizer={tokenizer}",),
    "experiment/causal": ("generator.source={llama}",),
    "generator/causal_hf": ("generator.source={llama}",),
    "generator/films": ("generator.source={bart}", "generator.tokenizer={tokenizer}"),
    "generator/films_small": ("generator.source={two_layers}", "generator.tokenizer={two_layers}"),
    "generator/hf": ("generator.source={bart}",),
    "generator/llama_tiny": ("generator.tokenizer={tokenizer}",),
    "generator/minilm2minilm": ("generator.encoder={bert}", "generator.decoder={bert}"),
    "generator/own_vocabulary": ("generator.tokenizer={tokenizer}",),
    "generator/t5_base": ("generator.source={t5}",),
    "generator/t5_large": ("generator.source={t5}",),
    "generator/t5_large_lm": ("generator.source={t5}",),
    "generator/t5_tiny": ("generator.tokenizer={tokenizer}",),
    "logger/wandb": ("logger.offline=true",),
    "retriever_loss/adist": ("objective=fid",),
    "retriever_loss/cross_encoder": (
        "objective.retriever_losses.cross_encoder.cross_encoder.source={cross_encoder}",
        "objective.retriever_losses.cross_encoder.cross_encoder.max_tokens=64",
    ),
}
EXTRAS = {
    "index/faiss_flat": "faiss",
    "index/faiss_hnsw": "faiss",
    "index/faiss_ivf": "faiss",
    "mine": "bm25s",
    "retriever/hybrid_convex": "bm25s",
    "retriever/hybrid_gate": "bm25s",
    "retriever/hybrid_rrf": "bm25s",
    "retriever/sparse": "bm25s",
    "peft/lora": "peft",
    "hydra/launcher/slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher/workers": "hydra_plugins.hydra_joblib_launcher",
    "logger/wandb": "wandb",
    "logger/tensorboard": "tensorboard",
    "logger/csv_tensorboard": "tensorboard",
    "logger/mlflow": "mlflow",
}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "made", "film"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def sources(
    tmp_path_factory: pytest.TempPathFactory, tiny_world: Any, tiny_generator: Any, tiny_model: Any
) -> dict[str, Path]:
    """Tiny saved models of the types that the configurations name."""
    root = tmp_path_factory.mktemp("sources")
    tokenizer = bert_tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": 80}
    BertModel(BertConfig(**size)).save_pretrained(root / "bert")
    DPRQuestionEncoder(DPRConfig(**size)).save_pretrained(root / "dpr_query")
    DPRContextEncoder(DPRConfig(**size)).save_pretrained(root / "dpr_passage")
    BertForSequenceClassification(BertConfig(**size, num_labels=1)).save_pretrained(root / "cross_encoder")
    for name in ("bert", "dpr_query", "dpr_passage", "cross_encoder"):
        tokenizer.save_pretrained(root / name)
    bart = tiny_generator()
    bart.model.save_pretrained(root / "bart")
    bart.tokenizer.save_pretrained(root / "bart")
    small = {"d_model": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24}
    t5 = AutoConfig.for_model("t5", **small, vocab_size=len(bart.tokenizer), decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(root / "t5")
    bart.tokenizer.save_pretrained(root / "t5")
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = AutoConfig.for_model("llama", **narrow, num_key_value_heads=2, vocab_size=len(bart.tokenizer))
    AutoModelForCausalLM.from_config(llama).save_pretrained(root / "llama")
    bart.tokenizer.save_pretrained(root / "llama")
    tiny_model().save_pretrained(root / "teacher")
    two = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    two |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 80}
    Seq2SeqGenerator.from_config(model_type="bart", settings=two, tokenizer=str(tiny_world.tokenizer)).save(
        root / "two_layers"
    )
    return {path.name: path for path in root.iterdir()} | {"tokenizer": tiny_world.tokenizer}


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """Returns ``compose(primary, *overrides)``."""
    register_resolvers()

    def run(primary: str, *overrides: str, with_hydra: bool = False) -> DictConfig:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return hydra.compose(primary, list(overrides), return_hydra_config=with_hydra)

    return run


@pytest.fixture
def tiny_overrides(
    tiny_model_overrides: list[str], tiny_data_overrides: list[str], tmp_path: Path, sources: dict[str, Path]
) -> Callable[..., list[str]]:
    """Returns ``tiny_overrides(group, name)``: the tiny run's settings with one group's choice in their place."""

    def choose(group: str | None = None, name: str = "") -> list[str]:
        usual = [*tiny_model_overrides, *tiny_data_overrides, f"paths.run_dir={tmp_path / 'run'}"]
        if group is None:
            return usual
        dropped = {group}
        if (group, name) == ("objective", "closed_book") or name.endswith("films/closed_book"):
            dropped.add("model.num_passages")
        if (group, name) == ("experiment", "causal"):
            dropped.add("generator")
        if group == "paths":
            dropped.add("paths.run_dir")
        kept = [text for text in usual if not any(text.startswith((f"{head}=", f"{head}.")) for head in dropped)]
        if group == "trainer":
            kept.append("trainer.enable_progress_bar=false")
        chosen = [text.format(**sources) for text in REPLACEMENTS.get(f"{group}/{name}", ())]
        return [*kept, f"{group}={name}", *chosen]

    return choose


def built(config: DictConfig) -> tuple[RagLightningModule, RagDataModule, L.Trainer]:
    """Builds everything that a training is made of."""
    module, data = build_run(config)
    assert isinstance(module, RagLightningModule)
    assert isinstance(data, RagDataModule)
    trainer = build_trainer(config, config.callbacks)
    assert any(isinstance(callback, ReindexCallback) for callback in trainer.callbacks)
    assert any(isinstance(callback, TrackingCallback) for callback in trainer.callbacks)
    return module, data, trainer


def test_every_file_is_found() -> None:
    assert len(FILES) == NUM_FILES, "a YAML file came or went: cover it below, then change NUM_FILES"
    covered = {*PRIMARY, *GROUPS}
    assert {file.split("/")[0] for file in FILES} == covered, "a folder or primary file without a check, or none left"


def test_every_replacement_and_extra_names_a_file() -> None:
    assert {f"{name}.yaml" for name in [*REPLACEMENTS, *EXTRAS]} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_instantiates(file: str, compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    name = file.removesuffix(".yaml")
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"needs the extra {EXTRAS[name]!r}")
    if "/" not in name:
        PRIMARY[file](compose, tiny_overrides, tmp_path)
        return
    group, choice = name.split("/", 1)
    GROUPS[group](choice, compose, tiny_overrides)


# ---------------------------------------------------------------------- primary configurations


def check_train(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    config = compose("train", *tiny_overrides())
    module, data, trainer = built(config)
    assert module.model.settings.num_passages == 3
    assert data.batch_size == 4
    assert trainer.max_steps == 200
    assert recordable(config)["data"]["index_dir"] == str(tmp_path / "run" / "index")


def check_evaluate(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    assert compose("evaluate", "checkpoint=RUN").index.factory is None, "the run's own index"
    config = compose("evaluate", "checkpoint=RUN", f"paths.run_dir={tmp_path}", "data.test=F", "index=exact")
    data = instantiate(config.data)
    assert data.paths == {"train": None, "validation": None, "test": "F"}
    trainer = build_trainer(config, config.callbacks)
    assert trainer.loggers == []
    settings, options = RagSettings(), DecodingOptions()
    assert decoding_of(settings, options, config.decoding, config.num_passages) == (settings, options)


def check_index(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    encoder = [text for text in tiny_overrides() if text.startswith("encoder")]
    config = compose("index", "action=build", f"paths.run_dir={tmp_path}", *encoder)
    assert isinstance(instantiate(config.encoder), BiEncoder)
    assert config.index.factory == "exact"


def check_predict(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    config = compose("predict", "checkpoint=RUN", "question='who?'", "decoding.num_beams=4", "num_passages=7")
    settings, options = decoding_of(RagSettings(), DecodingOptions(), config.decoding, config.num_passages)
    assert settings == replace(RagSettings(), num_passages=7)
    assert options == replace(DecodingOptions(), num_beams=4)


def check_report(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    config = compose("report", "runs=outputs/x", "order=[b,a]")
    told = OmegaConf.to_container(config, resolve=True)
    assert isinstance(told, dict)
    off = "curve paper rows column compare findings num_seeds errors plots page".split()
    assert [told.pop(name) for name in off] == [None] * 7 + [False] * 3
    unset = "predictions questions passages output metrics num_resamples num_heatmaps page_passages".split()
    assert [told.pop(name) for name in unset] == [None] * 8, "what is null and given is refused where nothing reads it"
    assert told == {"runs": "outputs/x", "order": ["b", "a"]}


def check_mine(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    config = compose("mine", "passages=P", "questions=Q", "output=F.jsonl", f"paths.run_dir={tmp_path}")
    assert (config.miner, config.num_negatives, config.snapshot) == ("sparse", 10, None)


def check_benchmark(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    plan = plan_of(OmegaConf.to_container(compose("benchmark", "parts=[training_step_token]"), resolve=True))
    assert (plan.shape.name, plan.shape.num_passages, plan.shape.batch_size) == ("cpu", 5, 8)
    assert list(plan.parts) == ["training_step_token"]
    assert len(plan.tables.passages) == len(plan.tables.answers) == 21


def check_shape(name: str, compose: Compose, tiny_overrides: Any) -> None:
    plan = plan_of(OmegaConf.to_container(compose("benchmark", f"shape={name}"), resolve=True))
    assert plan.shape.name == name
    assert plan.parts == PARTS


def check_retriever(name: str, compose: Compose, tiny_overrides: Any) -> None:
    config = compose("train", *tiny_overrides("retriever", name))
    module, data, _ = built(config)
    settings = {key: value for key, value in config.retriever.items() if key != "_target_"}
    assert {key: getattr(data.retriever_settings, key) for key in settings} == settings
    assert (module.model.encoder is None) == (name == "sparse")
    assert (module.model.fusion is None) == (not name.startswith("hybrid"))


def check_data_command(compose: Compose, tiny_overrides: Any, tmp_path: Path) -> None:
    config = compose("data", "action=fetch", "names=[nq_open]", f"output={tmp_path}")
    assert "nq_open" in read_sources(OmegaConf.to_container(config.sources))


PRIMARY = {
    "benchmark.yaml": check_benchmark,
    "data.yaml": check_data_command,
    "mine.yaml": check_mine,
    "train.yaml": check_train,
    "evaluate.yaml": check_evaluate,
    "index.yaml": check_index,
    "predict.yaml": check_predict,
    "report.yaml": check_report,
}


# ---------------------------------------------------------------------- groups


def check_choice(group: str) -> Callable[[str, Compose, Any], None]:
    """Returns the check of a group whose choices build a whole run."""

    def check(name: str, compose: Compose, tiny_overrides: Any) -> None:
        if (group, name) == ("callbacks", "task"):
            return  # built with every task
        built(compose("train", *tiny_overrides(group, name)))

    return check


def check_paths(name: str, compose: Compose, tiny_overrides: Any) -> None:
    config = compose("train", *tiny_overrides("paths", name), with_hydra=True)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.runtime.output_dir = "somewhere"
    HydraConfig.instance().set_config(config)
    assert config.paths.run_dir == "somewhere"
    assert config.data.cache_dir == config.paths.cache_dir


def check_data(name: str, compose: Compose, tiny_overrides: Any) -> None:
    files = [text for text in tiny_overrides() if text.startswith("data.")] if name == "base" else []
    _, data, _ = built(compose("train", *tiny_overrides("data", name), *files))
    for path in (data.passages, *data.paths.values()):
        assert path is not None
        assert resolve(path).is_file()


def check_index_choice(name: str, compose: Compose, tiny_overrides: Any) -> None:
    if name == "own":  # of evaluate: see check_evaluate, and tests/pipelines/test_cli.py
        return
    config = compose("train", *tiny_overrides("index", name))
    _, data, _ = built(config)
    settings = dict(config.index.items())
    assert {key: getattr(data.index_settings, key) for key in settings} == settings  # each reaches the constructor
    vectors_ND = torch.randn(2600, 8, generator=torch.Generator().manual_seed(0))
    settings = {"nprobe": config.index.nprobe, "ef_search": config.index.ef_search}
    index = build_index(vectors_ND, factory=config.index.factory, **settings)
    scores_BK, ids_BK = index.search(vectors_ND[:4] * 100, 3)
    assert ids_BK.shape == scores_BK.shape == (4, 3)
    assert index.num_vectors == 2600


def check_optim(name: str, compose: Compose, tiny_overrides: Any) -> None:
    if name == "heads":
        name = "default"  # built with every task
    config = compose("train", *tiny_overrides("optim", name))
    module, _, _ = built(config)
    assert module.optim == OptimSettings(**{k: v for k, v in config.optim.items() if k != "_target_"})


def check_trainer(name: str, compose: Compose, tiny_overrides: Any) -> None:
    config = compose("train", *tiny_overrides("trainer", name))
    if name in ("base", "cpu"):
        assert type(built(config)[2].strategy).__name__ == "SingleDeviceStrategy"
        return
    strategies = {"gpu": ("SingleDeviceStrategy", 1), "ddp": ("DDPStrategy", 2), "slurm": ("DDPStrategy", 2)}
    strategy, devices = strategies.get(name, ("", 2))
    assert config.trainer.accelerator == "gpu"
    if not torch.cuda.is_available():
        with pytest.raises(Exception, match=r"No supported gpu backend found") as caught:
            built(config)
        assert isinstance(caught.value.__cause__, MisconfigurationException)
    on_cpu = compose("train", *tiny_overrides("trainer", name), "trainer.accelerator=cpu", f"trainer.devices={devices}")
    if name in strategies:
        assert type(built(on_cpu)[2].strategy).__name__ == strategy
        return
    reason = {"fsdp": "fsdp` requires a GPU", "deepspeed": "DeepSpeed|deepspeed"}[name]
    with pytest.raises(Exception, match=reason):
        built(on_cpu)
    if name == "fsdp":
        assert type(instantiate(config.trainer.strategy)).__name__ == "FSDPStrategy"


RECIPES = ("rag", "rag_end2end", "realm", "fid", "atlas", "dpr")
RECIPE_ON_A_CPU = ("trainer=cpu", "trainer.devices=1", "trainer.precision=32-true", "task.folder=D")


def check_experiment(name: str, compose: Compose, tiny_overrides: Any) -> None:
    if name.startswith("bert/"):
        return  # heads: test_the_ner_recipe_is_the_published_one
    recipe = RECIPE_ON_A_CPU if name.split("/")[0] in RECIPES else ()
    given = [text for text in tiny_overrides("experiment", name) if not (recipe and text.startswith("decoding."))]
    given = [text for text in given if not (name == "rag/table2_bart" and text == "model.num_passages=3")]
    config = compose("train", *given, *recipe)
    module, _, trainer = built(config)
    assert trainer.max_steps == config.trainer.max_steps
    header = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"rag-lightning train experiment={name}" in header, "an experiment's header gives its command"
    assert config.run_name == name.replace("/", "_")
    if "closed_book" in name or name == "rag/table2_bart":
        assert module.model.encoder is None
    if name in ("films/student_soft", "films/student_posterior"):
        assert isinstance(module.objective, KnowledgeDistillation)
    if name == "films/student_posterior":
        assert module.trained == ("query_encoder",)


@pytest.fixture
def task_overrides(tmp_path: Path, sources: dict[str, Path]) -> list[str]:
    """Settings of a task's run with tiny towers and tiny files of every data set."""
    tiny = f"reader=hf reader.source={sources['bert']} reader.max_tokens=32 encoder=hf encoder.source={sources['bert']}"
    tiny += f" task.folder={write_labelled(tmp_path / 'labelled')} task.data.allow_unknown=true"
    return [*tiny.split(), f"paths.run_dir={tmp_path / 'run'}"]


def built_task(config: DictConfig) -> tuple[TaskLightningModule, TaskDataModule, L.Trainer]:
    """Builds everything that a training of heads is made of."""
    module, data = build_task_run(config)
    walks = [build_walk(config, module, data)] if config.get("curriculum") is not None else []
    trainer = build_trainer(config, config.callbacks, walks)
    assert any(isinstance(callback, TaskOutputCallback) for callback in trainer.callbacks)
    return module, data, trainer


LABELLED = sorted(path.stem for path in (CONF / "labelled").glob("*.yaml"))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("num_passages", [0, 2])
def test_every_task_builds_plain_and_with_retrieval(
    name: str, num_passages: int, compose: Compose, task_overrides: list[str]
) -> None:
    config = compose("train", f"task={name}", *task_overrides, f"task.retrieval.num_passages={num_passages}")
    module, data, _ = built_task(config)
    assert list(module.tasks) == [name]
    assert (module.model.encoder is None) == (num_passages == 0)
    assert {"train", "validation", "test"} == set(data.examples[name])
    assert all(splits for splits in data.examples[name].values())
    assert config.run_name == name
    task = module.tasks[name]
    assert config.monitor == f"val/{task.monitor}"
    metric = module.metrics[name]
    if task.kind == "tagging":
        tags = [list(one.tags) for one in data.examples[name]["train"]]
        metric.update(tags, tags)
    else:
        metric.update(torch.arange(2), torch.arange(2))
    assert task.monitor in metric.compute()


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("retriever=sparse", "retriever"),
        ("retriever=rerank_live", "retriever"),
        ("reindex=periodic", "reindex"),
        ("peft=lora", "peft"),
        ("retriever_loss=pdist", "retriever_loss"),
        ("+optim.checkpoint_activations=[query_encoder]", "optim.checkpoint_activations"),
        ("+optim.train_passage_encoder=true", "optim.train_passage_encoder"),
    ],
)
def test_choices_that_heads_would_ignore_are_refused(
    choice: str, named: str, compose: Compose, task_overrides: list[str]
) -> None:
    config = compose("train", "task=sst2", choice, *task_overrides)
    with pytest.raises(ConfigError, match=f"task: expected choices that heads take, got {re.escape(named)}"):
        build_task_run(config)


def test_what_only_generators_read_is_refused_of_heads(compose: Compose, task_overrides: list[str]) -> None:
    config = compose("train", "task=sst2", *task_overrides)
    given = [
        "task=sst2",
        "generator=bart_base",
        "+model.num_passages=3",
        "data.index.nprobe=4",
        "seed=1",
        "data.train=F",
    ]
    with pytest.raises(ConfigError, match=r"got generator, model.num_passages, data.train\. Heads"):
        check_task_choices(config, given)
    check_task_choices(config, [given[0], *given[3:5]])


@pytest.mark.parametrize("policy", sorted(path.stem for path in (CONF / "curriculum" / "policy").glob("*.yaml")))
def test_every_policy_walks_over_the_tasks(policy: str, compose: Compose, task_overrides: list[str]) -> None:
    chosen = ("task=multitask", "curriculum=task_graph", f"curriculum/policy={policy}")
    config = compose("train", *chosen, *task_overrides)
    module, data, trainer = built_task(config)
    (callback,) = [one for one in trainer.callbacks if isinstance(one, WalkCallback)]
    assert list(callback.walk.graph.nodes) == list(module.tasks) == ["sst2", "ag_news", "fever", "boolq"]
    assert callback.walk.graph.activity("sst2").size == len(data.examples["sst2"]["train"])
    settings = {key: value for key, value in config.curriculum.policy.items() if key != "_target_"}
    named = {key: value for key, value in settings.items() if not key.startswith("rescale_")}
    assert {key: getattr(callback.walk.policy, key) for key in named} == named
    defaults = inspect.signature(type(callback.walk.policy)).parameters
    assert {key: defaults[key].default for key in settings} == settings, "the file and the class have the same defaults"


def test_the_augmentation_graph_walks_over_ways_to_train(compose: Compose, task_overrides: list[str]) -> None:
    config = compose("train", "task=sst2", "curriculum=augmentation_graph", *task_overrides)
    module, data, trainer = built_task(config)
    (callback,) = [one for one in trainer.callbacks if isinstance(one, WalkCallback)]
    nodes = callback.walk.graph.nodes
    assert set(nodes) == set(config.curriculum.graph.nodes)
    assert {callback.walk.graph.activity(name).size for name in nodes} == {len(data.examples["sst2"]["train"])}
    kinds = {name: [one.kind for one in activity.augment] for name, activity in module.activities.items()}
    assert kinds["masking"] == ["masking"]
    assert kinds["plain"] == []
    assert (module.activities["top"].scope, module.activities["top"].top_layers) == ("top", 2)
    assert module.activities["wide"].batches == 2


def test_further_processes_take_the_edges_that_the_first_has_measured(
    compose: Compose, task_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = "curriculum.estimate={by: gradients, num_batches: 1}"
    config = compose("train", "task=multitask", "curriculum=task_graph", estimate, *task_overrides)
    module, data = build_task_run(config)
    Path(config.paths.run_dir).mkdir(exist_ok=True)
    first = build_walk(config, module, data).walk.graph
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    data.seed = 7  # would measure others
    assert build_walk(config, module, data).walk.graph.edges == first.edges


def test_the_ner_recipe_is_the_published_one(compose: Compose, task_overrides: list[str]) -> None:
    config = compose("train", "experiment=bert/conll2003_ner", "task.folder=D")
    assert (config.reader.source, config.reader.max_tokens) == ("google-bert/bert-base-cased", 128)
    assert (config.optim.lr_reader, config.task.data.batch_size, config.trainer.max_epochs) == (2e-5, 16, 5)
    module, _, trainer = built_task(compose("train", "experiment=bert/conll2003_ner", *task_overrides))
    assert module.tasks["conll2003"].kind == "tagging"
    assert trainer.max_steps == -1


GENERATION = (
    "multi30k",
    "scitldr",
    "dialogsum",
    "dailydialog",
    "cmu_dog",
    "kdconv",
    "jeopardy",
    "cmrc2018",
    "drcd",
    "xquad",
)
IN_CHINESE = ("kdconv", "cmrc2018", "drcd")


@pytest.fixture(scope="session")
def generation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny files of every data set to generate from."""
    return write_generation(tmp_path_factory.mktemp("generation"))


@pytest.mark.parametrize("name", GENERATION)
def test_every_generation_task_builds_with_retrieval_and_plain(
    name: str, compose: Compose, generation_folder: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    text = (CONF / "task" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"#   rag-lightning train task={name} task.folder=DATA" in text, "a task's header gives its command"
    chosen = [f"task={name}", f"task.folder={generation_folder}", f"paths.run_dir={tmp_path / 'run'}"]
    chosen += [f"paths.cache_dir={tmp_path / 'cache'}"]
    if "minilm" in text:
        chosen += ["encoder=hf", f"encoder.source={sources['bert']}", "task.allow_unknown=true"]
    config = with_prepared(compose("train", *chosen))
    assert prepares(config)
    assert config.run_name == name
    module, data, trainer = built(config)
    check_languages(config, module.model)
    data.setup("fit")
    assert {"train", "validation", "test"} == set(data.questions)
    assert module.model.settings.num_passages == 5
    assert module.language == ("zh" if name in IN_CHINESE else "en")
    wanted = config.monitor.removeprefix("val/")
    assert config.sweep_metric == f"test/{wanted}"
    assert wanted in {*config.module.text_metrics, "f1"}
    assert trainer.checkpoint_callback.monitor == config.monitor
    defaults = {key: value for key, value in config.task.prepare.items() if key not in ("_target_", "folder")}
    reader = hydra.utils.get_class(config.task.prepare._target_)
    assert set(defaults) <= set(inspect.signature(reader).parameters)
    plain_run = built(with_prepared(compose("train", *chosen, "objective=closed_book")))[0]
    assert plain_run.model.encoder is None
    assert plain_run.model.prompt == module.model.prompt


def test_a_file_of_ones_own_stands_in_for_a_prepared_one(
    compose: Compose, generation_folder: Path, tmp_path: Path
) -> None:
    chosen = (
        "task=jeopardy",
        f"task.folder={generation_folder}",
        f"paths.cache_dir={tmp_path}",
        "data.test=MINE.jsonl",
    )
    config = with_prepared(compose("train", *chosen))
    assert config.data.test == "MINE.jsonl"
    assert Path(config.data.train) == Path(config.task.prepared) / "train.jsonl"
    assert Path(config.data.train).is_file()


def test_no_run_folder_learns_where_the_caches_of_the_environment_lie(
    compose: Compose, generation_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAG_LIGHTNING_CACHE", str(tmp_path / "secret"))
    chosen = ("task=jeopardy", f"task.folder={generation_folder}", f"paths.run_dir={tmp_path / 'run'}")
    record = recordable(with_prepared(compose("train", *chosen)))
    assert "secret" not in str(record)
    assert record["data"]["train"].startswith("${oc.env:RAG_LIGHTNING_CACHE,outputs/cache}/prepared/jeopardy-")


def check_dataset(name: str, compose: Compose, tiny_overrides: Any) -> None:
    """A column names its reader, which takes its settings; tests/configs/test_recipes.py prepares and runs it."""
    if name in ("base", "sample/mini"):
        return  # parts of the others
    chosen = (f"dataset={name.removeprefix('sample/mini_')}", f"scale={'mini' if '/' in name else 'paper'}")
    config = compose("train", *chosen, "task.folder=D")
    settings = {key for key in config.task.prepare if key != "_target_"}
    assert settings <= set(inspect.signature(hydra.utils.get_class(config.task.prepare._target_)).parameters)
    assert (config.task.vocabulary is None) == ("/" not in name)


def check_scale(name: str, compose: Compose, tiny_overrides: Any) -> None:
    """A size composes with a recipe; one of a row alone is found by the row's name."""
    if name.startswith("rows/"):
        row = name.removeprefix("rows/mini_")
        whole = compose("train", f"experiment={row}", "scale=mini", "task.folder=D", with_hydra=True)
        assert whole.hydra.runtime.choices["scale/rows"] == f"mini_{row}"
        return
    config = compose("train", "experiment=rag/table1_rag_token", f"scale={name}", "task.folder=D")
    assert (config.trainer.accelerator == "cpu") == (name == "mini")


def covered_elsewhere(name: str, compose: Compose, tiny_overrides: Any) -> None:
    """Choices of runs of tasks, which are built by the tests above."""
    known = {*LABELLED, *GENERATION, "base", "generation", "multitask", "minilm", "hf", "task_graph"}
    known |= {"augmentation_graph", "movielens"}  # the latter: tests/pipelines/test_recommendation_cli.py
    assert name in known or name.startswith("policy/")


def check_hydra(name: str, compose: Compose, tiny_overrides: Any) -> None:
    """Launchers and sweepers: those of ours that exist are named, and resources are as their files say."""
    group, choice = name.split("/")
    chosen = compose("train", f"hydra/{group}={choice}", with_hydra=True).hydra[group]
    if group == "sweeper":
        sweeper = {"grid": GridSweeper, "search": SearchSweeper}[choice]
        assert chosen._target_ == f"hydra_plugins.rag_lightning.{sweeper.__name__}"
        settings = {key: value for key, value in chosen.items() if key != "_target_"}
        defaults = inspect.signature(sweeper).parameters
        assert settings == {key: one.default for key, one in defaults.items()}, "file and class have the same defaults"
    elif choice == "workers":
        assert (chosen.n_jobs, chosen.pre_dispatch, chosen.batch_size) == (2, "n_jobs", "1")
        assert chosen._target_.endswith(".JoblibLauncher")
    else:
        assert (chosen.timeout_min, chosen.gpus_per_node, chosen.cpus_per_task, chosen.mem_gb) == (720, 1, 8, 64)
        assert chosen._target_.endswith(".SlurmLauncher")


def check_sweep(name: str, compose: Compose, tiny_overrides: Any) -> None:
    if name == "grid":
        whole = compose("train", with_hydra=True)
        assert whole.hydra.sweeper == compose("train", "hydra/sweeper=grid", with_hydra=True).hydra.sweeper
        return
    if name == "optuna":
        whole = compose("train", *tiny_overrides("sweep", name), with_hydra=True)
        assert whole.hydra.sweep.dir == "outputs/optuna"
        assert whole.hydra.sweeper._target_.endswith(".SearchSweeper")
        assert set(whole.hydra.sweeper.params) >= {"optim.lr_generator", "model.temperature", "model.num_passages"}
        assert (whole.monitor, whole.sweep_metric) == ("val/exact_match", "val/exact_match")
        assert whole.callbacks.checkpoint.monitor == whole.callbacks.pruning.monitor == "val/exact_match"
        del whole.hydra
        assert any(isinstance(one, PruningCallback) for one in built(whole)[2].callbacks)
        return
    if name == "recipe_optuna":
        chosen = ("experiment=rag/table6_rag_token", "dataset=webquestions", "scale=mini", "task.folder=D")
        whole = compose("train", f"sweep={name}", *chosen, with_hydra=True)
        assert whole.hydra.sweeper._target_.endswith(".SearchSweeper")
        learned = {"optim.lr_query_encoder", "optim.lr_generator", "model.temperature", "model.num_passages"}
        assert set(whole.hydra.sweeper.params) == learned
        assert whole.sweep_metric == whole.monitor == "val/exact_match", "the data set's own is of the test"
        HydraConfig.instance().set_config(whole)
        assert whole.hydra.sweep.dir == "outputs/recipe_optuna/rag_table6_rag_token/webquestions"
        return
    if name == "tasks":
        whole = compose("train", "sweep=tasks", "task=sst2", with_hydra=True)
        assert whole.hydra.sweep.dir == "outputs/tasks/sst2"
        assert dict(whole.hydra.sweeper.params) == {"seed": "0,1,2", "task.retrieval.num_passages": "0,3"}
        return
    if name == "generation":
        whole = compose("train", "sweep=generation", "task=multi30k", "task.folder=D", with_hydra=True)
        assert whole.hydra.sweep.dir == "outputs/tasks/multi30k"
        assert dict(whole.hydra.sweeper.params) == {"seed": "0,1,2", "objective": "closed_book,rag_token"}
        assert whole.data.validation is None
        return
    if name in {"reproduce/passages", "reproduce/hot_swap", "reproduce/index"}:
        check_evaluations(name, compose)
        return
    if name in {"reproduce/reader", "reproduce/end2end", "reproduce/natural_questions"}:
        check_small_reproduction(name, compose)
        return
    whole = compose("train", *tiny_overrides("sweep", name), with_hydra=True)
    params = {key: str(value).split(",") for key, value in whole.hydra.sweeper.params.items()}
    params = {key: values[:1] if key == "seed" else values for key, values in params.items()}
    assert params, "a sweep names what it sweeps"
    folders = set()
    for values in itertools.product(*params.values()):
        chosen = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        closed_book = any("closed_book" in text for text in chosen)
        usual = tiny_overrides("objective", "closed_book")[:-1] if closed_book else tiny_overrides()
        job = compose("train", *usual, f"sweep={name}", *chosen, with_hydra=True)
        folders.add(job.hydra.sweep.subdir)
        del job.hydra
        built(job)
    if name == "quickstart":
        assert whole.hydra.sweep.dir == "outputs/quickstart"
        assert folders == {"closed_book", "frozen", "joint", "joint_reindex"}
    if name == "reproduce/table6":
        rows = itertools.product(("rag_token", "rag_sequence"), ("bm25", "frozen", "joint"))
        assert folders == {f"row={objective}_{retriever},seed=0" for objective, retriever in rows}


def check_evaluations(name: str, compose: Compose) -> None:
    """A sweep of ``evaluate``: every job resolves, to a run of sweep=reproduce/table6 and to a folder of its own."""
    whole = compose("evaluate", f"sweep={name}", with_hydra=True)
    params = {key: str(value).split(",") for key, value in whole.hydra.sweeper.params.items()}
    folders, trained = set(), set()
    for values in itertools.product(*params.values()):
        chosen = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        job = compose("evaluate", f"sweep={name}", *chosen, "paths.run_dir=DIR", with_hydra=True)
        folders.add(job.hydra.sweep.subdir)
        del job.hydra
        OmegaConf.resolve(job)
        trained.add(job.checkpoint)
        if name == "reproduce/index":
            factory, settings = job.index.factory, {key: job.index[key] for key in ("nprobe", "ef_search")}
            index = build_index(
                torch.randn(2600, 8, generator=torch.Generator().manual_seed(0)), factory=factory, **settings
            )
            assert index.num_vectors == 2600
    assert len(folders) == math.prod(len(values) for values in params.values())
    rows = ("rag_token_joint", "rag_sequence_joint") if name == "reproduce/passages" else ("rag_token_joint",)
    assert trained == {f"outputs/reproduce/table6/row={row},seed={seed}" for row in rows for seed in range(3)}


def check_small_reproduction(name: str, compose: Compose) -> None:
    """A recipe's rows at a laptop's size: they differ in what the paper compares, and read with the one reader."""
    whole = compose("train", f"sweep={name}", "task.folder=DATA", with_hydra=True)
    params = {key: str(value).split(",") for key, value in whole.hydra.sweeper.params.items()}
    reader = name == "reproduce/reader"
    assert params["seed"] == (["0"] if reader else ["0", "1", "2"])
    jobs = {}
    for values in itertools.product(*({**params, "seed": ["0"]}.values())):
        chosen = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        job = compose("train", f"sweep={name}", "task.folder=DATA", *chosen, "paths.run_dir=DIR", with_hydra=True)
        jobs[job.hydra.sweep.subdir] = job
        assert job.trainer.limit_test_batches is None
        assert job.generator.get("source") == (None if reader else "outputs/reproduce/reader/seed=0/model/generator")
        assert job.objective._target_.endswith(".Denoising") == reader
    if reader:
        (only,) = jobs.values()
        assert only.encoder.tokenizer == only.task.tokenizer == only.generator.tokenizer
        return
    passages = [job.optim.train_passage_encoder for job in jobs.values()]
    queries = [job.optim.train_query_encoder for job in jobs.values()]
    kinds = [job.retriever.kind for job in jobs.values()]
    if name == "reproduce/end2end":
        assert list(jobs) == ["row=squad_original,seed=0", "row=squad_end2end,seed=0"]
        assert (passages, queries, kinds) == ([False, True], [True, True], ["dense", "dense"])
        assert [job.reindex.get("schedule") for job in jobs.values()] == [None, 20]
    else:
        assert (passages, queries, kinds) == ([False] * 3, [False, False, True], ["sparse", "dense", "dense"])
        files = [OmegaConf.to_container(job, resolve=False)["data"] for job in jobs.values()]
        assert {file["test"] for file in files} == {"${task.prepared}/validation.jsonl"}
        assert {file["train"] for file in files} == {"${task.prepared}/train.jsonl"}


GROUPS: dict[str, Callable[[str, Compose, Any], None]] = {
    **{
        group: check_choice(group)
        for group in (
            "callbacks",
            "debug",
            "decoding",
            "distill",
            "encoder",
            "generator",
            "peft",
            "logger",
            "objective",
            "method",
            "reindex",
            "reinforce",
            "retriever_loss",
        )
    },
    "curriculum": covered_elsewhere,
    "labelled": covered_elsewhere,
    "reader": covered_elsewhere,
    "task": covered_elsewhere,
    "data": check_data,
    "dataset": check_dataset,
    "scale": check_scale,
    "experiment": check_experiment,
    "hydra": check_hydra,
    "index": check_index_choice,
    "optim": check_optim,
    "paths": check_paths,
    "retriever": check_retriever,
    "shape": check_shape,
    "sweep": check_sweep,
    "trainer": check_trainer,
}


# ---------------------------------------------------------------------- particular values


def test_debug_fast_is_two_steps(compose: Compose, tiny_overrides: Any) -> None:
    trainer = built(compose("train", *tiny_overrides("debug", "fast")))[2]
    assert (trainer.max_steps, trainer.limit_val_batches, trainer.limit_test_batches) == (2, 2, 2)


def test_without_validation_the_last_checkpoint_is_kept(compose: Compose, tiny_overrides: Any) -> None:
    trainer = built(compose("train", *tiny_overrides("callbacks", "no_validation")))[2]
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.monitor is None


def test_films_joint_reindex_is_joint_plus_the_passage_encoder(compose: Compose, tiny_overrides: Any) -> None:
    joint = compose("train", *tiny_overrides("experiment", "films/joint"))
    reindex = compose("train", *tiny_overrides("experiment", "films/joint_reindex"))
    differences = {
        key for key in joint if key in reindex and recordable(joint).get(key) != recordable(reindex).get(key)
    }
    assert differences == {"run_name", "optim", "reindex", "callbacks"}
    assert reindex.optim.train_passage_encoder
    assert "passage_encoder" in build_run(reindex)[0].trained


@pytest.mark.parametrize("objective", ["rag_token", "rag_sequence", "fid"])
@pytest.mark.parametrize("examples", ["salient_spans", "random_spans"])
def test_any_marginal_pre_trains_and_contrasts(
    objective: str, examples: str, compose: Compose, tiny_overrides: Any
) -> None:
    chosen = (f"objective={objective}", f"objective.examples={examples}", "retriever_loss=[contrastive,pdist]")
    module, data, _ = built(compose("train", *tiny_overrides(), *chosen, f"data.{examples}.mask=HOLE"))
    assert module.objective.examples == examples
    assert module.objective.eval_examples == "questions"
    assert list(module.objective.retriever_losses) == ["contrastive", "pdist"]
    assert data.pretraining[examples]["mask"] == "HOLE"
    assert {**data.pretraining["salient_spans"], "mask": None} == {
        "kinds": ["date", "entity"],
        "with_title": False,
        "forbid_source": True,
        "mask": None,
    }


@pytest.mark.parametrize("retriever", ["sparse", "hybrid_convex"])
def test_a_null_passage_wants_similarities(retriever: str, compose: Compose, tiny_overrides: Any) -> None:
    chosen = ("model.null_passage=true", "optim.train_query_encoder=false")
    module, _, _ = built(compose("train", *tiny_overrides(), "model.null_passage=true"))
    assert module.model.null_passage is not None
    with pytest.raises(ConfigError, match=f"model.null_passage: .* came kind={retriever.split('_')[0]}"):
        build_run(compose("train", *tiny_overrides("retriever", retriever), *chosen))


@pytest.mark.parametrize("secret", ["${oc.env:A_SECRET}", "x${oc.env:A_SECRET,none}y", "${other}/z"])
def test_what_comes_from_the_environment_is_recorded_as_it_was_written(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "s3cret")
    config = OmegaConf.create({"place": [secret], "other": "${oc.env:A_SECRET}", "number": 3, "same": "${number}"})
    assert "s3cret" in config.place[0]
    recorded = recordable(config)
    assert "s3cret" not in str(recorded)
    assert recorded["same"] == 3
    assert OmegaConf.create(recorded).place[0] == config.place[0], "loaded again, it is read again"


def bundled_model() -> Sequence[str]:
    """Returns what is missing of the bundled warm-up model."""
    missing = []
    for part in ("encoder", "generator"):
        try:
            resolve(f"bundled:films/model/{part}")
        except MissingFileError:
            missing.append(part)
    return missing


@pytest.mark.skipif(bool(bundled_model()), reason="the bundled model is not made yet: make films-model")
@pytest.mark.parametrize("overrides", [(), ("experiment=films/joint",), ("experiment=films/closed_book",)])
def test_the_defaults_build_from_the_bundled_model(
    overrides: tuple[str, ...], compose: Compose, tmp_path: Path
) -> None:
    module, data, _ = built(compose("train", *overrides, f"paths.run_dir={tmp_path}"))
    assert data.passages == "bundled:films/passages.jsonl.gz"
    assert sum(parameter.numel() for parameter in module.model.parameters()) > 1e6
