"""Fusion: one document score from a similarity (dense) and a score by words (sparse), and so one document prior.

Inputs: for each question, U candidates (the union of what either retriever found), with **both** scores of **every**
candidate, so that no passage is punished for being missing from a list. All fusions give a score near [0, 1], whatever
the scale of inner products and of BM25, and the document prior of a fused list is

    p(z | x) = softmax(s(x, z) / τ)  over the K best of the fused list,  τ = ``model.temperature``

as for the other retrievers. A fused score spans at most about 1, so τ between 0.02 and 0.1 suits it, as for cosines.

==============  ===================================================================  ==============================
fusion          s(x, z)                                                               gradient
==============  ===================================================================  ==============================
reciprocal rank ``Σ 1 / (k + rank)``, over its largest value ``2 / (k + 1)``          none: ranks are steps
convex          ``w φ(dense) + (1 − w) φ(sparse)``                                    both encoders
gated           the same with ``w = w(x)``, a learned function of the query vector    both encoders and the gate
==============  ===================================================================  ==============================

Reciprocal ranks: Cormack, Clarke and Büttcher 2009. The others: Bruch, Gai and Ingber 2023, "An Analysis of Fusion
Functions for Hybrid Retrieval", who find the convex sum better than reciprocal ranks in and out of domain, and little
sensitive to φ. φ is linear, ``φ(s) = (s − shift) / scale``, with constants settled over the candidates:

- ``theoretical`` (their TM2C2, §4.2): shift = inf, the least value that the score can have, scale = max − inf. inf is 0
  for BM25 and −1 for cosines; where no bound is known (inner products, negative distances), the candidates' minimum.
- ``min_max``: shift = minimum, scale = maximum − minimum. A candidate that is worst of a good lot gets 0.
- ``z_score``: mean and standard deviation. Not within [0, 1]: about −3 to 3, so τ near 1 suits it.

The constants carry no gradient, and travel with the hits (:class:`~rag_lightning.types.FusionInputs`): the loss sees
the fused score move with the live similarities alone, and a live similarity beyond the candidates' range goes beyond
[0, 1] instead of being cut, which would end its gradient. Where the scale would be 0, φ is 0 for all candidates.
"""

from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.types import FusionInputs

Normalisation = Literal["theoretical", "min_max", "z_score"]
BM25_FLOOR = 0.0


def ranks(scores_BU: Float[Tensor, "B U"]) -> Int[Tensor, "B U"]:
    """Returns 1 + the number of candidates that score higher: equal scores share a rank, so no order is invented.

    >>> ranks(torch.tensor([[0.3, 0.9, 0.3, 0.1]]))
    tensor([[2, 1, 2, 4]])
    """
    ascending_BU = scores_BU.sort(dim=1).values.contiguous()
    return 1 + scores_BU.shape[1] - torch.searchsorted(ascending_BU, scores_BU.contiguous(), right=True)


def reciprocal_rank_fusion(
    dense_BU: Float[Tensor, "B U"], sparse_BU: Float[Tensor, "B U"], k: int = 60
) -> Float[Tensor, "B U"]:
    """Returns ``Σ 1 / (k + rank)`` over its largest value, so in (0, 1]; 1 is first by both (Cormack et al. 2009).

    Args:
        dense_BU: Similarities; ``-inf`` marks a place without a candidate, and gives ``-inf``.
        sparse_BU: Scores by words; ``-inf`` likewise.
        k: Softens the lead of the first ranks; 60 is the paper's.
    """
    best = torch.tensor(k + 1.0, device=dense_BU.device)  # a true division: over itself it is exactly 1
    fused_BU = 0.5 * (best / (k + ranks(dense_BU)) + best / (k + ranks(sparse_BU)))
    return fused_BU.masked_fill(dense_BU == -torch.inf, -torch.inf)


def shift_and_scale(
    scores_BU: Float[Tensor, "B U"], normalisation: Normalisation, floor: float | None = None
) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """Returns the constants of ``φ(s) = (s − shift) / scale`` for each question, without gradient.

    Args:
        scores_BU: The candidates' scores; ``-inf`` marks a place without a candidate.
        normalisation: See the module's description.
        floor: The score's theoretical minimum, for ``theoretical``; None takes the candidates'.

    Raises:
        ConfigError: Not a normalisation, or a score below its theoretical minimum.

    >>> shift_and_scale(torch.tensor([[3.0, 1.0, -torch.inf]]), "theoretical", floor=0.0)
    (tensor([[0.]]), tensor([[3.]]))
    """
    check_normalisation(normalisation)
    scores_BU = scores_BU.detach()
    found_BU = scores_BU > -torch.inf
    largest_B1 = scores_BU.masked_fill(~found_BU, -torch.inf).amax(dim=1, keepdim=True)
    smallest_B1 = scores_BU.masked_fill(~found_BU, torch.inf).amin(dim=1, keepdim=True)
    if normalisation == "z_score":
        count_B1 = found_BU.sum(dim=1, keepdim=True).clamp(min=1)
        shift_B1 = scores_BU.masked_fill(~found_BU, 0.0).sum(dim=1, keepdim=True) / count_B1
        deviations_BU = (scores_BU - shift_B1).masked_fill(~found_BU, 0.0)
        scale_B1 = (deviations_BU.square().sum(dim=1, keepdim=True) / count_B1).sqrt()
        scale_B1 = scale_B1.masked_fill(largest_B1 <= smallest_B1, 0.0)  # not the rounding of the mean
    elif normalisation == "theoretical" and floor is not None:
        if bool((smallest_B1 < floor - 1e-3).any()):
            raise ConfigError(
                f"fusion: expected scores of at least {floor}, their theoretical minimum, came "
                f"{float(smallest_B1.min()):.4g}. dense_floor=-1 is for vectors of length 1: leave it unset for others."
            )
        shift_B1, scale_B1 = torch.full_like(largest_B1, floor), largest_B1 - floor
    else:
        shift_B1, scale_B1 = smallest_B1, largest_B1 - smallest_B1
    level_B1 = ~(torch.isfinite(scale_B1) & (scale_B1 > 0))  # or no candidate at all
    shift_B1 = torch.where(level_B1 & torch.isfinite(largest_B1), largest_B1, shift_B1)
    shift_B1 = torch.where(torch.isfinite(shift_B1), shift_B1, torch.zeros_like(shift_B1))
    return shift_B1, scale_B1.masked_fill(level_B1, 1.0)


def convex_combination(
    dense_BK: Float[Tensor, "B K"], inputs: FusionInputs, weights_B1: Float[Tensor, "B 1"]
) -> Float[Tensor, "B K"]:
    """Returns ``w φ(dense) + (1 − w) φ(sparse)``, with gradient to ``dense`` and ``w``; ``-inf`` stays ``-inf``."""
    found_BK = dense_BK > -torch.inf
    dense_BK = dense_BK.masked_fill(~found_BK, 0.0)  # a weight of 0 times -inf is no number
    sparse_BK = inputs.sparse_BK.masked_fill(~found_BK, 0.0)
    dense_BK = (dense_BK - inputs.dense_shift_B1) / inputs.dense_scale_B1
    fused_BK = weights_B1 * dense_BK + (1.0 - weights_B1) * sparse_BK
    return fused_BK.masked_fill(~found_BK, -torch.inf)


class ScoreFusion(nn.Module):
    """What every fusion does; the model holds one, so that its weights are saved and trained with the others."""

    kind = ""

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """As :attr:`rag_lightning.retrieval.base.Retriever.gradient_to`."""
        return ()

    def fuse(
        self,
        dense_BU: Float[Tensor, "B U"],
        sparse_BU: Float[Tensor, "B U"],
        queries_BD: Float[Tensor, "B D"],
    ) -> tuple[Float[Tensor, "B U"], FusionInputs | None]:
        """Returns the fused scores of all candidates, and what :meth:`live` needs of them; None without gradient."""
        raise NotImplementedError

    def live(
        self, dense_BK: Float[Tensor, "B K"], inputs: FusionInputs, queries_BD: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B K"]:
        """Returns the fused scores of live similarities, with gradient."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the kind, as plain JSON; see :func:`fusion_of`."""
        raise NotImplementedError


class ReciprocalRankFusion(ScoreFusion):
    """:func:`reciprocal_rank_fusion`: no scale to settle, nothing to learn, no gradient to the encoders.

    Args:
        k: See there.
    """

    kind = "rrf"

    def __init__(self, *, k: int = 60) -> None:
        super().__init__()
        if k < 0:
            raise ConfigError(f"fusion rrf: expected k of at least 0, came {k}. 60 is usual.")
        self.k = k

    def fuse(
        self,
        dense_BU: Float[Tensor, "B U"],
        sparse_BU: Float[Tensor, "B U"],
        queries_BD: Float[Tensor, "B D"],
    ) -> tuple[Float[Tensor, "B U"], None]:
        """Returns the fused scores of all candidates."""
        return reciprocal_rank_fusion(dense_BU, sparse_BU, self.k), None

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the kind."""
        return {"kind": self.kind, "k": self.k}


class _WeightedFusion(ScoreFusion):
    """A convex combination, whose weight the two siblings below find differently."""

    def __init__(self, normalisation: Normalisation, dense_floor: float | None) -> None:
        super().__init__()
        check_normalisation(normalisation)
        if dense_floor is not None and normalisation != "theoretical":
            raise ConfigError(
                f"fusion: dense_floor belongs to normalisation theoretical, came {dense_floor} with {normalisation}. "
                "Leave it unset."
            )
        self.normalisation: Normalisation = normalisation
        self.dense_floor = dense_floor

    def weights(self, queries_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B 1"]:
        """Returns the weight of the dense score for each question."""
        raise NotImplementedError

    def fuse(
        self,
        dense_BU: Float[Tensor, "B U"],
        sparse_BU: Float[Tensor, "B U"],
        queries_BD: Float[Tensor, "B D"],
    ) -> tuple[Float[Tensor, "B U"], FusionInputs]:
        """Returns the fused scores of all candidates, and their constants."""
        dense_shift_B1, dense_scale_B1 = shift_and_scale(dense_BU, self.normalisation, self.dense_floor)
        sparse_shift_B1, sparse_scale_B1 = shift_and_scale(sparse_BU, self.normalisation, BM25_FLOOR)
        inputs = FusionInputs((sparse_BU - sparse_shift_B1) / sparse_scale_B1, dense_shift_B1, dense_scale_B1)
        return self.live(dense_BU, inputs, queries_BD), inputs

    def live(
        self, dense_BK: Float[Tensor, "B K"], inputs: FusionInputs, queries_BD: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B K"]:
        """Returns the fused scores of live similarities, with gradient, in float32 at least."""
        with torch.autocast(dense_BK.device.type, enabled=False):
            return convex_combination(dense_BK, inputs, self.weights(queries_BD).to(dense_BK.dtype))


class ConvexFusion(_WeightedFusion):
    """:func:`convex_combination` with one weight for all questions, to be chosen on training questions.

    Args:
        weight: w, of the dense score, 0 to 1.
        normalisation: See the module's description.
        dense_floor: The least similarity there can be: −1 for cosines and vectors of length 1; None where unknown.
    """

    kind = "convex"

    def __init__(
        self, *, weight: float = 0.5, normalisation: Normalisation = "theoretical", dense_floor: float | None = None
    ) -> None:
        super().__init__(normalisation, dense_floor)
        if not 0 <= weight <= 1:
            raise ConfigError(f"fusion convex: expected a weight from 0 (sparse) to 1 (dense), came {weight}.")
        self.weight = weight

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """Both encoders, unless the weight leaves them out."""
        return ("query_encoder", "passage_encoder") if self.weight > 0 else ()

    def weights(self, queries_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B 1"]:
        """Returns the weight."""
        return queries_BD.new_full((len(queries_BD), 1), self.weight, dtype=torch.float32)

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the kind."""
        return {
            "kind": self.kind,
            "weight": self.weight,
            "normalisation": self.normalisation,
            "dense_floor": self.dense_floor,
        }


class GatedFusion(_WeightedFusion):
    """:func:`convex_combination` with a weight for each question: ``w(x) = sigmoid(gate(q(x)))``.

    The gate is trained as the encoders are, by the generator's marginal likelihood: where the dense score ranks the
    passages that explain the answer higher than words do, w(x) grows. It starts at w = 0.5. Its input is the query
    vector as a constant, scaled to root mean square 1: the encoder is taught by similarities alone, and its scale does
    not set the gate's pace.

    Args:
        dimension: D, of the query vectors.
        hidden: Width of a hidden layer; None is a linear gate.
        normalisation: See the module's description.
        dense_floor: See :class:`ConvexFusion`.
    """

    kind = "gate"

    def __init__(
        self,
        *,
        dimension: int,
        hidden: int | None = None,
        normalisation: Normalisation = "theoretical",
        dense_floor: float | None = None,
    ) -> None:
        super().__init__(normalisation, dense_floor)
        if dimension < 1 or (hidden is not None and hidden < 1):
            raise ConfigError(f"fusion gate: expected positive sizes, came dimension {dimension} and hidden {hidden}.")
        self.dimension = dimension
        self.hidden = hidden
        last = nn.Linear(dimension if hidden is None else hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = last if hidden is None else nn.Sequential(nn.Linear(dimension, hidden), nn.Tanh(), last)

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """Both encoders and the gate."""
        return ("query_encoder", "passage_encoder", "fusion")

    def weights(self, queries_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B 1"]:
        """Returns ``w(x)``, with gradient to the gate."""
        queries_BD = queries_BD.detach().float()
        queries_BD = queries_BD / queries_BD.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        gated_B1: Tensor = self.gate(queries_BD)
        return torch.sigmoid(gated_B1)

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the kind."""
        return {
            "kind": self.kind,
            "dimension": self.dimension,
            "hidden": self.hidden,
            "normalisation": self.normalisation,
            "dense_floor": self.dense_floor,
        }


def check_normalisation(name: str) -> Normalisation:
    """Returns the name of a normalisation, checked.

    Raises:
        ConfigError: Not one.
    """
    if name not in get_args(Normalisation):
        raise ConfigError(f"fusion normalisation: expected one of {', '.join(get_args(Normalisation))}, came {name!r}.")
    return cast(Normalisation, name)


def fusion_of(settings: dict[str, Any]) -> ScoreFusion:
    """Returns the fusion that :meth:`ScoreFusion.settings` describes, with new weights.

    Raises:
        CheckpointError: Not a kind of fusion, or other settings than it has.
    """
    kinds: dict[str, Any] = {fusion.kind: fusion for fusion in (ReciprocalRankFusion, ConvexFusion, GatedFusion)}
    arguments = dict(settings)
    kind = arguments.pop("kind", None)
    try:
        fusion: ScoreFusion = kinds[kind](**arguments)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"fusion: expected one of {', '.join(kinds)} with its settings, came {settings}. "
            "Load the model with the version of rag_lightning that wrote it."
        ) from error
    return fusion
