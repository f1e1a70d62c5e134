"""Weights that came from a file lie where torch's own allocations begin, so that products round alike."""

import torch
from torch import nn

from rag_lightning.utils.memory import ALIGNMENT, aligned


def shifted(values):
    """Returns the values in memory that begins 4 bytes behind an allocation."""
    room = torch.empty(values.numel() + 1)
    room[1:] = values.flatten()
    return room[1:].view(values.shape)


def test_weights_move_to_aligned_memory_and_keep_values_and_ties():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(5, 7))
    model[1].weight = model[0].weight
    values = model[0].weight.detach().clone()
    model[0].weight.data = shifted(values)
    assert model[0].weight.data_ptr() % ALIGNMENT

    assert aligned(model) is model
    assert all(weight.data_ptr() % ALIGNMENT == 0 for weight in model.parameters())
    assert torch.equal(model[0].weight, values)
    assert model[1].weight is model[0].weight


def test_weights_that_are_aligned_stay_where_they_are():
    model = nn.Linear(5, 7)
    place = model.weight.data_ptr()
    aligned(model)
    assert model.weight.data_ptr() == place
