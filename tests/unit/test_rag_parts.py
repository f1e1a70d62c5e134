import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, EncoderDecoderModel

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import CheckpointError, ConfigError, DataError, MissingFileError, StaleIndexError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings, RetrieverSource
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.tokenizers import load_tokenizer, train_word_tokenizer

QUESTIONS = ["who made Amber", "who made Quartz"]


@pytest.fixture(scope="module")
def corpus(tiny_world):
    return PassageCorpus.read(tiny_world.passages)


def bert_pair(tokenizer_place, folder):
    """A generator joined from two tiny BERTs that read the word tokenizer."""
    tokenizer = load_tokenizer(tokenizer_place)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=80,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    return Seq2SeqGenerator.from_encoders(encoder=str(folder), decoder=str(folder), tokenizer=str(tokenizer_place))


@pytest.fixture(params=["separate", "shared", "projection", "word_embeddings", "bert_pair", "closed_book"])
def model(request, tiny_model, tiny_encoder, tiny_world, tmp_path_factory):
    built = tiny_model(shared=request.param == "shared", num_passages=0 if request.param == "closed_book" else 3)
    if request.param in ("projection", "word_embeddings"):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        words = request.param == "word_embeddings"
        built.encoder = BiEncoder.from_config(
            model_type="rag_word_embeddings" if words else "bert",
            settings={"hidden_size": 16} if words else sizes,
            tokenizer=str(tiny_world.tokenizer),
            projection_dim=None if words else 5,
        )
    if request.param == "bert_pair":
        built.generator = bert_pair(tiny_world.tokenizer, tmp_path_factory.mktemp("bert"))
    with torch.no_grad():  # as after training: the towers have parted, and passages matter
        for weight in built.parameters():
            weight.mul_(2.0).add_(0.05 * torch.randn_like(weight))
    return built.eval()


def index_of(model, corpus, folder):
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    return SnapshotStore(folder).publish(
        encode_passages(model.encoder, tokens, range(len(corpus)), progress=False),
        encoder_hash=model.encoder.passage_hash(),
        corpus_hash=corpus.hash,
        pooling="mean",
    )


def test_a_saved_model_comes_back_the_same(model, corpus, tmp_path):
    model.settings = replace(
        model.settings, objective="rag_sequence", decoding="rag_sequence_fast", temperature=0.3, hf_compat=True
    )
    model.decoding_options = DecodingOptions(num_beams=2, max_new_tokens=5, length_penalty=0.5)
    model.prompt = Prompt(passage_template="{title}: {text}", question_template=" ? {question}", max_passage_tokens=30)
    model.save_pretrained(tmp_path / "model")
    again = RagModel.from_pretrained(tmp_path / "model")
    assert again.settings == model.settings
    assert again.decoding_options == model.decoding_options
    assert again.prompt == model.prompt
    assert not any(module.training for module in again.modules())
    expected = model.state_dict()
    found = again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    retriever = None
    if model.encoder is not None:
        assert again.encoder.settings() == model.encoder.settings()
        assert again.encoder.passage_hash() == model.encoder.passage_hash()
        assert again.encoder.shared == model.encoder.shared
        retriever = DenseRetriever(index_of(model, corpus, tmp_path / "index"), corpus)
    before = model.generate(QUESTIONS, retriever=retriever)
    assert again.generate(QUESTIONS, retriever=retriever) == before
    assert all(torch.isfinite(torch.tensor(prediction.log_likelihood)) for prediction in before)
    assert isinstance(again.generator.model, EncoderDecoderModel) == isinstance(
        model.generator.model, EncoderDecoderModel
    )


def test_a_saved_model_holds_no_pickle_and_no_second_copy_of_a_shared_tower(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".txt"}
    places = {path.relative_to(tmp_path / "model").as_posix() for path in files}
    assert {"rag_config.json", "generator/model.safetensors", "generator/tokenizer.json"} <= places
    has_encoder = model.encoder is not None
    assert ("encoder/query/model.safetensors" in places) == has_encoder
    separate = has_encoder and not model.encoder.shared
    assert ("encoder/passage/model.safetensors" in places) == separate
    assert json.loads((tmp_path / "model" / "rag_config.json").read_text())["format_version"] == 1


def test_saving_again_replaces_the_folder_whole(tiny_model, tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    (folder / "stray").touch()
    tiny_model(num_passages=0).save_pretrained(folder)
    assert not (folder / "stray").exists()
    assert not (folder / "encoder").exists()
    assert os.listdir(tmp_path) == ["model"]


# ---------------------------------------------------------------------- where its corpus and index are


@pytest.fixture
def run(tiny_model, tiny_world, corpus, tmp_path):
    """A run's folder with corpus, index and model, and its answers."""
    folder = tmp_path / "here" / "run"
    (folder / "data").mkdir(parents=True)
    shutil.copy(tiny_world.passages, folder / "data" / "passages.jsonl")
    model = tiny_model().eval()
    snapshot = index_of(model, corpus, folder / "index")
    model.retriever_source = RetrieverSource(str(folder / "data" / "passages.jsonl"), str(snapshot.path))
    model.save_pretrained(folder / "model")
    return folder, model, model.generate(QUESTIONS, retriever=DenseRetriever(snapshot, corpus))


def test_a_model_finds_its_corpus_and_index_again(run):
    folder, model, answers = run
    assert RagModel.from_pretrained(folder / "model").generate(QUESTIONS) == answers
    assert model.generate(QUESTIONS) == answers


def test_a_run_that_was_moved_as_a_whole_still_answers(run, tmp_path, monkeypatch):
    folder, _, answers = run
    saved = json.loads((folder / "model" / "rag_config.json").read_text())["retriever"]
    assert saved["passages"] == "../data/passages.jsonl"
    assert not Path(saved["snapshot"]).is_absolute()
    (tmp_path / "there").mkdir()
    folder.rename(tmp_path / "there" / "moved")
    assert RagModel.from_pretrained(tmp_path / "there" / "moved" / "model").generate(QUESTIONS) == answers
    monkeypatch.chdir(tmp_path / "there")
    model = RagModel.from_pretrained("./moved/model")
    monkeypatch.chdir(tmp_path)  # places are fixed at loading
    assert model.generate(QUESTIONS) == answers
    model.save_pretrained(tmp_path / "elsewhere")
    assert RagModel.from_pretrained(tmp_path / "elsewhere").generate(QUESTIONS) == answers


def test_relative_places_are_those_of_the_working_directory_at_saving(run, monkeypatch):
    folder, model, answers = run
    monkeypatch.chdir(folder)
    snapshot = next((folder / "index").iterdir()).name
    model.retriever_source = RetrieverSource("data/passages.jsonl", f"index/{snapshot}")
    model.save_pretrained("again/model")
    monkeypatch.chdir(folder.parent)
    assert RagModel.from_pretrained(folder / "again" / "model").generate(QUESTIONS) == answers


def test_a_corpus_inside_the_package_is_named_as_it_is():
    source = RetrieverSource("bundled:films/passages.jsonl.gz", "/runs/a/index/step0")
    seen = source.relative_to(Path("/runs/a/model"))
    assert seen == RetrieverSource("bundled:films/passages.jsonl.gz", "../index/step0")
    assert seen.resolved_in(Path("/runs/b/model")) == RetrieverSource(source.passages, "/runs/b/index/step0")


def test_a_corpus_or_index_left_behind_is_named(run):
    folder, _, _ = run
    (folder / "data" / "passages.jsonl").rename(folder / "data" / "other.jsonl")
    with pytest.raises(MissingFileError, match=r"no such file: .*/run/data/passages.jsonl"):
        RagModel.from_pretrained(folder / "model").generate(QUESTIONS)
    (folder / "data" / "other.jsonl").rename(folder / "data" / "passages.jsonl")
    (folder / "index").rename(folder / "old_index")
    with pytest.raises(MissingFileError, match=r"/run/index/step00000000-"):
        RagModel.from_pretrained(folder / "model").generate(QUESTIONS)


def test_an_index_of_another_passage_encoder_is_refused(run):
    folder, model, _ = run
    with torch.no_grad():
        next(model.encoder.passage.parameters()).add_(1.0)
    model.save_pretrained(folder / "model")
    again = RagModel.from_pretrained(folder / "model")
    with pytest.raises(StaleIndexError, match=again.encoder.passage_hash()):
        again.generate(QUESTIONS)


# ---------------------------------------------------------------------- what cannot be loaded


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model(num_passages=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("version", [None, 2, "1"])
def test_another_format_is_refused(saved, version):
    config = json.loads((saved / "rag_config.json").read_text())
    config["format_version"] = version
    (saved / "rag_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"expected model format 1, came {version!r}: load it with the version"):
        RagModel.from_pretrained(saved)


def test_a_torn_configuration_is_named(saved):
    (saved / "rag_config.json").write_text('{"format_version": 1,')
    with pytest.raises(DataError, match=r"model configuration: .*rag_config.json is not valid JSON"):
        RagModel.from_pretrained(saved)


def test_a_folder_of_another_layout_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"expected rag_config.json .* or config.json .*, found \['weights.bin'\]"
    ):
        RagModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a saved model's folder or a hub id, but no configuration"):
        RagModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=f"model: no such folder: {place.removeprefix('./')}"):
        RagModel.from_pretrained(place)


def test_a_name_that_is_neither_folder_nor_reachable_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="outputs/model: expected a saved model's folder or a hub id"):
        RagModel.from_pretrained("outputs/model")


@pytest.mark.parametrize("part", ["encoder/query", "encoder/passage", "generator"])
def test_a_model_with_a_part_missing_is_refused(tiny_model, tmp_path, part):
    tiny_model().save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(MissingFileError, match=f"no such folder: .*{part}"):
        RagModel.from_pretrained(tmp_path / "model")


def test_a_checkpoint_of_another_vocabulary_is_refused(saved):
    size = len(load_tokenizer(saved / "generator"))
    larger = train_word_tokenizer([f"word{number}" for number in range(size)], vocab_size=size + 500)
    larger.save_pretrained(saved / "generator")
    with pytest.raises(CheckpointError, match=rf"the tokenizer has \d+ tokens but the generator's .* only {size}"):
        RagModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_passages": -1}, r"expected num_passages >= 0 \(0 is closed-book\), got -1"),
        ({"temperature": 0.0}, "expected temperature > 0, got 0.0"),
        ({"temperature": float("nan")}, "expected temperature > 0, got nan"),
        ({"max_target_tokens": 2}, "expected max_target_tokens >= 3"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RagSettings(**settings)
