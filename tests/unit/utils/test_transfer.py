"""What goes to a GPU is pinned first and not waited for; nothing else is. Without a GPU: its calls are noted down."""

import pytest
import torch

from rag_lightning.types import QuestionBatch, TokenBatch
from rag_lightning.utils.transfer import to_device


def tokens(*shape):
    return TokenBatch(torch.ones(*shape, dtype=torch.long), torch.ones(*shape, dtype=torch.long))


def questions():
    return QuestionBatch(
        questions=(),
        query=tokens(2, 3),
        prompt=tokens(2, 4),
        labels=torch.ones(2, 5, dtype=torch.long),
        positive_ids=torch.zeros(2, dtype=torch.long),
        weights_B=torch.ones(2),
    )


@pytest.fixture
def calls(monkeypatch):
    """Notes down what is pinned and moved, and moves nothing."""
    noted = {"pinned": [], "moved": []}
    pinned_tensors = []

    def pin_memory(tensor):
        noted["pinned"].append(tuple(tensor.shape))
        pinned_tensors.append(tensor.clone())
        return pinned_tensors[-1]

    def to(tensor, device, non_blocking=False):
        is_pinned = any(tensor is pinned for pinned in pinned_tensors)
        noted["moved"].append((tuple(tensor.shape), str(device), non_blocking, is_pinned))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return noted


SHAPES = [(2, 3), (2, 3), (2, 4), (2, 4), (2, 5), (2,), (2,)]


def test_every_tensor_of_a_record_within_a_record_is_pinned_and_sent_without_waiting(calls):
    to_device(questions(), torch.device("cuda", 1))
    assert calls["pinned"] == SHAPES
    assert calls["moved"] == [(shape, "cuda:1", True, True) for shape in SHAPES]


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices_get_plain_copies(device, calls):
    to_device(questions(), torch.device(device))
    assert calls["pinned"] == []
    assert calls["moved"] == [(shape, device, False, False) for shape in SHAPES]


def test_what_is_on_a_device_already_is_not_pinned(calls):
    elsewhere = torch.zeros(2, 3, dtype=torch.long, device="meta")
    to_device(TokenBatch(elsewhere, torch.ones(2, 3, dtype=torch.long)), torch.device("cuda"))
    assert calls["pinned"] == [(2, 3)]
    assert [is_pinned for *_, is_pinned in calls["moved"]] == [False, True]


def test_a_batch_and_its_contexts_go_this_way(tiny_run, monkeypatch):
    """Lightning's own way copies a record without pinning and waits for it."""
    sent = []

    def noted(record, device):
        sent.append((type(record).__name__, device.type))
        return record

    for module in ("training.datamodule", "retrieval.contexts"):
        monkeypatch.setattr(f"rag_lightning.{module}.to_device", noted)
    tiny_run(max_steps=2, optim={"train_passage_encoder": True}).fit()
    # a batch, its passages for the encoder, its contexts
    assert sent == [("QuestionBatch", "cpu"), ("TokenBatch", "cpu"), ("TokenBatch", "cpu")] * 2
