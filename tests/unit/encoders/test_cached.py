"""Encoding in chunks: the same vectors and gradients as at once, in the memory of one chunk."""

import weakref

import pytest
import torch

from rag_lightning.encoders.bi_encoder import Tower
from rag_lightning.encoders.cached import encode_in_chunks
from rag_lightning.errors import ConfigError
from rag_lightning.types import TokenBatch


@pytest.fixture
def tower(tiny_encoder):
    def build(dropout=0.0):
        torch.manual_seed(0)
        return tiny_encoder(dropout=dropout).passage.train()

    return build


def texts(count, length=12):
    rng = torch.Generator().manual_seed(count)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (count, 1), generator=rng)).long()
    return TokenBatch(torch.randint(5, 40, (count, length), generator=rng) * mask, mask)


def gradients(tower: Tower, vectors_ND):
    """Of a loss that joins every vector with every other."""
    tower.zero_grad()
    (vectors_ND @ vectors_ND.T).softmax(dim=1).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 50])
def test_vectors_and_gradients_are_those_of_one_pass(chunk_size, tower):
    model, tokens = tower(), texts(7)
    plain = model(tokens)
    expected = gradients(model, plain)
    chunked = encode_in_chunks(model, tokens, chunk_size)
    torch.testing.assert_close(chunked, plain)
    found = gradients(model, chunked)
    assert len(found) > 10
    assert max(float(value.abs().max()) for value in found.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}")


def test_dropout_drops_the_same_again(tower):
    """Without the random state of the first pass, the second would carry the gradient to other units."""
    model, tokens = tower(dropout=0.5), texts(5)
    torch.manual_seed(3)
    parts = [TokenBatch(tokens.input_ids[i : i + 2], tokens.attention_mask[i : i + 2]) for i in (0, 2, 4)]
    plain = torch.cat([model(part) for part in parts])
    expected = gradients(model, plain)
    torch.manual_seed(3)
    chunked = encode_in_chunks(model, tokens, 2)
    torch.manual_seed(99)  # what happens between the passes must not matter
    torch.testing.assert_close(chunked, plain)
    assert not torch.allclose(chunked, encode_in_chunks(model, tokens, 2))
    for name, value in gradients(model, chunked).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, n=name: f"{n}: {text}")


def held_after_forward(model, encode):
    """Returns how many numbers, weights aside, autograd holds for the backward pass."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    held = []

    def pack(tensor):
        held.append(0 if tensor.data_ptr() in weights else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vectors_ND = encode()
    del vectors_ND
    return sum(held)


def test_autograd_holds_hardly_more_than_the_texts(tower):
    model, tokens = tower(), texts(64)
    whole = held_after_forward(model, lambda: model(tokens))
    assert whole > 100 * 64 * 16  # activations: many times the vectors
    assert held_after_forward(model, lambda: encode_in_chunks(model, tokens, 4)) < whole / 20


def test_one_chunk_at_a_time_is_encoded_and_held(tower):
    """Each chunk twice, the second time in the backward pass; by then the activations of the others are gone."""
    model, tokens = tower(), texts(10)
    sizes, alive_before, seen = [], [], []

    def watch(module, inputs, output):
        alive_before.append(sum(one() is not None for one in seen))
        sizes.append(len(output))
        seen.append(weakref.ref(output))

    model.backbone.encoder.layer[0].intermediate.register_forward_hook(watch)
    encoded = model(tokens)
    vectors_ND = encode_in_chunks(model, tokens, 4)
    assert alive_before == [0, 1, 1, 1]  # the plain pass keeps its own
    del encoded
    vectors_ND.square().sum().backward()
    assert sizes[:4] == [10, 4, 4, 2]
    assert sorted(sizes[4:]) == [2, 4, 4]
    assert alive_before[4:] == [0, 0, 0]


def test_texts_without_gradient_are_encoded_too(tower):
    model, tokens = tower(), texts(5)
    with torch.no_grad():
        torch.testing.assert_close(encode_in_chunks(model, tokens, 2), model(tokens))
    frozen = model.requires_grad_(False)
    assert not encode_in_chunks(frozen, tokens, 2).requires_grad


def test_a_chunk_holds_at_least_one_text(tower):
    with pytest.raises(ConfigError, match="chunk_size: expected at least 1 text at a time, got 0"):
        encode_in_chunks(tower(), texts(2), 0)
