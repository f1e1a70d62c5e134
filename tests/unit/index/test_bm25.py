"""BM25 against the formula written out as double loops."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingExtraError, MissingFileError
from rag_lightning.index import bm25
from rag_lightning.index.bm25 import Bm25Index, Bm25Settings, indexed_text, open_or_build, terms_of
from rag_lightning.retrieval.base import TextIndex
from rag_lightning.types import Passage

pytest.importorskip("bm25s")

TEXTS = [
    ("Kismet", "Kismet is a film of 1955, directed by Vincente Minnelli."),
    ("Sita Sings the Blues", "An animated film of 2008 by Nina Paley. The film tells of Sita; of Sita and of Nina."),
    ("Kismet (novel)", "A novel. Not the film."),
    ("", "???"),
    ("Кисмет", "Фильм 1955 года, режиссёр Минелли."),
    ("天命", "天命是一部电影。"),
    ("Twin", "amber quartz"),
    ("Twin", "quartz amber"),
]
QUESTIONS = [
    "who directed Kismet?",
    "film film of Nina",
    "КИСМЕТ 1955",
    "电影",
    "amber",
    "nothing shared here whatsoever",
    "",
    "the of and",
]


def corpus_of(texts=TEXTS):
    return PassageCorpus.from_passages([Passage(f"p{n}", title, text) for n, (title, text) in enumerate(texts)])


def naive_scores(corpus, question, k1, b, stop_words):
    """BM25 of every passage, from its definition."""
    documents = [terms_of(indexed_text(passage), stop_words) for passage in corpus]
    mean = sum(len(document) for document in documents) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in terms_of(question, stop_words):
            holding = sum(term in other for other in documents)
            frequency = document.count(term)
            if frequency > 0:
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                score += idf * frequency / (frequency + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def naive_search(scores, num_passages):
    ranked = sorted((-score, row) for row, score in enumerate(scores) if score > 0)[:num_passages]
    missing = num_passages - len(ranked)
    return [-score for score, _ in ranked] + [-math.inf] * missing, [row for _, row in ranked] + [-1] * missing


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("stop_words", ["none", "english"])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 0.0), (2.0, 1.0)])
def test_scores_and_order_are_those_of_the_formula(k1, b, stop_words):
    corpus = corpus_of()
    index = Bm25Index.build(corpus, Bm25Settings(k1=k1, b=b, stop_words=stop_words))
    assert isinstance(index, TextIndex)
    assert index.num_passages == len(corpus)
    all_ids = torch.arange(len(corpus)).expand(len(QUESTIONS), -1)
    given_BN = index.scores_of(QUESTIONS, all_ids)
    for num_passages in (1, 3, len(corpus)):
        scores_BK, ids_BK = index.search(QUESTIONS, num_passages)
        assert (scores_BK.dtype, ids_BK.dtype) == (torch.float32, torch.int64)
        for row, question in enumerate(QUESTIONS):
            expected = naive_scores(corpus, question, k1, b, stop_words)
            assert given_BN[row].tolist() == pytest.approx(expected, abs=1e-5)
            wanted_scores, wanted_ids = naive_search(expected, num_passages)
            assert scores_BK[row].tolist() == pytest.approx(wanted_scores, abs=1e-5)
            assert ids_BK[row].tolist() == wanted_ids


words = st.lists(st.sampled_from("amber quartz sita nina film iron jade".split()), max_size=8).map(" ".join)


@given(texts=st.lists(words, min_size=1, max_size=9), questions=st.lists(words, min_size=1, max_size=3))
def test_any_small_corpus_is_searched_as_the_loops_search_it(texts, questions):
    corpus = corpus_of([("x", text or "-") for text in texts])
    index = Bm25Index.build(corpus)
    scores_BK, ids_BK = index.search(questions, len(corpus))
    for row, question in enumerate(questions):
        expected = naive_scores(corpus, question, 0.9, 0.4, "english")
        assert scores_BK[row].tolist() == pytest.approx(naive_search(expected, len(corpus))[0], abs=1e-5)
        found = [i for i in ids_BK[row].tolist() if i >= 0]
        assert sorted(found) == [i for i, score in enumerate(expected) if score > 0]
        # a search and a look-up add the same numbers in the same order
        assert torch.equal(index.scores_of([question], ids_BK[row : row + 1])[0], scores_BK[row])


def test_equal_scores_stand_by_ascending_row_at_the_cut_too():
    corpus = corpus_of([("t", "amber quartz")] * 7 + [("t", "amber amber")])
    index = Bm25Index.build(corpus)
    assert index.search(["amber"], 4)[1].tolist() == [[7, 0, 1, 2]]
    assert index.search(["quartz"], 3)[1].tolist() == [[0, 1, 2]]


def test_a_question_without_a_known_word_finds_nothing():
    index = Bm25Index.build(corpus_of())
    scores_BK, ids_BK = index.search(["", "zzz", "the"], 2)
    assert torch.equal(ids_BK, torch.full((3, 2), -1))
    assert torch.equal(scores_BK, torch.full((3, 2), -torch.inf))
    assert index.search([], 2)[1].shape == (0, 2)


def test_given_rows_may_repeat_and_be_missing():
    index = Bm25Index.build(corpus_of())
    all_scores = index.scores_of(["film of Kismet"], torch.arange(8)[None])[0]
    ids_BM = torch.tensor([[2, -1, 0, 2, 7]])
    scores_BM = index.scores_of(["film of Kismet"], ids_BM)
    expected = [all_scores[2].item(), -math.inf, all_scores[0].item(), all_scores[2].item(), 0.0]
    assert scores_BM[0].tolist() == expected
    assert index.scores_of(["x"], torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The C-3PO of the Café, 42!", ["c", "3po", "café", "42"]),
        (
            "cafe\u0301 \ufb01lm \uff21\uff22",
            ["café", "film", "ab"],
        ),  # NFKC joins marks, ligatures and full-width letters
        ("天命film", ["天", "命", "film"]),
        ("Straße ÄÖ под_ключ", ["straße", "äö", "под", "ключ"]),
        ("한국어 영화", ["한국어", "영화"]),
        ("¿?—…", []),
    ],
)
def test_terms_are_what_the_description_says(text, expected):
    assert terms_of(text) == expected


def test_stop_words_are_dropped_only_when_asked():
    assert terms_of("To be or not", "none") == ["to", "be", "or", "not"]
    assert terms_of("To be or not", "english") == []
    assert len(bm25.ENGLISH_STOP_WORDS) == 33


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("mmap", [True, False])
def test_saving_and_loading_changes_nothing(tmp_path, mmap):
    index = Bm25Index.build(corpus_of(), Bm25Settings(k1=1.2, b=0.6, stop_words="none"))
    index.save(tmp_path)
    again = Bm25Index.load(tmp_path, mmap=mmap)
    assert (again.settings, again.corpus_hash, again.num_passages, again.id) == (
        index.settings,
        index.corpus_hash,
        index.num_passages,
        index.id,
    )
    for found, expected in zip(again.search(QUESTIONS, 5), index.search(QUESTIONS, 5), strict=True):
        assert torch.equal(found, expected)
    assert "no stemming" in json.loads((tmp_path / "bm25.json").read_text())["tokenisation"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".json"}


def test_a_loaded_index_stays_on_disk(tmp_path):
    import numpy as np

    Bm25Index.build(corpus_of()).save(tmp_path)
    scores = Bm25Index.load(tmp_path)._bm25.scores
    assert all(isinstance(scores[name], np.memmap) for name in ("data", "indices", "indptr"))


def test_the_id_tells_corpus_and_settings_apart():
    ids = {
        Bm25Index.build(corpus, settings).id
        for corpus in (corpus_of(), corpus_of(TEXTS[:3]))
        for settings in (Bm25Settings(), Bm25Settings(k1=1.0), Bm25Settings(b=0.5), Bm25Settings(stop_words="none"))
    }
    assert len(ids) == 8
    assert all(name.startswith("bm25-") and len(name) == 13 for name in ids)


def test_a_cached_index_is_opened_not_built(tmp_path, monkeypatch):
    corpus = corpus_of()
    first = open_or_build(corpus, cache_dir=tmp_path)
    monkeypatch.setattr(Bm25Index, "build", None)
    again = open_or_build(corpus, cache_dir=tmp_path)
    assert torch.equal(again.search(QUESTIONS, 4)[0], first.search(QUESTIONS, 4)[0])
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError):  # other settings are another index
        open_or_build(corpus, cache_dir=tmp_path, settings=Bm25Settings(k1=1.0))


def test_a_torn_cached_index_is_built_again(tmp_path, caplog):
    corpus = corpus_of()
    expected = open_or_build(corpus, cache_dir=tmp_path).search(QUESTIONS, 4)[0]
    (folder,) = tmp_path.iterdir()
    data = folder / "data.csc.index.npy"
    data.write_bytes(data.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        again = open_or_build(corpus, cache_dir=tmp_path)
    assert "is not usable and is built again" in caplog.text
    assert torch.equal(again.search(QUESTIONS, 4)[0], expected)
    assert list(tmp_path.iterdir()) == [folder]


def test_two_processes_that_build_at_once_both_succeed(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from rag_lightning.corpora.passages import PassageCorpus\n"
        "from rag_lightning.index.bm25 import open_or_build\n"
        "from rag_lightning.types import Passage\n"
        "corpus = PassageCorpus.from_passages([Passage(str(n), 'film', f'number {n}') for n in range(300)])\n"
        "print(open_or_build(corpus, cache_dir=Path(sys.argv[1])).search(['film 7'], 1)[1].item())\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["7", "7"]
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------- what is refused


def test_what_cannot_be_searched_is_refused():
    index = Bm25Index.build(corpus_of())
    for wrong in (0, 9):
        with pytest.raises(ConfigError, match=f"num_passages: expected 1 to 8, .* came {wrong}"):
            index.search(["x"], wrong)
    with pytest.raises(DataError, match=r"expected passage numbers within -1\.\.7, came 0\.\.8"):
        index.scores_of(["x"], torch.tensor([[0, 8]]))
    with pytest.raises(DataError, match=r"expected passage numbers within -1\.\.7, came -2\.\.0"):
        index.scores_of(["x"], torch.tensor([[0, -2]]))
    with pytest.raises(DataError, match="expected ids for each of 2 questions, came ids for 1"):
        index.scores_of(["x", "y"], torch.tensor([[0]]))


def test_adding_to_a_finished_index_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"1 passages cannot be added .* computed in advance .* Build it again"):
        Bm25Index.build(corpus_of()).add([Passage("new", "", "text")])


def test_a_corpus_without_words_is_refused():
    with pytest.raises(DataError, match="expected words in the 2 passages of memory, came none at all"):
        Bm25Index.build(corpus_of([("", "???"), ("the", "of")]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k1": -0.1}, "k1: expected a number of at least 0, came -0.1"),
        ({"k1": float("nan")}, "k1: expected a number of at least 0, came nan"),
        ({"b": 1.5}, "b: expected a number from 0 to 1, came 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Bm25Settings(**settings)


def test_unknown_stop_words_are_refused():
    settings = Bm25Settings()
    object.__setattr__(settings, "stop_words", "french")  # past the type checks, which only tests have
    with pytest.raises(ConfigError, match="expected one of none, english, came 'french'"):
        settings.__post_init__()


@pytest.fixture
def saved(tmp_path):
    Bm25Index.build(corpus_of()).save(tmp_path)
    return tmp_path


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no file bm25.json in .*nowhere. Check the path"):
        Bm25Index.load(tmp_path / "nowhere")


FILES = ["data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "vocab.index.json", "params.index.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["removed", "cut", "flipped"])
def test_a_harmed_file_is_refused_by_name(saved, name, harm):
    file = saved / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if harm == "cut" else content)
    with pytest.raises(CorruptSnapshotError, match=f"{name}: the BM25 index is torn: expected the file whose checksum"):
        Bm25Index.load(saved)


@pytest.mark.parametrize(
    "meta", ["{", "[]", "{}", '{"format_version": 1, "settings": {"k1": -1}}', '{"format_version": 9}']
)
def test_a_harmed_description_is_refused(saved, meta):
    (saved / "bm25.json").write_text(meta)
    with pytest.raises(CorruptSnapshotError, match=r"bm25.json: expected what|expected BM25 index format 1, came 9"):
        Bm25Index.load(saved)


def test_a_description_that_names_files_elsewhere_is_refused(saved):
    meta = json.loads((saved / "bm25.json").read_text())
    meta["checksums"] = {"../other": "0"}
    (saved / "bm25.json").write_text(json.dumps(meta))
    with pytest.raises(CorruptSnapshotError, match="checksums of files elsewhere"):
        Bm25Index.load(saved)


def test_without_checksums_what_bm25s_cannot_read_is_refused(saved):
    (saved / "params.index.json").write_text("{")
    with pytest.raises(CorruptSnapshotError, match="bm25s cannot read its files"):
        Bm25Index.load(saved, verify=False)


def test_without_bm25s_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"BM25 retrieval needs the package 'bm25s'.*rag_lightning\[bm25\]"):
        Bm25Index.build(corpus_of())


def test_only_one_module_imports_bm25s():
    package = Path(bm25.__file__).parent.parent
    importers = [path.name for path in package.rglob("*.py") if "import bm25s" in path.read_text(encoding="utf-8")]
    assert importers == ["bm25.py"]
