"""One process; several are the matter of the ddp tier."""

from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.utils import distributed


def test_without_a_process_group_there_is_one_process():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    distributed.barrier()
    value = {"x": 1}
    assert distributed.broadcast_object(value) is value
    assert distributed.gather_objects(value) == [value]


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_are_contiguous_even_and_cover_everything_once(length, world_size):
    parts = [distributed.shard(length, rank, world_size) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_first_error_speaks_for_all():
    assert distributed.first_error([None, None]) is None
    assert distributed.first_error([None, "", "second"]) == ""
    assert distributed.first_error([None, "b", "a"]) == "b"
