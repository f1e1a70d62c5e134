"""Sides run in turn on the same batches; a slow minute meets all; what runs out of memory is left out."""

import pytest
import torch

from rag_lightning.benchmark.timing import Timing, in_turn, ratio
from rag_lightning.errors import ConfigError


def test_sides_take_turns_on_the_same_batches():
    calls = []
    runs = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    timings, missing = in_turn(runs, repeats=3, warmup=1)
    assert missing == {}
    warm, rest = calls[:3], calls[3:]
    assert [name for name, _ in warm] == ["a", "b", "c"]
    assert [name for name, _ in rest] == [*"abc", *"bca", *"cab"], "the first moves on by one"
    assert [number for _, number in rest] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_side_without_memory_is_missing_and_the_others_go_on():
    def fails(number):
        raise torch.OutOfMemoryError("no room\nfor this")

    timings, missing = in_turn({"a": lambda number: None, "b": fails}, repeats=2)
    assert list(timings) == ["a"]
    assert len(timings["a"].seconds) == 2
    assert missing == {"b": "ran out of memory: no room"}


def test_other_errors_are_not_swallowed():
    def fails(number):
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        in_turn({"a": fails}, repeats=1)


def test_the_device_is_waited_for_around_every_run():
    events = []
    in_turn({"a": lambda number: events.append("run")}, repeats=2, warmup=0, synchronise=lambda: events.append("wait"))
    assert events == ["wait", "run", "wait"] * 2


def test_median_and_spread():
    timing = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median_s, timing.spread) == (3.0, 2.0)


def test_a_ratio_is_of_pairs_so_a_slow_minute_does_not_count():
    fast, slow = Timing([1.0, 1.0, 10.0, 1.0, 1.0]), Timing([2.0, 2.0, 20.0, 2.0, 20.0])
    assert ratio(fast, slow) == 0.5


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_refusals(repeats, warmup):
    with pytest.raises(ConfigError, match="expected repeats of at least 1 and warmup of at least 0"):
        in_turn({}, repeats=repeats, warmup=warmup)
