"""From a composed configuration to objects: the one place where configuration ends and constructors begin."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate as hydra_instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from rag_lightning.decoding.options import DecodingMode, DecodingOptions
from rag_lightning.errors import ConfigError, MissingFileError
from rag_lightning.generators.lora import add_lora
from rag_lightning.heads.model import HeadedModel, RetrievalSettings
from rag_lightning.heads.reader import Reader
from rag_lightning.methods.curriculum.graph import NODE_KEYS, ActivityGraph
from rag_lightning.methods.curriculum.walk import Walk
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import CONFIG_NAME, RagSettings
from rag_lightning.retrieval.build import RetrieverSettings, build_fusion
from rag_lightning.text.prompts import Prompt
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule, check_shapes
from rag_lightning.training.objectives import Objective, Teacher
from rag_lightning.training.tasks.activities import activity_from
from rag_lightning.training.tasks.data import TaskDataModule
from rag_lightning.training.tasks.estimation import estimated_graph
from rag_lightning.training.tasks.module import TaskLightningModule
from rag_lightning.training.tasks.task import Task
from rag_lightning.training.tasks.walking import WalkCallback
from rag_lightning.training.tracking import TrackingCallback
from rag_lightning.utils.io import read_json, write_json

logger = logging.getLogger(__name__)
NOT_FOR_HEADS = ("generator", "objective", "decoding", "model", "module", "data", "method")
"""Groups that a run of heads does not read; of data the index alone."""
DEFAULT_DECODING: dict[str, DecodingMode] = {
    "rag_token": "rag_token",
    "rag_sequence": "rag_sequence_thorough",
    "fid": "fid",
    "stuffed": "stuffed",
}


def instantiate(node: Any, **arguments: Any) -> Any:
    """Calls the constructor that a configuration node names; it gets plain values, never Hydra's containers."""
    return hydra_instantiate(node, **arguments, _convert_="all")


def build_model(config: DictConfig) -> RagModel:
    """Builds the model; one that is closed-book (``model.num_passages=0``) or searches by words has no encoder."""
    settings = plain(config.model)
    decoding = plain(config.decoding)
    mode = decoding.pop("mode")
    if mode is None:
        mode = DEFAULT_DECODING[settings["objective"]]
    prompt = Prompt(**settings.pop("prompt"))
    retriever: RetrieverSettings = instantiate(config.retriever)
    if settings.get("null_passage", False) and (retriever.kind != "dense" or retriever.rerank == "cross_encoder"):
        raise ConfigError(
            f"model.null_passage: expected a retriever whose document scores are similarities, came kind="
            f"{retriever.kind}, rerank={retriever.rerank}. Use retriever=dense, or set model.null_passage=false."
        )
    needs_encoder = settings["num_passages"] > 0 and retriever.needs_vectors
    encoder = instantiate(config.encoder) if needs_encoder else None
    generator = instantiate(config.generator)
    if config.get("peft") is not None:
        add_lora(generator, instantiate(config.peft))
    return RagModel(
        encoder=encoder,
        generator=generator,
        fusion=build_fusion(retriever, dimension=encoder.dimension) if encoder is not None else None,
        prompt=prompt,
        settings=RagSettings(**settings, decoding=mode),
        decoding_options=instantiate(decoding),
    )


def build_run(config: DictConfig) -> tuple[RagLightningModule, RagDataModule]:
    """Builds the Lightning module and the data module, bound to each other."""
    objective = build_objective(config)
    model = build_model(config)
    module = RagLightningModule(
        model=model, objective=objective, optim=instantiate(config.optim), **plain(config.module)
    )
    data: RagDataModule = instantiate(config.data)
    bind(data, model, objective)
    return module, data


def build_objective(config: DictConfig) -> Objective:
    """Builds the objective, with a reward and a teacher where it is to learn from one."""
    if "retriever_losses" in config.objective and not str(config.objective._target_).endswith("MarginalObjective"):
        raise ConfigError(
            "retriever_loss: expected an objective that retrieves (rag_token, rag_sequence, fid, prompt_stuffing), "
            f"got {config.objective._target_}: choose another, or retriever_loss=null"
        )
    objective: Objective = instantiate(config.objective)
    if config.get("reinforce") is not None:
        objective = instantiate(config.reinforce, objective=objective)
    if config.get("distill") is None:  # without a choice, Hydra leaves the group out
        return objective
    teacher = Teacher(source=config.distill.teacher, load=lambda source: load_checkpoint(source, "distill.teacher")[0])
    distilled: Objective = instantiate(config.distill, objective=objective, teacher=teacher)
    return distilled


def bind(data: RagDataModule, model: RagModel, objective: Objective) -> None:
    """Tells the data module what the objective feeds on."""
    data.bind(
        model,
        train_kind=objective.examples,
        eval_kind=objective.eval_examples,
        retrieves=objective.reads == "retrieved",
        num_negatives=objective.num_negatives,
        cross_process=objective.cross_process,
    )


def has_heads(config: DictConfig) -> bool:
    """Whether the run's task is judged by heads; else a generator writes, be it for a task or not."""
    return config.get("task") is not None and config.task.get("prepare") is None


def build_task_run(config: DictConfig) -> tuple[TaskLightningModule, TaskDataModule]:
    """Builds the modules of ``task=…``, where heads judge what a reader has read, bound to each other.

    Raises:
        ConfigError: A choice that heads would ignore.
    """
    check_task_choices(config)
    settings = plain(config.task)
    tasks: list[Task] = [instantiate(node) for node in config.task.tasks.values()]
    retrieval = RetrievalSettings(**settings["retrieval"])
    augmented = retrieval.num_passages > 0
    data = TaskDataModule(
        tasks=tasks,
        passages=settings["passages"] if augmented else None,
        index=instantiate(config.data.index),
        index_dir=config.data.index_dir,
        seed=config.seed,
        progress=config.trainer.enable_progress_bar,
        **settings["data"],
    )
    reader: Reader = instantiate(config.reader)
    heads = {task.name: task.head(reader.width, len(data.labels[task.name])) for task in tasks}
    encoder = instantiate(config.encoder) if augmented else None
    model = HeadedModel(reader=reader, heads=heads, encoder=encoder, settings=retrieval)
    labels = {name: tuple(names.to_list()) for name, names in data.labels.items()}
    activities = {name: activity_from(name, node, list(heads)) for name, node in _nodes(config, list(heads)).items()}
    module = TaskLightningModule(
        model=model, tasks=tasks, labels=labels, optim=instantiate(config.optim), activities=activities
    )
    data.bind(model)
    return module, data


def check_task_choices(config: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Refuses what is for generators, or not there for heads yet: it would be read and ignored.

    Args:
        config: The run's.
        overrides: What the command line says, as typed.

    Raises:
        ConfigError: Names the choices.
    """
    retriever: RetrieverSettings = instantiate(config.retriever)
    ignored = [group for group in ("peft", "reinforce", "distill") if config.get(group) is not None]
    ignored += ["retriever_loss"] if "retriever_losses" in config.objective else []
    ignored += ["retriever"] if retriever.kind != "dense" or retriever.rerank != "none" else []
    ignored += ["reindex"] if config.reindex.schedule is not None or config.reindex.trigger != "schedule" else []
    ignored += ["optim.checkpoint_activations"] if config.optim.get("checkpoint_activations") else []
    ignored += ["optim.train_passage_encoder"] if config.optim.get("train_passage_encoder") else []
    keys = [override.lstrip("+~").split("=")[0] for override in overrides]
    ignored += [key for key in keys if key.split(".")[0] in NOT_FOR_HEADS and not key.startswith("data.index")]
    if ignored:
        raise ConfigError(
            f"task: expected choices that heads take, got {', '.join(ignored)}. Heads search a dense index whose "
            "passage tower stays as it is: leave these out."
        )


def _nodes(config: DictConfig, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the curriculum's nodes, less what the graph itself reads; the tasks where it names none."""
    graph = plain(config.curriculum)["graph"] if config.get("curriculum") is not None else None
    nodes = (graph or {}).get("nodes") or dict.fromkeys(tasks)
    return {
        str(name): {key: value for key, value in (node or {}).items() if key not in NODE_KEYS}
        for name, node in nodes.items()
    }


def build_walk(
    config: DictConfig, module: TaskLightningModule, data: TaskDataModule, *, resumed: bool = False
) -> WalkCallback:
    """Builds the walk over the run's activities that ``curriculum=…`` asks for.

    The graph is kept in the run's ``curriculum.json``, from which a resumed run reads what was estimated.

    Raises:
        ConfigError: Edges both given and to be estimated, an estimate of activities that are not tasks, or a graph that
            does not hold together, see :class:`~rag_lightning.methods.curriculum.graph.ActivityGraph`.
    """
    settings = plain(config.curriculum)
    settings.pop("policy")
    description, estimate = settings.pop("graph") or {}, settings.pop("estimate")
    targets, probe_size, ordered = (settings.pop(name) for name in ("targets", "probe_size", "ordered"))
    given = description.get("nodes") or {}
    nodes = {
        name: {
            "size": len(data.examples[activity.task]["train"]),
            **{key: value for key, value in (given.get(name) or {}).items() if key in NODE_KEYS},
        }
        for name, activity in module.activities.items()
    }
    kept = Path(config.paths.run_dir) / "curriculum.json"
    others = estimate is not None and rank_zero_only.rank != 0  # all processes walk one graph: the first measures it
    if estimate is not None and ((resumed and kept.is_file()) or others):
        _wait_for(kept)
        graph = ActivityGraph.from_dict(read_json(kept))
    elif estimate is None:
        graph = ActivityGraph.from_dict({**description, "nodes": nodes})
    else:
        if description.get("edges") is not None:
            raise ConfigError(
                "curriculum.estimate: expected no curriculum.graph.edges with it, got both. Leave one out."
            )
        if set(nodes) != set(module.tasks):
            raise ConfigError(
                f"curriculum.estimate: expected the run's tasks as nodes, got {', '.join(nodes)}: what alters the "
                "examples of a task is weighed by the walk itself"
            )
        _check_estimate(estimate)
        graph = estimated_graph(module, data, nodes, **estimate)
        logger.info("curriculum: %s", ", ".join(f"{a} -> {b} {weight:.3g}" for a, b, weight in graph.edges))
    if ordered:
        logger.info("curriculum: in the order %s", ", ".join(graph.order()))
    if rank_zero_only.rank == 0:
        write_json(kept, graph.to_dict())
    policy = instantiate(config.curriculum.policy, graph=graph, seed=config.seed)
    return WalkCallback(walk=Walk(graph, policy, **settings), targets=targets, probe_size=probe_size)


def _check_estimate(estimate: Mapping[str, Any]) -> None:
    ways = {"gradients": ("by", "num_batches"), "transfer": ("by", "num_steps", "probe_size")}
    if estimate.get("by") not in ways:
        raise ConfigError(f"curriculum.estimate.by: expected one of {', '.join(ways)}, got {estimate.get('by')!r}")
    known = ways[estimate["by"]]
    if unknown := [key for key in estimate if key not in known]:
        raise ConfigError(f"curriculum.estimate: expected {', '.join(known)}, got {', '.join(unknown)} too")


def _wait_for(path: Path, minutes: float = 30.0) -> None:
    end = time.monotonic() + 60 * minutes
    while not path.is_file():
        if time.monotonic() > end:
            raise MissingFileError(f"{path}: expected the first process to write it, found none in {minutes:g} minutes")
        time.sleep(0.2)


def build_trainer(config: DictConfig, callbacks: DictConfig | None, further: Sequence[L.Callback] = ()) -> L.Trainer:
    """Builds the trainer with its logger and callbacks; batches are divided among processes by our loader."""
    chosen = [*further, *(instantiate(entry) for entry in (callbacks or {}).values() if entry is not None)]
    tracking = plain(config.tracking) if "tracking" in config else {}
    chosen.append(TrackingCallback(config=recordable(config), **tracking))
    if not config.trainer.enable_progress_bar:
        chosen = [callback for callback in chosen if not isinstance(callback, ProgressBar)]
    fixed: dict[str, Any] = {
        "callbacks": chosen,
        "logger": build_loggers(config) or False,
        "use_distributed_sampler": False,
    }
    if config.data.validation is None and not has_heads(config):
        fixed["limit_val_batches"] = 0  # Lightning would warn of a validation without batches
    check_validation_interval(config.trainer.val_check_interval, config.trainer.accumulate_grad_batches)
    trainer: L.Trainer = instantiate(config.trainer, **fixed)
    return trainer


def build_loggers(config: DictConfig) -> list[Logger]:
    """Builds the logger, or all of a file with several, each under a name, as ``logger=csv_tensorboard``."""
    return [instantiate(node) for node in logger_nodes(config)]


def logger_nodes(config: DictConfig) -> list[DictConfig]:
    """Returns the configuration of each logger."""
    node = config.get("logger")
    if node is None:
        return []
    return [node] if "_target_" in node else [entry for entry in node.values() if entry is not None]


def check_validation_interval(val_check_interval: float | None, accumulate_grad_batches: int) -> None:
    """Refuses to validate, and so to save a checkpoint, between two optimiser steps.

    Raises:
        ConfigError: The gradients accumulated so far would be in no checkpoint, and a resumed run would go another way.
    """
    if isinstance(val_check_interval, int) and val_check_interval % accumulate_grad_batches != 0:
        raise ConfigError(
            f"trainer.val_check_interval counts batches: expected a multiple of trainer.accumulate_grad_batches="
            f"{accumulate_grad_batches}, got {val_check_interval}, which would save checkpoints in the middle of a step"
        )


def plain(config: Any) -> dict[str, Any]:
    """Returns a configuration node as a plain dictionary."""
    container = OmegaConf.to_container(config, resolve=True)
    if not isinstance(container, dict):
        raise ConfigError(f"expected a mapping, got {container!r}")
    return {str(key): value for key, value in container.items()}


def recordable(config: DictConfig) -> dict[str, Any]:
    """Returns a configuration with everything resolved, except what is read from the process's environment.

    Such a value stays as it was written (``${oc.env:NAME}``), so that no run folder and no logger learns it.

    >>> recordable(OmegaConf.create({"home": "${oc.env:HOME}", "cache": "${home}/cache", "k": 5, "twice": "${k}"}))
    {'home': '${oc.env:HOME}', 'cache': '${oc.env:HOME}/cache', 'k': 5, 'twice': 5}
    """
    kept: dict[str, str] = {}

    def hide(text: str) -> str:
        if "${oc.env:" not in text:
            return text
        kept[f"<environment {len(kept)}>"] = text
        return f"<environment {len(kept) - 1}>"

    def show(text: str) -> str:
        for mark, original in kept.items():
            text = text.replace(mark, original)
        return text

    hidden = _map_strings(OmegaConf.to_container(config, resolve=False), hide)
    shown: dict[str, Any] = _map_strings(plain(OmegaConf.create(hidden)), show)
    return shown


def _map_strings(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        return {key: _map_strings(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_map_strings(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def run_folder(checkpoint: str) -> Path:
    """Returns the run directory behind a run directory, a Lightning checkpoint or a saved model directory."""
    path = Path(checkpoint)
    if path.suffix == ".ckpt":
        return path.parent.parent
    return path.parent if (path / "rag_config.json").is_file() else path


def run_config(checkpoint: str) -> DictConfig | None:
    """Returns the configuration of the run behind a checkpoint; None where it lies apart from one."""
    path = run_folder(checkpoint) / "config.yaml"
    config = OmegaConf.load(path) if path.is_file() else None
    assert config is None or isinstance(config, DictConfig)
    return config


def load_checkpoint(checkpoint: str, setting: str = "checkpoint") -> tuple[RagModel, DictConfig | None]:
    """Returns the model behind a run directory, a Lightning checkpoint or a saved model directory.

    Args:
        checkpoint: Where it is.
        setting: Which setting named it, for messages.

    Raises:
        MissingFileError: Nothing is there.
        CheckpointError: The checkpoint is of another model.
    """
    place, folder, config = Path(checkpoint), run_folder(checkpoint), run_config(checkpoint)
    if place.suffix == ".ckpt":
        if not place.is_file():
            raise MissingFileError(f"{setting}: no such file: {place}. Check the path.")
        if config is None:
            raise MissingFileError(f"{setting}: expected {folder / 'config.yaml'} beside the checkpoint, found none")
        model = build_model(config)
        weights = torch.load(place, map_location="cpu", weights_only=True)["state_dict"]
        weights = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
        check_shapes(model.state_dict(), weights)
        model.load_state_dict(weights)
        return model, config
    is_model = (place / CONFIG_NAME).is_file()
    if not is_model and place.is_dir() and not (place / "model").is_dir():
        raise MissingFileError(
            f"{setting}: expected a run folder with model/, a .ckpt file or a model folder, found {place}. "
            "An interrupted run has no model/ yet: give its checkpoints/last.ckpt, or resume it."
        )
    return RagModel.from_pretrained(place if is_model or not place.is_dir() else place / "model"), config


def decoding_of(
    settings: RagSettings, options: DecodingOptions, decoding: DictConfig, num_passages: int | None
) -> tuple[RagSettings, DecodingOptions]:
    """Returns a saved model's settings with what the command line says in their place, where it says something."""
    given = {key: value for key, value in plain(decoding).items() if value is not None}
    mode = given.pop("mode", None)
    changes: dict[str, Any] = {"decoding": mode} if mode is not None else {}
    if num_passages is not None:
        if settings.num_passages == 0:
            raise ConfigError("num_passages: this is a closed-book model, it retrieves nothing")
        changes["num_passages"] = num_passages
    return replace(settings, **changes), replace(options, **given)
