"""Numbers below the normal range of a format, which a CPU computes with many times as slowly as with others."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Takes subnormal results for zero within the block, in this thread and in those that it starts.

    A passage that p(z|x) all but rules out has gradients of such size; with a peaked p(z|x) most of a step goes into
    them. Afterwards all is as it was, for a program that trains is not alone in its process.

    >>> with subnormals_flushed():
    ...     sys.float_info.min / 2
    0.0
    >>> sys.float_info.min / 2 > 0
    True
    """
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
