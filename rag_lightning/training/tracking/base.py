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
SECRET_WORDS = frozenset(
    [
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "bearer",
        "apikey",
    ]
)
"""A name with one of these calls whatever stands below it secret."""
SECRET_ENDS = frozenset(["auth", "authorization", "authorisation", "authentication"])
KEYS = frozenset(
    [
        "api",
        "access",
        "private",
        "license",
        "licence",
        "auth",
        "signing",
        "encryption",
        "ssh",
        "account",
        "client",
        "subscription",
    ]
)
"""What a key is of that opens something; other keys are names of settings."""
TOKENS = KEYS | frozenset(["refresh", "session", "identity"])
HARMLESS_TOKENS = frozenset(
    ["pad", "mask", "bos", "eos", "unk", "sep", "cls", "max", "min", "special", "start", "stop", "rag"]
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
REFERENCE = re.compile(r"\$\{[\w.:]+\}")
"""A setting that is read from elsewhere; one with a default tells a value."""
USER_INFO = re.compile(r"//[^/\s]+@")
QUERY = re.compile(r"([?&;](?:password|passwd|pwd|secret|token|api_?key|access_?key|access_?token)=)[^&;\s]+", re.I)
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
    """Returns settings without the values of those whose names call them secret, and without users in addresses.

    >>> redacted({"logger": {"api_key": 123, "project": "p"}, "pad_token": "<pad>", "max_tokens": 3})
    {'logger': {'api_key': '<redacted>', 'project': 'p'}, 'pad_token': '<pad>', 'max_tokens': 3}
    >>> redacted({"tracking_uri": "postgresql://me:hunter2@host/db"})
    {'tracking_uri': 'postgresql://<redacted>@host/db'}
    """
    return {key: _redacted(str(key), value, False) for key, value in settings.items()}


def _redacted(key: str, value: Any, below_secret: bool) -> Any:
    secret = below_secret or _is_secret(key)
    if isinstance(value, Mapping):
        return {name: _redacted(str(name), one, secret) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(key, one, secret) for one in value]
    if value is None or isinstance(value, bool) or (isinstance(value, str) and REFERENCE.fullmatch(value)):
        return value
    if secret or (isinstance(value, str) and _is_token(key)):
        return REDACTED
    if isinstance(value, str):
        return QUERY.sub(rf"\1{REDACTED}", USER_INFO.sub(f"//{REDACTED}@", value))
    return value


def _is_secret(name: str) -> bool:
    """Returns whether a name calls any value below it secret.

    >>> [_is_secret(name) for name in ("db_password", "authToken", "license_key", "key", "author", "passage")]
    [True, True, True, False, False, False]
    """
    words = [word.lower() for word in WORDS.findall(name)]
    if not words:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    opens = (last in ("key", "keys") and before in KEYS) or (last in ("token", "tokens") and before in TOKENS)
    return opens or last in SECRET_ENDS or not SECRET_WORDS.isdisjoint(words)


def _is_token(name: str) -> bool:
    """Returns whether a name may be that of a token which opens something: then its text is secret, a number is not.

    >>> [_is_token(name) for name in ("hf_token", "token", "pad_token", "tokenizer")]
    [True, True, False, False]
    """
    words = [word.lower() for word in WORDS.findall(name)]
    return bool(words) and words[-1] in ("token", "tokens") and HARMLESS_TOKENS.isdisjoint(words)


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
