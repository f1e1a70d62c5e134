"""Packing changes how weights are stored, not what the retriever answers."""

import json

import torch
import yaml
from transformers import AutoModel, BartConfig, BartForConditionalGeneration

from rag_lightning.corpora.films import pack
from rag_lightning.encoders.word_embeddings import WordEmbeddingsConfig, WordEmbeddingsModel


def saved_run(folder, model, *place):
    model.save_pretrained(folder.joinpath("model", *place))
    settings = {name: name for name in pack.TOLD} | {"paths": {"run_dir": str(folder)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def test_packed_weights_are_the_runs_rounded(tmp_path):
    torch.manual_seed(0)
    words = WordEmbeddingsModel(WordEmbeddingsConfig(vocab_size=50, hidden_size=16))
    words.log_weights.weight.data.normal_(std=0.1)
    reader = BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                   decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
                   max_position_embeddings=8)
    )  # fmt: skip
    runs = saved_run(tmp_path / "a", words, "encoder", "query"), saved_run(tmp_path / "b", reader, "generator")
    size = pack.pack(*runs, tmp_path / "packed")
    assert 0 < size < pack.MAX_BYTES

    found = AutoModel.from_pretrained(tmp_path / "packed" / "encoder", dtype=torch.float32)
    assert found.config.weight_rate == pack.WEIGHT_RATE != words.config.weight_rate
    ids = torch.arange(1, 50)[None]
    with torch.no_grad():
        before_D, after_D = (model(ids).last_hidden_state.sum(dim=1)[0] for model in (words, found))
    assert torch.cosine_similarity(before_D, after_D, dim=0) > 0.995
    weights = [model.config.weight_rate * model.log_weights.weight for model in (words, found)]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-3, rtol=2e-3)

    told = (tmp_path / "packed" / "encoder" / "trained_by.yaml").read_text(encoding="utf-8")
    assert str(tmp_path) not in told
    assert json.loads((tmp_path / "packed" / "generator" / "config.json").read_text(encoding="utf-8"))["d_model"] == 16
