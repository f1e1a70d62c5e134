"""``rag-lightning benchmark shape=tiny``, end to end: the files it writes, the guard, and refusals before any work."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rag_lightning.benchmark.parts import PARTS
from rag_lightning.utils.io import read_json

Cli = Callable[..., None]
TINY = ("shape=tiny", "memory=false")


def refusal(cli: Cli, folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli("benchmark", folder / "run", *arguments, f"output={folder}")
    assert not (folder / "results.json").exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def measured(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    points = (
        "scaling=all",
        "scaling_points={num_passages: [1,5,8], batch_sizes: [1,2], corpus_sizes: [50,100], repeats: 1}",
    )
    cli("benchmark", folder / "run", *TINY, *points, f"output={folder}")
    return folder


def test_every_part_has_its_sides_or_a_reason(measured):
    results = read_json(measured / "results.json")
    assert set(PARTS) <= set(results)
    for name, part in PARTS.items():
        assert set(results[name]) | set(results["missing"][name]) >= set(part.sides)
        assert set(results[name]) <= set(part.sides)
        assert not set(results[name]) & set(results["missing"][name])
        for figures in results[name].values():
            assert set(figures) == {"median_s", "spread", "peak_mb"}
            assert figures["median_s"] > 0
            assert figures["spread"] == 0.0, "of one repeat"
            assert figures["peak_mb"] is None
        wanted = {f"ours/{side}" for side in results[name] if side != "ours"}
        assert {ratio for ratio in results["ratios"][name] if ratio.startswith("ours/")} == wanted
    assert results["notes"]["retrieval"]["share of training_step_token"] > 0
    assert results["missing"]["rag_sequence_fast"]["hf_rag"].startswith("transformers has no fast decoding")


def test_where_and_what_is_told(measured):
    results = read_json(measured / "results.json")
    assert {"cpu", "cores", "threads", "memory_gb", "gpu"} <= set(results["machine"])
    assert {"python", "torch", "transformers"} <= set(results["versions"])
    assert "commit" in results
    assert results["shape"]["name"] == "tiny"
    table = (measured / "results.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in PARTS)
    assert "| rag_sequence_fast |" in table
    assert " none | none |" in table


def test_series_have_points_and_exponents(measured):
    scaling = read_json(measured / "results.json")["scaling"]
    assert {series: found["ours"]["sizes"] for series, found in scaling.items()} == {
        "k": [1, 5, 8],
        "batch": [1, 2],
        "passages": [50, 100],
    }
    assert all(isinstance(found["ours"]["exponent"], float) for found in scaling.values())
    at_5, at_8 = scaling["k"]["cost_per_passage"]
    assert at_5 == 1.0
    assert at_8 > 0
    assert scaling["k"]["cost_per_further_passage"] == [1.0]  # between 5 and 8 alone: its own mean
    assert "scaling with k, ours: 1: " in (measured / "results.md").read_text(encoding="utf-8")


def test_the_guard_ends_with_an_error_where_a_ratio_is_worse(measured, cli, tmp_path, capsys):
    kept = read_json(measured / "results.json")
    kept["ratios"] = {"rag_token_beam": {"ours/hf_rag": 1e-6}}
    (tmp_path / "kept.json").write_text(json.dumps(kept), encoding="utf-8")
    command = ("benchmark", tmp_path / "run", *TINY, "parts=[rag_token_beam]", f"output={tmp_path / 'out'}")
    guard = f"baseline={tmp_path / 'kept.json'}"
    with pytest.raises(SystemExit) as caught:
        cli(*command, guard)
    assert "1 of 1 ratios are worse" in str(caught.value)
    assert (tmp_path / "out" / "results.json").is_file(), "the figures are kept all the same"
    kept["ratios"] = {"rag_token_beam": {"ours/hf_rag": 1e6}}
    (tmp_path / "kept.json").write_text(json.dumps(kept), encoding="utf-8")
    cli(*command, guard)
    assert "1 moved, 0 of them worse" in capsys.readouterr().out


def test_a_run_that_is_cut_keeps_the_parts_before(cli, tmp_path, monkeypatch):
    def cut(_world):
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "index_build", replace(PARTS["index_build"], make=cut))
    parts = "parts=[retrieval,index_build]"
    with pytest.raises(KeyboardInterrupt):
        cli("benchmark", tmp_path / "run", *TINY, parts, f"output={tmp_path}")
    results = read_json(tmp_path / "results.json")
    assert set(PARTS) & set(results) == {"retrieval"}
    assert results["retrieval"]["ours"]["median_s"] > 0
    assert "| retrieval |" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_peak_memory_is_that_of_a_process_of_its_own(cli, tmp_path):
    cli(
        "benchmark", tmp_path / "run", "shape=tiny", "parts=[training_step_token]", "sides=[ours]", f"output={tmp_path}"
    )
    figures = read_json(tmp_path / "results.json")["training_step_token"]["ours"]
    assert 100 < figures["peak_mb"] < 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("parts=[colour]",), "expected parts among training_step_token"),
        (("sides=[peer]",), "expected sides among ours, hf_rag"),
        (("shape.repeats=0",), "expected repeats of at least 1, came 0"),
        (("shape.num_passages=50",), "expected num_passages (K) of at most num_corpus_passages = 40, came 50"),
        (("shape.batch_size=1000000000",), "expected a shape that fits into memory"),
        (("scaling=[width]",), "expected scaling none, all or some of"),
        (("scaling=[k]",), "expected num_passages (K) of at most num_corpus_passages = 40, came 50"),
        (("passages=F",), "expected passages, questions and tokenizer together"),
        (("tolerance=0", "baseline=README.md"), "README.md"),
        (("shape=gpu", "parts=[index_build]"), "expected a CUDA device for shape gpu, came none"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, message, cli, tmp_path):
    assert message in refusal(cli, tmp_path, *TINY, *arguments)
