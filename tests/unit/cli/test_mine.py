"""``rag-lightning mine``: files in, a question file with hard negatives out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from rag_lightning.cli import mine
from rag_lightning.cli.hydra_app import conf_dir, register_resolvers
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.encode import PassageTokens, encode_passages

Mine = Callable[..., Path]
ENCODER = ["encoder=word_embeddings", "encoder.settings.hidden_size=16", "num_negatives=3", "depth=10"]


@pytest.fixture
def mined(tiny_world: Any, tmp_path: Path) -> Mine:
    """Returns ``mined(*settings)``, which runs the command and gives the file that it wrote."""
    register_resolvers()

    def run(*settings: str) -> Path:
        output = tmp_path / "mined.jsonl"
        usual = [f"passages={tiny_world.passages}", f"questions={tiny_world.train}", f"output={output}"]
        usual += [f"encoder.tokenizer={tiny_world.tokenizer}", f"paths.cache_dir={tmp_path / 'cache'}"]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = hydra.compose("mine", [*usual, *ENCODER, *settings])
        torch.manual_seed(0)  # the encoder's random weights
        mine.run(config)
        return Path(config.output)

    return run


def checked(path: Path, tiny_world: Any) -> list[dict[str, Any]]:
    """Reads the file as training does, and checks what holds of any miner."""
    corpus = PassageCorpus.read(tiny_world.passages)
    before = read_questions(tiny_world.train)
    after = read_questions(path, corpus=corpus)
    assert [question.id for question in after] == [question.id for question in before]
    for question in after:
        texts = [corpus[corpus.row_of(one)].text.lower() for one in question.negative_passage_ids]
        assert not any(answer.lower() in text for answer in question.answers for text in texts)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        assert record["negative_scores"] == sorted(record["negative_scores"], reverse=True)
    return records


def test_words_find_hard_negatives(mined: Mine, tiny_world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s", reason="needs the extra 'bm25'")
    records = checked(mined(), tiny_world)
    # "made" and "who" are in all passages or none, the title in one: the others are found by "made" alone
    assert all(1 <= len(record["negative_passage_ids"]) <= 3 for record in records)
    total = sum(len(record["negative_passage_ids"]) for record in records)
    fewer = sum(len(record["negative_passage_ids"]) < 3 for record in records)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{total} hard negatives for 13 questions, {fewer} of them with fewer than 3 (0 with none)" in shown


def test_an_encoder_finds_hard_negatives_with_and_without_a_snapshot(
    mined: Mine, tiny_world: Any, tmp_path: Path
) -> None:
    records = checked(mined("miner=dense"), tiny_world)
    assert all(len(record["negative_passage_ids"]) == 3 for record in records)
    torch.manual_seed(0)
    encoder = BiEncoder.from_config(
        model_type="rag_word_embeddings",
        settings={"hidden_size": 16},
        tokenizer=str(tiny_world.tokenizer),
        max_query_tokens=32,
        max_passage_tokens=126,
    )
    corpus = PassageCorpus.read(tiny_world.passages)
    tokens = PassageTokens(encoder=encoder, corpus=corpus)
    snapshot = SnapshotStore(tmp_path / "index").publish(
        encode_passages(encoder, tokens, range(24), progress=False),
        encoder_hash=encoder.passage_hash(),
        corpus_hash=corpus.hash,
        pooling="mean",
    )
    again = checked(mined("miner=dense", f"snapshot={snapshot.path}"), tiny_world)
    for one, other in zip(records, again, strict=True):
        assert one["negative_passage_ids"] == other["negative_passage_ids"]
        assert one["negative_scores"] == pytest.approx(other["negative_scores"], abs=1e-5)
    with pytest.raises(StaleIndexError, match="encoder"):
        mined("miner=dense", f"snapshot={snapshot.path}", "encoder.max_passage_tokens=9")


def test_a_model_is_mined_with_by_its_own_metric(mined: Mine, tiny_world: Any, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.settings = replace(model.settings, metric="l2")
    model.save_pretrained(tmp_path / "model")
    checkpoint = f"checkpoint={tmp_path / 'model'}"
    records = checked(mined("miner=dense", checkpoint), tiny_world)
    assert all(score <= 0 for record in records for score in record["negative_scores"])  # negated squared distances
    with pytest.raises(ConfigError, match="metric: expected l2, by which the model of .* was trained, came cosine"):
        mined("miner=dense", checkpoint, "metric=cosine")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["miner=magic"], "miner: expected sparse or dense, got 'magic'"),
        (["checkpoint=RUN"], "checkpoint: miner=sparse matches words and uses no encoder; set miner=dense"),
        (["snapshot=S"], "snapshot: miner=sparse matches words"),
        (["output=negatives.txt"], r"output: expected a file ending in \.jsonl or \.jsonl\.gz, got negatives.txt"),
        (["miner=dense", "depth=25"], "at most the 24 passages of .*, got 25"),
    ],
)
def test_what_cannot_be_mined_is_refused(settings: list[str], message: str, mined: Mine) -> None:
    with pytest.raises(ConfigError, match=message):
        mined(*settings)
