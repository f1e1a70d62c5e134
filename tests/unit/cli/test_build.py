"""Where configuration ends: folders of checkpoints, and a saved model's settings under the command line's."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rag_lightning.cli.build import check_validation_interval, decoding_of, instantiate, plain, run_folder
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.errors import ConfigError
from rag_lightning.rag_parts import RagSettings

UNSAID = {"mode": None, "num_beams": None, "max_new_tokens": None, "length_penalty": None}


@pytest.mark.parametrize("place", [".", "checkpoints/last.ckpt", "model"])
def test_a_run_folder_is_found_from_everything_in_it(place: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "rag_config.json").write_text("{}")
    assert run_folder(str(run / place)) == run


def test_what_the_command_line_does_not_say_stays() -> None:
    settings, options = RagSettings(num_passages=4, decoding="rag_token"), DecodingOptions(num_beams=2)
    assert decoding_of(settings, options, OmegaConf.create(UNSAID), None) == (settings, options)


def test_what_the_command_line_says_stands() -> None:
    said = OmegaConf.create({**UNSAID, "mode": "rag_sequence_fast", "length_penalty": 0.0})
    settings, options = decoding_of(RagSettings(), DecodingOptions(num_beams=2), said, 9)
    assert settings == replace(RagSettings(), decoding="rag_sequence_fast", num_passages=9)
    assert options == DecodingOptions(num_beams=2, length_penalty=0.0)


def test_a_closed_book_model_takes_no_k() -> None:
    closed_book = RagSettings(num_passages=0)
    with pytest.raises(ConfigError, match="closed-book model, it retrieves nothing"):
        decoding_of(closed_book, DecodingOptions(), OmegaConf.create(UNSAID), 5)


def test_constructors_get_plain_values() -> None:
    node = OmegaConf.create({"_target_": "builtins.dict", "items": [1, 2], "inner": {"a": {"b": 1}}})
    built = instantiate(node)
    assert type(built["items"]) is list
    assert type(built["inner"]) is dict
    assert type(built["inner"]["a"]) is dict


def test_only_a_mapping_is_plain() -> None:
    with pytest.raises(ConfigError, match=r"expected a mapping, got \[1\]"):
        plain(OmegaConf.create([1]))


@pytest.mark.parametrize(("interval", "accumulated"), [(250, 5), (250, 1), (None, 4), (0.5, 4)])
def test_a_validation_after_an_optimiser_step_is_fine(interval: float | None, accumulated: int) -> None:
    check_validation_interval(interval, accumulated)


def test_a_validation_in_the_middle_of_an_accumulation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of trainer\.accumulate_grad_batches=4, got 250"):
        check_validation_interval(250, 4)
