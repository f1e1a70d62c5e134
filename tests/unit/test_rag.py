import inspect
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.decoding.options import Decoded, DecodingOptions
from rag_lightning.errors import ConfigError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.bm25 import Bm25Index
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.losses.marginal import (
    doc_log_prior,
    rag_sequence_log_likelihood,
    rag_token_log_likelihood,
    token_posteriors,
)
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings
from rag_lightning.retrieval.build import RetrieverSettings, build_fusion
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.retrieval.hybrid import HybridRetriever
from rag_lightning.retrieval.sparse import SparseRetriever
from rag_lightning.types import Hits, Question, RagBatch

QUESTIONS = ["who made Amber", "who made Quartz", "who made Winter"]
ANSWERS = ["Ada Ash", "Eve Cedar", "Cleo"]


@pytest.fixture(scope="module")
def corpus(tiny_world):
    return PassageCorpus.read(tiny_world.passages)


@pytest.fixture
def model(tiny_model):
    """Large random weights, so that passages matter."""
    built = tiny_model().eval()
    with torch.no_grad():
        for weight in built.parameters():
            weight.mul_(4.0)
    return built


def retriever_for(model, corpus, folder, metric="inner_product"):
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    snapshot = SnapshotStore(folder).publish(
        encode_passages(model.encoder, tokens, range(len(corpus)), progress=False),
        encoder_hash=model.encoder.passage_hash(),
        corpus_hash=corpus.hash,
        pooling="mean",
        metric=metric,
    )
    return DenseRetriever(snapshot, corpus)


@pytest.fixture
def retriever(model, corpus, tmp_path):
    return retriever_for(model, corpus, tmp_path / "index")


def batch_of(model, retriever, hits, scores_BK, answers: Sequence[str] = ANSWERS):
    assembler = ContextAssembler(corpus=retriever.corpus, tokenizer=model.generator.tokenizer, prompt=model.prompt)
    contexts = assembler.contexts(hits.ids_BK, model.prompt_tokens(QUESTIONS))
    return RagBatch(contexts, scores_BK, model.target_tokens(answers))


# ---------------------------------------------------------------------- gradient through retrieval


def without_gradient(part):
    """Names of the weights that got no gradient at all."""
    return [
        name for name, weight in part.named_parameters() if weight.grad is None or not bool((weight.grad != 0).any())
    ]


def moved_by_no_loss(names):
    """A key's bias moves all scores of a softmax alike, so its gradient is 0 but for rounding."""
    return all(name.endswith(("k_proj.bias", "key.bias")) for name in names)


@pytest.mark.parametrize("objective", ["rag_token", "rag_sequence"])
@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_gradient_reaches_the_query_encoder_and_the_generator_through_retrieval(
    model, corpus, tmp_path, objective, metric
):
    model.settings = replace(model.settings, metric=metric, temperature=1.0)
    retriever = retriever_for(model, corpus, tmp_path, metric)
    vectors = retriever.vectors(torch.arange(len(corpus))[None]).clone()
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    torch.testing.assert_close(scores_BK.detach(), hits.scores_BK, atol=1e-5, rtol=1e-5)
    model.marginal(batch_of(model, retriever, hits, scores_BK), objective=objective).nll_B.sum().backward()
    assert moved_by_no_loss(without_gradient(model.generator))
    assert moved_by_no_loss(without_gradient(model.encoder.query))
    assert all(weight.grad is None for weight in model.encoder.passage.parameters())
    # the index's vectors are constants
    assert not retriever.vectors(hits.ids_BK).requires_grad
    assert torch.equal(retriever.vectors(torch.arange(len(corpus))[None]), vectors)


def test_the_gradient_of_the_query_vector_is_posterior_minus_prior_of_the_index_vectors(model, retriever):
    """∂ log p(y|x) / ∂ q = Σ_k (p(z_k|x,y) - p(z_k|x)) z_k / temperature, for RAG-Sequence and inner product."""
    captured = []
    handle = model.encoder.query.register_forward_hook(
        lambda module, arguments, output: (output.retain_grad(), captured.append(output))[-1]
    )
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    handle.remove()
    marginal = model.marginal(batch_of(model, retriever, hits, scores_BK), objective="rag_sequence")
    marginal.log_likelihood_B.sum().backward()
    weights_BK = (marginal.log_posterior_BK.exp() - marginal.log_prior_BK.exp()).detach()
    vectors_BKD = retriever.vectors(hits.ids_BK)
    expected_BD = (weights_BK[..., None] * vectors_BKD).sum(dim=1) / model.settings.temperature
    assert expected_BD.abs().max() > 1e-3
    torch.testing.assert_close(captured[0].grad, expected_BD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_reencoded_passages_carry_gradient_to_the_passage_encoder(model, corpus, tmp_path, metric):
    model.settings = replace(model.settings, metric=metric)
    retriever = retriever_for(model, corpus, tmp_path, metric)
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    asked = []

    def reencode(ids_BK):
        asked.append(ids_BK.tolist())
        return tokens.batch(ids_BK.reshape(-1).numpy())

    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever, reencode=reencode)
    assert asked == [hits.ids_BK.tolist()]
    torch.testing.assert_close(scores_BK.detach(), hits.scores_BK, atol=1e-4, rtol=1e-4)
    model.marginal(batch_of(model, retriever, hits, scores_BK)).nll_B.sum().backward()
    assert moved_by_no_loss(without_gradient(model.encoder.passage))
    assert moved_by_no_loss(without_gradient(model.encoder.query))


def test_scores_come_from_the_passage_encoder_as_it_is_now_not_from_the_index(model, retriever, corpus):
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    with torch.no_grad():
        for weight in model.encoder.passage.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    query = model.query_tokens(QUESTIONS)
    hits, stale_BK = model.retrieve(query, QUESTIONS, retriever)
    _, fresh_BK = model.retrieve(
        query, QUESTIONS, retriever, reencode=lambda ids_BK: tokens.batch(ids_BK.reshape(-1).numpy())
    )
    batch = tokens.batch(hits.ids_BK.reshape(-1).numpy())
    vectors_BKD = model.encoder.passage(batch).view(3, 3, -1)
    expected_BK = (model.encoder.query(query)[:, None] * vectors_BKD).sum(dim=2)
    torch.testing.assert_close(fresh_BK, expected_BK)
    assert (fresh_BK - stale_BK).abs().max() > 1e-2


@pytest.mark.parametrize("frozen", ["encoder.query", "encoder.passage", "generator"])
def test_no_frozen_part_gets_a_gradient(model, retriever, corpus, frozen):
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    parts = {
        "encoder.query": model.encoder.query,
        "encoder.passage": model.encoder.passage,
        "generator": model.generator,
    }
    parts[frozen].requires_grad_(False)
    hits, scores_BK = model.retrieve(
        model.query_tokens(QUESTIONS),
        QUESTIONS,
        retriever,
        reencode=lambda ids_BK: tokens.batch(ids_BK.reshape(-1).numpy()),
    )
    model.marginal(batch_of(model, retriever, hits, scores_BK)).nll_B.sum().backward()
    for name, part in parts.items():
        if name == frozen:
            assert all(weight.grad is None for weight in part.parameters())
        else:
            assert moved_by_no_loss(without_gradient(part))


class Forgetful:
    """A retriever that finds nothing at the last place, as an approximate index may."""

    def __init__(self, retriever):
        self.retriever = retriever

    def retrieve(self, questions, query_vectors_BD, num_passages):
        hits = self.retriever.retrieve(questions, query_vectors_BD, num_passages)
        scores_BK, ids_BK = hits.scores_BK.clone(), hits.ids_BK.clone()
        scores_BK[:, -1], ids_BK[:, -1] = -torch.inf, -1
        return Hits(scores_BK, ids_BK, hits.snapshot_id)

    def __getattr__(self, name):
        return getattr(self.retriever, name)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize("reencoded", [False, True])
def test_a_passage_that_was_not_found_weighs_nothing_and_spoils_no_gradient(model, corpus, tmp_path, metric, reencoded):
    model.settings = replace(model.settings, metric=metric)
    retriever = retriever_for(model, corpus, tmp_path, metric)
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    reencode = (lambda ids_BK: tokens.batch(ids_BK.reshape(-1).numpy())) if reencoded else None
    query = model.query_tokens(QUESTIONS)
    hits, scores_BK = model.retrieve(query, QUESTIONS, Forgetful(retriever), reencode=reencode)
    assert (scores_BK[:, -1] == -torch.inf).all()
    for kind in ("rag_token", "rag_sequence"):
        model.zero_grad()
        marginal = model.marginal(batch_of(model, retriever, hits, scores_BK), objective=kind, label_smoothing=0.1)
        marginal.nll_B.sum().backward(retain_graph=True)
        assert (marginal.log_prior_BK[:, -1].exp() == 0).all()
        assert (marginal.log_posterior_BK[:, -1].exp() == 0).all()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert len(gradients) > 20
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    fewer_hits, fewer_BK = model.retrieve(query, QUESTIONS, retriever, num_passages=2)
    fewer = model.marginal(batch_of(model, retriever, fewer_hits, fewer_BK), objective="rag_token")
    full = model.marginal(batch_of(model, retriever, hits, scores_BK), objective="rag_token")
    torch.testing.assert_close(full.nll_B, fewer.nll_B)


# ---------------------------------------------------------------------- other retrievers


@pytest.fixture(scope="module")
def sparse(corpus):
    pytest.importorskip("bm25s")
    return SparseRetriever(Bm25Index.build(corpus), corpus)


def refuse(*_):
    raise AssertionError("no question need be encoded")


def test_a_sparse_retriever_runs_no_query_encoder_and_needs_none(model, sparse):
    model.encoder.query.register_forward_pre_hook(refuse)
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, sparse)
    expected_scores, expected_ids = sparse.index.search(QUESTIONS, 3)
    assert torch.equal(hits.ids_BK, expected_ids)
    assert torch.equal(scores_BK, expected_scores)
    assert not scores_BK.requires_grad
    model.settings = replace(model.settings, temperature=1.0)
    marginal = model.marginal(batch_of(model, sparse, hits, scores_BK))
    marginal.nll_B.sum().backward()
    assert moved_by_no_loss(without_gradient(model.generator))
    assert all(weight.grad is None for weight in model.encoder.parameters())
    bare = RagModel.from_parts(replace(model.parts(), encoder=None)).eval()
    answers = bare.generate(QUESTIONS, retriever=sparse)
    assert answers == model.generate(QUESTIONS, retriever=sparse)
    assert [passage.score for passage in answers[0].passages] == pytest.approx(expected_scores[0].tolist())
    assert answers[0].passages[0].id == "film-0"


def test_a_question_without_a_known_word_is_read_alone(model, sparse):
    """The scores of such a question were -inf throughout, and its marginal undefined."""
    model.settings = replace(model.settings, temperature=1.0)
    questions = ["zzz yyy", *QUESTIONS[1:]]
    hits, scores_BK = model.retrieve(None, questions, sparse)
    assert hits.ids_BK[0].tolist() == [-1, -1, -1]
    assembler = ContextAssembler(corpus=sparse.corpus, tokenizer=model.generator.tokenizer, prompt=model.prompt)
    prompt = model.prompt_tokens(questions)
    contexts = assembler.contexts(hits.ids_BK, prompt)
    marginal = model.marginal(RagBatch(contexts, scores_BK, model.target_tokens(ANSWERS)))
    alone = model.marginal(RagBatch(assembler.without_passage(prompt), torch.zeros(3, 1), model.target_tokens(ANSWERS)))
    torch.testing.assert_close(marginal.nll_B[0], alone.nll_B[0])
    assert (marginal.nll_B[1:] - alone.nll_B[1:]).abs().min() > 1e-3
    (prediction, *_) = model.generate(questions, retriever=sparse)
    assert [passage.id for passage in prediction.passages] == ["", "", ""]


def hybrid_for(model, retriever, sparse, **settings):
    model.fusion = build_fusion(
        RetrieverSettings(kind="hybrid", num_candidates=6, **settings), dimension=model.encoder.dimension
    )
    return HybridRetriever(dense=retriever, sparse=sparse, fusion=model.fusion, num_candidates=6)


@pytest.mark.parametrize("objective", ["rag_token", "rag_sequence"])
@pytest.mark.parametrize("reencoded", [False, True])
@pytest.mark.parametrize("hidden", [None, 4])
def test_the_marginal_likelihood_reaches_gate_encoders_and_generator(
    model, corpus, retriever, sparse, objective, reencoded, hidden
):
    hybrid = hybrid_for(model, retriever, sparse, fusion="gate", gate_hidden=hidden)
    with torch.no_grad():  # a zero last layer passes nothing to the one before it
        for parameter in model.fusion.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    reencode = (lambda ids_BK: tokens.batch(ids_BK.reshape(-1).numpy())) if reencoded else None
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, hybrid, reencode=reencode)
    torch.testing.assert_close(scores_BK.detach(), hits.scores_BK, atol=1e-4, rtol=1e-4)
    model.marginal(batch_of(model, hybrid, hits, scores_BK), objective=objective).nll_B.sum().backward()
    assert not without_gradient(model.fusion)
    assert moved_by_no_loss(without_gradient(model.generator))
    assert moved_by_no_loss(without_gradient(model.encoder.query))
    reached = [weight.grad is not None for weight in model.encoder.passage.parameters()]
    assert all(reached) if reencoded else not any(reached)


def test_the_gradient_of_the_gate_is_posterior_minus_prior_of_what_it_weighs(model, retriever, sparse):
    """∂ log p(y|x) / ∂ w = Σ_k (p(z_k|x,y) − p(z_k|x)) (φ_dense − φ_sparse) / τ; and ∂w/∂bias = w (1 − w) = 1/4."""
    hybrid = hybrid_for(model, retriever, sparse, fusion="gate")
    query = model.query_tokens(QUESTIONS)
    hits, scores_BK = model.retrieve(query, QUESTIONS, hybrid)
    marginal = model.marginal(batch_of(model, hybrid, hits, scores_BK), objective="rag_sequence")
    marginal.log_likelihood_B.sum().backward()
    gain_BK = (marginal.log_posterior_BK.exp() - marginal.log_prior_BK.exp()).detach()
    queries_BD = model.encoder.query(query).detach()
    similarities_BK = (queries_BD[:, None] * retriever.vectors(hits.ids_BK)).sum(dim=2)
    dense_BK = (similarities_BK - hits.fusion.dense_shift_B1) / hits.fusion.dense_scale_B1
    expected = (gain_BK * (dense_BK - hits.fusion.sparse_BK)).sum() / model.settings.temperature / 4
    assert expected.abs() > 1e-4
    torch.testing.assert_close(model.fusion.gate.bias.grad[0], expected, atol=1e-5, rtol=1e-4)


def test_steps_on_the_marginal_likelihood_move_the_gate_and_lower_the_loss(model, retriever, sparse):
    hybrid = hybrid_for(model, retriever, sparse, fusion="gate")
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    optimizer = torch.optim.SGD(model.fusion.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, hybrid)
        loss = model.marginal(batch_of(model, hybrid, hits, scores_BK)).nll_B.sum()
        losses.append((hits.ids_BK.tolist(), loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same_hits = [loss for ids, loss in losses if ids == losses[0][0]]
    assert len(same_hits) >= 2
    assert same_hits[-1] < same_hits[0]


@pytest.mark.parametrize("settings", [{"fusion": "rrf"}, {"fusion": "convex", "fusion_weight": 0.0}])
def test_constant_document_scores_cost_no_similarities(model, retriever, sparse, settings):
    hybrid = hybrid_for(model, retriever, sparse, **settings)
    hits, scores_BK = model.retrieve(
        model.query_tokens(QUESTIONS), QUESTIONS, hybrid, reencode=lambda ids_BK: pytest.fail("encoded for nothing")
    )
    assert torch.equal(scores_BK, hits.scores_BK)
    assert not scores_BK.requires_grad
    predictions = model.generate(QUESTIONS, retriever=hybrid)
    assert [passage.id for passage in predictions[0].passages] == [corpus_id(hybrid, i) for i in hits.ids_BK[0]]


def corpus_id(retriever, row):
    return retriever.corpus[int(row)].id


# ---------------------------------------------------------------------- the marginal


@pytest.mark.parametrize(
    ("objective", "oracle"), [("rag_token", rag_token_log_likelihood), ("rag_sequence", rag_sequence_log_likelihood)]
)
def test_the_marginal_is_generator_times_prior(model, retriever, objective, oracle):
    model.settings = replace(model.settings, objective=objective)
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    batch = batch_of(model, retriever, hits, scores_BK)
    scored = model.generator.score(model.generator.encode(batch.contexts), batch.labels, 3)
    prior_BK = (scores_BK / model.settings.temperature).log_softmax(dim=1)
    expected = oracle(scored.token_log_probs_BKT, prior_BK, scored.target_mask_BT)
    marginal = model.marginal(batch)
    torch.testing.assert_close(marginal.log_likelihood_B, expected)
    assert torch.equal(marginal.nll_B, -marginal.log_likelihood_B)
    assert marginal.num_tokens_B.tolist() == (batch.labels[:, 1:] != 0).sum(dim=1).tolist()
    same = model.log_likelihood(
        context_input_ids=batch.contexts.input_ids,
        context_attention_mask=batch.contexts.attention_mask,
        doc_scores=scores_BK,
        labels=batch.labels,
    )
    assert torch.equal(same, marginal.log_likelihood_B)
    encoded = model.generator.encode(batch.contexts)
    assert torch.equal(model.marginal(batch, encoded=encoded).nll_B, marginal.nll_B)


def test_an_unknown_objective_or_decoding_is_refused(model, retriever):
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    batch = batch_of(model, retriever, hits, scores_BK)
    with pytest.raises(ConfigError, match="expected objective rag_token, rag_sequence, fid or stuffed, got 'rag'"):
        inspect.unwrap(RagModel.marginal)(model, batch, objective="rag")
    with pytest.raises(ConfigError, match=r"expected decoding rag_token, rag_sequence_fast, .* got 'rag'"):
        inspect.unwrap(RagModel.decode)(model, model.generator.encode(batch.contexts), scores_BK, decoding="rag")


# ---------------------------------------------------------------------- texts


def byte_level_tokenizer(prefix, specials):
    """Byte-level letters; ``prefix`` is put before a text, ``</s>`` after it, as BART's and T5's tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    used = [token for token in (prefix, "</s>") if token]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A </s>".strip(), special_tokens=[(token, vocabulary[token]) for token in used]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>" if "<s>" in specials else None,
    )


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ada", "ash", "eve"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def closed_book(hf_model, tokenizer, **settings):
    generator = Seq2SeqGenerator(model=hf_model, tokenizer=tokenizer)
    return RagModel(encoder=None, generator=generator, settings=RagSettings(num_passages=0, **settings)).eval()


SMALL_BART = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
}


def bart_model(**settings):
    tokenizer = byte_level_tokenizer("<s>", ["<s>", "<pad>", "</s>", "<unk>"])
    config = BartConfig(vocab_size=len(tokenizer), **SMALL_BART)
    return closed_book(AutoModelForSeq2SeqLM.from_config(config), tokenizer, **settings)


def t5_model():
    tokenizer = byte_level_tokenizer("", ["<pad>", "</s>", "<unk>"])
    config = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return closed_book(AutoModelForSeq2SeqLM.from_config(config), tokenizer)


def bert_pair_model():
    bert = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0
    )
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 2, 3
    return closed_book(EncoderDecoderModel(config), bert_tokenizer())


def test_targets_of_bart_begin_with_end_and_begin_token():
    """``</s> <s> a b </s>``, transformers' shift of BART's own ``<s> a b </s>``."""
    model = bart_model()
    ids = model.generator.tokenizer.convert_tokens_to_ids
    assert model.target_tokens(["ab", "b"]).tolist() == [[2, 0, ids("a"), ids("b"), 2], [2, 0, ids("b"), 2, 1]]


def test_targets_of_t5_begin_with_padding():
    model = t5_model()
    ids = model.generator.tokenizer.convert_tokens_to_ids
    assert model.target_tokens(["ab", "b"]).tolist() == [[0, ids("a"), ids("b"), 1], [0, ids("b"), 1, 0]]
    # the start token is padding's id, and yet every token after it is scored
    output = model.generator.score(
        model.generator.encode(model.prompt_tokens(["a", "b"])), model.target_tokens(["ab", "b"]), 1
    )
    assert output.target_mask_BT.tolist() == [[True, True, True], [True, True, False]]


def test_targets_of_a_pair_of_berts_are_the_tokenizers_own():
    assert bert_pair_model().target_tokens(["ada ash", "eve"]).tolist() == [[2, 4, 5, 3], [2, 6, 3, 0]]


def test_targets_of_the_word_tokenizer_are_the_tokenizers_own(model):
    tokenizer = model.generator.tokenizer
    assert model.target_tokens(["Ada Ash"]).tolist() == [tokenizer("Ada Ash")["input_ids"]]
    assert tokenizer.decode(model.target_tokens(["Ada Ash"])[0], skip_special_tokens=True) == "ada ash"


def test_targets_are_cut_to_the_limit_and_still_end():
    model = bart_model(max_target_tokens=4)
    letters = model.generator.tokenizer.convert_tokens_to_ids
    assert model.target_tokens(["abcdef", "", "a"]).tolist() == [
        [2, 0, letters("a"), 2],
        [2, 0, 2, 1],
        [2, 0, letters("a"), 2],
    ]


@pytest.mark.parametrize("build", [bart_model, t5_model, bert_pair_model])
def test_answers_leave_out_special_tokens_and_outer_spaces(build):
    model = build()
    labels = model.target_tokens(["ada ash", "eve"])
    assert model.answers(Decoded(labels, torch.zeros(2))) == ["ada ash", "eve"]


def test_questions_and_prompts_are_tokenised_for_their_readers(model):
    query = model.query_tokens(["who made Amber", "who"])
    assert query.input_ids[0].tolist() == model.encoder.tokenizer("who made Amber")["input_ids"]
    assert query.attention_mask.sum(dim=1).tolist() == [5, 3]
    prompt = model.prompt_tokens(["who made Amber"])
    expected = model.generator.tokenizer(" // who made Amber", add_special_tokens=False)["input_ids"]
    assert prompt.input_ids.tolist() == [expected]
    model.encoder.query_template = "{question} amber"
    assert model.query_tokens(["who made"]).input_ids.tolist() == [query.input_ids[0].tolist()]
    model.encoder.max_query_tokens = 4
    assert model.query_tokens(["who made Amber"]).input_ids.shape == (1, 4)


def test_a_model_without_tokenizers_says_which_is_missing(model):
    model.generator.tokenizer = None
    model.encoder.tokenizer = None
    with pytest.raises(ConfigError, match="this model has no encoder tokenizer"):
        model.query_tokens(["x"])
    for call in (model.prompt_tokens, model.target_tokens):
        with pytest.raises(ConfigError, match="this model has no generator tokenizer"):
            call(["x"])


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("decoding", ["rag_token", "rag_sequence_fast", "rag_sequence_thorough"])
def test_answers_come_with_their_passages_and_likelihood(model, retriever, corpus, decoding):
    kind = "rag_token" if decoding == "rag_token" else "rag_sequence"
    model.settings = replace(model.settings, objective=kind)
    options = DecodingOptions(num_beams=2, max_new_tokens=5)
    predictions = model.generate(QUESTIONS, retriever=retriever, decoding=decoding, options=options)
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    batch = batch_of(model, retriever, hits, scores_BK)
    encoded = model.generator.encode(batch.contexts)
    decoded = model.decode(encoded, scores_BK, decoding=decoding, options=options)
    marginal = model.marginal(replace(batch, labels=decoded.sequences_BT))
    for row, prediction in enumerate(predictions):
        assert (prediction.id, prediction.question) == (str(row), QUESTIONS[row])
        assert prediction.answer == model.answers(decoded)[row]
        assert prediction.log_likelihood == pytest.approx(marginal.log_likelihood_B[row].item(), abs=1e-4)
        assert [passage.id for passage in prediction.passages] == [corpus[i].id for i in hits.ids_BK[row].tolist()]
        assert [passage.title for passage in prediction.passages] == [
            corpus[i].title for i in hits.ids_BK[row].tolist()
        ]
        found = {
            "score": [passage.score for passage in prediction.passages],
            "probability": [passage.probability for passage in prediction.passages],
            "posterior": [passage.posterior for passage in prediction.passages],
        }
        assert found["score"] == pytest.approx(scores_BK[row].tolist(), abs=1e-5)
        assert found["probability"] == pytest.approx(marginal.log_prior_BK[row].exp().tolist(), abs=1e-5)
        assert found["posterior"] == pytest.approx(marginal.log_posterior_BK[row].exp().tolist(), abs=1e-4)


def test_batches_records_and_num_passages(model, retriever):
    records = [Question(f"q{number}", question, ()) for number, question in enumerate(QUESTIONS)]
    one_by_one = model.generate(records, retriever=retriever, batch_size=1)
    together = model.generate(records, retriever=retriever)
    assert [prediction.id for prediction in together] == ["q0", "q1", "q2"]
    assert [prediction.answer for prediction in one_by_one] == [prediction.answer for prediction in together]
    wider = model.generate(QUESTIONS, retriever=retriever, num_passages=5)
    assert {len(prediction.passages) for prediction in wider} == {5}
    assert model.generate([], retriever=retriever) == []


def test_modes_are_left_as_they_were(model, retriever):
    """generate() once set every part to the mode of the whole, and so woke the dropout of frozen parts."""
    model.train()
    model.encoder.passage.eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}
    model.generate(QUESTIONS[:1], retriever=retriever)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ConfigError, match="expected 1 to 24"):
        model.generate(QUESTIONS[:1], retriever=retriever, num_passages=99)
    assert [module.training for module in model.modules()] == modes


def test_a_closed_book_model_answers_without_passages_and_cannot_retrieve(tiny_model, retriever):
    model = tiny_model(num_passages=0).eval()
    assert model.encoder is None
    (prediction,) = model.generate(["who made Amber"])
    assert prediction.passages == ()
    contexts = ContextAssembler(corpus=None, tokenizer=model.generator.tokenizer, prompt=model.prompt)
    context = contexts.without_passage(model.prompt_tokens(["who made Amber"]))
    labels = model.decode(model.generator.encode(context), torch.zeros(1, 1)).sequences_BT
    scored = model.generator.score(model.generator.encode(context), labels, 1)
    assert prediction.log_likelihood == pytest.approx(scored.token_log_probs_BKT.sum().item(), abs=1e-5)
    with pytest.raises(ConfigError, match="this model has no encoder, and the retriever searches by query vectors"):
        model.retrieve(context, ["who made Amber"], retriever)


def test_a_model_without_an_encoder_is_refused_where_it_would_search_by_vectors(tiny_generator, retriever):
    model = RagModel(encoder=None, generator=tiny_generator(), settings=RagSettings(num_passages=2))
    for call in (
        lambda: model.retrieve(None, QUESTIONS, retriever),
        lambda: model.query_tokens(QUESTIONS),
        lambda: model.generate(QUESTIONS, retriever=retriever),
    ):
        with pytest.raises(ConfigError, match=r"this model has no encoder( tokenizer|, and the retriever searches)"):
            call()


def test_a_model_with_an_encoder_still_needs_the_questions_tokens(model, retriever):
    with pytest.raises(ConfigError, match="the questions came without encoder tokens, and the retriever searches by"):
        model.retrieve(None, QUESTIONS, retriever)


def test_without_a_saved_index_a_retriever_is_asked_for(model):
    with pytest.raises(ConfigError, match="saved without an index: pass retriever=DenseRetriever"):
        model.generate(["who made Amber"])


def test_the_prior_of_the_settings_temperature_is_used_in_decoding(model, retriever):
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    for temperature in (0.01, 100.0):
        model.settings = replace(model.settings, temperature=temperature)
        (prediction, *_) = model.generate(QUESTIONS, retriever=retriever)
        expected = doc_log_prior(scores_BK[:1].detach(), temperature).exp()[0].tolist()
        assert [passage.probability for passage in prediction.passages] == pytest.approx(expected, abs=1e-4)
    assert hits.snapshot_id == retriever.snapshot_id


# ---------------------------------------------------------------------- n best, samples, rules, token-wise posteriors

EVERY_DECODING = ["rag_token", "rag_sequence_fast", "rag_sequence_thorough", "fid"]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("decoding", EVERY_DECODING)
def test_the_n_best_come_with_the_answer_and_the_likelihood_of_the_model(model, retriever, decoding, sampled):
    model.settings = replace(model.settings, objective="rag_token" if decoding == "rag_token" else "rag_sequence")
    if decoding == "fid":
        model.settings = replace(model.settings, objective="fid")
    options = DecodingOptions(num_return=4, max_new_tokens=4, num_beams=1 if sampled else 4, sample=sampled)
    predictions = model.generate(QUESTIONS, retriever=retriever, decoding=decoding, options=options)
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    batch = batch_of(model, retriever, hits, scores_BK)
    rng = torch.Generator().manual_seed(options.seed)
    encoded = model.generator.encode(batch.contexts)
    decoded = model.decode(encoded, scores_BK, decoding=decoding, options=options, rng=rng)
    marginal = model.marginal(replace(batch, labels=decoded.nbest_BRT[:, 1]), encoded=encoded)
    for row, prediction in enumerate(predictions):
        assert (prediction.answer, prediction.log_likelihood) == (
            prediction.alternatives[0].answer,
            prediction.alternatives[0].log_likelihood,
        )
        assert 2 <= len(prediction.alternatives) <= 4
        true = marginal.log_likelihood_B[row].item()
        if decoding == "rag_sequence_fast" and not sampled:
            assert prediction.alternatives[1].log_likelihood <= true + 1e-4
        else:
            assert prediction.alternatives[1].log_likelihood == pytest.approx(true, abs=1e-4)
    plain = model.generate(QUESTIONS[:1], retriever=retriever, decoding=decoding)
    assert plain[0].alternatives == ()
    assert plain[0].token_posteriors is None


@pytest.mark.parametrize("decoding", EVERY_DECODING)
def test_token_posteriors_are_those_of_the_answers_tokens(model, retriever, decoding):
    predictions = model.generate(QUESTIONS, retriever=retriever, decoding=decoding, token_posteriors=True)
    hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
    encoded = model.generator.encode(batch_of(model, retriever, hits, scores_BK).contexts)
    decoded = model.decode(encoded, scores_BK, decoding=decoding)
    scored = model.generator.score(encoded, decoded.sequences_BT, 3)
    expected_BKT = token_posteriors(
        scored.token_log_probs_BKT,
        doc_log_prior(scores_BK, model.settings.temperature),
        scored.target_mask_BT,
        "rag_token" if decoding == "rag_token" else "rag_sequence",
    )
    for row, prediction in enumerate(predictions):
        found = prediction.token_posteriors
        ids = [token for token in decoded.sequences_BT[row, 1:].tolist() if token != model.generator.pad_token_id]
        assert list(found.tokens) == [model.generator.tokenizer.decode([token]) for token in ids]
        torch.testing.assert_close(
            torch.tensor(found.probabilities), expected_BKT[row, :, : len(ids)].detach(), atol=1e-4, rtol=1e-4
        )
        if decoding != "rag_token":
            last = [row[-1] for row in found.probabilities]
            assert last == pytest.approx([passage.posterior for passage in prediction.passages], abs=1e-4)


def test_a_closed_book_model_has_no_passages_to_tell_apart(tiny_model):
    (prediction,) = tiny_model(num_passages=0).generate(["who made Amber"], token_posteriors=True)
    assert prediction.token_posteriors is None


def test_samples_repeat_by_their_seed_and_batches_share_one_stream(model, retriever):
    def drawn(seed=0, **settings):
        options = DecodingOptions(sample=True, seed=seed, num_return=3, max_new_tokens=6)
        same = [QUESTIONS[0]] * 4
        found = model.generate(same, retriever=retriever, options=options, **settings)
        return [[one.answer for one in prediction.alternatives] for prediction in found]

    assert drawn() == drawn()
    assert drawn() != drawn(seed=1)
    by_one = drawn(batch_size=1)
    assert len({tuple(answers) for answers in by_one}) > 1, "each batch once began the same random numbers again"
    assert drawn(rng=torch.Generator().manual_seed(1)) == drawn(seed=1)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("decoding", EVERY_DECODING)
def test_only_allowed_answers_are_given(model, retriever, tmp_path, decoding, sampled):
    names = ["ada ash", "ada birch", "eve cedar", "finn"]
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    options = DecodingOptions(
        allowed=str(tmp_path / "names.txt"),
        max_new_tokens=6,
        sample=sampled,
        num_beams=1 if sampled else 4,
        num_return=30 if sampled else 4,
    )
    predictions = model.generate(QUESTIONS, retriever=retriever, decoding=decoding, options=options)
    for prediction in predictions:
        answers = [alternative.answer for alternative in prediction.alternatives]
        assert set(answers) <= set(names)
        assert len(answers) == len(set(answers)) >= (1 if sampled else 4)
    if decoding == "rag_token" and not sampled:
        hits, scores_BK = model.retrieve(model.query_tokens(QUESTIONS), QUESTIONS, retriever)
        marginals = [
            model.marginal(batch_of(model, retriever, hits, scores_BK, answers=[name] * 3), objective="rag_token")
            for name in names
        ]
        for row, prediction in enumerate(predictions):
            true = {name: m.log_likelihood_B[row].item() for name, m in zip(names, marginals, strict=True)}
            found = {one.answer: one.log_likelihood for one in prediction.alternatives}
            assert found == pytest.approx(true, abs=1e-4)


def test_an_answer_is_cut_before_a_stop_string(model, retriever):
    free = model.generate(QUESTIONS, retriever=retriever)
    words = free[0].answer.split()
    assert len(words) > 1, "the case must have an answer to cut"
    stop = f" {words[1][:2]}"  # the beginning of a word
    options = replace(model.decoding_options, stop=(stop,))
    cut = model.generate(QUESTIONS, retriever=retriever, options=options)
    assert cut[0].answer == words[0]
    assert cut[0].log_likelihood > free[0].log_likelihood, "what would have come after the stop string is not scored"
    assert all(stop not in prediction.answer for prediction in cut)


@pytest.mark.parametrize("build", [bart_model, t5_model, bert_pair_model])
@pytest.mark.parametrize("sampled", [False, True])
def test_every_family_of_generators_writes_allowed_answers(build, sampled, tmp_path):
    names = ["ada ash", "eve"]
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    options = DecodingOptions(
        allowed=str(tmp_path / "names.txt"), sample=sampled, num_beams=1 if sampled else 2, max_new_tokens=10
    )
    (prediction,) = build().eval().generate(["ada"], options=replace(options, num_return=2))
    assert {one.answer for one in prediction.alternatives} <= set(names)
    assert prediction.answer in names


def test_rules_need_a_tokenizer(model):
    model.generator.tokenizer = None
    with pytest.raises(ConfigError, match="this model has no generator tokenizer"):
        model.output_rules(DecodingOptions(stop=(".",)))
    assert model.output_rules(DecodingOptions()).stops is None
