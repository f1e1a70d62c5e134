import numpy as np
import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.retrieval.contexts import ContextAssembler, pad_sequences
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.token_store import TokenStore
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import Passage

QUESTIONS = ["who made Amber", "who made the film Quartz"]
PROMPT = Prompt(max_passage_tokens=12, max_tokens=32)


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return load_tokenizer(tiny_world.tokenizer)


@pytest.fixture(scope="module")
def corpus(tiny_world):
    return PassageCorpus.read(tiny_world.passages)


@pytest.fixture(params=["as met", "from the store"])
def assembler(request, tokenizer, corpus, tmp_path):
    store = None
    if request.param == "from the store":
        texts = [PROMPT.passage_text(passage) for passage in corpus]
        store = TokenStore.build(
            texts,
            tokenizer,
            directory=tmp_path / "store",
            key="k",
            max_tokens=PROMPT.max_passage_tokens,
            progress=False,
        )
    return ContextAssembler(corpus=corpus, tokenizer=tokenizer, prompt=PROMPT, store=store)


def questions_of(tokenizer, prompt=PROMPT):
    texts = [prompt.question_text(question) for question in QUESTIONS]
    return pad_sequences(tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id)


def rows_of(batch):
    """The real tokens of each row; checks that padding is on the right."""
    rows = []
    for ids, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        rows.append(ids[:length])
    return rows


def test_contexts_are_the_tokens_of_the_joined_text_question_by_question(assembler, tokenizer, corpus):
    ids_BK = torch.tensor([[3, 0, 7], [16, 3, 23]])
    batch = assembler.contexts(ids_BK, questions_of(tokenizer))
    assert batch.input_ids.shape[0] == 6
    for place, row in enumerate(rows_of(batch)):
        question = QUESTIONS[place // 3]
        passage = corpus[ids_BK.view(-1)[place].item()]
        passage_ids = tokenizer(PROMPT.passage_text(passage), add_special_tokens=False)["input_ids"][:12]
        question_ids = tokenizer(PROMPT.question_text(question), add_special_tokens=False)["input_ids"]
        assert row == [tokenizer.bos_token_id, *passage_ids, *question_ids, tokenizer.eos_token_id]
    padding = batch.input_ids[batch.attention_mask == 0]
    assert (padding == tokenizer.pad_token_id).all()


def test_a_short_context_is_the_tokenizers_own_of_the_joined_string(tokenizer):
    corpus = PassageCorpus.from_passages([Passage(id="1", title="Amber", text="Amber was made by Ada Ash.")])
    prompt = Prompt()
    assembler = ContextAssembler(corpus=corpus, tokenizer=tokenizer, prompt=prompt)
    batch = assembler.contexts(torch.tensor([[0], [0]]), questions_of(tokenizer, prompt))
    for row, question in zip(rows_of(batch), QUESTIONS, strict=True):
        assert row == tokenizer(f"Amber / Amber was made by Ada Ash. // {question}")["input_ids"]


def test_where_nothing_was_found_the_context_is_the_question_alone(assembler, tokenizer):
    questions = questions_of(tokenizer)
    batch = assembler.contexts(torch.tensor([[3, -1], [-1, -1]]), questions)
    alone = rows_of(assembler.without_passage(questions))
    rows = rows_of(batch)
    assert rows[1] == alone[0]
    assert rows[2] == rows[3] == alone[1]
    assert len(rows[0]) > len(alone[0])
    assert alone[0] == tokenizer(PROMPT.question_text(QUESTIONS[0]))["input_ids"]


def test_passages_outside_the_corpus_can_be_given(assembler, tokenizer):
    questions = questions_of(tokenizer)
    passages = [Passage(id="x", title="Dawn", text="Eve Birch made it."), Passage(id="y", title="Jade", text="Ash.")]
    for row, passage, question in zip(
        rows_of(assembler.contexts_of(passages, questions)), passages, QUESTIONS, strict=True
    ):
        assert row == tokenizer(PROMPT.passage_text(passage) + PROMPT.question_text(question))["input_ids"]


def test_a_closed_book_assembler_needs_no_corpus(tokenizer):
    assembler = ContextAssembler(corpus=None, tokenizer=tokenizer, prompt=PROMPT)
    assert len(rows_of(assembler.without_passage(questions_of(tokenizer)))) == 2


def test_question_first(tokenizer, corpus):
    prompt = Prompt(passage_template=" / {text}", question_template="{question} ?", question_first=True)
    assembler = ContextAssembler(corpus=corpus, tokenizer=tokenizer, prompt=prompt)
    batch = assembler.contexts(torch.tensor([[0], [0]]), questions_of(tokenizer, prompt))
    for row, question in zip(rows_of(batch), QUESTIONS, strict=True):
        assert row == tokenizer(f"{question} ? / {corpus[0].text}")["input_ids"]


def test_sequences_are_padded_on_the_right_to_the_longest():
    batch = pad_sequences([np.asarray([4, 5, 6], dtype=np.uint16), np.asarray([], dtype=np.uint16)], pad_id=9)
    assert batch.input_ids.tolist() == [[4, 5, 6], [9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.input_ids.dtype == torch.int64
    assert pad_sequences([[], []], pad_id=9).input_ids.tolist() == [[9], [9]]
