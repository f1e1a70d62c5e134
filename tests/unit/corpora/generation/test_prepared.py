"""A prepared data set is written whole, once, in the package's own form, and read again as it was."""

from dataclasses import dataclass, replace

import pytest

from rag_lightning.corpora.generation.prepared import PreparedData, keep, keep_tokenizer, prepared_name
from rag_lightning.corpora.generation.translation import Translation
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions, source_rows, write_questions
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import Passage, Question
from tests.generation_files import write, write_generation


@pytest.fixture
def translation(tmp_path) -> Translation:
    return Translation(folder=str(write_generation(tmp_path / "data") / "multi30k_en_de"))


def test_what_is_kept_reads_as_what_was_prepared(translation, tmp_path):
    folder = keep(translation, tmp_path / "cache")
    data = translation()
    corpus = PassageCorpus.read(folder / "passages.jsonl")
    assert list(corpus) == list(data.passages)
    for split, questions in data.questions.items():
        kept = read_questions(folder / f"{split}.jsonl", corpus=corpus)
        assert len(kept) == len(questions)
        assert set(kept) == set(questions)
        assert (kept == list(questions)) == (split == "train"), "the first so many to measure on are a sample"


def test_every_field_of_a_question_survives(tmp_path):
    question = Question("1", "who?", ("Ann", "Ben"), ("p",), "A.*", ("n",), "p")
    write_questions(tmp_path / "q.jsonl", [question, Question("2", "when?", ("now",))])
    assert read_questions(tmp_path / "q.jsonl") == [question, Question("2", "when?", ("now",))]


def test_a_source_passage_must_be_in_the_corpus(tmp_path):
    corpus = PassageCorpus.from_passages([Passage("p", "", "text")])
    write_questions(tmp_path / "q.jsonl", [Question("1", "who?", ("Ann",), source_passage_id="gone")])
    with pytest.raises(
        DataError, match="line 1: field 'source_passage_id': expected ids of passages in memory, came 'gone'"
    ):
        read_questions(tmp_path / "q.jsonl", corpus=corpus)
    (tmp_path / "q.jsonl").write_text('{"id": "1", "question": "who?", "answers": ["Ann"], "source_passage_id": 7}\n')
    with pytest.raises(DataError, match="field 'source_passage_id': expected a string, came int"):
        read_questions(tmp_path / "q.jsonl")


def test_source_rows_number_passages_of_this_corpus_alone():
    corpus = PassageCorpus.from_passages([Passage("a", "", "x"), Passage("b", "", "y")])
    asked = [Question("1", "?", ("!",), source_passage_id=one) for one in ("b", None, "elsewhere")]
    assert source_rows(asked, corpus) == [1, -1, -1]


def test_it_is_prepared_once_and_anew_when_settings_or_files_change(translation, tmp_path):
    cache = tmp_path / "cache"
    folder = keep(translation, cache)
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert keep(translation, cache) == folder
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    assert keep(replace(translation, source="de", target="en"), cache) != folder
    moved = tmp_path / "moved"
    (tmp_path / "data" / "multi30k_en_de").rename(moved)
    translation = replace(translation, folder=str(moved))
    assert prepared_name(translation) == folder.name
    write(moved / "test.jsonl.gz", [{"id": 0, "en": "a", "de": "b"}])
    assert keep(translation, cache) != folder


def test_a_passage_file_counts_by_its_content(translation, tmp_path):
    file = tmp_path / "p.jsonl"
    names = set()
    for text in ("one", "two"):
        file.write_text(f'{{"id": "1", "title": "", "text": "{text}"}}\n')
        names.add(prepared_name(replace(translation, passages=str(file))))
    assert len(names) == 2


def test_nothing_is_left_where_a_line_is_bad(translation, tmp_path):
    write(tmp_path / "data" / "multi30k_en_de" / "test.jsonl.gz", [{"id": 0, "en": "a"}])
    with pytest.raises(DataError, match="test.jsonl.gz, line 1: field 'de' is missing"):
        keep(translation, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]


@dataclass(frozen=True)
class Given:
    folder: str
    data: PreparedData

    def __call__(self) -> PreparedData:
        return self.data


def test_a_split_without_questions_and_an_unknown_passage_are_refused(tmp_path):
    question = Question("1", "who?", ("Ann",), ("q",))
    passages = [Passage("p", "", "text")]
    splits = {"train": [question], "validation": [question], "test": []}
    with pytest.raises(DataError, match="expected questions in each split, came none to test"):
        keep(Given(str(tmp_path), PreparedData(passages, splits)), tmp_path / "cache")
    with pytest.raises(DataError, match="field 'positive_passage_ids': expected ids of passages"):
        keep(Given(str(tmp_path), PreparedData(passages, {**splits, "test": [question]})), tmp_path / "cache")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="task.folder: no such file"):
        keep(Translation(folder=str(tmp_path / "nowhere")), tmp_path / "cache")


def test_the_tokenizer_knows_the_data_and_is_made_once(translation, tmp_path):
    prepared = keep(translation, tmp_path / "cache")
    folder = keep_tokenizer(prepared, vocab_size=400, lowercase=False)
    tokenizer = load_tokenizer(folder)
    text = "Ein Mädchen liest"
    assert tokenizer.unk_token_id not in tokenizer(f"ein {text[4:]} 3")["input_ids"]
    assert (
        tokenizer.decode(tokenizer("ein Mädchen liest")["input_ids"], skip_special_tokens=True) == "ein Mädchen liest"
    )
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert keep_tokenizer(prepared, vocab_size=400, lowercase=False) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert keep_tokenizer(prepared, vocab_size=400, lowercase=True) != folder
