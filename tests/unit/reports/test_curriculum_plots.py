"""Pictures of walks are drawn, with the names that they are given; what they look like was judged by eye."""

import sys
from pathlib import Path

import numpy as np
import pytest

from rag_lightning.errors import ConfigError, DataError, MissingExtraError
from rag_lightning.methods.curriculum import ActivityGraph, Exp3Policy, Step, Walk
from rag_lightning.reports.curriculum_plots import moving_means, plot_walk
from rag_lightning.reports.plots import look

GRAPH = ActivityGraph.from_dict({"nodes": dict.fromkeys(("answers", "the $um of $ all titles", "masking", "never"))})
HISTORY = [Step(("answers", "the $um of $ all titles", "masking")[step % 3], 0.1 * step) for step in range(30)]


def test_a_walk_is_drawn_with_names_and_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters stay letters
    plot_walk(GRAPH, HISTORY, path=tmp_path / "walk.svg", window=6)
    drawn = (tmp_path / "walk.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    for text in ("answers", "the $um of $ all titles", "33%", "0%", "mean reward", "step  (means over the last 6)"):
        assert f">{text}<" in drawn, text


@pytest.mark.parametrize("num_steps", [1, 2, 300])
def test_short_and_long_walks_of_many_activities_are_drawn(num_steps: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    graph = ActivityGraph.from_dict({"nodes": dict.fromkeys(f"activity {number}" for number in range(11))})
    walk = Walk(graph, Exp3Policy(graph))
    for step in range(num_steps):
        walk.next()
        walk.reward(float(step % 5))
    plot_walk(graph, walk.history, path=tmp_path / "walk.png")
    assert (tmp_path / "walk.png").read_bytes()[:4] == b"\x89PNG"


def test_moving_means_are_those_of_a_loop() -> None:
    window = 4
    means_AS, shares_AS = moving_means(GRAPH, HISTORY, window)
    for row, name in enumerate(GRAPH.nodes):
        for step in range(len(HISTORY)):
            recent = HISTORY[max(0, step - window + 1) : step + 1]
            own = [one.reward for one in recent if one.activity == name]
            assert shares_AS[row, step] == pytest.approx(len(own) / len(recent))
            assert means_AS[row, step] == pytest.approx(np.mean(own) if own else np.nan, nan_ok=True)


def test_no_two_activities_look_alike() -> None:
    looks = [tuple(sorted(look(number).items())) for number in range(32)]
    assert len(set(looks)) == 32


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a walk of at least one rewarded step, got none"):
        plot_walk(GRAPH, [], path=tmp_path / "walk.png")
    with pytest.raises(ConfigError, match="window: expected at least 1 step, got 0"):
        plot_walk(GRAPH, HISTORY, path=tmp_path / "walk.png", window=0)
    with pytest.raises(ConfigError, match="expected activities of the graph, 'answers', .*, got 'other'"):
        plot_walk(GRAPH, [*HISTORY, Step("other", 0.0)], path=tmp_path / "walk.png")
    with pytest.raises(ConfigError, match=r"picture: expected a file ending in \.png"):
        plot_walk(GRAPH, HISTORY, path=tmp_path / "walk.gif")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"drawing a curriculum needs the package 'matplotlib'.*\[plots\]"):
        plot_walk(GRAPH, HISTORY, path=tmp_path / "walk.png")
