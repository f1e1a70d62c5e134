"""The console that tables are printed to."""

import os
import sys

from rich.console import Console

FILE_WIDTH = 200
"""Columns where no terminal says how many there are: in a pipe, in the log of a batch job."""


def table_console(*, highlight: bool = True) -> Console:
    """Returns a console as wide as the terminal, or wide enough for our tables where the output goes to a file.

    ``COLUMNS`` in the environment goes before both.
    """
    unknown = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=FILE_WIDTH if unknown else None, highlight=highlight)
