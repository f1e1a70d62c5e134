"""Stop strings in texts, and files of allowed answers, with a tokenizer of pieces."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rag_lightning.decoding.constraints import NO_RULES
from rag_lightning.decoding.options import Decoded, DecodingOptions
from rag_lightning.decoding.text_rules import StopStrings, cut_before, text_rules
from rag_lightning.decoding.texts import alternatives, answer_texts, tokens_with_posteriors
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.types import Alternative
from tests.unit.decoding.table_generator import EOS, PAD, START, TableGenerator

PIECES = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", ".", "ab", "b.", "c"]
A, B, DOT, AB, B_DOT, C = range(4, 10)
MAX_TARGET_TOKENS = 8


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("a", "b"), ("b", ".")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def rules_of(tokenizer, tmp_path):
    generator = TableGenerator.random(num_contexts=1, vocab_size=len(PIECES), max_tokens=1, seed=0)

    def target_tokens(texts):
        rows = [[START, *ids[: MAX_TARGET_TOKENS - 2], EOS] for ids in tokenizer(list(texts))["input_ids"]]
        width = max(map(len, rows))
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])

    def build(lines=None, **settings):
        if lines is not None:
            (tmp_path / "names.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            settings["allowed"] = str(tmp_path / "names.txt")
        return text_rules(
            DecodingOptions(**settings),
            generator=generator,
            tokenizer=tokenizer,
            target_tokens=target_tokens,
            max_target_tokens=MAX_TARGET_TOKENS,
        )

    return build


def test_a_stop_string_is_found_within_and_across_tokens(tokenizer):
    written = torch.tensor([[START, C, B_DOT], [START, A, B], [START, AB, C], [START, C, A], [START, EOS, PAD]])
    assert StopStrings(tokenizer, ["."])(written).tolist() == [True, False, False, False, False]
    assert StopStrings(tokenizer, ["ab"])(written).tolist() == [False, True, True, False, False]
    assert StopStrings(tokenizer, ["bc", "ca"])(written).tolist() == [False, False, True, True, False]
    assert StopStrings(tokenizer, ["/s"])(written).tolist() == [False] * 5, "special tokens are no text"


def test_an_answer_is_cut_before_its_first_stop_string(tokenizer):
    sequences = torch.tensor([[START, A, B_DOT, EOS], [START, AB, C, EOS]])
    assert answer_texts(tokenizer, sequences, ["."]) == ["ab", "abc"]
    assert answer_texts(tokenizer, sequences, [".", "b"]) == ["a", "a"]
    assert cut_before("abc", []) == "abc"
    assert cut_before("abc", ["c", "a"]) == ""


def test_the_n_best_are_texts_with_likelihoods_and_empty_places_go(tokenizer):
    sequences = torch.tensor([[[START, A, DOT], [START, C, EOS]], [[START, B, EOS], [START, PAD, PAD]]])
    likelihoods = torch.tensor([[-1.0, -2.0], [-3.0, -torch.inf]])
    decoded = Decoded(sequences[:, 0], likelihoods[:, 0], sequences, likelihoods, stop=(".",))
    assert alternatives(tokenizer, decoded) == [
        (Alternative("a", -1.0), Alternative("c", -2.0)),
        (Alternative("b", -3.0),),
    ]
    assert alternatives(tokenizer, Decoded(sequences[:, 0], likelihoods[:, 0])) == [(), ()]


def test_tokens_keep_their_end_token_and_lose_their_padding(tokenizer):
    posteriors = torch.tensor([[[0.25, 0.5, 0.75], [0.75, 0.5, 0.25]]])
    (found,) = tokens_with_posteriors(tokenizer, torch.tensor([[START, AB, EOS, PAD]]), posteriors, PAD)
    assert found.tokens == ("ab", "</s>")
    assert found.probabilities == ((0.25, 0.5), (0.75, 0.5))


def test_nothing_asked_is_no_rule(rules_of):
    assert rules_of() is NO_RULES


def test_a_file_of_answers_becomes_a_trie_of_targets(rules_of):
    allowed = rules_of(["ab", "c.", "abc"]).allowed
    start = allowed.next_tokens(torch.tensor([[START]]), len(PIECES))[0]
    after = allowed.next_tokens(torch.tensor([[START, AB]]), len(PIECES))[0]
    assert start.nonzero().flatten().tolist() == [AB, C]
    assert after.nonzero().flatten().tolist() == [EOS, C]


def test_a_forced_first_token_is_put_where_the_tokenizer_does_not_write_it(rules_of):
    allowed = rules_of(["ab", "c"], forced_bos_token_id=C).allowed
    first = allowed.next_tokens(torch.tensor([[START]]), len(PIECES))[0]
    second = allowed.next_tokens(torch.tensor([[START, C]]), len(PIECES))[0]
    assert first.nonzero().flatten().tolist() == [C]
    assert second.nonzero().flatten().tolist() == [EOS, AB]  # "c" begins with it already


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["ab", "", "c"], r"names\.txt, line 2: expected an allowed answer, came ''"),
        (["ab", "c", "zzz"], r"names\.txt, line 3: expected an answer that .* knows, came 'zzz', of which it knows no"),
        (["c", "cacac"], r"names\.txt, line 2: expected at most max_new_tokens = 4 tokens, came 'cacac' of 6"),
        (["c", "cacacacac"], r"line 2: expected at most model\.max_target_tokens = 8 tokens .*, came 'cacacacac'"),
        ([], "expected one allowed answer on each line, came none"),
    ],
)
def test_an_answer_that_cannot_be_written_is_named_with_its_line(rules_of, lines, message):
    with pytest.raises(DataError, match=message):
        rules_of(lines, max_new_tokens=4)


def test_an_answer_of_just_the_greatest_length_is_allowed(rules_of):
    assert rules_of(["cacaca"], max_new_tokens=7).allowed is not None


def test_an_answer_that_loses_a_token_is_told(rules_of, caplog):
    with caplog.at_level(logging.WARNING):
        rules_of(["ab", "cz"])
    (record,) = caplog.records
    assert "1 allowed answers have a token" in record.getMessage()
    assert "the first is 'cz' on line 2" in record.getMessage()


def test_a_file_that_is_not_there_is_named(rules_of):
    with pytest.raises(MissingFileError, match=r"decoding\.allowed"):
        rules_of(allowed="none.txt")
