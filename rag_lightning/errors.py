"""Errors that speak to people: what was expected, what came, what to do.

Each is also the builtin that a caller would catch without knowing this package.
"""


class RagError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(RagError, ValueError):
    """A setting, or a combination of settings, that cannot be run as asked."""


class DataError(RagError, ValueError):
    """Input data that is missing, malformed or contradicts itself."""


class MissingFileError(DataError, FileNotFoundError):
    """A file or folder that was named but is not there."""


class FetchError(RagError, OSError):
    """A download that did not come, did not fit on the disk, or is not what was expected."""


class StaleIndexError(RagError, ValueError):
    """An index snapshot of another encoder or of another corpus."""


class CorruptSnapshotError(RagError, OSError):
    """An index snapshot whose files are torn, altered or of an unknown format."""


class CheckpointError(RagError, ValueError):
    """A checkpoint that does not fit the model it is loaded into."""


class NonFiniteLossError(RagError, FloatingPointError):
    """A loss that is NaN or infinite; names the step and the questions of the batch."""


class JobFailedError(RagError, RuntimeError):
    """A job of a sweep that failed, or a sweep with such jobs: plain text, which any launcher carries home."""


class MissingExtraError(RagError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: The import name of the missing package.
        extra: The extra of ``rag_lightning`` that brings it.
        purpose: What it is needed for, as a noun phrase.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}'. Install it with: pip install 'rag_lightning[{extra}]'"
        )
