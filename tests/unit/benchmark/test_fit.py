"""A shape that does not fit is refused with numbers; a baseline that does not is named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from rag_lightning.benchmark.fit import estimated_bytes, num_weights, too_large
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.texts import word_tokenizer
from rag_lightning.benchmark.world import hf_models
from rag_lightning.cli.hydra_app import conf_dir
from rag_lightning.errors import ConfigError


def shape(name: str) -> Shape:
    return Shape.of(yaml.safe_load(Path(conf_dir() / "shape" / f"{name}.yaml").read_text()))


def test_ours_too_large_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="expected a shape that fits into memory.*num_passages 5.*0.1 GB are free"):
        too_large(shape("cpu"), ["hf_rag"], available=10**8)


def test_a_baseline_too_large_is_named():
    cpu = shape("cpu")
    between = (estimated_bytes(cpu, "ours") + estimated_bytes(cpu, "hf_rag")) // 2
    assert list(too_large(cpu, ["hf_rag", "floor"], available=between)) == ["hf_rag"]


def test_everything_fits_into_enough():
    assert too_large(shape("cpu"), ["hf_rag", "floor"], available=10**12) == {}


def test_contexts_dominate_and_are_proportional():
    cpu = shape("cpu")
    few, many = (estimated_bytes(replace(cpu, batch_size=size), "hf_rag") for size in (100, 200))
    assert 1.9 < many / few < 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
def test_a_gpu_shape_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="expected a CUDA device for shape gpu, came none"):
        too_large(shape("gpu"), [])


def test_weights_are_those_of_the_models():
    sizes = replace(shape("cpu"), vocab_size=500)
    token, _ = hf_models(sizes, word_tokenizer(500))
    built = sum(parameter.numel() for parameter in token.parameters())
    assert num_weights(sizes) == pytest.approx(built, rel=0.02)
