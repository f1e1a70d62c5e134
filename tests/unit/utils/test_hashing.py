import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.utils.hashing import hash_file, hash_tensors, hash_texts


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_texts_hash_alike_only_when_they_are_alike(left, right):
    assert (hash_texts(left) == hash_texts(right)) == (left == right)


def test_where_a_text_ends_counts():
    assert len({hash_texts(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"])}) == 5


def test_a_file_is_hashed_by_its_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x00\n" * 100_000)
    assert hash_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tensors_are_hashed_by_name_type_shape_and_value():
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others = [
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0).double(), "b": torch.zeros(2)},
        {"a": torch.arange(6.0) + 1e-6, "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": -torch.zeros(2)},
        {"a": torch.arange(6.0)},
    ]
    assert len({hash_tensors(tensors) for tensors in (base, *others)}) == 1 + len(others)


def test_order_memory_layout_and_gradient_do_not_count():
    tensor = torch.arange(6.0).view(2, 3)
    transposed = torch.nn.Parameter(tensor.T.contiguous().T)
    assert not transposed.is_contiguous()
    assert hash_tensors({"b": transposed, "a": torch.ones(1)}) == hash_tensors({"a": torch.ones(1), "b": tensor})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64])
def test_every_type_and_shape_can_be_hashed(dtype):
    for tensor in (torch.ones(3).to(dtype), torch.tensor(1).to(dtype), torch.zeros(0, 2).to(dtype)):
        assert len(hash_tensors({"x": tensor})) == 64
