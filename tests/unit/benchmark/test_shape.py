"""A shape refuses what cannot be measured, and says what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rag_lightning.benchmark.shape import Shape
from rag_lightning.cli.hydra_app import conf_dir
from rag_lightning.errors import ConfigError


def tiny(**changes: Any) -> Shape:
    settings = yaml.safe_load(Path(conf_dir() / "shape" / "tiny.yaml").read_text())
    return Shape.of({**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, "expected repeats of at least 1, came 0"),
        ({"num_passages": 41}, "expected num_passages (K) of at most num_corpus_passages = 40, came 41"),
        ({"device": "tpu"}, "expected device cpu or cuda, came 'tpu'"),
        ({"encoder_heads": 3}, "multiple of encoder_heads, came 16 and 3"),
        ({"max_target_tokens": 1}, "expected max_target_tokens of at least 2"),
        ({"batch_size": 2.5}, "expected batch_size to be of type int, came 2.5"),
        ({"lengths": None}, "expected lengths to be of type str"),
        ({"colour": 1}, "came colour"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert message in str(caught.value)


def test_a_missing_size_is_named():
    with pytest.raises(ConfigError, match="sizes are missing: vocab_size. Give them"):
        Shape.of(
            {
                key: value
                for key, value in yaml.safe_load((conf_dir() / "shape" / "tiny.yaml").read_text()).items()
                if key != "vocab_size"
            }
        )
