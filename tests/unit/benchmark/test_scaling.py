"""Exponents of known powers; series that are none are refused."""

import pytest

from rag_lightning.benchmark.scaling import ScalingSettings, exponent
from rag_lightning.errors import ConfigError


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_the_power_is_found(power):
    sizes = [1, 5, 10, 50]
    assert exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_one_point_has_no_exponent():
    assert exponent([4], [1.0]) is None


def test_names():
    assert ScalingSettings.of("none", {}).series == ()
    assert ScalingSettings.of("all", {}).series == ("k", "batch", "passages")
    assert ScalingSettings.of(["passages", "k"], {}).series == ("k", "passages")


def test_refusals():
    with pytest.raises(ConfigError, match="expected scaling none, all or some of k, batch, passages, came 'width'"):
        ScalingSettings.of(["width"], {})
    with pytest.raises(ConfigError, match="batch_sizes: expected at least two different numbers"):
        ScalingSettings.of("batch", {"batch_sizes": [4, 4]})
