"""The guard compares ratios, never seconds, and tells what moved which way."""

import copy
from typing import Any

import pytest

from rag_lightning.benchmark.compare import Move, compare, compared
from rag_lightning.benchmark.table import markdown
from rag_lightning.errors import ConfigError

KEPT: dict[str, Any] = {
    "training_step_token": {"ours": {"median_s": 1.0, "spread": 0.1, "peak_mb": 100.0}},
    "ratios": {
        "training_step_token": {"ours/hf_rag": 0.4, "peak ours/hf_rag": 0.5},
        "rag_token_beam": {"ours/hf_rag": 0.3},
    },
    "asked": {"sides": ["ours", "hf_rag"], "memory": True},
    "shape": {"name": "tiny", "num_passages": 3, "repeats": 7, "seed": 0},
    "texts": "made up",
}


def now(**ratios: float | None) -> dict[str, Any]:
    results = copy.deepcopy(KEPT)
    for name, value in ratios.items():
        if value is None:
            del results["ratios"]["training_step_token"][name]
        else:
            results["ratios"]["training_step_token"][name] = value
    return results


def test_nothing_moved_whatever_the_seconds():
    results = now()
    results["training_step_token"]["ours"]["median_s"] = 50.0
    results["shape"]["repeats"] = 3
    assert compare(results, KEPT, tolerance=0.1) == []
    assert compared(results, KEPT) == 3


@pytest.mark.parametrize(("value", "moved", "worse"), [(0.43, 0, 0), (0.45, 1, 1), (0.37, 0, 0), (0.35, 1, 0)])
def test_moves_beyond_the_tolerance(value, moved, worse):
    moves = compare(now(**{"ours/hf_rag": value}), KEPT, tolerance=0.1)
    assert (len(moves), sum(move.worse for move in moves)) == (moved, worse)


def test_a_move_says_which_way():
    move = Move(part="training_step_token", name="ours/hf_rag", kept=0.4, now=0.5)
    assert str(move) == "training_step_token: ours/hf_rag 0.400 -> 0.500 (+25 %, worse)"


def test_a_ratio_that_is_gone_is_worse_unless_it_was_not_asked_for():
    results = now(**{"peak ours/hf_rag": None})
    (move,) = compare(results, KEPT, tolerance=0.1)
    assert move.worse
    assert "not measured any more" in str(move)
    results["asked"]["memory"] = False
    assert compare(results, KEPT, tolerance=0.1) == []


def test_parts_that_were_not_run_are_not_compared():
    results = now()
    del results["ratios"]["rag_token_beam"]
    assert compare(results, KEPT, tolerance=0.1) == []
    assert compared(results, KEPT) == 2


def test_another_shape_is_refused():
    results = now()
    results["shape"]["num_passages"] = 5
    with pytest.raises(ConfigError, match="differ in num_passages"):
        compare(results, KEPT, tolerance=0.1)
    with pytest.raises(ConfigError, match="differ in texts"):
        compare({**now(), "texts": "files"}, KEPT, tolerance=0.1)


def test_what_is_no_result_is_refused():
    with pytest.raises(ConfigError, match="expected a results.json of this command"):
        compare(now(), {"a": 1}, tolerance=0.1)
    with pytest.raises(ConfigError, match="expected tolerance above 0, came 0"):
        compare(now(), KEPT, tolerance=0)


def test_a_missing_side_is_none_in_the_table_and_no_win():
    results = now() | {
        "missing": {"training_step_token": {"hf_rag": "needs 90 GB"}},
        "machine": {"gpu": None, "cpu": "C", "threads": 1},
        "versions": {"torch": "1", "transformers": "5"},
        "commit": None,
    }
    sizes = "device encoder_layers encoder_width generator_layers generator_width vocab_size batch_size".split()
    results["shape"] |= dict.fromkeys([*sizes, "max_combined_length", "dtype"], 1)
    results["ratios"] = {}
    text = markdown(results)
    row = next(line for line in text.splitlines() if line.startswith("| training_step_token"))
    assert row == "| training_step_token | 1 ± 0.1 | none | none | - | - | 100 / - / - |"
    assert "- training_step_token: no hf_rag: needs 90 GB" in text
