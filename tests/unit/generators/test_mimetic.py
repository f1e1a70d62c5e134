"""The start that is ready to copy: cross-attention hands embeddings on, and what was read is likelier to be said."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from rag_lightning.errors import ConfigError
from rag_lightning.generators.mimetic import sinusoids, start_mimetic

VOCAB_SIZE = 400
SMALL = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "init_std": 0.125,
    "scale_embedding": True,
}


def small_model(model_type="bart", **settings):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **settings)).eval()


def lead_of_read_tokens(model) -> float:
    """Returns how many nats likelier a token is as first word when it was read than when it was not."""
    read_BL = torch.randint(5, VOCAB_SIZE, (64, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_BV = model(input_ids=read_BL, decoder_input_ids=torch.full((64, 1), 2)).logits[:, 0]
    was_read_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(1, read_BL, True)
    return float(logits_BV[was_read_BV].mean() - logits_BV[~was_read_BV].mean())


def test_cross_attention_hands_on_what_it_attends_to():
    model = small_model(**SMALL)
    start_mimetic(model)
    for layer in model.model.decoder.layers:
        product_DD = layer.encoder_attn.out_proj.weight @ layer.encoder_attn.v_proj.weight
        torch.testing.assert_close(product_DD, torch.eye(64), atol=1e-5, rtol=0)


def test_read_tokens_are_likelier_before_any_step():
    model = small_model(**SMALL)
    before = lead_of_read_tokens(model)
    start_mimetic(model)
    assert abs(before) < 0.03
    assert lead_of_read_tokens(model) > 0.1


def test_positions_are_sinusoids_whose_products_tell_distances():
    model = small_model(**SMALL)
    start_mimetic(model)
    table_PD = model.model.encoder.embed_positions.weight
    torch.testing.assert_close(table_PD, sinusoids(*table_PD.shape))
    products_PP = table_PD @ table_PD.T
    torch.testing.assert_close(products_PP.diagonal(1), products_PP[0, 1].expand(len(table_PD) - 1), atol=1e-4, rtol=0)


def test_other_shapes_are_refused():
    t5 = small_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="expected a model of BART's shape.*model_type='t5'"):
        start_mimetic(t5)
    untied = small_model(**SMALL, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match="tied embeddings"):
        start_mimetic(untied)
