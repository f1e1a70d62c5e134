"""Both marginals equal transformers' ``get_nll`` in float64 to 1e-10, values and gradients, and differ where we say.

The difference (design.md §8.1): transformers adds log p(z|x) at the second scored token, we add it to the sum. Where
two tokens are scored that is the same number; where only one is, transformers' RAG-Sequence has lost the prior.
"""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from rag_lightning.rag import RagModel
from rag_lightning.rag_reading import Marginal
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.objectives import MarginalObjective, Outcome
from rag_lightning.training.optim import OptimSettings
from rag_lightning.types import QuestionBatch, RagBatch, TokenBatch
from tests.parity.hf_rag import (
    FAMILIES,
    VOCAB_SIZE,
    Family,
    RagInputs,
    hf_rag_model,
    tiny_bart_config,
    tiny_t5_config,
)

BATCH_SIZE = 4
EXACT = {"atol": 1e-10, "rtol": 0.0}
SEQUENCE = pytest.mark.parametrize("sequence", [False, True], ids=["rag_token", "rag_sequence"])
FAMILY = pytest.mark.parametrize("family", FAMILIES)


class Case:
    """A random model with inputs and labels, and both answers to them."""

    def __init__(self, family: Family, sequence: bool, num_passages: int, lengths: list[int], seed: int = 0) -> None:
        config = tiny_bart_config() if family == "bart" else tiny_t5_config()
        self.model: Any = hf_rag_model(sequence, config, num_passages=num_passages, seed=seed)
        self.num_passages = num_passages
        self.inputs = RagInputs.random(
            batch_size=len(lengths), num_passages=num_passages, pad_token_id=config.pad_token_id, seed=seed
        )
        self.inputs.doc_scores.requires_grad_()
        self.labels = ragged_labels(lengths, config, seed)
        self.wrapped = RagModel.from_hf_rag(self.model)

    def theirs(self, *, epsilon: float = 0.0, reduce_loss: bool = False) -> Tensor:
        """Returns the loss of transformers."""
        output = self.model(
            context_input_ids=self.inputs.context_input_ids,
            context_attention_mask=self.inputs.context_attention_mask,
            doc_scores=self.inputs.doc_scores,
            decoder_input_ids=self.labels,
            n_docs=self.num_passages,
            use_cache=False,
        )
        loss: Tensor = self.model.get_nll(
            output.logits,
            output.doc_scores,
            self.labels,
            reduce_loss=reduce_loss,
            epsilon=epsilon,
            n_docs=self.num_passages,
        )
        return loss

    def ours(self, *, epsilon: float = 0.0, hf_compat: bool = False) -> Marginal:
        """Returns our marginal; the objective is taken from the class that was wrapped."""
        contexts = TokenBatch(self.inputs.context_input_ids, self.inputs.context_attention_mask)
        batch = RagBatch(contexts, self.inputs.doc_scores, self.labels)
        return self.wrapped.marginal(batch, label_smoothing=epsilon, hf_compat=hf_compat)

    def gradients(self, loss_B: Tensor) -> dict[str, Tensor]:
        """Returns the gradient of each generator weight and of the scores, with another weight for each example."""
        weights_B = torch.linspace(0.5, 2.0, len(loss_B), dtype=torch.float64)
        parameters = dict(self.model.generator.named_parameters())
        tensors = {**parameters, "doc_scores": self.inputs.doc_scores}
        values = torch.autograd.grad((loss_B * weights_B).sum(), list(tensors.values()), allow_unused=True)
        return {
            name: value if value is not None else torch.zeros_like(tensors[name])
            for name, value in zip(tensors, values, strict=True)
        }


def ragged_labels(lengths: list[int], config: Any, seed: int) -> Tensor:
    """Start token, ``length`` scored tokens of which the last is the end token, padding."""
    rng = torch.Generator().manual_seed(100 + seed)
    labels = torch.full((len(lengths), 1 + max(lengths)), config.pad_token_id)
    for row, length in enumerate(lengths):
        labels[row, 0] = config.decoder_start_token_id
        labels[row, 1:length] = torch.randint(4, VOCAB_SIZE, (length - 1,), generator=rng)
        labels[row, length] = config.eos_token_id
    return labels


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@FAMILY
@SEQUENCE
@pytest.mark.parametrize("num_passages", [1, 2, 5])
@pytest.mark.parametrize("hf_compat", [False, True])
def test_values_and_gradients_equal_transformers(family, sequence, num_passages, hf_compat):
    case = Case(family, sequence, num_passages, lengths=[5, 2, 3, 4])
    expected = case.theirs()
    found = case.ours(hf_compat=hf_compat).nll_B
    assert found.shape == (BATCH_SIZE,)
    torch.testing.assert_close(found, expected, **EXACT)
    gradients = case.gradients(expected)
    assert sum(bool((gradient != 0).any()) for gradient in gradients.values()) > 20
    assert bool((gradients["doc_scores"] != 0).all()) == (num_passages > 1)
    assert_same_gradients(case.gradients(found), gradients)


@FAMILY
@SEQUENCE
@pytest.mark.parametrize("num_passages", [1, 2, 5])
def test_label_smoothing_of_hf_compat_equals_transformers(family, sequence, num_passages):
    case = Case(family, sequence, num_passages, lengths=[5, 2, 1, 4])
    expected = case.theirs(epsilon=0.1)
    marginal = case.ours(epsilon=0.1, hf_compat=True)
    torch.testing.assert_close(marginal.nll_B, expected, **EXACT)
    torch.testing.assert_close(marginal.log_likelihood_B, -case.theirs(), **EXACT)
    assert_same_gradients(case.gradients(marginal.nll_B), case.gradients(expected))


@SEQUENCE
def test_our_label_smoothing_is_not_theirs_and_leaves_the_likelihood_alone(sequence):
    case = Case("bart", sequence, 2, lengths=[5, 2, 3, 4])
    marginal = case.ours(epsilon=0.1)
    assert (marginal.nll_B - case.theirs(epsilon=0.1)).abs().max() > 1e-2
    torch.testing.assert_close(marginal.log_likelihood_B, -case.theirs(), **EXACT)


@FAMILY
@SEQUENCE
def test_smoothing_of_one_passage_is_the_same_in_both(family, sequence):
    """With K = 1 there is nothing to marginalise, so both are the textbook's."""
    case = Case(family, sequence, 1, lengths=[5, 2, 3, 4])
    torch.testing.assert_close(case.ours(epsilon=0.1).nll_B, case.theirs(epsilon=0.1), **EXACT)


@FAMILY
@pytest.mark.parametrize("lengths", [[1, 1], [1, 3]], ids=["alone", "beside a longer target"])
def test_difference_transformers_loses_the_prior_of_one_token_targets(family, lengths):
    case = Case(family, True, 3, lengths=lengths)
    theirs, ours, compat = case.theirs(), case.ours().nll_B, case.ours(hf_compat=True).nll_B
    torch.testing.assert_close(compat, theirs, **EXACT)
    log_prior = case.inputs.doc_scores.log_softmax(dim=1)
    contexts = TokenBatch(case.inputs.context_input_ids, case.inputs.context_attention_mask)
    scored = case.wrapped.generator.score(case.wrapped.generator.encode(contexts), case.labels, 3)
    first_BK = scored.token_log_probs_BKT[:, :, 0]
    for row, length in enumerate(lengths):
        if length > 1:
            torch.testing.assert_close(ours[row], theirs[row], **EXACT)
            continue
        torch.testing.assert_close(-theirs[row], first_BK[row].logsumexp(dim=0), **EXACT)  # a sum, not a mixture
        torch.testing.assert_close(-ours[row], (first_BK[row] + log_prior[row]).logsumexp(dim=0), **EXACT)
        assert ours[row] - theirs[row] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_difference_one_token_targets_teach_transformers_retriever_nothing(family):
    case = Case(family, True, 3, lengths=[1, 3])
    theirs = case.gradients(case.theirs())["doc_scores"]
    compat = case.gradients(case.ours(hf_compat=True).nll_B)["doc_scores"]
    ours = case.gradients(case.ours().nll_B)["doc_scores"]
    assert (theirs[0] == 0).all()
    assert (compat[0] == 0).all()
    assert (ours[0].abs() > 1e-6).all()
    torch.testing.assert_close(ours[1], theirs[1], **EXACT)


@FAMILY
def test_rag_token_does_not_differ_on_one_token_targets(family):
    case = Case(family, False, 3, lengths=[1, 3])
    expected = case.theirs()
    for hf_compat in (False, True):
        torch.testing.assert_close(case.ours(hf_compat=hf_compat).nll_B, expected, **EXACT)


@SEQUENCE
def test_reduce_loss_is_reduction_sum(sequence, tiny_model):
    case = Case("bart", sequence, 2, lengths=[5, 2, 3, 4])
    loss_B = case.ours().nll_B
    expected = case.theirs(reduce_loss=True)
    assert expected.shape == ()
    objective = MarginalObjective(kind="rag_sequence" if sequence else "rag_token")
    module = RagLightningModule(model=tiny_model(), objective=objective, optim=OptimSettings(), reduction="sum")
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batch = QuestionBatch(
        questions=(),
        query=None,
        prompt=TokenBatch(case.labels, torch.ones_like(case.labels)),
        labels=case.labels,
        positive_ids=torch.full((BATCH_SIZE,), -1),
        weights_B=torch.ones(BATCH_SIZE),
    )
    outcome = Outcome(loss_B=loss_B, num_units_B=(case.labels[:, 1:] != 1).sum(dim=1))
    torch.testing.assert_close(module._reduce(outcome, batch), expected, **EXACT)
