"""One process here; several in the tests marked ddp, which run this file as their processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import DataError
from rag_lightning.utils import distributed

COUNTS = {2: (3, 1), 3: (2, 0, 4)}
WIDTH = 3


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


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(distributed.all_gather_rows(rows), rows.detach())
    assert not distributed.all_gather_rows(rows).requires_grad
    distributed.all_gather_rows_with_grad(rows).square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows.detach())


def part(rank: int, world_size: int) -> torch.Tensor:
    """Returns a process's rows: other numbers in each, also none."""
    rng = torch.Generator().manual_seed(rank)
    return torch.randn(COUNTS[world_size][rank], WIDTH, generator=rng, dtype=torch.float64)


def loss_of(rank: int, rows: torch.Tensor) -> torch.Tensor:
    """Returns a process's loss, which mixes all rows and is worth nothing in the last process."""
    worth = [3.0, 0.5, 0.0][rank]
    return worth * ((rows @ rows.T) * (rank + 1)).softmax(dim=1).square().sum()


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_rows_of_all_processes_are_gathered_and_their_gradients_added(world_size, tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}  # a script sees its own folder only
    arguments = [[sys.executable, __file__, str(rank), str(world_size), str(tmp_path)] for rank in range(world_size)]
    processes = [
        subprocess.Popen(one, env=environment, stderr=subprocess.PIPE, text=True, cwd=root) for one in arguments
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    parts = [part(rank, world_size).requires_grad_() for rank in range(world_size)]
    whole = torch.cat(parts)
    sum(loss_of(rank, whole) for rank in range(world_size)).backward()
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["plain"], whole.detach())
        assert torch.equal(found["with_grad"], whole.detach())
        assert found["numbers"].tolist() == [[one] for one in range(world_size) for _ in range(one)]
        torch.testing.assert_close(found["gradient"], parts[rank].grad)
        widths = [WIDTH - other for other in range(world_size)]
        assert found["error"].startswith(f"expected rows of one width from every process, came widths {widths}")


def run_process(rank: int, world_size: int, folder: Path) -> None:
    """What each process of the test above does."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    rows = part(rank, world_size).requires_grad_()
    found = {"plain": distributed.all_gather_rows(rows), "with_grad": distributed.all_gather_rows_with_grad(rows)}
    assert not found["plain"].requires_grad
    loss_of(rank, found["with_grad"]).backward()
    found |= {"with_grad": found["with_grad"].detach(), "gradient": rows.grad}
    found["numbers"] = distributed.all_gather_rows(torch.full((rank, 1), rank))
    try:
        distributed.all_gather_rows(rows.detach()[:, rank:])
    except DataError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
