"""How an answer is shown."""

import pytest

from rag_lightning.cli.predict import show
from rag_lightning.types import Prediction, Question, RetrievedPassage


def test_an_answer_is_shown_with_prior_and_posterior(capsys: pytest.CaptureFixture[str]) -> None:
    passages = (
        RetrievedPassage("1", "Kismet", "A film of 1944 [sic]. " * 9, 2.0, 0.25, 0.875),
        RetrievedPassage("2", "Laura", "Another.", 1.0, 0.75, 0.125),
    )
    show(Prediction("q", "who made Kismet", "W. Dieterle", -0.125, passages), Question("q", "", ("Dieterle", "W. D.")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "who made Kismet"
    assert lines[2] == "  answer: W. Dieterle   log p(y|x) = -0.12   (accepted: Dieterle, W. D.)"
    assert lines[3].startswith("  p(z|x) 25.0%   p(z|x,y) 87.5%   Kismet: A film of 1944 [sic]. A film")
    assert lines[3].endswith("…")
    assert lines[4] == "  p(z|x) 75.0%   p(z|x,y) 12.5%   Laura: Another."


def test_without_accepted_answers_none_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(Prediction("q", "who [b]made[/b] it?", "[x] nobody", -2.0, ()), Question("q", "", ()))
    shown = capsys.readouterr().out
    assert "accepted" not in shown
    assert "who [b]made[/b] it?" in shown
    assert "answer: [x] nobody" in shown
