"""Soft targets on disk: what a teacher said of a question and an answer, so that it need not say it again.

A cache is a folder of parts in safetensors, one for each batch that the teacher had to read::

    targets-<key>/made_of.json           teacher, vocabulary, temperature, tokens kept: what every number depends on
    targets-<key>/part-<hash>.safetensors   log_probs [rows, E], ids [rows, n] where only n tokens are kept

The key names all that the targets depend on besides question and answer, so another teacher opens another folder. Parts
are written beside and renamed: an interrupted run leaves whole ones, and several processes may write at once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rag_lightning.errors import DataError
from rag_lightning.types import TensorRecord
from rag_lightning.utils.hashing import hash_texts
from rag_lightning.utils.io import atomic_path, read_json, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SoftTargets(TensorRecord):
    """A teacher's distributions at temperature T, one row for each scored position.

    Attributes:
        log_probs_SE: Over the vocabulary, or over n tokens and all the others together.
        ids_SN: Which tokens these n are; None for the whole vocabulary.
    """

    log_probs_SE: Float[Tensor, "S E"]
    ids_SN: Int[Tensor, "S n"] | None = None


class TargetCache:
    """Soft targets by question and answer.

    Args:
        root: Where caches are kept.
        made_of: All that the targets depend on besides question and answer; JSON.
    """

    def __init__(self, root: Path, made_of: Mapping[str, Any]) -> None:
        record = {"format_version": FORMAT_VERSION, **made_of}
        self.folder = root / f"targets-{hash_texts([json.dumps(record, sort_keys=True)])[:20]}"
        self.made_of = record
        self._rows: dict[str, tuple[Path, int, int]] = {}
        for part in sorted(self.folder.glob("part-*.safetensors")):
            self._remember(part)

    def __len__(self) -> int:
        return len(self._rows)

    def notes(self) -> dict[str, Any]:
        """Returns what :meth:`note` kept; nothing in a new cache."""
        path = self.folder / "made_of.json"
        notes: dict[str, Any] = read_json(path, "soft targets").get("notes", {}) if path.is_file() else {}
        return notes

    def note(self, notes: Mapping[str, Any]) -> None:
        """Keeps what is to be known of the teacher without loading it."""
        if not (self.folder / "made_of.json").is_file():
            write_json(self.folder / "made_of.json", {**self.made_of, "notes": dict(notes)})

    def get(self, keys: Sequence[str]) -> SoftTargets | None:
        """Returns the rows of these examples one behind the other, or None where any of them is missing."""
        if any(key not in self._rows for key in keys):
            return None
        found = [self._read(*self._rows[key]) for key in keys]
        ids = [part.ids_SN for part in found if part.ids_SN is not None]
        return SoftTargets(
            torch.cat([part.log_probs_SE for part in found]), torch.cat(ids) if len(ids) == len(found) else None
        )

    def put(self, keys: Sequence[str], lengths: Sequence[int], targets: SoftTargets) -> None:
        """Writes the rows of some examples; ``lengths`` says how many each has."""
        path = self.folder / f"part-{hash_texts(keys)[:20]}.safetensors"
        tensors = {"log_probs": targets.log_probs_SE.cpu().contiguous()}
        if targets.ids_SN is not None:
            tensors["ids"] = targets.ids_SN.to("cpu", torch.int32).contiguous()
        with atomic_path(path) as part:
            save_file(tensors, part, metadata={"examples": json.dumps(list(zip(keys, lengths, strict=True)))})
        self._remember(path)

    def _remember(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as part:
                examples = json.loads((part.metadata() or {})["examples"])
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise DataError(
                f"distill.cache: expected soft targets in {path}, but it cannot be read ({error}). Remove this file: "
                "the teacher will be asked again."
            ) from error
        start = 0
        for key, length in examples:
            self._rows[key] = (path, start, start + length)
            start += length

    def _read(self, path: Path, start: int, stop: int) -> SoftTargets:
        with safe_open(path, framework="pt") as part:  # memory-mapped: only these rows are read
            ids_SN = part.get_slice("ids")[start:stop].long() if "ids" in part.keys() else None  # noqa: SIM118
            return SoftTargets(part.get_slice("log_probs")[start:stop], ids_SN)
