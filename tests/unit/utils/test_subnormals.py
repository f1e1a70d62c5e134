"""Subnormal numbers are zero within the block, in torch and in Python, and numbers again after it, or an error."""

import sys

import pytest
import torch

from rag_lightning.utils.subnormals import subnormals_flushed


def small() -> tuple[float, float]:
    return sys.float_info.min / 2, float(torch.full((2,), 1e-38).mul(0.1)[0])


def test_the_block_flushes_and_leaves_no_trace() -> None:
    assert min(small()) > 0
    with subnormals_flushed():
        assert small() == (0.0, 0.0)
        with subnormals_flushed():
            pass
        assert small() == (0.0, 0.0), "as it was before the inner block"
    assert min(small()) > 0
    with pytest.raises(ValueError, match="lost"), subnormals_flushed():
        raise ValueError("lost")
    assert min(small()) > 0
