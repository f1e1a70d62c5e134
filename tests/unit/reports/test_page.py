"""The page of predictions, opened in headless Chromium: what it shows, its filters, and what it must not run."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.predictions import read_predictions
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.reports.error_analysis import Judged, judge
from rag_lightning.reports.page import write_page
from rag_lightning.types import Passage
from tests.report_runs import prediction, write_questions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
ANSWERS = ("Ada Ash", "Birch", "nobody <b>bold</b>", "Dan Dogwood")


@pytest.fixture
def told(tmp_path: Path, json_lines) -> tuple[list[Judged], dict[str, Passage]]:
    questions, passages = write_questions(tmp_path)
    lines = [prediction(number, answer, by_token=number == 0) for number, answer in enumerate(ANSWERS)]
    predictions = read_predictions(json_lines(tmp_path / "predictions.jsonl", lines))
    texts = {passage.id: passage for passage in PassageCorpus.read(passages)}
    return judge(predictions, {one.id: one for one in read_questions(questions)}, texts), texts


def opened(path: Path, fragment: str, folder: Path) -> str:
    """Returns the page's elements once its script has run."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"{path.as_uri()}#{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def ids(dom: str) -> list[str]:
    return re.findall(r'<article[^>]* data-id="([^"]*)"', dom)


def test_nothing_is_loaded_and_no_text_ends_the_data(tmp_path: Path, told) -> None:
    write_page(tmp_path / "page.html", *told, title="a <i>title</i> of $5")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://""", page)
    assert page.count("<script") == 2
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    assert "<title>a &lt;i&gt;title&lt;/i&gt; of $5</title>" in page
    assert "default-src 'none'; script-src 'sha256-" in page


@needs_chromium
def test_the_page_shows_questions_and_filters_them(tmp_path: Path, told) -> None:
    page = tmp_path / "page.html"
    write_page(page, *told, title="run")
    for fragment, expected in (
        ("", ["q0", "q1", "q2", "q3"]),
        ("right=wrong", ["q1", "q2"]),
        ("right=right&retrieved=no", ["q3"]),
        ("verdict=annotation_mismatch", ["q1"]),
        ("right=wrong&retrieved=no", []),
        ("q=film%202", ["q2"]),
        ("right=nonsense", ["q0", "q1", "q2", "q3"]),
    ):
        dom = opened(page, fragment, tmp_path)
        assert ids(dom) == expected, fragment
        assert f">{len(expected)} of 4 questions · page 1 of 1</output>" in dom
    assert "right 2 (50.0 %)" in dom
    assert "right though no passage holds the answer 1 of 1 (100.0 %)" in dom


@needs_chromium
def test_texts_are_shown_and_never_run(tmp_path: Path, told) -> None:
    page = tmp_path / "page.html"
    write_page(page, *told, title="run")
    dom = opened(page, "q=q0", tmp_path)  # one question alone is shown with its passages
    assert "<script>alert" not in dom
    assert "<p>Its maker is &lt;script&gt;alert(1)&lt;/script&gt; unknown &amp; $x.</p>" in dom
    assert dom.count('class="passage"') == 2
    assert dom.count(">gold<") == dom.count(">holds an answer<") == 1
    assert '<th scope="col">&lt;/s&gt;</th>' in dom
    assert re.search(r"<td[^>]*>90</td>", dom)
    assert "prior p(z|x) 50.0 %" in html.unescape(dom)


@needs_chromium
def test_thousands_are_shown_in_pages(tmp_path: Path, told) -> None:
    judged, passages = told
    page = tmp_path / "many.html"
    write_page(page, judged * 700, passages, title="many")
    assert page.stat().st_size < 2e6
    dom = opened(page, "page=112", tmp_path)
    assert len(ids(dom)) == 25
    assert ">2800 of 2800 questions · page 112 of 112</output>" in dom
    assert ">2800 of 2800 questions · page 112 of 112</output>" in opened(page, "page=999", tmp_path)


def test_of_many_passages_the_best_are_kept(tmp_path: Path, told) -> None:
    judged, passages = told
    write_page(tmp_path / "page.html", judged[:1], passages, title="run", max_passages=1)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"found": 2' in page
    assert "unknown" not in page


def test_what_makes_no_page_is_refused(tmp_path: Path, told) -> None:
    with pytest.raises(ConfigError, match=r"expected a file ending in \.html, got '.*page\.pdf'"):
        write_page(tmp_path / "page.pdf", *told, title="run")
    with pytest.raises(ConfigError, match="page_passages: expected at least 1, got 0"):
        write_page(tmp_path / "page.html", *told, title="run", max_passages=0)
    with pytest.raises(DataError, match="expected at least one prediction, came none"):
        write_page(tmp_path / "page.html", [], {}, title="run")
