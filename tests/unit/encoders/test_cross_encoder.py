import inspect

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from rag_lightning.encoders.cross_encoder import CrossEncoder
from rag_lightning.errors import CheckpointError, ConfigError, DataError, MissingFileError
from rag_lightning.types import Passage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "made", "amber", "ada", "eve", "quartz"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
QUESTIONS = ["who made amber", "who made quartz", "amber", "who"]
PASSAGES = [
    Passage("0", "amber", "ada made amber"),
    Passage("1", "quartz", "eve"),
    Passage("2", "", "ada made amber amber amber amber"),
    Passage("3", "eve", "quartz"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cross-encoder with a BERT tokenizer, which tells the two texts apart by token types."""
    place = tmp_path_factory.mktemp("cross_encoder")
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), num_labels=1, pad_token_id=0, initializer_range=0.5, **SIZES)
    BertForSequenceClassification(config).save_pretrained(place)
    return place


@pytest.fixture
def cross_encoder(folder):
    return CrossEncoder.from_source(source=str(folder), max_tokens=32)


def naive_logit(folder, question, text):
    """One pair by hand: ``[CLS] question [SEP] text [SEP]``, token types 0 and 1, no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = {word: n for n, word in enumerate(WORDS)}
    left = [2, *(ids[word] for word in question.split()), 3]
    right = [*(ids[word] for word in text.split()), 3]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([left + right]), token_type_ids=torch.tensor([[0] * len(left) + [1] * len(right)])
        ).logits.item()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_each_pair_is_scored_as_if_alone(folder, cross_encoder, batch_size):
    expected = [
        naive_logit(folder, question, f"{passage.title} {passage.text}".strip())
        for question, passage in zip(QUESTIONS, PASSAGES, strict=True)
    ]
    assert max(expected) - min(expected) > 0.1
    logits = cross_encoder.score(QUESTIONS, PASSAGES, batch_size=batch_size)
    assert logits.tolist() == pytest.approx(expected, abs=1e-5)
    assert not logits.requires_grad


def test_dropout_is_off_and_the_mode_is_left_as_it_was(cross_encoder):
    expected = cross_encoder.score(QUESTIONS, PASSAGES)
    cross_encoder.train()
    assert torch.equal(cross_encoder.score(QUESTIONS, PASSAGES), expected)
    assert cross_encoder.training
    assert cross_encoder.score([], []).shape == (0,)


def test_a_long_pair_is_cut_at_the_passage(folder):
    short = CrossEncoder.from_source(source=str(folder), max_tokens=9)
    cut = short.score(["who made amber"], [Passage("0", "", "ada made amber amber amber amber amber")])
    assert cut.item() == pytest.approx(naive_logit(folder, "who made amber", "ada made amber"), abs=1e-5)


def test_a_random_one_is_built_from_a_configuration(folder):
    built = CrossEncoder.from_config(model_type="bert", settings=SIZES, tokenizer=str(folder), max_tokens=32)
    assert built.score(QUESTIONS, PASSAGES).shape == (4,)
    assert built.model.config.vocab_size == len(WORDS)


def test_what_is_no_cross_encoder_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="expected a classifier with one output, came 3"):
        CrossEncoder.from_config(model_type="bert", settings={**SIZES, "num_labels": 3}, tokenizer=str(folder))
    config = BertConfig(vocab_size=len(WORDS), num_labels=1, **SIZES)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks \d weights of BertForSequenceClassification, such as classifier"):
        CrossEncoder.from_source(source=str(tmp_path))
    with pytest.raises(MissingFileError, match="pretrained model: no such folder"):
        CrossEncoder.from_source(source=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("max_tokens", [7, 33])
def test_pairs_longer_than_the_model_reads_are_refused(folder, max_tokens):
    with pytest.raises(ConfigError, match=f"max_tokens: expected 8 to 32, came {max_tokens}"):
        CrossEncoder.from_source(source=str(folder), max_tokens=max_tokens)


def test_unequal_numbers_are_refused(cross_encoder):
    with pytest.raises(DataError, match="one passage for each of 4 questions, came 1"):
        inspect.unwrap(CrossEncoder.score)(cross_encoder, QUESTIONS, PASSAGES[:1])
