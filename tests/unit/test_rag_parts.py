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
from rag_lightning.encoders.cross_encoder import CrossEncoder
from rag_lightning.errors import CheckpointError, ConfigError, DataError, MissingFileError, StaleIndexError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.bm25 import index_folder, open_or_build
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings, RetrieverSource
from rag_lightning.retrieval.build import RetrieverSettings, build_fusion, build_retriever, open_cross_encoder
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.retrieval.rerank import live_vectors
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
    model.decoding_options = DecodingOptions(num_beams=2, max_new_tokens=5, length_penalty=0.5, stop=(" or", "?"))
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
    assert json.loads((tmp_path / "model" / "rag_config.json").read_text())["format_version"] == 3


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


def test_a_model_saved_before_there_were_other_retrievers_still_answers(run):
    folder, _, answers = run
    file = folder / "model" / "rag_config.json"
    config = json.loads(file.read_text())
    config["format_version"] = 1
    del config["fusion"], config["retriever"]["settings"], config["retriever"]["bm25"]
    for name in ("sample", "temperature", "top_k", "top_p", "seed", "num_return", "stop", "allowed"):
        del config["decoding_options"][name]
    file.write_text(json.dumps(config))
    assert RagModel.from_pretrained(folder / "model").generate(QUESTIONS) == answers


# ---------------------------------------------------------------------- other retrievers


@pytest.fixture
def saved_hybrid(tiny_model, tiny_world, corpus, tmp_path):
    """A function that saves a model with a retriever of some settings, and returns its folder and its answers."""
    pytest.importorskip("bm25s")

    def build(*, keep_bm25=True, bare=False, **settings):
        chosen = RetrieverSettings(**settings)
        model = tiny_model().eval()
        model.fusion = build_fusion(chosen, dimension=16)
        if model.fusion is not None:
            with torch.no_grad():
                for weight in model.fusion.parameters():
                    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        (tmp_path / "run").mkdir()
        passages = shutil.copy(tiny_world.passages, tmp_path / "run" / "passages.jsonl")
        snapshot = index_of(model, corpus, tmp_path / "run" / "index")
        bm25 = open_or_build(corpus, cache_dir=tmp_path / "run", settings=chosen.bm25)
        folder = index_folder(corpus, tmp_path / "run", chosen.bm25)
        reencode = live_vectors(model.encoder, PassageTokens(encoder=model.encoder, corpus=corpus))
        retriever = build_retriever(
            chosen,
            corpus=corpus,
            dense=DenseRetriever(snapshot, corpus),
            bm25=bm25,
            fusion=model.fusion,
            reencode=reencode,
            cross_encoder=open_cross_encoder(chosen),
        )
        if bare:
            model = RagModel.from_parts(replace(model.parts(), encoder=None)).eval()
        model.retriever_source = RetrieverSource(
            str(passages),
            str(snapshot.path) if chosen.needs_vectors else None,
            str(folder) if keep_bm25 and chosen.needs_words else None,
            chosen,
        )
        model.settings = replace(model.settings, temperature=1.0)
        model.save_pretrained(tmp_path / "run" / "model")
        return tmp_path / "run", model, model.generate(QUESTIONS, retriever=retriever)

    return build


@pytest.mark.parametrize("keep_bm25", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "sparse", "bm25_k1": 1.2, "bm25_stop_words": "none"},
        {"kind": "hybrid", "fusion": "rrf", "rrf_k": 7, "num_candidates": 9},
        {"kind": "hybrid", "fusion": "convex", "fusion_weight": 0.3, "normalisation": "min_max"},
        {"kind": "hybrid", "fusion": "gate", "gate_hidden": 3, "num_candidates": 9},
        {"kind": "hybrid", "fusion": "gate", "dense_floor": -1.0},
        {"rerank": "live", "rerank_candidates": 12},
    ],
)
def test_a_model_finds_its_retriever_again_wherever_the_run_lies(saved_hybrid, tmp_path, settings, keep_bm25):
    folder, model, answers = saved_hybrid(keep_bm25=keep_bm25, **settings)
    folder.rename(tmp_path / "moved")
    again = RagModel.from_pretrained(tmp_path / "moved" / "model")
    assert again.retriever_source.settings == RetrieverSettings(**settings)
    assert again.generate(QUESTIONS) == answers
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.state_dict().items())
    has_gate = settings.get("fusion") == "gate"
    assert (tmp_path / "moved" / "model" / "fusion.safetensors").is_file() == has_gate
    assert any(name.startswith("fusion.gate") for name in expected) == has_gate
    again.save_pretrained(tmp_path / "elsewhere")
    assert RagModel.from_pretrained(tmp_path / "elsewhere").generate(QUESTIONS) == answers


def test_a_model_without_encoder_answers_by_words(saved_hybrid):
    folder, _, answers = saved_hybrid(kind="sparse", bare=True)
    again = RagModel.from_pretrained(folder / "model")
    assert again.encoder is None
    assert not (folder / "model" / "encoder").exists()
    assert again.generate(QUESTIONS) == answers
    assert answers[0].passages[0].title == "Amber"


def test_a_model_that_lost_a_part_of_its_retriever_is_refused(saved_hybrid):
    folder, _, _ = saved_hybrid(kind="hybrid", fusion="gate")
    config_file = folder / "model" / "rag_config.json"
    config = json.loads(config_file.read_text())

    def refused(error, message, **changes):
        config_file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=message):
            RagModel.from_pretrained(folder / "model").generate(QUESTIONS)

    refused(ConfigError, "expected the model's fusion for kind=hybrid", fusion=None)
    refused(ConfigError, r"this model retrieves by vectors \(kind=hybrid\): expected an encoder", encoder=None)
    refused(CheckpointError, "fusion: expected one of rrf, convex, gate", fusion={"kind": "mean"})
    refused(CheckpointError, "expected the weights of", fusion={**config["fusion"], "dimension": 5})
    refused(ConfigError, "expected the fusion .*came the model's", fusion={"kind": "rrf", "k": 60})
    refused(MissingFileError, "no file bm25.json", retriever={**config["retriever"], "bm25": "../nowhere"})
    config_file.write_text(json.dumps(config))
    (folder / "model" / "fusion.safetensors").unlink()
    with pytest.raises(MissingFileError, match="the model's fusion: no such file: .*fusion.safetensors"):
        RagModel.from_pretrained(folder / "model")


def test_a_cross_encoder_is_loaded_from_where_the_settings_say(saved_hybrid, tiny_world, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    built = CrossEncoder.from_config(
        model_type="bert",
        settings={**sizes, "max_position_embeddings": 64, "initializer_range": 0.5},
        tokenizer=str(tiny_world.tokenizer),
        max_tokens=64,
    )
    place = tmp_path / "cross_encoder"
    built.model.save_pretrained(place)
    built.tokenizer.save_pretrained(place)
    folder, _, answers = saved_hybrid(
        kind="sparse", rerank="cross_encoder", cross_encoder=str(place), cross_encoder_max_tokens=64
    )
    assert len(answers[0].passages) == 3
    assert RagModel.from_pretrained(folder / "model").generate(QUESTIONS) == answers
    (folder / "other").mkdir()
    (tmp_path / "moved").mkdir()  # together with the model
    folder, place = (part.rename(tmp_path / "moved" / part.name) for part in (folder, place))
    assert RagModel.from_pretrained(folder / "model").generate(QUESTIONS) == answers
    place.rename(folder / "other" / "gone")
    with pytest.raises(MissingFileError, match="no such folder: .*cross_encoder"):
        RagModel.from_pretrained(folder / "model").generate(QUESTIONS)


# ---------------------------------------------------------------------- what cannot be loaded


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model(num_passages=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("version", [None, 4, "1"])
def test_another_format_is_refused(saved, version):
    config = json.loads((saved / "rag_config.json").read_text())
    config["format_version"] = version
    (saved / "rag_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"expected model format 3 or older, came {version!r}: load it with"):
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
