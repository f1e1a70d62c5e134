"""Moments in 8 bits: near AdamW, a quarter of its state, resumed without a trace, refused where they save nothing."""

import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings
from rag_lightning.text.prompts import Prompt
from rag_lightning.training.optim import OptimSettings, build_optimizer, freeze_all_but

SETTINGS = OptimSettings(name="adamw_8bit", lr_generator=1e-3, weight_decay=0.1)


@pytest.fixture
def wide_generator(tiny_world):
    """Returns a builder of generators with matrices of 4,096 entries and more."""

    def build():
        torch.manual_seed(0)
        settings = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        settings |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0}
        settings |= {"max_position_embeddings": 80, "tie_word_embeddings": True}
        return Seq2SeqGenerator.from_config(model_type="bart", settings=settings, tokenizer=str(tiny_world.tokenizer))

    return build


def trained(model, settings, steps=20):
    freeze_all_but(model, ("generator",))
    optimizer = build_optimizer(model, settings)
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draws) + 0.5
        optimizer.step()
    return optimizer


def test_without_the_package_the_extra_is_named(tiny_generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = RagModel(encoder=None, generator=tiny_generator())
    freeze_all_but(model, ("generator",))
    with pytest.raises(MissingExtraError, match=r"'bitsandbytes'.*rag_lightning\[bitsandbytes\]"):
        build_optimizer(model, SETTINGS)


def test_it_goes_where_adamw_goes_with_a_quarter_of_its_state(wide_generator):
    pytest.importorskip("bitsandbytes")
    start = dict(RagModel(encoder=None, generator=wide_generator()).named_parameters())
    plain, small = (RagModel(encoder=None, generator=wide_generator()) for _ in range(2))
    trained(plain, OptimSettings(lr_generator=1e-3, weight_decay=0.1))
    optimizer = trained(small, SETTINGS)
    embeddings = {id(m.weight) for m in small.modules() if isinstance(m, torch.nn.Embedding)}
    widths = set()
    for name, parameter in small.named_parameters():
        wide = parameter.numel() >= 4096 and id(parameter) not in embeddings
        assert optimizer.state[parameter]["state1"].dtype == (torch.uint8 if wide else torch.float32), name
        widths.add(wide)
        moved = (plain.get_parameter(name) - start[name]).abs().mean()
        apart = (plain.get_parameter(name) - parameter).abs().mean()
        assert moved > 5e-3, name
        assert apart < (0.05 * moved if wide else 1e-5), name
    assert widths == {True, False}
    names = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert names == {"generator": 0.1, "generator/no_decay": 0.0}


def test_another_model_in_the_same_process_is_not_mistaken_for_the_first(wide_generator):
    """bitsandbytes knows exceptions by their place among the parameters, for all optimisers of a process."""
    pytest.importorskip("bitsandbytes")
    for shift in (0, 1):
        model = RagModel(encoder=None, generator=wide_generator())
        freeze_all_but(model, ("generator",))
        if shift:
            model.generator.model.model.shared.weight.requires_grad_(False)
        optimizer = build_optimizer(model, SETTINGS)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        for parameter, state in optimizer.state.items():
            wide = parameter.numel() >= 4096 and id(parameter) not in embeddings
            assert (state["state1"].dtype == torch.uint8) == wide


def test_where_nothing_would_be_saved_it_is_refused(tiny_generator):
    pytest.importorskip("bitsandbytes")
    model = RagModel(encoder=None, generator=tiny_generator())
    freeze_all_but(model, ("generator",))
    with pytest.raises(ConfigError, match=r"adamw_8bit: expected a parameter of 4,096 entries .*optim.name=adamw"):
        build_optimizer(model, SETTINGS)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_the_uninterrupted_one(wide_generator, tiny_encoder, tiny_run, tmp_path):
    pytest.importorskip("bitsandbytes")

    def run(*callbacks):
        torch.manual_seed(0)
        model = RagModel(
            encoder=tiny_encoder(),
            generator=wide_generator(),
            prompt=Prompt(max_passage_tokens=40, max_tokens=64),
            settings=RagSettings(num_passages=2, max_target_tokens=8),
            decoding_options=DecodingOptions(max_new_tokens=6),
        )
        settings = {"optim": {"name": "adamw_8bit"}, "max_steps": 6, "index_dir": tmp_path / "index"}
        return tiny_run(model=model, callbacks=callbacks, **settings)

    every_step = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run(every_step).fit()
    again = run().fit(tmp_path / "step=3.ckpt")
    assert again.recorder.losses == whole.recorder.losses[3:]
    for name, weight in whole.weights().items():
        torch.testing.assert_close(again.weights()[name], weight, rtol=0, atol=0, msg=name)
    assert any(state["state1"].dtype == torch.uint8 for state in again.trainer.optimizers[0].state.values())
