import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.prompts import Prompt, join_contexts
from rag_lightning.text.tokenizers import special_affixes, train_word_tokenizer
from rag_lightning.types import Passage, TokenBatch

TEXTS = [
    'The "Kismet" / film // was made in 1955.',
    "who directed Spider-Man 2, exactly?",
    "it's J.J.'s film é",
    "a  b",
]
WORDS = st.text(alphabet="abthe KJ.,'\"-/é1 \n", max_size=40)
KINDS = ("byte_bpe", "wordpiece", "unigram", "word")
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def make_tokenizer(kind, cache={}):  # noqa: B006 (a module-wide cache, as Hypothesis runs one test many times)
    if kind not in cache:
        cache[kind] = train_word_tokenizer(TEXTS, 120) if kind == "word" else train_other(kind)
    return cache[kind]


def train_other(kind):
    if kind == "byte_bpe":
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIALS, show_progress=False)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=80, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad_questions(rows, pad_id=0, left=False):
    width = max(map(len, rows), default=0)
    ids = [([pad_id] * (width - len(r)) + r) if left else (r + [pad_id] * (width - len(r))) for r in rows]
    mask = [([0] * (width - len(r)) + [1] * len(r)) if left else ([1] * len(r) + [0] * (width - len(r))) for r in rows]
    return TokenBatch(
        torch.tensor(ids, dtype=torch.long).reshape(len(rows), width),
        torch.tensor(mask, dtype=torch.long).reshape(len(rows), width),
    )


def join(tokenizer, prompt, passages, questions, num_passages):
    prefix, suffix = special_affixes(tokenizer)
    batch = join_contexts(
        [np.asarray(bare(tokenizer, prompt.passage_text(p)), dtype=np.uint16) for p in passages],
        pad_questions([bare(tokenizer, prompt.question_text(q)) for q in questions]),
        num_passages,
        prefix,
        suffix,
        tokenizer.pad_token_id,
        prompt.max_tokens,
        prompt.question_first,
    )
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return batch, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("question_first", [False, True])
@settings(deadline=None, max_examples=40)
@given(title=WORDS, text=WORDS, question=WORDS)
def test_joined_ids_are_those_of_the_joined_text(kind, question_first, title, text, question):
    templates = (
        (" context: {title} / {text}", "question: {question}")
        if question_first
        else ("{title} / {text}", " // {question}")
    )
    prompt = Prompt(*templates, question_first=question_first)
    tokenizer = make_tokenizer(kind)
    passage = Passage("1", title, text)
    parts = [prompt.passage_text(passage), prompt.question_text(question)]
    joined = "".join(parts[::-1] if question_first else parts)
    _, rows = join(tokenizer, prompt, [passage], [question], 1)
    assert rows == [tokenizer(joined)["input_ids"]]


@settings(deadline=None)
@given(title=WORDS, text=WORDS, question=WORDS)
def test_rendering_is_that_of_transformers_rag(title, text, question):
    # transformers, RagRetriever.postprocess_docs; runs of spaces, which it halves as a whole, are left out
    title, text, question = (" ".join(part.split(" ")).strip() for part in (title, text, question))
    if any("  " in part for part in (title, text, question)) or not text:
        return
    expected = (title.removeprefix('"').removesuffix('"') + " / " + text + " // " + question).replace("  ", " ")
    prompt = Prompt()
    assert prompt.passage_text(Passage("1", title, text)) + prompt.question_text(question) == expected


def test_quotes_of_the_title_and_double_spaces_go():
    assert Prompt().passage_text(Passage("1", '"Heroes"', 'He said  "no" ')) == 'Heroes / He said "no"'
    assert Prompt().question_text("who  is  it?") == " // who is it?"


def test_a_brace_in_the_data_is_only_text():
    assert Prompt().passage_text(Passage("1", "{text}", "a {b} c")) == "{text} / a {b} c"


@pytest.mark.parametrize("question_first", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_join_contexts_by_hand(question_first, left):
    passages = [np.array(ids, dtype=np.uint16) for ids in ([11, 12, 13, 14], [21], [], [41, 42, 43])]
    questions = pad_questions([[7], [8, 9, 10]], left=left)
    batch = join_contexts(passages, questions, 2, [1], [2, 3], pad_id=0, max_tokens=7, question_first=question_first)
    expected = (
        [[1, 7, 11, 12, 13, 2, 3], [1, 7, 21, 2, 3, 0, 0], [1, 8, 9, 10, 2, 3, 0], [1, 8, 9, 10, 41, 2, 3]]
        if question_first
        else [[1, 11, 12, 13, 7, 2, 3], [1, 21, 7, 2, 3, 0, 0], [1, 8, 9, 10, 2, 3, 0], [1, 41, 8, 9, 10, 2, 3]]
    )
    assert batch.input_ids.tolist() == expected
    assert batch.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1] * 7]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.lengths == (7, 5, 6, 7)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    questions=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    max_tokens=st.integers(7, 14),
    first=st.booleans(),
)
def test_truncation_takes_the_end_of_the_passage_only(lengths, questions, max_tokens, first):
    passages = [np.arange(100 * (n + 1), 100 * (n + 1) + length) for n, length in enumerate(lengths)]
    asked = [list(range(1000 * (b + 1), 1000 * (b + 1) + length)) for b, length in enumerate(questions)]
    batch = join_contexts(passages, pad_questions(asked), 2, [1, 2], [3], 0, max_tokens, first)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    for n, row in enumerate(rows):
        question = asked[n // 2]
        kept = passages[n].tolist()[: max_tokens - 3 - len(question)]
        assert row == [1, 2, *(question + kept if first else kept + question), 3]
    assert batch.input_ids.shape[1] == max(map(len, rows)) <= max_tokens


def test_permuting_passages_permutes_rows():
    passages = [np.array(ids) for ids in ([11, 12], [21], [31, 32, 33])]
    questions = pad_questions([[7, 8]])
    rows = join_contexts(passages, questions, 3, [1], [2], 0, 20).input_ids
    swapped = join_contexts(passages[::-1], questions, 3, [1], [2], 0, 20).input_ids
    assert swapped.tolist() == rows.flip(0).tolist()


def test_join_contexts_refuses_a_wrong_number_of_passages():
    with pytest.raises(ConfigError, match=r"B \* K passages for B=2 questions and K=2, came 3"):
        join_contexts([np.array([1])] * 3, pad_questions([[7], [8]]), 2, [], [], 0, 10)


def test_a_question_that_leaves_no_room_is_named():
    questions = pad_questions([[7], [8, 9, 10, 11]])
    with pytest.raises(DataError, match=r"max_tokens=5 with 1 \+ 1 special tokens, came one of 4 tokens in row 1"):
        join_contexts([np.array([1])] * 2, questions, 1, [1], [2], 0, 5)
    assert join_contexts([np.array([1])] * 2, questions, 1, [1], [2], 0, 6).input_ids.shape == (2, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"passage_template": "{title} {body}"},
            r"passage_template: expected only the plain field \{title\} or \{text\}",
        ),
        ({"passage_template": "text"}, r"expected the field \{title\} or \{text\}, found none in 'text'"),
        ({"question_template": " // "}, r"expected the field \{question\}, found none"),
        ({"question_template": " // {question!r}"}, r"expected only the plain field \{question\}"),
        ({"question_template": " // {question.x}"}, r"expected only the plain field"),
        ({"question_template": " // {}"}, r"expected only the plain field"),
        ({"question_template": " // {question"}, r"is no template: .*Write \{\{ for a brace"),
        ({"question_template": "// {question}"}, r"expected question_template to start with a space"),
        ({"question_first": True}, r"question_first=True, expected passage_template to start with a space"),
        ({"max_passage_tokens": 0}, r"came max_passage_tokens=0 and max_tokens=300"),
        ({"max_tokens": 100}, r"came max_passage_tokens=200 and max_tokens=100"),
    ],
)
def test_bad_prompts_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Prompt(**changes)


def test_passage_key_follows_what_renders_passages():
    key = Prompt().passage_key
    assert Prompt(question_template=" ? {question}", max_tokens=250).passage_key == key
    assert Prompt(passage_template="{title}: {text}").passage_key != key


def test_what_to_keep_of_a_long_question_is_start_or_end():
    assert Prompt(keep_question="end").keep_question == "end"
    initialise = inspect.unwrap(Prompt.__post_init__)
    prompt = Prompt()
    object.__setattr__(prompt, "keep_question", "middle")
    with pytest.raises(ConfigError, match="keep_question: expected start or end, came 'middle'"):
        initialise(prompt)


def test_what_stands_around_the_question():
    prompt = Prompt(question_template=" {{q}} {question} {{a}}")
    assert (prompt.before_question, prompt.after_question) == (" {q} ", " {a}")
