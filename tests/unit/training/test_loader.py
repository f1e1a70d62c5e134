"""Batches: the same questions whatever the number of processes, and the same rest after a stop."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError
from rag_lightning.training.examples import Example
from rag_lightning.training.loader import BatchLoader
from rag_lightning.types import Question


class Numbers:
    """Examples whose answer is a random draw."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def draw(self, position: int, rng: random.Random) -> Example:
        return Example(Question(str(position), "?", ()), str(rng.random()))


def pairs(examples: Sequence[Example], weights: Sequence[float]) -> list[tuple[str, str, float]]:
    return [(example.question.id, example.answer, weight) for example, weight in zip(examples, weights, strict=True)]


def loader(length: int, **settings: object) -> BatchLoader:
    return BatchLoader(Numbers(length), pairs, **{"batch_size": 4, "shuffle": True, **settings})


@given(length=st.integers(1, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 4), seed=st.integers(0, 5))
def test_processes_share_each_batch_without_loss_or_repetition(length, batch_size, world_size, seed):
    batch_size = max(batch_size, world_size)
    settings = {"batch_size": batch_size, "seed": seed}
    whole = list(loader(length, **settings))
    parts = [list(loader(length, **settings, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1  # in step
    assert sorted(int(row[0]) for batch in whole for row in batch) == list(range(length))
    for number, batch in enumerate(whole):
        real = [row for part in parts for row in part[number] if row[2] > 0]
        assert real == batch  # the same questions with the same draws, in the same order
        for part in parts:
            weights = [row[2] for row in part[number]]
            assert weights == [0.0] or all(weight == 1.0 for weight in weights)


@given(length=st.integers(1, 30), batch_size=st.integers(1, 7), stop=st.integers(0, 30), epoch=st.integers(0, 3))
def test_a_loaded_state_gives_the_rest_of_the_epoch(length, batch_size, stop, epoch):
    settings = {"batch_size": batch_size, "seed": 7, "current_epoch": lambda: epoch}
    whole = list(loader(length, **settings))
    stop = min(stop, len(whole))
    stopped = loader(length, **settings)
    iterator = iter(stopped)
    for _ in range(stop):
        next(iterator)
    resumed = loader(length, **settings)
    resumed.load_state_dict(stopped.state_dict() if stop > 0 else {"epoch": epoch, "num_yielded": 0})
    assert list(resumed) == whole[stop:]
    assert list(resumed) == whole  # only once


def test_a_state_at_the_end_of_an_epoch_starts_the_next_one_whole():
    epoch = 0
    stopped = loader(10, current_epoch=lambda: epoch)
    list(stopped)
    state = stopped.state_dict()
    epoch = 1
    resumed = loader(10, current_epoch=lambda: epoch)
    resumed.load_state_dict(state)
    assert list(resumed) == list(loader(10, current_epoch=lambda: 1))


def test_a_batch_that_failed_is_met_again():
    """A non-finite loss once skipped its batch on resume: the loader counted what it yielded."""
    stopped = loader(12, num_processed=lambda: 1)
    iterator = iter(stopped)
    next(iterator), next(iterator)  # the second fails
    resumed = loader(12)
    resumed.load_state_dict(stopped.state_dict())
    assert list(resumed) == list(loader(12))[1:]


def test_order_and_draws_change_with_epoch_and_seed_and_only_with_them():
    def ids(**settings: object) -> list[str]:
        return [row[0] for batch in loader(30, **settings) for row in batch]

    def draws(**settings: object) -> dict[str, str]:
        return {row[0]: row[1] for batch in loader(30, **settings) for row in batch}

    assert ids() == ids()
    assert ids() != ids(seed=1)
    assert ids() != ids(current_epoch=lambda: 1)
    assert ids(shuffle=False) == [str(number) for number in range(30)]
    assert draws() == draws(batch_size=7)  # a draw belongs to its question, not to its place in a batch
    assert draws()["5"] != draws(current_epoch=lambda: 1)["5"]


def test_fewer_questions_than_processes_is_refused():
    with pytest.raises(ConfigError, match="at least one question for each of 3 processes, got 2"):
        loader(10, batch_size=2, world_size=3)


def test_length_counts_the_odd_batch():
    assert len(loader(13)) == len(list(loader(13))) == 4
