"""The formula counts what torch's own counter counts of a BART without padding."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartForConditionalGeneration

from rag_lightning.benchmark.flops import generator_flops
from rag_lightning.benchmark.gpu import idle_share
from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.texts import word_tokenizer
from rag_lightning.benchmark.world import bart_config
from rag_lightning.cli.hydra_app import conf_dir


@pytest.mark.parametrize(("num_contexts", "read", "written"), [(3, 11, 5), (2, 7, 9)])
def test_the_formula_is_what_is_counted(num_contexts, read, written):
    shape = Shape.of(yaml.safe_load(Path(conf_dir() / "shape" / "tiny.yaml").read_text()))
    config = bart_config(shape, word_tokenizer(shape.vocab_size))
    config._attn_implementation = "eager"  # the counter knows its products on every device
    model = BartForConditionalGeneration(config).train()
    contexts = torch.randint(5, 200, (num_contexts, read))
    targets = torch.randint(5, 200, (num_contexts, written))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=contexts, decoder_input_ids=targets, use_cache=False).logits.sum().backward()
    expected = generator_flops(shape, [read] * num_contexts, [written] * num_contexts)
    assert counter.get_total_flops() == expected


def test_idle_is_what_nothing_covers():
    assert idle_share([(0.0, 1.0), (3.0, 4.0)]) == 0.5
    assert idle_share([(0.0, 10.0), (2.0, 3.0)]) == 0.0
    assert idle_share([]) == 1.0
