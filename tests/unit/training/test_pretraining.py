"""Pre-training on masked text: examples by place alone, held-out passages unread, the source never among the hits."""

import inspect
import json
import random
from dataclasses import replace

import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.retrieval.base import search, without
from rag_lightning.training.objectives import MarginalObjective
from rag_lightning.training.pretraining_examples import RandomSpanExamples, SalientSpanExamples, pretraining_examples
from rag_lightning.types import FusionInputs, Hits

KINDS = ["salient_spans", "random_spans"]


@pytest.fixture
def corpus(tiny_world):
    return PassageCorpus.read(tiny_world.passages)


def spans_filled(example):
    return example.question.question.replace("<mask>", example.answer)


def test_salient_examples_are_sentences_of_their_passage_by_place_alone(corpus):
    examples = SalientSpanExamples(corpus, rows=[3, 7])
    assert len(examples) == 2
    met = {examples.draw(1, random.Random(seed)).answer for seed in range(40)}
    assert met == {"Harbour", "Ben Birch", "1957"}
    for position, row in enumerate([3, 7]):
        example = examples.draw(position, random.Random(5))
        assert example == examples.draw(position, random.Random(5))
        assert example.forbidden_row == row
        assert example.question.answers == (example.answer,)
        assert spans_filled(example) in corpus[row].text
        assert (example.passage, example.positive_row) == (None, -1)
    allowed = SalientSpanExamples(corpus, forbid_source=False, kinds=["date"], with_title=True)
    example = allowed.draw(0, random.Random(0))
    assert (example.question.question, example.answer) == ("Amber: It came out in <mask>.", "1950")
    assert example.forbidden_row == -1


def test_random_examples_mask_a_sentence_or_the_passage(corpus):
    example = RandomSpanExamples(corpus, mask_share=0.4, mean_span_words=1.0).draw(2, random.Random(0))
    assert example.forbidden_row == 2
    assert example.question.question.count("<mask>") == 2
    whole = RandomSpanExamples(corpus, unit="passage", forbid_source=False).draw(2, random.Random(0))
    assert len(whole.question.question.split()) > 8
    assert spans_filled(whole) == corpus[2].text
    with pytest.raises(ConfigError, match="data.random_spans.unit: expected sentence or passage, came 'word'"):
        inspect.unwrap(RandomSpanExamples.__init__)(object.__new__(RandomSpanExamples), corpus, unit="word")


def test_a_passage_without_anything_to_mask_gives_way_to_another(tmp_path):
    bare = {"id": "bare", "title": "", "text": "nothing here."}
    file = tmp_path / "passages.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in (bare, {"id": "1", "title": "", "text": "made by Ada Ash"}))
    )
    example = SalientSpanExamples(PassageCorpus.read(file)).draw(0, random.Random(0))
    assert (example.answer, example.forbidden_row) == ("Ada Ash", 1)
    file.write_text(json.dumps(bare) + "\n")
    with pytest.raises(DataError, match="expected passages to mask something in, came 100 running without.*'bare'"):
        SalientSpanExamples(PassageCorpus.read(file)).draw(0, random.Random(0))


def test_a_sign_for_holes_is_needed(corpus):
    asked = {"rows": [0], "tokenizer_mask": None}
    with pytest.raises(ConfigError, match="tokenizer has a mask token.*data.salient_spans.mask.*<extra_id_0> for T5"):
        pretraining_examples("salient_spans", corpus, settings={"mask": None}, **asked)
    chosen = pretraining_examples("random_spans", corpus, settings={"mask": "<extra_id_0>"}, **asked)
    assert "<extra_id_0>" in chosen.draw(0, random.Random(0)).question.question


def test_only_examples_that_retrieve_are_taken():
    with pytest.raises(ConfigError, match="objective.examples: expected one of questions, salient_spans, random_spans"):
        MarginalObjective(kind="rag_token", examples="gold_passages")


# ---------------------------------------------------------------------- the forbidden passage


def test_what_is_forbidden_makes_room_for_the_next():
    ids_BL = torch.tensor([[4, 7, 9], [4, 7, 9], [4, -1, -1], [4, 7, 9]])
    scores_BL = torch.tensor([[3.0, 2.0, 1.0]] * 4).masked_fill(ids_BL < 0, -torch.inf)
    fusion = FusionInputs(scores_BL + 10, torch.zeros(4, 1), torch.ones(4, 1))
    hits = without(Hits(scores_BL, ids_BL, "a", fusion), torch.tensor([4, 9, 4, -1]), 2)
    assert hits.ids_BK.tolist() == [[7, 9], [4, 7], [-1, -1], [4, 7]]
    assert hits.scores_BK.tolist() == [[2.0, 1.0], [3.0, 2.0], [-torch.inf] * 2, [3.0, 2.0]]
    assert hits.fusion.sparse_BK[0].tolist() == [12.0, 11.0]
    assert hits.snapshot_id == "a"
    several = torch.tensor([[4, 9], [9, -1], [4, 4], [-1, -1]])
    assert without(hits_of_all := Hits(scores_BL, ids_BL, "a"), several, 2).ids_BK.tolist() == [
        [7, -1],
        [4, 7],
        [-1, -1],
        [4, 7],
    ]
    assert torch.equal(hits_of_all.ids_BK, ids_BL)


@pytest.fixture
def ready(tiny_run):
    def build(**named):
        run = tiny_run(**named)
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        run.data.trainer = None
        run.module.eval()
        return run

    return build


@pytest.mark.parametrize("num_passages", [1, 3, 23, 24])
def test_the_forbidden_passage_is_never_found(num_passages, ready):
    run = ready()
    model, retriever = run.module.model, run.data.retriever
    texts = ["who made Amber", "who made Iron", "who made Jade"]
    queries_BD = model.encoder.query(model.query_tokens(texts)).detach()
    free = search(retriever, texts, queries_BD, num_passages)
    forbidden = free.ids_BK[:, 0].clone()
    forbidden[2] = -1
    hits, scores_BK = model.retrieve(
        model.query_tokens(texts), texts, retriever, num_passages=num_passages, forbidden_ids=forbidden
    )
    assert hits.ids_BK.shape == scores_BK.shape == (3, num_passages)
    assert not (hits.ids_BK == forbidden[:, None])[:2].any()
    assert hits.ids_BK[2].tolist() == free.ids_BK[2].tolist()
    found = hits.found_BK.sum(dim=1).tolist()
    assert found == [min(num_passages, 23)] * 2 + [num_passages]  # 24 passages, one of them forbidden
    assert torch.equal(scores_BK == -torch.inf, ~hits.found_BK)
    if num_passages < 24:
        wider = search(retriever, texts, queries_BD, num_passages + 1)
        assert hits.ids_BK[:2].tolist() == wider.ids_BK[:2, 1:].tolist()


def test_a_corpus_of_one_passage_has_nothing_else(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"id": "1", "title": "A", "text": "B"}) + "\n")

    class One:
        corpus = PassageCorpus.read(file)

    with pytest.raises(ConfigError, match="expected at least 2 passages, as one may be forbidden"):
        inspect.unwrap(search)(One(), ["q"], None, 1, torch.tensor([0]))


# ---------------------------------------------------------------------- in a run


@pytest.mark.parametrize("kind", KINDS)
def test_batches_leave_held_out_passages_unmasked_and_forbid_the_source(kind, ready, tiny_world):
    objective = MarginalObjective(kind="rag_token", examples=kind)
    files = {"train": None, "validation": str(tiny_world.validation), "test": str(tiny_world.test)}
    run = ready(objective=objective, data=files)
    loader = run.data.train_dataloader()
    batches = list(loader)
    masked = {int(question.id.removeprefix("masked-film-")) for batch in batches for question in batch.questions}
    assert masked == {*range(13), 23}  # 13 to 17 are validated on, 18 to 22 tested
    for batch in batches:
        assert batch.forbidden_ids.tolist() == [int(q.id.removeprefix("masked-film-")) for q in batch.questions]
        assert bool((batch.positive_ids == -1).all())
        assert batch.contexts is None
    again = list(run.data.train_dataloader())
    assert [batch.questions for batch in again] == [batch.questions for batch in batches]
    evaluated = next(iter(run.data.val_dataloader()))
    assert evaluated.questions[0].question.startswith("who made")
    assert evaluated.forbidden_ids is None


@pytest.mark.parametrize("marginal", ["rag_token", "rag_sequence", "fid"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_on_masked_text_and_tests_on_questions(kind, marginal, tiny_run, tiny_model, tiny_world):
    model = tiny_model()
    model.settings = replace(model.settings, objective=marginal, decoding="rag_token" if marginal != "fid" else "fid")
    files = {"train": None, "test": str(tiny_world.test)}
    run = tiny_run(model=model, objective=MarginalObjective(kind=marginal, examples=kind), data=files, max_steps=3)
    before = run.weights()
    run.fit()
    moved = {name.split(".")[0] for name, value in run.weights().items() if not torch.equal(value, before[name])}
    assert moved == ({"generator"} if marginal == "fid" else {"encoder", "generator"})
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert {"test/exact_match", "test/recall@1"} <= set(figures)


def test_each_tokenizer_reads_its_own_mask_sign(ready):
    run = ready(objective=MarginalObjective(kind="rag_token", examples="salient_spans"))
    model = run.module.model
    own = next(iter(run.data.train_dataloader()))
    assert bool((own.query.input_ids == model.encoder.tokenizer.mask_token_id).any())
    run.data.pretraining["salient_spans"]["mask"] = "Yellow"  # any word that both know
    other = next(iter(run.data.train_dataloader()))
    assert other.questions[0].question.count("Yellow") >= 1
    assert bool((other.query.input_ids == model.encoder.tokenizer.mask_token_id).any())
    assert not bool((other.prompt.input_ids == model.generator.tokenizer.mask_token_id).any())
