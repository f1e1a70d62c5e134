"""What can be fetched: names, each with files by URL or a repository of the hub; and mirrors of both."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from rag_lightning.errors import ConfigError

MIRROR_VARIABLE = "RAG_LIGHTNING_MIRROR"


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that is fetched by its URL.

    Attributes:
        url: ``https://…``, ``http://…`` or ``file://…``.
        name: What it is called here; the last part of the URL by default.
        sha256: Its checksum, in hexadecimal digits; None where nobody has published one.
        md5: Likewise; guards against damage, not against malice.
        size: In bytes, where known.
        members: Of a zip archive, the files to take out; the archive itself is not kept.
    """

    url: str
    name: str | None = None
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    members: Sequence[str] = ()

    @property
    def file_name(self) -> str:
        """What it is called here."""
        return self.name if self.name is not None else PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one name stands for: files, or a repository of the hub.

    Attributes:
        name: On the command line, and of the folder.
        about: One line, with the licence as it is stated.
        files: By URL.
        repo: ``owner/name`` of the hub.
        repo_type: Of models or of data sets.
        revision: A branch, tag or commit of the repository.
        patterns: Which of its files; by default weights for torch, configurations and vocabularies.
    """

    name: str
    about: str = ""
    files: Sequence[RemoteFile] = ()
    repo: str | None = None
    repo_type: Literal["model", "dataset"] = "model"
    revision: str = "main"
    patterns: Sequence[str] = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")


def read_sources(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Source]:
    """Returns the sources that a configuration lists, checked.

    Raises:
        ConfigError: An entry with an unknown or missing field, a URL of another kind, or a name that leads elsewhere.

    >>> read_sources({"x": {"files": [{"url": "https://example.org/a/b.csv"}]}})["x"].files[0].file_name
    'b.csv'
    """
    return {name: _source(name, dict(entry)) for name, entry in entries.items()}


def _source(name: str, entry: dict[str, Any]) -> Source:
    _check_fields(Source, {"name": name, **entry}, f"sources.{name}")
    files = entry.pop("files", None) or ()
    if bool(files) == ("repo" in entry):
        raise ConfigError(f"sources.{name}: expected files or a repo, got {'both' if files else 'neither'}.")
    for file in files:
        _check_fields(RemoteFile, file, f"sources.{name}.files")
    _check_place(name, f"sources.{name}")
    if entry.get("repo_type", "model") not in ("model", "dataset"):
        raise ConfigError(f"sources.{name}.repo_type: expected model or dataset, got {entry['repo_type']!r}.")
    checked = tuple(_checked(RemoteFile(**file), f"sources.{name}") for file in files)
    return Source(name=name, files=checked, **entry)


def _check_fields(kind: type, entry: Mapping[str, Any], place: str) -> None:
    known = {field.name for field in fields(kind)}
    needed = {"url"} if kind is RemoteFile else set()
    if unknown := sorted(set(entry) - known):
        raise ConfigError(f"{place}: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}.")
    if missing := sorted(needed - set(entry)):
        raise ConfigError(f"{place}: expected the field {', '.join(missing)}, got {dict(entry)}.")


def _checked(file: RemoteFile, place: str) -> RemoteFile:
    if urlsplit(file.url).scheme not in ("https", "http", "file"):
        raise ConfigError(f"{place}: expected a url that begins with https://, http:// or file://, got {file.url!r}.")
    for name in (file.file_name, *file.members):
        _check_place(name, place)
    for kind, digits in (("sha256", 64), ("md5", 32)):
        value = getattr(file, kind)
        if value is not None and (len(value) != digits or set(value.lower()) - set("0123456789abcdef")):
            raise ConfigError(f"{place}: {kind}: expected {digits} hexadecimal digits, got {value!r}.")
    return file


def _check_place(name: str, place: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ConfigError(f"{place}: expected names of files within its own folder, got {name!r}.")


def mirrored(url: str, rules: Sequence[tuple[str, str]]) -> str:
    """Returns where to fetch a URL from: the first rule whose beginning it has puts another in its place.

    >>> mirrored("https://a.org/x/y.gz", [("https://a.org/", "/mnt/a/")])
    '/mnt/a/x/y.gz'
    """
    for before, after in rules:
        if url.startswith(before):
            return after + url[len(before) :]
    return url


def mirror_rules(text: str | None = None) -> list[tuple[str, str]]:
    """Returns the rules of the environment variable ``RAG_LIGHTNING_MIRROR``: ``BEGINNING=OTHER``, several by blanks.

    ``OTHER`` is ``https://…``, ``http://…``, ``file://…`` or a folder. For repositories of the hub it is the hub's own
    variable, ``HF_ENDPOINT``, that names a mirror.

    Args:
        text: In place of the variable's value.

    Raises:
        ConfigError: A rule of another form.

    >>> mirror_rules("https://a.org/=https://b.org/a/ https://c.org/=/mnt/c/")
    [('https://a.org/', 'https://b.org/a/'), ('https://c.org/', '/mnt/c/')]
    """
    rules = []
    for rule in (text if text is not None else os.environ.get(MIRROR_VARIABLE, "")).split():
        before, sign, after = rule.partition("=")
        if not sign or not after or "://" not in before:
            raise ConfigError(
                f"{MIRROR_VARIABLE}: expected rules such as https://dl.example.org/=https://mirror.example.org/dl/ or "
                f"https://dl.example.org/=/mnt/dl/, divided by blanks, got {rule!r}."
            )
        rules.append((before, after))
    return rules
