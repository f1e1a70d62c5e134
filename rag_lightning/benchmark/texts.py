"""What a benchmark reads: passages, questions and answers, made up with given lengths or taken from files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rag_lightning.benchmark.lengths import LengthTables, drawn_lengths
from rag_lightning.benchmark.shape import Shape
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.places import model_place
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import Passage, Question
from rag_lightning.utils.seeding import derived_seed

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SEPARATORS = ("/", "//")
_TITLE_WORDS, _FIRST_WORD = 2, len(SPECIAL) + len(SEPARATORS)
_SHORTEST_PASSAGE = _TITLE_WORDS + 2


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Real texts in the place of made-up ones.

    Attributes:
        passages: The corpus.
        questions: With answers.
        tokenizer: Folder, hub id or ``minilm``; its vocabulary becomes V.
    """

    passages: str
    questions: str
    tokenizer: str


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is read.

    Attributes:
        corpus: The passages.
        questions: ``batch_size * num_batches`` of them; their first answer is the target.
        tokenizer: Of both models.
        source: Where they come from, for results.
    """

    corpus: PassageCorpus
    questions: Sequence[Question]
    tokenizer: PreTrainedTokenizerBase
    source: str


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of ``vocab_size`` words ``w7``, ``w8``, …, so that a text of n words has n tokens.

    >>> word_tokenizer(20)("w8 / w9")["input_ids"]
    [2, 8, 5, 9, 3]
    """
    if vocab_size <= _FIRST_WORD:
        raise ConfigError(f"benchmark: expected vocab_size above {_FIRST_WORD}, came {vocab_size}. Raise it.")
    words = [*SPECIAL, *SEPARATORS, *(f"w{number}" for number in range(_FIRST_WORD, vocab_size))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def made_texts(shape: Shape, tables: LengthTables) -> Texts:
    """Returns texts of random words whose lengths follow the tables, or are all equal (``shape.lengths``)."""
    rng = np.random.default_rng(derived_seed(shape.seed, "benchmark texts"))
    num_questions = shape.batch_size * shape.num_batches
    equal = shape.lengths == "equal"
    longest_question = max(2, shape.max_combined_length // 4)
    longest_passage = shape.max_combined_length - 2  # a longer one is cut when it is joined to its question
    if longest_passage < _SHORTEST_PASSAGE:
        raise ConfigError(
            f"benchmark: expected max_combined_length of at least {_SHORTEST_PASSAGE + 2}, came "
            f"{shape.max_combined_length}. Raise it."
        )

    def lengths(quantiles: Sequence[int], count: int, shortest: int, longest: int) -> list[int]:
        if equal:
            return [min(longest, max(shortest, quantiles[-1]))] * count
        drawn: list[int] = drawn_lengths(quantiles, count, shortest=shortest, longest=longest, rng=rng).tolist()
        return drawn

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(_FIRST_WORD, shape.vocab_size, size=count))

    passage_table = [longest_passage] if equal else tables.passages
    passages = [
        Passage(str(row), words(_TITLE_WORDS), words(length - _TITLE_WORDS - 1))
        for row, length in enumerate(
            lengths(passage_table, shape.num_corpus_passages, _SHORTEST_PASSAGE, longest_passage)
        )
    ]
    asked = lengths(tables.questions, num_questions, 2, longest_question)
    said = lengths(tables.answers, num_questions, 1, shape.max_target_tokens - 1)
    questions = [
        Question(str(row), words(length - 1), (words(target),))
        for row, (length, target) in enumerate(zip(asked, said, strict=True))
    ]
    corpus = PassageCorpus.from_passages(passages, source="benchmark")
    return Texts(corpus=corpus, questions=questions, tokenizer=word_tokenizer(shape.vocab_size), source="made up")


def read_texts(shape: Shape, files: TextFiles) -> Texts:
    """Returns the texts of files.

    Raises:
        ConfigError: Too few questions with answers for the batches, or fewer passages than K.
        MissingFileError: A file is not there.
    """
    corpus = PassageCorpus.read(files.passages)
    if len(corpus) < shape.num_passages:
        raise ConfigError(
            f"benchmark: expected at least num_passages = {shape.num_passages} passages in {files.passages}, came "
            f"{len(corpus)}. Lower K, or give more passages."
        )
    answered = [question for question in read_questions(files.questions) if question.answers]
    wanted = shape.batch_size * shape.num_batches
    if len(answered) < wanted:
        raise ConfigError(
            f"benchmark: expected {wanted} questions with answers in {files.questions} (batch_size x num_batches), "
            f"came {len(answered)}. Lower num_batches, or give more."
        )
    chosen = np.random.default_rng(derived_seed(shape.seed, "benchmark questions")).permutation(len(answered))[:wanted]
    tokenizer = load_tokenizer(model_place(files.tokenizer))
    source = f"{len(corpus)} passages and {len(answered)} questions of files"
    return Texts(corpus=corpus, questions=[answered[row] for row in chosen], tokenizer=tokenizer, source=source)
