"""Tokenizers: load one, name its content by a hash, find its special tokens, train a small word vocabulary.

``tokenizer_hash`` keys caches (a token store of another vocabulary is never read) and ``special_affixes`` lets contexts
be joined from ids without calling the tokenizer again. ``train_word_tokenizer`` makes the vocabulary of the bundled
small world: names stay whole, so that a small generator can copy them in one step.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rag_lightning.errors import ConfigError, DataError, MissingFileError

WORD_START = "▁"
CONTINUATION = "##"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
MAX_PIECES = 1000  # sub-word pieces beyond single characters, for words outside the vocabulary
PROBES = ("a", "the", "1", ".")
CHAT_PROBE = "context-and-question"


def load_tokenizer(
    source: str | Path, subfolder: str = "", config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer saved in a directory, or published on the hub under that id.

    Args:
        source: Directory or hub id.
        subfolder: Folder inside it, where the tokenizer does not lie at the top.
        config: Its model's configuration, which names the class where the files do not (checkpoints of 2020).

    Raises:
        MissingFileError: ``source`` looks like a path, and no such directory exists.
        DataError: The directory or the hub entry holds no tokenizer that can be loaded.
    """
    path = Path(source)
    looks_local = isinstance(source, Path) or path.is_absolute() or str(source).startswith((".", "~"))
    if looks_local and not path.expanduser().is_dir():
        raise MissingFileError(
            f"tokenizer: expected a directory saved with save_pretrained, found none at {source}. "
            "Check the path, or give a hub id such as 'facebook/bart-base'."
        )
    name = str(path.expanduser()) if path.expanduser().is_dir() else str(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder, config=config)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"tokenizer: expected a directory with tokenizer files (tokenizer.json and others) or a hub id, "
            f"came {str(source)!r}: {reason}. Save one there with tokenizer.save_pretrained, or check the name and the "
            "network."
        ) from error
    # where the files are missing but the class is known, transformers makes a tokenizer without a vocabulary
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - {WORD_START}:
        raise DataError(
            f"tokenizer: expected tokenizer files (tokenizer.json and others) in {Path(name) / subfolder}, found none: "
            f"the {type(tokenizer).__name__} knows no words. Save one there with tokenizer.save_pretrained."
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a SHA-256 of what decides the ids: the backend's JSON, or the vocabulary, and the special tokens.

    Padding and truncation settings, which a tokenizer changes while it is used, do not enter; nor does the Python
    class, which saving and loading may change.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state: dict[str, Any] = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    state["special_ids"] = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id")
    }
    return sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def truncating(tokenizer: PreTrainedTokenizerBase, *, keep: Literal["start", "end"]) -> Iterator[None]:
    """Lets a tokenizer keep the start or the end of a text that is too long, and then be as it was."""
    before = tokenizer.truncation_side
    tokenizer.truncation_side = "right" if keep == "start" else "left"
    try:
        yield
    finally:
        tokenizer.truncation_side = before


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer puts before and after one sequence, such as ``([<s>], [</s>])``.

    Found by encoding a short probe with and without special tokens, so it holds for any template.

    Raises:
        ConfigError: No probe gives the same ids with and without special tokens.
    """
    for probe in PROBES:
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(bare) + 1) if bare else ():
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    raise ConfigError(
        f"{type(tokenizer).__name__}: expected the ids of a text to stand unchanged between its special tokens, but no "
        f"probe of {PROBES} does. Use a tokenizer whose template only adds ids before and after."
    )


def chat_affixes(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> tuple[list[int], list[int]]:
    """Returns the ids that the chat template puts before and after a user's turn, up to where the answer begins.

    Args:
        tokenizer: With a chat template.
        system: The system message before the user's turn, if any.

    Raises:
        ConfigError: There is no chat template, or it does not let a user's words stand as they are.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    text = _chat_text(tokenizer, [*messages, {"role": "user", "content": CHAT_PROBE}], add_generation_prompt=True)
    before, found, after = text.partition(CHAT_PROBE)
    if not found:
        raise ConfigError(f"generator.chat=true: expected the chat template to write a user's words, came {text!r}")
    ids = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    return list(ids[0]), list(ids[1])


def chat_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that a chat template writes behind an assistant's turn; None where there is none.

    Raises:
        ConfigError: As :func:`chat_affixes`.
    """
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": CHAT_PROBE}]
    _, _, after = _chat_text(tokenizer, turns, add_generation_prompt=False).partition(CHAT_PROBE)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "generator.chat=true: expected a tokenizer with a chat template, came one without. Give that of an "
            "instruction-tuned model, or set generator.chat=false"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # whatever the template raises, by jinja, which is transformers' to import
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"generator.chat=true: expected a chat template that writes turns of {roles}, but it says: {error}. Leave "
            "generator.system out if it knows no such turn."
        ) from error


def continuation_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], before: str) -> list[list[int]]:
    """Returns the ids of texts as they are where they follow other text, as an answer follows its prompt.

    Vocabularies differ in who brings the space: byte-level ones write ``" Paris"``, SentencePiece ones add it unasked.

    Args:
        tokenizer: Of the generator.
        texts: What follows, with its leading space.
        before: The end of what it follows, such as ``":"``.

    Raises:
        ConfigError: The tokenizer joins ``before`` to what follows.
    """
    start = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    joined = tokenizer([before + text for text in texts], add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, joined, strict=True):
        if list(ids[: len(start)]) != start:
            raise ConfigError(
                f"{type(tokenizer).__name__}: expected {before!r} to keep its ids where {text!r} follows, but they are "
                "joined into one token. Let model.prompt.answer_prefix begin with a space."
            )
    return [list(ids[len(start) :]) for ids in joined]


def train_word_tokenizer(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, split_ideographs: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a WordPiece tokenizer whose vocabulary is mostly whole words.

    The vocabulary holds, in this order: the special tokens ``<pad> <s> </s> <unk> <mask>`` (ids 0 to 4), every
    character of the texts as first and as continuing piece, up to 1,000 frequent word pieces (learned by byte-pair
    merges over the distinct words), then the most frequent words until ``vocab_size`` is reached. Ties are broken
    alphabetically, so equal texts give equal tokenizers.

    A word carries its preceding space (``▁``) and each punctuation mark is a token of its own, so decoding restores
    the text exactly, up to case and runs of white space. A word with a character never seen becomes ``<unk>``.
    Sequences are wrapped as ``<s> … </s>``.

    Args:
        texts: What to learn the words from; read once.
        vocab_size: The largest number of entries; fewer when the texts have fewer words.
        lowercase: Whether case is dropped.
        split_ideographs: Whether each Chinese character is a word, as in BERT (Devlin et al. 2019): Chinese sets no
            space between words, and a sentence would else be one.

    Raises:
        DataError: The texts hold no word.
        ConfigError: ``vocab_size`` is too small for the characters of the texts.

    >>> tokenizer = train_word_tokenizer(["J.J. Abrams directed Spider-Man 2"] * 2, vocab_size=100)
    >>> tokenizer.tokenize("spider-man 2")
    ['▁spider', '-', 'man', '▁2']
    >>> tokenizer.decode(tokenizer("J.J.  Abrams")["input_ids"], skip_special_tokens=True)
    'j.j. abrams'
    """
    backend = _word_backend(models.WordPiece({}, unk_token="<unk>"), lowercase, split_ideographs)
    counts = _count_words(backend, texts)
    if not counts:
        raise DataError("word tokenizer: expected texts with at least one word, came none. Check the corpus.")
    vocabulary = _word_vocabulary(counts, vocab_size, split_ideographs)
    backend.model = models.WordPiece(
        vocabulary, unk_token="<unk>", continuing_subword_prefix=CONTINUATION, max_input_chars_per_word=200
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _word_backend(model: models.Model, lowercase: bool, split_ideographs: bool) -> Tokenizer:
    """Returns a tokenizer without vocabulary: normalising, splitting into words and signs, joining again."""
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            *([normalizers.Lowercase()] if lowercase else []),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(WORD_START),
            normalizers.Replace(" ", WORD_START),
        ]
    )
    letters = r"\p{L}\p{N}\p{M}"
    words = rf"{WORD_START}?[{letters}]+|{WORD_START}?[^{WORD_START}{letters}]"
    if split_ideographs:  # the space before a character is a word of its own, so that each character has one entry
        words = rf"{WORD_START}?[{letters}&&[^\p{{Han}}]]+|\p{{Han}}|{WORD_START}?[^{WORD_START}{letters}]|{WORD_START}"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    # a sign is one pre-token, so "##" inside a token can only be the mark of a continuing piece
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(CONTINUATION, ""),
            decoders.Replace(WORD_START, " "),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def _count_words(backend: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        normalised = backend.normalizer.normalize_str(text)
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised))
    return counts


def _word_vocabulary(counts: Counter[str], vocab_size: int, split_ideographs: bool) -> dict[str, int]:
    """Returns token to id: specials, characters, pieces, then words by frequency."""
    alphabet = sorted({character for word in counts for character in word})
    inner = sorted({character for word in counts for character in word[1:]}) if split_ideographs else alphabet
    tokens = [*SPECIAL_TOKENS, *alphabet, *(CONTINUATION + character for character in inner)]
    if vocab_size < len(tokens):
        raise ConfigError(
            f"word tokenizer: expected vocab_size of at least {len(tokens)} ({len(SPECIAL_TOKENS)} special tokens and "
            f"{len(alphabet)} characters, each as first and as continuing piece), came {vocab_size}. Raise it."
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    num_pieces = min(MAX_PIECES, (vocab_size - len(tokens)) // 4)
    for token in [*_word_pieces(by_frequency, alphabet, num_pieces), *by_frequency]:
        if len(vocabulary) >= vocab_size:
            break
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


def _word_pieces(words: list[str], alphabet: list[str], num_pieces: int) -> list[str]:
    """Returns frequent pieces of the distinct words; those inside a word carry the continuation mark."""
    if num_pieces == 0:
        return []
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + num_pieces, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    # each distinct word is a text without white space or signs to split at, so merges stay within words
    learner.train_from_iterator(words, trainer)
    by_id = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return [piece if piece.startswith(WORD_START) else CONTINUATION + piece for piece, _ in by_id if len(piece) > 1]
