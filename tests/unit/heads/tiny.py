"""A reader of one layer, towers of one layer, and labelled examples that they can learn."""

import torch
from transformers import BertConfig, BertModel

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.heads.classification import ClassificationHead
from rag_lightning.heads.model import HeadedModel, RetrievalSettings
from rag_lightning.heads.reader import Reader
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.types import LabelledText, Passage

TEXTS = (
    "good bad",
    "a warm and funny film", "a cold and dull film", "funny people made it", "dull people made it",
    "warm songs in the film", "cold songs in the film", "@ Anna @ sings in # Oslo #", "none = : , PER LOC",
)  # fmt: skip


def tokenizer():
    return train_word_tokenizer(TEXTS, vocab_size=200)


def backbone(tokens, seed=0, num_layers=1):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64, pad_token_id=tokens.pad_token_id, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    return BertModel(config).double()


def reader(max_tokens=32, num_layers=1):
    tokens = tokenizer()
    return Reader(backbone=backbone(tokens, num_layers=num_layers), tokenizer=tokens, max_tokens=max_tokens)


def encoder():
    tokens = tokenizer()
    towers = [Tower(backbone=backbone(tokens, seed=1), pooling="mean", normalise=True) for _ in range(2)]
    return BiEncoder(query=towers[0], passage=towers[1], tokenizer=tokens, passage_template="{text}")


def model(head=None, **settings):
    own = head if head is not None else ClassificationHead(width=16, num_labels=2, dropout=0.0)
    augmented = settings.get("num_passages", 0) > 0
    made = HeadedModel(
        reader=reader(), heads={"task": own}, encoder=encoder() if augmented else None,
        settings=RetrievalSettings(**settings),
    )  # fmt: skip
    return made.double().eval()


def examples():
    return [LabelledText(str(n), text, "good" if n % 2 == 0 else "bad") for n, text in enumerate(TEXTS[1:7])]


def corpus():
    return PassageCorpus.from_passages([Passage(e.id, e.label, e.text) for e in examples()])
