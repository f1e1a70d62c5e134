"""Pictures are drawn, with the names that they are given; what they look like was judged by eye."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rag_lightning.errors import ConfigError, DataError, MissingExtraError
from rag_lightning.reports.plots import plot_token_posteriors, shortened
from rag_lightning.types import Prediction, RetrievedPassage, TokenPosteriors

TITLES = ("Amber", "The $um of All $ Fears, and of many other things besides", "")
PREDICTION = Prediction(
    id="q",
    question="who made $Amber$?",
    answer="ada ash",
    log_likelihood=-1.0,
    passages=tuple(RetrievedPassage(f"p{row}", title, "", 1.0, 0.25, 0.5) for row, title in enumerate(TITLES)),
    token_posteriors=TokenPosteriors(("ada", " ", "</s>"), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (0.5, 0.3, 0.1))),
)


def test_a_heat_map_names_tokens_and_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters stay letters
    plot_token_posteriors(PREDICTION, path=tmp_path / "heat.svg")
    drawn = (tmp_path / "heat.svg").read_text(encoding="utf-8")
    for text in (
        "who made $Amber$?",
        "Amber  (0.25)",
        "The $um of All $ Fears, and of many oth…  (0.25)",
        "p2  (0.25)",
    ):
        assert f">{text}<" in drawn.replace("&#160;", " "), text
    assert ">ada<" in drawn
    assert ">&lt;/s&gt;<" in drawn


def test_many_tokens_are_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    posteriors = TokenPosteriors(tuple(f"word{place}" for place in range(30)), ((0.5,) * 30,) * 3)
    plot_token_posteriors(replace(PREDICTION, token_posteriors=posteriors), path=tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("posteriors", [None, TokenPosteriors((), ((), (), ()))])
def test_an_answer_without_tokens_or_passages_is_refused(posteriors: TokenPosteriors | None, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="expected an answer with tokens, and passages that were read apart, came 'ada ash'"
    ):
        plot_token_posteriors(replace(PREDICTION, token_posteriors=posteriors), path=tmp_path / "heat.png")


def test_only_pictures_are_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"picture: expected a file ending in \.png, \.svg, \.pdf, got '.*heat\.gif'"):
        plot_token_posteriors(PREDICTION, path=tmp_path / "heat.gif")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"drawing a heat map needs the package 'matplotlib'.*\[plots\]"):
        plot_token_posteriors(PREDICTION, path=tmp_path / "heat.png")


def test_short_texts_stay_whole() -> None:
    assert shortened("abc", 3) == "abc"
