import math

import torch
from transformers import AutoConfig, AutoModel

from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.encoders.word_embeddings import WordEmbeddingsConfig, WordEmbeddingsModel
from rag_lightning.types import TokenBatch


def small_model():
    torch.manual_seed(0)
    model = WordEmbeddingsModel(WordEmbeddingsConfig(vocab_size=7, hidden_size=3, pad_token_id=0))
    model.log_weights.weight.data = torch.arange(7.0)[:, None] / 10 / model.config.weight_rate
    return model


def test_a_text_is_the_weighted_sum_of_its_words():
    model = small_model()
    tokens = TokenBatch(torch.tensor([[4, 2, 0], [6, 6, 1]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    found = Tower(backbone=model, pooling="mean")(tokens)
    vector = model.vectors.weight
    weight = [math.exp(number / 10) for number in range(7)]
    expected = torch.stack(
        [
            (weight[4] * vector[4] + weight[2] * vector[2]) / 2,
            (2 * weight[6] * vector[6] + weight[1] * vector[1]) / 3,
        ]
    )
    torch.testing.assert_close(found, expected)


def test_it_starts_with_equal_weights_and_a_padding_vector_of_zero():
    model = WordEmbeddingsModel(WordEmbeddingsConfig(vocab_size=500, hidden_size=64, pad_token_id=3))
    assert (model.log_weights.weight == 0).all()
    assert (model.vectors.weight[3] == 0).all()
    rest = torch.cat([model.vectors.weight[:3], model.vectors.weight[4:]])
    assert abs(rest.std().item() - 64**-0.5) < 0.01


def test_the_auto_classes_save_and_load_it(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.vocab_size, config.hidden_size, config.pad_token_id) == (
        "rag_word_embeddings", 7, 3, 0
    )  # fmt: skip
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, WordEmbeddingsModel)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_gradient_reaches_vectors_and_weights_but_not_the_padding_vector():
    model = small_model()
    tokens = TokenBatch(torch.tensor([[4, 0]]), torch.tensor([[1, 1]]))  # even a padding token that is let in
    Tower(backbone=model, pooling="mean")(tokens).sum().backward()
    assert (model.vectors.weight.grad[4] != 0).all()
    assert (model.vectors.weight.grad[0] == 0).all()
    assert model.log_weights.weight.grad[4] != 0


def test_another_weight_rate_makes_an_index_stale():
    torch.manual_seed(0)
    hashes = []
    for rate in (10.0, 30.0):
        words = WordEmbeddingsModel(WordEmbeddingsConfig(vocab_size=5, hidden_size=2, weight_rate=rate))
        words.vectors.weight.data.fill_(1.0)
        tower = Tower(backbone=words, pooling="mean")
        hashes.append(BiEncoder(query=tower, passage=tower, tokenizer=None).passage_hash())
    assert hashes[0] != hashes[1]


def test_texts_of_unlike_length_are_read_while_learning():
    """There is no table of input embeddings to look up once for all groups."""
    tower = Tower(backbone=small_model(), pooling="mean")
    mask_NL = (torch.arange(6) < torch.tensor([[6], [1], [3]])).long()
    tokens = TokenBatch(torch.full((3, 6), 4) * mask_NL, mask_NL)
    tower.group_overhead_tokens = 0.0
    grouped_ND = tower(tokens)
    grouped_ND.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(grouped_ND, tower(tokens))
    assert tower.backbone.vectors.weight.grad is not None
