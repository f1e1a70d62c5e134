import numpy as np
import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.retrieval import encode
from rag_lightning.retrieval.encode import PassageTokens, encode_passages, encode_questions, encoding_seconds
from rag_lightning.text.token_store import TokenStore
from rag_lightning.types import Passage, TokenBatch
from rag_lightning.utils.distributed import shard

NUM_PASSAGES = 23


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    torch.manual_seed(0)
    built = tiny_encoder(dropout=0.5)
    with torch.no_grad():
        for weight in built.passage.parameters():  # so that the towers differ
            weight.add_(0.3 * torch.randn_like(weight))
    return built


@pytest.fixture(scope="module")
def corpus():
    """Passages of very different lengths, out of order, some longer than the encoder's limit."""
    rng = np.random.default_rng(0)
    words = ["amber", "bridge", "copper", "dawn", "was", "made", "by", "ada", "ash", "in", "it"]
    texts = [" ".join(rng.choice(words, size=1 + (7 * number) % 60)) for number in range(NUM_PASSAGES)]
    return PassageCorpus.from_passages(
        [Passage(id=str(number), title=f"Film {number}", text=text) for number, text in enumerate(texts)]
    )


@pytest.fixture(params=["as met", "from the store"])
def tokens(request, encoder, corpus, tmp_path):
    store = None
    if request.param == "from the store":
        texts = [encoder.passage_text(passage) for passage in corpus]
        limit = encoder.max_passage_tokens
        store = TokenStore.build(
            texts, encoder.tokenizer, directory=tmp_path / "store", key="k", max_tokens=limit, progress=False
        )
    return PassageTokens(encoder=encoder, corpus=corpus, store=store)


def plain_loop(encoder, corpus, rows):
    """One passage at a time, by the tokenizer and the tower: the oracle."""
    tower = encoder.passage.eval()
    vectors = []
    for row in rows:
        text = f"{corpus[row].title} {corpus[row].text}"
        ids = encoder.tokenizer(text, truncation=True, max_length=encoder.max_passage_tokens + 2)["input_ids"]
        ids = torch.tensor([ids])
        vectors.append(tower(TokenBatch(ids, torch.ones_like(ids)))[0].detach())
    return torch.stack(vectors)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("batches_per_block", [2, 32])
def test_vectors_are_those_of_a_plain_loop_in_order(
    encoder, corpus, tokens, batch_size, batches_per_block, monkeypatch
):
    monkeypatch.setattr(encode, "BATCHES_PER_BLOCK", batches_per_block)
    encoder.train()
    blocks = []
    for block in encode_passages(encoder, tokens, range(len(tokens)), batch_size=batch_size, progress=False):
        assert torch.is_grad_enabled()  # only the encoding itself goes without
        blocks.append(block)
    assert encoder.training
    assert encoder.passage.training
    per_block = batch_size * batches_per_block
    sizes = [min(per_block, NUM_PASSAGES - start) for start in range(0, NUM_PASSAGES, per_block)]
    assert [len(block) for block in blocks] == sizes  # the last is smaller
    found = torch.cat(blocks)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, plain_loop(encoder, corpus, range(NUM_PASSAGES)))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_shards_of_several_processes_make_up_the_whole(encoder, corpus, tokens):
    parts = [
        torch.cat(list(encode_passages(encoder, tokens, shard(NUM_PASSAGES, rank, 3), batch_size=4, progress=False)))
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [8, 8, 7]
    torch.testing.assert_close(torch.cat(parts), plain_loop(encoder, corpus, range(NUM_PASSAGES)))


def test_an_error_leaves_the_encoder_in_training_mode(encoder, tokens):
    encoder.train()
    blocks = encode_passages(encoder, tokens, range(NUM_PASSAGES, NUM_PASSAGES + 1), progress=False)
    with pytest.raises(IndexError):
        next(blocks)
    assert encoder.passage.training


def test_a_batch_holds_the_special_tokens_and_row_minus_one_nothing_else(encoder, corpus, tokens):
    batch = tokens.batch(np.asarray([2, -1]))
    text = f"{corpus[2].title} {corpus[2].text}"
    expected = encoder.tokenizer(text, truncation=True, max_length=encoder.max_passage_tokens + 2)["input_ids"]
    assert batch.input_ids[0].tolist() == expected
    assert batch.input_ids[1, : batch.attention_mask[1].sum()].tolist() == encoder.tokenizer("")["input_ids"]


def test_passages_outside_the_corpus_can_be_given(encoder, tokens):
    batch = tokens.batch_of([Passage(id="x", title="Dawn", text="was made by Ada")])
    assert batch.input_ids.tolist() == encoder.tokenizer(["Dawn was made by Ada"])["input_ids"]


def test_an_encoder_without_tokenizer_is_refused(encoder, corpus):
    bare = BiEncoder(query=encoder.query, passage=encoder.passage, tokenizer=None)
    with pytest.raises(ConfigError, match="this encoder has no tokenizer"):
        PassageTokens(encoder=bare, corpus=corpus)


def test_questions_are_encoded_as_one_by_one(encoder):
    questions = ["who made amber", "dawn", "by ada ash in it was made " * 20]
    with torch.no_grad():  # so that the towers differ, and the passage tower would show
        encoder.query.backbone.embeddings.word_embeddings.weight.mul_(1.5)
    encoder.train()
    found = encode_questions(encoder, questions, batch_size=2)
    assert encoder.query.training
    encoder.eval()
    for question, vector in zip(questions, found, strict=True):
        ids = encoder.tokenizer(question, truncation=True, max_length=encoder.max_query_tokens)["input_ids"]
        ids = torch.tensor([ids])
        torch.testing.assert_close(vector, encoder.query(TokenBatch(ids, torch.ones_like(ids)))[0].detach())
    assert not found.requires_grad
    bare = BiEncoder(query=encoder.query, passage=encoder.passage, tokenizer=None)
    with pytest.raises(ConfigError, match="this encoder has no tokenizer"):
        encode_questions(bare, questions)


def test_the_time_to_encode_is_extrapolated_from_batches_of_all_lengths(encoder, tokens, monkeypatch):
    clock = iter([100.0, 103.0])
    monkeypatch.setattr(encode.time, "perf_counter", lambda: next(clock))
    lengths = []
    plain = encode._encode

    def watched(tower, batch):
        lengths.append(batch.input_ids.shape)
        return plain(tower, batch)

    monkeypatch.setattr(encode, "_encode", watched)
    encoder.train()
    seconds = encoding_seconds(encoder, tokens, batch_size=4, num_batches=3)
    assert encoder.passage.training
    timed = lengths[1:]  # the first warms up
    assert len(timed) == 3
    assert seconds == pytest.approx(3.0 * NUM_PASSAGES / sum(rows for rows, _ in timed))
    widths = [width for _, width in timed]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 42, "the longest, cut at the limit"
    assert widths[-1] < 30
