import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.heads.classification import ClassificationHead
from rag_lightning.heads.model import HeadedModel, RetrievalSettings
from rag_lightning.heads.reading import read
from rag_lightning.heads.relation import RelationHead
from rag_lightning.heads.token_classification import TokenClassificationHead
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.types import LabelledText, RelationMention, TaggedSentence
from rag_lightning.utils import lengths
from tests.unit.heads import tiny

EXACT = {"atol": 1e-9, "rtol": 0.0}
KINDS = {
    "classification": (ClassificationHead(width=16, num_labels=3, dropout=0.0), tiny.examples()[:3]),
    "tagging": (
        TokenClassificationHead(width=16, num_labels=3, dropout=0.0),
        [
            TaggedSentence("1", ("Anna", "sings", "in", "Oslo"), ("B-PER", "O", "O", "B-LOC")),
            TaggedSentence("2", ("warm", "songs"), ("O", "O")),
        ],
    ),
    "relation": (
        RelationHead(width=16, num_labels=3, dropout=0.0),
        [
            RelationMention("1", "Anna sings in Oslo", (0, 4), (14, 18), "in"),
            RelationMention("2", "warm songs in it", (5, 10), (0, 4), "of"),
        ],
    ),
}


def retriever_for(model, tmp_path):
    corpus = tiny.corpus()
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus).batch(torch.arange(len(corpus)).numpy())
    with torch.no_grad():
        vectors = model.encoder.passage(tokens)
    snapshot = SnapshotStore(tmp_path / "index").publish(
        vectors.float(), encoder_hash="e", corpus_hash=corpus.hash, pooling="mean", step=0
    )
    return DenseRetriever(snapshot, corpus)


@pytest.mark.parametrize("kind", KINDS)
def test_the_marginal_is_the_sum_over_passages_read_one_at_a_time(kind, tmp_path):
    head, examples = KINDS[kind]
    model = tiny.model(head, num_passages=3, temperature=0.1)
    retriever = retriever_for(model, tmp_path)
    forbidden = torch.full((len(examples),), -1)
    forbidden[0] = 0
    output = model("task", examples, retriever, forbidden)
    for row, example in enumerate(examples):
        text = " ".join(example.words) if kind == "tagging" else example.text
        tokens = model.encoder.tokenizer([text], return_tensors="pt")
        query = model.encoder.query.backbone(**tokens).last_hidden_state.mean(dim=1)[0]
        query = (query / query.norm()).detach()
        scores = {
            number: float(query @ retriever.vectors(torch.tensor([[number]]))[0, 0].double())
            for number in range(6)
            if number != int(forbidden[row])
        }
        best = sorted(scores, key=lambda number: -scores[number])[:3]
        weights = torch.tensor([scores[number] / 0.1 for number in best], dtype=torch.float64).softmax(dim=0)
        total = 0.0
        for number, weight in zip(best, weights, strict=True):
            passage = retriever.corpus[number]
            one = read(model.reader.tokenizer, [example], [[passage]], max_tokens=32)
            each = head(model.reader(one), one.tokens.attention_mask, one.places)[0].softmax(dim=-1)
            total = total + weight * each
        found = output.log_probs[row].exp()
        torch.testing.assert_close(found[: len(total)] if kind == "tagging" else found, total, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_head_reads_the_text_alone_and_padding_changes_nothing(kind):
    head, examples = KINDS[kind]
    model = tiny.model(head)
    together = model("task", examples).log_probs
    for row, example in enumerate(examples):
        alone = model("task", [example]).log_probs[0]
        torch.testing.assert_close(together[row][: len(alone)] if kind == "tagging" else together[row], alone, **EXACT)


@pytest.mark.parametrize("reads", ["marginal", "attention"])
def test_the_gradient_reaches_query_encoder_reader_and_head(reads, tmp_path):
    head = ClassificationHead(width=16, num_labels=2, pooling="attention", dropout=0.0)
    model = tiny.model(head, num_passages=3, temperature=0.1, reads=reads)
    output = model("task", tiny.examples(), retriever_for(model, tmp_path), torch.arange(6))
    labels = torch.tensor([0, 1] * 3)
    (-output.log_probs.gather(1, labels[:, None]).mean()).backward()
    for part in (model.encoder.query, model.reader, model.heads):
        assert all(p.grad is not None for p in part.parameters())
        assert max(float(p.grad.abs().max()) for p in part.parameters()) > 1e-9
    assert all(p.grad is None for p in model.encoder.passage.parameters())
    assert all(int(output.hits.ids_BK[row].eq(row).sum()) == 0 for row in range(6)), "an example never finds itself"


def test_attention_over_passages_equals_one_softmax_written_out(tmp_path):
    head = ClassificationHead(width=16, num_labels=2, pooling="attention", dropout=0.0)
    torch.nn.init.normal_(head.attention.query)
    model = tiny.model(head, num_passages=2, temperature=0.1, reads="attention")
    retriever = retriever_for(model, tmp_path)
    output = model("task", tiny.examples()[:2], retriever, None)
    torch.testing.assert_close(output.weights_BKL.sum(dim=(1, 2)), torch.ones(2, dtype=torch.float64), **EXACT)
    for row, example in enumerate(tiny.examples()[:2]):
        parts, weights = [], []
        for k in range(2):
            passage = retriever.corpus[int(output.hits.ids_BK[row, k])]
            one = read(model.reader.tokenizer, [example], [[passage]], max_tokens=32)
            states = model.reader(one)[0]
            scores = states @ head.attention.query / 4.0
            parts.append(states)
            weights.append(scores.exp() * output.log_prior_BK[row, k].exp() / len(states))
        joined, mass = torch.cat(parts), torch.cat(weights)
        expected = head.output((mass[:, None] * joined).sum(dim=0) / mass.sum()).log_softmax(dim=0)
        torch.testing.assert_close(output.log_probs[row], expected, atol=1e-6, rtol=0.0)


def test_a_missing_passage_has_no_share():
    head = ClassificationHead(width=16, num_labels=2, pooling="attention", dropout=0.0)
    states, mask = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.long)
    _, weights_BKL = head.over_passages(states, mask, torch.tensor([[0.0, -torch.inf]]))
    assert weights_BKL[0, 1].sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_judges_the_same(kind, tmp_path):
    head, examples = KINDS[kind]
    model = tiny.model(head).float()
    names = {"task": ("a", "b", "c")}
    model.save_pretrained(tmp_path / "model", names)
    other, labels = HeadedModel.from_pretrained(tmp_path / "model")
    assert labels == names
    torch.testing.assert_close(other("task", examples).log_probs, model("task", examples).log_probs)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="task.num_passages: expected 0 without an encoder"):
        HeadedModel(reader=tiny.reader(), heads={}, settings=RetrievalSettings(num_passages=2))
    with pytest.raises(ConfigError, match="heads: expected a retriever with num_passages=2"):
        tiny.model(num_passages=2)("task", tiny.examples())
    with pytest.raises(ConfigError, match="task.reads=attention: expected a classification head, task has another"):
        tiny.model(RelationHead(width=16, num_labels=2), num_passages=1, reads="attention")
    with pytest.raises(ConfigError, match="task.reads=attention: expected task.pooling=attention with it, got 'cls'"):
        ClassificationHead(width=16, num_labels=2).over_passages(
            torch.zeros(1, 1, 16), torch.ones(1, 1).long(), torch.zeros(1, 1)
        )
    with pytest.raises(ConfigError, match="task.num_passages: expected 0 .plain. or more, got -1"):
        RetrievalSettings(num_passages=-1)
    with pytest.raises(ConfigError, match="reader.max_tokens=100: expected at most 64"):
        tiny.reader(max_tokens=100)


def test_texts_read_in_groups_of_like_length_have_the_states_of_each_alone(monkeypatch):
    monkeypatch.setattr(lengths, "_RUN_FLOPS", {"cpu": 1.0, "cuda": 1.0})
    reader = tiny.reader()
    texts = [
        LabelledText("1", "warm", "a"),
        LabelledText("2", "a cold and dull film", "a"),
        LabelledText("3", "funny film", "a"),
    ]
    reading = read(reader.tokenizer, texts, None, max_tokens=32)
    assert len(lengths.model_length_groups(reader.backbone, reading.tokens.lengths, 7)) > 1
    states = reader(reading)
    for row, text in enumerate(texts):
        alone = reader(read(reader.tokenizer, [text], None, max_tokens=32))[0]
        torch.testing.assert_close(states[row, : len(alone)], alone, **EXACT)
