"""transformers' RAG models, wrapped or in the layout of facebook/rag-token-nq, give transformers' likelihoods."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, DPRContextEncoder, RagConfig, RagTokenForGeneration

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import CheckpointError, DataError
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.types import Passage, TokenBatch
from tests.parity.hf_rag import (
    FAMILIES,
    VOCAB_SIZE,
    RagInputs,
    hf_rag_model,
    tiny_bart_config,
    tiny_question_encoder_config,
    tiny_t5_config,
)

NUM_PASSAGES = 3
CLASSES = pytest.mark.parametrize("sequence", [False, True], ids=["rag_token", "rag_sequence"])
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def hf_model(sequence: bool, family: str = "bart", dtype: torch.dtype = torch.float32) -> Any:
    config = tiny_bart_config() if family == "bart" else tiny_t5_config()
    return hf_rag_model(sequence, config, num_passages=NUM_PASSAGES, seed=3, dtype=dtype)


def inputs_and_labels(model: Any, dtype: torch.dtype = torch.float32) -> tuple[RagInputs, Tensor]:
    """Three questions, targets of 2 to 4 scored tokens."""
    config = model.config.generator
    pad, end, start = config.pad_token_id, config.eos_token_id, config.decoder_start_token_id
    inputs = RagInputs.random(batch_size=3, num_passages=NUM_PASSAGES, pad_token_id=pad, seed=5, dtype=dtype)
    return inputs, torch.tensor([[start, 7, 8, 9, end], [start, 11, end, pad, pad], [start, 5, 13, end, pad]])


def log_likelihoods(model: Any, inputs: RagInputs, labels: Tensor) -> Tensor:
    """Returns minus the loss that transformers' forward gives."""
    with torch.no_grad():
        loss: Tensor = model(
            context_input_ids=inputs.context_input_ids,
            context_attention_mask=inputs.context_attention_mask,
            doc_scores=inputs.doc_scores,
            labels=labels,
        ).loss
    return -loss


def ours(model: RagModel, inputs: RagInputs, labels: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.log_likelihood(
            context_input_ids=inputs.context_input_ids,
            context_attention_mask=inputs.context_attention_mask,
            doc_scores=inputs.doc_scores,
            labels=labels,
            **options,
        )


# ---------------------------------------------------------------------- wrapping


@CLASSES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_gives_the_likelihoods_of_its_forward(sequence, family):
    model = hf_model(sequence, family, torch.float64)
    inputs, labels = inputs_and_labels(model, torch.float64)
    expected = log_likelihoods(model, inputs, labels)
    wrapped = RagModel.from_hf_rag(model)
    torch.testing.assert_close(ours(wrapped, inputs, labels), expected, atol=1e-10, rtol=0)
    kind, other = ("rag_sequence", "rag_token") if sequence else ("rag_token", "rag_sequence")
    assert wrapped.settings.objective == kind
    assert (ours(wrapped, inputs, labels, objective=other) - expected).abs().min() > 1e-3


def test_a_wrapped_model_shares_weights_and_takes_its_settings():
    model = hf_model(False)
    wrapped = RagModel.from_hf_rag(model)
    assert wrapped.generator.model is model.generator
    assert wrapped.encoder.query.backbone is model.question_encoder
    assert wrapped.encoder.passage is None
    assert wrapped.settings.num_passages == NUM_PASSAGES
    assert not wrapped.training
    passage = Passage(id="1", title='"Kismet"', text="A film.")
    prompt = wrapped.prompt
    assert prompt.passage_text(passage) + prompt.question_text("who made it") == "Kismet / A film. // who made it"
    assert RagModel.from_hf_rag(hf_model(True).train()).training


def test_the_query_vector_is_the_first_output_of_the_question_encoder():
    model = hf_model(False)
    wrapped = RagModel.from_hf_rag(model)
    inputs, _ = inputs_and_labels(model)
    ids, mask = inputs.context_input_ids, inputs.context_attention_mask
    expected = model.question_encoder(ids, attention_mask=mask, return_dict=False)[0]
    assert torch.equal(wrapped.encoder.query(TokenBatch(ids, mask)), expected)


def test_a_context_encoder_set_for_training_becomes_the_passage_tower():
    model = hf_model(False)
    context_encoder = DPRContextEncoder(tiny_question_encoder_config())
    model.set_context_encoder_for_training(context_encoder)
    assert RagModel.from_hf_rag(model).encoder.passage_tower().backbone is context_encoder


def test_a_question_encoder_that_is_not_dprs_is_refused():
    bert = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config = RagConfig.from_question_encoder_generator_configs(bert, tiny_bart_config(), n_docs=2)
    with pytest.raises(CheckpointError, match=r"expected a DPR question encoder .* got model type 'bert'"):
        RagModel.from_hf_rag(RagTokenForGeneration(config))


# ---------------------------------------------------------------------- the published layout


def write_tokenizers(directory: Path) -> None:
    """Vocabularies as the checkpoints of 2020 hold them: no tokenizer.json, no name of a class."""
    question = directory / "question_encoder_tokenizer"
    question.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "made", "kismet", "?", *LETTERS]
    (question / "vocab.txt").write_text("\n".join(words) + "\n")
    specials = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    (question / "special_tokens_map.json").write_text(json.dumps({**specials, "mask_token": "[MASK]"}))
    (question / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 32}))
    generator = directory / "generator_tokenizer"
    generator.mkdir()
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "Ġ", "/", "?", ".", "Ġa", "<mask>"]
    (generator / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (generator / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    (generator / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))


def write_published(model: Any, directory: Path, *, pickled: bool) -> dict[str, Tensor]:
    """Writes config, weights and tokenizers as facebook/rag-token-nq has them; returns the weights."""
    model.save_pretrained(directory)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if pickled:
        # as torch.save wrote it in 2020: tied weights twice, and buffers and a pooler that today's classes lack
        (directory / "model.safetensors").unlink()
        bert = "rag.question_encoder.question_encoder.bert_model"
        state[f"{bert}.embeddings.position_ids"] = torch.arange(32)[None]
        state[f"{bert}.pooler.dense.weight"] = torch.zeros(8, 8)
        state[f"{bert}.pooler.dense.bias"] = torch.zeros(8)
        torch.save(state, directory / "pytorch_model.bin")
    write_tokenizers(directory)
    return state


@CLASSES
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_published_layout_loads(sequence, pickled, tmp_path):
    model = hf_model(sequence)
    state = write_published(model, tmp_path, pickled=pickled)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "rag"
    assert (config["question_encoder"]["model_type"], config["generator"]["model_type"]) == ("dpr", "bart")
    for name in (
        "rag.question_encoder.question_encoder.bert_model.embeddings.word_embeddings.weight",
        "rag.question_encoder.question_encoder.bert_model.encoder.layer.0.attention.self.query.weight",
        "rag.generator.model.shared.weight",
        "rag.generator.model.encoder.layers.0.self_attn.k_proj.weight",
        "rag.generator.model.decoder.layers.1.encoder_attn.out_proj.bias",
        "rag.generator.final_logits_bias",
        "rag.generator.lm_head.weight",
    ):
        assert name in state

    loaded = RagModel.from_pretrained(tmp_path)

    inputs, labels = inputs_and_labels(model)
    torch.testing.assert_close(ours(loaded, inputs, labels), log_likelihoods(model, inputs, labels), atol=1e-5, rtol=0)
    assert torch.equal(ours(loaded, inputs, labels), ours(RagModel.from_hf_rag(model), inputs, labels))
    assert loaded.settings.objective == ("rag_sequence" if sequence else "rag_token")
    query = loaded.query_tokens(["Who made Kismet?"])
    assert query.input_ids.tolist() == [[2, 5, 6, 7, 8, 3]]
    expected = model.question_encoder(query.input_ids, attention_mask=query.attention_mask).pooler_output
    assert torch.equal(loaded.encoder.query(query), expected)
    letters = [4 + LETTERS.index(letter) for letter in "ada"]
    assert loaded.target_tokens(["ada"]).tolist() == [[2, 0, *letters, 2]]
    assert not loaded.training


def test_a_published_t5_reader_loads_in_single_precision_though_saved_in_half(tmp_path):
    model = hf_model(False, "t5").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    write_tokenizers(tmp_path)
    (tmp_path / "generator_tokenizer").rename(tmp_path / "unused")
    train_word_tokenizer(["ada a"] * 3, vocab_size=20).save_pretrained(tmp_path / "generator_tokenizer")
    loaded = RagModel.from_pretrained(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    inputs, labels = inputs_and_labels(model)
    expected = log_likelihoods(model.float(), inputs, labels)
    torch.testing.assert_close(ours(loaded, inputs, labels), expected, atol=1e-5, rtol=0)


def test_a_published_model_answers_over_ones_own_index_and_is_saved_in_our_layout(tmp_path):
    write_published(hf_model(False), tmp_path / "published", pickled=False)
    model = RagModel.from_pretrained(tmp_path / "published")
    corpus = PassageCorpus.from_passages(
        [Passage(id=title, title=title, text="a film") for title in ("kismet", "dawn", "ember", "jade")]
    )
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    snapshot = SnapshotStore(tmp_path / "index").publish(
        vectors, encoder_hash="dpr", corpus_hash=corpus.hash, pooling="dpr_pooler"
    )
    retriever = DenseRetriever(snapshot, corpus)
    questions = ["who made kismet?", "who made dawn?"]
    before = model.generate(questions, retriever=retriever, num_passages=2)
    for prediction in before:
        assert len(prediction.passages) == 2
        assert sum(passage.probability for passage in prediction.passages) == pytest.approx(1, abs=1e-6)
    model.save_pretrained(tmp_path / "ours")
    again = RagModel.from_pretrained(tmp_path / "ours")
    assert again.generate(questions, retriever=retriever, num_passages=2) == before
    assert again.encoder.passage is None


def test_a_saved_wrapped_model_needs_no_tokenizers(tmp_path):
    """It once asked for the tokenizers that were never given, and read the question encoder as a passage encoder."""
    model = hf_model(True)
    wrapped = RagModel.from_hf_rag(model)
    wrapped.save_pretrained(tmp_path / "model")
    loaded = RagModel.from_pretrained(tmp_path / "model")
    inputs, labels = inputs_and_labels(model)
    assert torch.equal(ours(loaded, inputs, labels), ours(wrapped, inputs, labels))
    assert loaded.encoder.passage is None
    assert loaded.encoder.tokenizer is None
    assert loaded.generator.tokenizer is None


def test_missing_tokenizers_are_named(tmp_path):
    hf_model(False).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"expected tokenizer files .* in .*/question_encoder_tokenizer, found none"):
        RagModel.from_pretrained(tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path):
    hf_model(False).generator.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected model type 'rag', came 'bart': not a RAG checkpoint"):
        RagModel.from_pretrained(tmp_path)
