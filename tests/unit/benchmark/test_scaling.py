"""Exponents of known powers; series that are none are refused."""

import pytest

from rag_lightning.benchmark.scaling import ScalingSettings, exponent, further_costs
from rag_lightning.errors import ConfigError


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_the_power_is_found(power):
    sizes = [1, 5, 10, 50]
    assert exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_one_point_has_no_exponent():
    assert exponent([4], [1.0]) is None


def test_a_further_passage_costs_the_same_beside_a_fixed_part():
    assert further_costs({k: (3.0 + 2.0 * k) / k for k in (5, 10, 20)}) == pytest.approx([1.0, 1.0])


def test_cost_that_grows_faster_than_k_shows():
    first, second = further_costs({k: (k * k) / k for k in (5, 10, 20)})  # slopes 15 and 30, mean 22.5
    assert (first, second) == pytest.approx((15 / 22.5, 30 / 22.5))


def test_of_one_k_nothing_is_told():
    assert further_costs({5: 2.0}) == []


def test_names():
    assert ScalingSettings.of("none", {}).series == ()
    assert ScalingSettings.of("all", {}).series == ("k", "batch", "passages")
    assert ScalingSettings.of(["passages", "k"], {}).series == ("k", "passages")


def test_refusals():
    with pytest.raises(ConfigError, match="expected scaling none, all or some of k, batch, passages, came 'width'"):
        ScalingSettings.of(["width"], {})
    with pytest.raises(ConfigError, match="batch_sizes: expected at least two different numbers"):
        ScalingSettings.of("batch", {"batch_sizes": [4, 4]})
