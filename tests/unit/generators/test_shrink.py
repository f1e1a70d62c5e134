"""Dropping layers: what is left is what those layers alone compute, it decodes, and it can be saved and loaded."""

import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.generators.shrink import keep_layers
from rag_lightning.types import TokenBatch

SIZE = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0, "max_position_embeddings": 40}
SIZE |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 3}


@pytest.fixture
def saved(tiny_world, tmp_path):
    """A 2+3-layer BART's folder."""
    torch.manual_seed(0)
    generator = Seq2SeqGenerator.from_config(model_type="bart", settings=SIZE, tokenizer=str(tiny_world.tokenizer))
    generator.save(tmp_path / "whole")
    return str(tmp_path / "whole")


def scores(generator):
    labels = torch.tensor([[1, 9, 8, 7, 2]])
    encoded = generator.encode(TokenBatch(torch.tensor([[1, 9, 10, 11, 2]]), torch.ones(1, 5, dtype=torch.long)))
    return encoded, labels, generator.score(encoded, labels, 1).token_log_probs_BKT


@torch.no_grad()
def test_the_kept_layers_compute_what_they_did(saved):
    whole = Seq2SeqGenerator.from_source(saved)
    small = Seq2SeqGenerator.from_source(saved, encoder_layers=[1], decoder_layers=[0, 2])
    assert (small.model.config.encoder_layers, small.model.config.decoder_layers) == (1, 2)
    body = whole.model.model  # by hand: the other layers hand on what they get
    body.encoder.layers = torch.nn.ModuleList([body.encoder.layers[1]])
    body.decoder.layers = torch.nn.ModuleList([body.decoder.layers[0], body.decoder.layers[2]])
    torch.testing.assert_close(scores(small)[2], scores(whole)[2])


@torch.no_grad()
def test_it_decodes_step_by_step_and_comes_back_from_disk(saved, tmp_path):
    """A kept layer caches its keys at its new place; at its old one the cache had a hole."""
    small = Seq2SeqGenerator.from_source(saved, encoder_layers=[0], decoder_layers=[1, 2]).eval()
    encoded, labels, expected_BKT = scores(small)
    state, found = small.start(encoded), []
    for place in range(labels.shape[1] - 1):
        log_probs_NV, state = small.step(labels[:, place], state)
        found.append(log_probs_NV[0, labels[0, place + 1]])
    torch.testing.assert_close(torch.stack(found), expected_BKT[0, 0])
    small.save(tmp_path / "small")
    again = Seq2SeqGenerator.load(tmp_path / "small").eval()
    assert torch.equal(scores(again)[2], expected_BKT)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("kept", [[], [3], [-1], [1, 0], [0, 0]])
def test_numbers_that_are_no_layers_are_refused(kept, saved):
    with pytest.raises(ConfigError, match=r"generator.decoder_layers: expected rising numbers of layers from 0 to 2"):
        Seq2SeqGenerator.from_source(saved, decoder_layers=kept)


def test_a_model_of_another_shape_is_refused(tiny_world):
    settings = {"d_model": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24}
    t5 = Seq2SeqGenerator.from_config(model_type="t5", settings=settings, tokenizer=str(tiny_world.tokenizer))
    with pytest.raises(
        ConfigError, match=r"generator.encoder_layers: expected a model of BART's shape .*model_type='t5'"
    ):
        keep_layers(t5.model, encoder=[0])
