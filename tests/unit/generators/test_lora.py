import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.generators.lora import LoraSettings, add_lora
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.training.optim import OptimSettings, parameter_groups

pytest.importorskip("peft")


def test_adapters_alone_learn_and_a_saved_model_has_them_merged(tiny_model, tiny_run, tmp_path):
    model = tiny_model()
    add_lora(model.generator, LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    run = tiny_run(model=model, max_steps=4)
    before = run.weights()
    after = run.fit().weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in moved if name.startswith("generator")}
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert any(name.startswith("encoder.query") for name in moved)
    learning = sum(p.numel() for group in parameter_groups(model, OptimSettings()) for p in group["params"])
    assert learning < sum(p.numel() for p in model.parameters())

    model.eval().save_pretrained(tmp_path / "model")
    again = Seq2SeqGenerator.load(tmp_path / "model" / "generator").eval()
    assert not any("lora" in name for name, _ in again.named_parameters())
    assert any("lora" in name for name, _ in model.generator.named_parameters())  # saving leaves the model as it is
    tokens = torch.tensor([[1, 7, 8, 2]])
    contexts = type(model.prompt_tokens(["who?"]))(tokens, torch.ones_like(tokens))
    labels = model.target_tokens(["someone"])
    scores = [g.score(g.encode(contexts), labels, 1).token_log_probs_BKT for g in (model.generator, again)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_layers_that_are_not_there_are_refused_with_the_names_of_those_that_are(tiny_model):
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"peft.target_modules=\['nowhere'\].*linear layers end in: .*q_proj"):
        add_lora(model.generator, LoraSettings(target_modules=["nowhere"]))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"peft.{next(iter(wrong))}: expected"):
        LoraSettings(**wrong)


def test_one_layer_may_be_named_without_a_list(tiny_model):
    model = tiny_model()
    add_lora(model.generator, LoraSettings(target_modules="q_proj"))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in model.state_dict() if ".lora_A" in name}
    assert adapted == {"q_proj"}


def test_adapters_of_a_generator_that_rests_are_refused(tiny_model, tiny_run):
    model = tiny_model()
    add_lora(model.generator, LoraSettings(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="peft: adapters were added to a generator that does not learn"):
        tiny_run(model=model, optim={"train_generator": False})
