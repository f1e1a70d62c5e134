"""Settings against the constructors that will read them, before a sweep's first job starts.

Hydra knows which keys there are, but not which values they take. A setting below a node with ``_target_`` is an
argument of that constructor, so its name and its annotation say what may stand there; a few nodes without one are known
by name.
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra.utils
from omegaconf import DictConfig, ListConfig, OmegaConf

from rag_lightning.errors import ConfigError
from rag_lightning.heads.model import RetrievalSettings
from rag_lightning.rag_parts import RagSettings
from rag_lightning.text.prompts import Prompt
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.tasks.data import TaskDataModule

READERS: dict[str, Callable[..., Any]] = {
    "model": RagSettings,
    "model.prompt": Prompt,
    "module": RagLightningModule,
    "task.data": TaskDataModule,
    "task.retrieval": RetrievalSettings,
}
"""Nodes without ``_target_`` and what reads them."""
ANNOTATED: dict[str, Any] = {"seed": int | None, "run_name": str, "monitor": str, "sweep_metric": str | None}
SCALARS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str, int, float),  # a name may look like a number
    Path: (str,),
    dict: (dict,),
    list: (list,),
    tuple: (list,),
    Mapping: (dict,),
    Sequence: (list,),
}


def check_setting(config: DictConfig, key: str) -> None:
    """Refuses a setting that the constructor below which it stands cannot take.

    Args:
        config: Composed, with the setting in it.
        key: As ``optim.lr_generator``. Groups, and settings that nobody known reads, are not looked at.

    Raises:
        ConfigError: No such argument, or a value of another type.
    """
    value = OmegaConf.select(config, key, throw_on_missing=False)
    if isinstance(value, DictConfig):
        return
    value = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
    parent, _, name = key.rpartition(".")
    if parent == "":
        _check_value(key, value, ANNOTATED.get(name, Any))
        return
    node = OmegaConf.select(config, parent, throw_on_missing=False)
    reader = _reader(parent, node)
    if reader is None or name.startswith("_"):
        return
    arguments, hints, takes_all = _arguments(reader)
    if name not in arguments and not takes_all and name not in _kept_aside(parent):
        raise ConfigError(
            f"{key}: expected a setting of {reader.__qualname__} ({', '.join(arguments)}), got {name!r}: check its name"
        )
    _check_value(key, value, hints.get(name, Any))


def _kept_aside(parent: str) -> tuple[str, ...]:
    return ("prompt",) if parent == "model" else ("mode",) if parent == "decoding" else ()


def _reader(parent: str, node: Any) -> Callable[..., Any] | None:
    if isinstance(node, DictConfig) and "_target_" in node:
        try:
            found: Callable[..., Any] = hydra.utils.get_object(node["_target_"])
        except Exception:  # an extra that is not installed: its own message comes when it is built
            return None
        return found
    return READERS.get(parent)


@lru_cache(maxsize=256)
def _arguments(reader: Callable[..., Any]) -> tuple[list[str], dict[str, Any], bool]:
    parameters = inspect.signature(reader).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    try:
        hints = get_type_hints(reader.__init__ if inspect.isclass(reader) else reader)
    except Exception:  # a library's annotation that names what is not there
        hints = {}
    return [name for name in parameters if name not in ("args", "kwargs")], hints, takes_all


def _check_value(key: str, value: Any, annotation: Any) -> None:
    if not fits(value, annotation):
        raise ConfigError(f"{key}: expected {_words(annotation)}, got {value!r} ({type(value).__name__})")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value may be an argument with this annotation; True where that cannot be told.

    >>> fits(3, int | None), fits("x", int | None), fits("half", float), fits(1, float), fits(True, int)
    (True, False, False, True, False)
    """
    origin = get_origin(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    kind = origin if origin is not None else annotation
    for known, taken in SCALARS.items():
        if kind is known or (origin is not None and _same(origin, known)):
            return isinstance(value, taken) and (bool in taken or not isinstance(value, bool))
    return True


def _same(origin: Any, known: Any) -> bool:
    return getattr(origin, "__name__", None) == getattr(known, "__name__", "")


def _words(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(one) for one in get_args(annotation))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    return str(getattr(annotation, "__name__", annotation)) if origin is None else str(annotation)
