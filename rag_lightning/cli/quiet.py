"""What third parties print that a user of the command line can do nothing about."""

import logging
import warnings

from transformers.utils import logging as transformers_logging

ADVERTISING = ("litlogger", "TPU available")


class _NoAdvertising(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in ADVERTISING)


def be_quiet() -> None:
    """Drops advertisements, bars for files of a few megabytes, and notes on other packages' deprecations."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_NoAdvertising())
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=Warning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
