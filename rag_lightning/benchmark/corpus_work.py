"""What is done with the corpus: search and joining, encoding, building an index and a token store."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rag_lightning.benchmark.sides import Run, WrongPathError
from rag_lightning.benchmark.world import World
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.text.token_store import TokenStore

_BATCH = 64
_CLOSE = {"float32": 1e-3, "bfloat16": 5e-2}


def retrieval(world: World) -> Run:
    """Returns search of the index, the similarities, and joining the contexts; the questions are encoded beforehand."""
    assert world.model.encoder is not None
    with torch.no_grad():
        queries = [world.model.encoder.query(batch.query) for batch in world.padded]

    @torch.no_grad()
    def run(number: int) -> Tensor:
        place = number % len(world.batches)
        batch = world.batches[place]
        texts = [question.question for question in batch.questions]
        hits, _ = world.model.retrieve(batch.query, texts, world.retriever, query_vectors_BD=queries[place])
        return world.assembler.contexts(hits.ids_BK, batch.prompt).input_ids

    return run


def ours_encoding(world: World) -> Run:
    """Returns how an index build encodes passages: from the token store, batched by length."""
    assert world.model.encoder is not None
    tower = world.model.encoder.query
    limit = world.model.prompt.max_passage_tokens
    encoder = BiEncoder(query=tower, passage=tower, tokenizer=world.texts.tokenizer, max_passage_tokens=limit)
    tokens = PassageTokens(encoder=encoder, corpus=world.texts.corpus, store=world.store)

    def run(_: int) -> Tensor:
        with world.autocast():
            rows = range(_num_encoded(world))
            return torch.cat(list(encode_passages(encoder, tokens, rows, batch_size=_BATCH, progress=False)))

    return run


def plain_encoding(world: World) -> Run:
    """Returns the loop that everybody writes: batches in corpus order, tokenised and padded to the longest."""
    encoder = world.rag_token.question_encoder

    @torch.no_grad()
    def run(_: int) -> Tensor:
        texts, vectors = _passage_texts(world)[: _num_encoded(world)], []
        for first in range(0, len(texts), _BATCH):
            batch = world.texts.tokenizer(texts[first : first + _BATCH], padding=True, return_tensors="pt")
            with world.autocast():
                found = encoder(
                    batch["input_ids"].to(world.device), attention_mask=batch["attention_mask"].to(world.device)
                )
            vectors.append(found.pooler_output.float().cpu())
        return torch.cat(vectors)

    return run


def check_encoding(world: World) -> dict[str, int]:
    """Compares the vectors of both ways to encode.

    Raises:
        WrongPathError: They differ by more than rounding.
    """
    ours_ND, plain_ND = ours_encoding(world)(0), plain_encoding(world)(0)
    worst = float((ours_ND - plain_ND).abs().max() / plain_ND.abs().max())
    if not worst <= _CLOSE[world.shape.dtype]:
        raise WrongPathError(
            f"benchmark: expected equal passage vectors of both sides, came ones that differ by {worst:.3g} of the "
            "largest number. Nothing is timed."
        )
    return {"passages": len(ours_ND)}


def index_build(world: World) -> Run:
    """Returns an exact snapshot of the corpus's vectors: written, checked, published."""
    snapshot = world.retriever.snapshot
    vectors_ND = snapshot.vectors(torch.arange(len(world.texts.corpus)))

    def run(_: int) -> None:
        with tempfile.TemporaryDirectory(dir=world.folder) as folder:
            SnapshotStore(Path(folder) / "index").publish(
                vectors_ND, encoder_hash="benchmark", corpus_hash=world.texts.corpus.hash, pooling="dpr_pooler"
            )

    return run


def store_build(world: World) -> Run:
    """Returns a token store of the corpus: rendered, tokenised, written, published."""

    def run(_: int) -> None:
        with tempfile.TemporaryDirectory(dir=world.folder) as folder:
            TokenStore.build(
                _passage_texts(world),
                world.texts.tokenizer,
                directory=Path(folder) / "tokens",
                key="benchmark",
                max_tokens=world.model.prompt.max_passage_tokens,
                progress=False,
            )

    return run


def plain_tokenising(world: World) -> Run:
    """Returns a call of the tokenizer for each batch of the corpus; nothing is kept."""

    def run(_: int) -> int:
        texts, total = _passage_texts(world), 0
        for first in range(0, len(texts), _BATCH):
            encoded = world.texts.tokenizer(texts[first : first + _BATCH], add_special_tokens=False)
            total += sum(map(len, encoded["input_ids"]))
        return total

    return run


def _passage_texts(world: World) -> Sequence[str]:
    return [world.model.prompt.passage_text(passage) for passage in world.texts.corpus]


def _num_encoded(world: World) -> int:
    return min(world.shape.num_encoded, len(world.texts.corpus))
