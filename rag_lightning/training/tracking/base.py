"""What any tracker can be told, what it is never told, and the identity that a resumed run keeps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rag_lightning.errors import CheckpointError
from rag_lightning.types import Prediction, Question
from rag_lightning.utils.io import read_json, write_json

TRACKING_FILE = "tracking.json"
SECRET = re.compile(
    r"(^|_)(token|password|passwd|secret|credential|credentials|api_?key|access_?key|private_?key)s?$", re.I
)
REDACTED = "<redacted>"
QUESTION_COLUMNS = ("id", "question", "accepted", "answer", "log_likelihood")
PASSAGE_COLUMNS = ("passage", "probability", "posterior")


@dataclass(frozen=True, kw_only=True)
class TrackedArtifact:
    """Files that a run made.

    Attributes:
        name: As ``index-snapshot``.
        kind: What it is, as ``model``.
        folder: Where the files lie.
        files: Their names in the folder.
        metadata: What to keep of it.
        made_from: Names of the artifacts that it was made from: its lineage.
    """

    name: str
    kind: str
    folder: Path
    files: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    made_from: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Returns the metadata with the lineage."""
        return {**self.metadata, **({"made_from": list(self.made_from)} if self.made_from else {})}


@runtime_checkable
class Tracker(Protocol):
    """Takes what Lightning's loggers have no common call for; metrics go to the loggers themselves."""

    def summary(self, figures: Mapping[str, float]) -> None:
        """Keeps figures of the whole run, as ``best/val/exact_match``."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keeps a table."""

    def image(self, name: str, path: Path) -> None:
        """Keeps a PNG file."""

    def artifact(self, artifact: TrackedArtifact) -> None:
        """Keeps files, or what is needed to find them again."""


def redacted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings without the values of those whose names call them secret.

    >>> redacted({"logger": {"api_key": "abc", "project": "p"}, "pad_token": "<pad>", "max_tokens": 3})
    {'logger': {'api_key': '<redacted>', 'project': 'p'}, 'pad_token': '<pad>', 'max_tokens': 3}
    """
    return {key: _redacted(key, value) for key, value in settings.items()}


def _redacted(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redacted(value)
    if isinstance(value, list | tuple):
        return [_redacted(key, one) for one in value]
    harmless = key in ("pad_token", "mask_token", "bos_token", "eos_token", "max_tokens")
    secret = SECRET.search(key) is not None and not harmless and isinstance(value, str) and not value.startswith("${")
    return REDACTED if secret else value


def prediction_table(
    predictions: Sequence[Prediction], questions: Mapping[str, Question]
) -> tuple[list[str], list[list[Any]]]:
    """Returns the columns and rows of a table of predictions, each passage with its prior and posterior.

    Args:
        predictions: In the order wanted.
        questions: The questions by id, for their accepted answers.

    >>> asked = Question("q", "who made Kismet?", ("Vincente Minnelli",))
    >>> columns, rows = prediction_table([Prediction("q", asked.question, "Minnelli", -0.5, ())], {"q": asked})
    >>> dict(zip(columns, rows[0]))["accepted"]
    'Vincente Minnelli'
    """
    most = max((len(prediction.passages) for prediction in predictions), default=0)
    columns = [*QUESTION_COLUMNS, *(f"{name}_{place}" for place in range(1, most + 1) for name in PASSAGE_COLUMNS)]
    rows = []
    for prediction in predictions:
        question = questions[prediction.id]
        accepted = " | ".join(question.answers) if question.answers else question.answer_regex
        row: list[Any] = [prediction.id, prediction.question, accepted, prediction.answer, prediction.log_likelihood]
        for passage in prediction.passages:
            row += [f"{passage.title}: {passage.text}", passage.probability, passage.posterior]
        rows.append(row + [None] * (len(columns) - len(row)))
    return columns, rows


def run_id_of(save_dir: str, kind: str, *, resumed: bool, given: str | None) -> str | None:
    """Returns under which id of a tracker a run goes on; None for a new one.

    Args:
        save_dir: The run's folder.
        kind: The tracker, as ``wandb``.
        resumed: Whether the run goes on.
        given: An id to take in any case; ``new`` for another one.

    Raises:
        CheckpointError: The run goes on, and its id is lost.
    """
    if given is not None:
        return None if given == "new" else given
    if not resumed:
        return None
    path = Path(save_dir) / TRACKING_FILE
    known = read_json(path).get(kind) if path.is_file() else None
    if not isinstance(known, str) or known == "":
        raise CheckpointError(
            f"logger={kind}: expected the id under which the resumed run was tracked in {path}, found none. Give it: "
            "logger.id=ID, or track what follows as another run: logger.id=new"
        )
    return known


def keep_run_id(save_dir: str, kind: str, run_id: str) -> None:
    """Writes down under which id of a tracker a run is known."""
    path = Path(save_dir) / TRACKING_FILE
    known = read_json(path) if path.is_file() else {}
    write_json(path, {**known, kind: run_id})
