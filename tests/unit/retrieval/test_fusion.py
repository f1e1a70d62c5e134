"""Fusion against loops written from the papers."""

import inspect
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.retrieval.fusion import (
    ConvexFusion,
    GatedFusion,
    ReciprocalRankFusion,
    check_normalisation,
    convex_combination,
    fusion_of,
    ranks,
    reciprocal_rank_fusion,
    shift_and_scale,
)
from rag_lightning.types import FusionInputs

INF = math.inf
DENSE = [[0.9, 0.2, 0.2, -0.5, -INF], [0.1, 0.3, -INF, -INF, -INF], [0.4, 0.4, 0.4, 0.4, 0.4]]
SPARSE = [[0.0, 7.0, 3.0, 0.0, -INF], [0.0, 0.0, -INF, -INF, -INF], [1.0, 0.0, 2.0, 2.0, 5.0]]
DENSE_BU, SPARSE_BU = torch.tensor(DENSE), torch.tensor(SPARSE)
QUERIES_BD = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def naive_rrf(dense, sparse, k):
    fused = []
    for place, score in enumerate(dense):
        if score == -INF:
            fused.append(-INF)
            continue
        total = 0.0
        for scores in (dense, sparse):
            rank = 1 + sum(other > scores[place] for other in scores)
            total += 1 / (k + rank)
        fused.append(total / (2 / (k + 1)))
    return fused


def naive_phi(scores, normalisation, floor):
    """The function φ of one component, over one question's candidates."""
    known = [score for score in scores if score > -INF]
    if normalisation == "z_score":
        shift, scale = statistics.fmean(known), statistics.pstdev(known)
    elif normalisation == "theoretical" and floor is not None:
        shift, scale = floor, max(known) - floor
    else:
        shift, scale = min(known), max(known) - min(known)
    return lambda score: 0.0 if scale == 0 else (score - shift) / scale


def naive_convex(dense, sparse, weight, normalisation, floor):
    of_dense, of_sparse = naive_phi(dense, normalisation, floor), naive_phi(sparse, normalisation, 0.0)
    return [
        -INF if d == -INF else weight * of_dense(d) + (1 - weight) * of_sparse(s)
        for d, s in zip(dense, sparse, strict=True)
    ]


# ---------------------------------------------------------------------- reciprocal ranks


def test_equal_scores_share_a_rank():
    assert ranks(torch.tensor([[2.0, 5.0, 2.0, -INF, 1.0]])).tolist() == [[2, 1, 2, 5, 4]]


@pytest.mark.parametrize("k", [0, 1, 60])
def test_reciprocal_rank_fusion_is_the_sum_over_both_rankings(k):
    fused_BU = reciprocal_rank_fusion(DENSE_BU, SPARSE_BU, k)
    for row in range(3):
        assert fused_BU[row].tolist() == pytest.approx(naive_rrf(DENSE[row], SPARSE[row], k))
    same, inputs = ReciprocalRankFusion(k=k).fuse(DENSE_BU, SPARSE_BU, QUERIES_BD)
    assert torch.equal(same, fused_BU)
    assert inputs is None


def test_first_by_both_is_1_and_nothing_is_0():
    fused_BU = reciprocal_rank_fusion(torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([[4.0, 0.0, 2.0]]))
    assert fused_BU[0, 0] == 1.0
    assert (fused_BU > 0).all()


scores = st.lists(st.tuples(st.floats(-50, 50, width=32), st.floats(0, 50, width=32)), min_size=1, max_size=8)


@given(pairs=scores)
def test_only_ranks_count_in_reciprocal_rank_fusion(pairs):
    dense, sparse = (torch.tensor([list(side)]) for side in zip(*pairs, strict=True))
    fused = reciprocal_rank_fusion(dense, sparse)
    assert torch.equal(reciprocal_rank_fusion(dense.double() * 4, sparse), fused)
    order = torch.randperm(len(pairs))
    assert torch.equal(reciprocal_rank_fusion(dense[:, order], sparse[:, order]), fused[:, order])


# ---------------------------------------------------------------------- convex sums


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("normalisation", "floor"), [("theoretical", -1.0), ("theoretical", None), ("min_max", None), ("z_score", None)]
)
def test_the_convex_sum_is_that_of_the_loops(weight, normalisation, floor):
    fusion = ConvexFusion(weight=weight, normalisation=normalisation, dense_floor=floor)
    fused_BU, inputs = fusion.fuse(DENSE_BU, SPARSE_BU, QUERIES_BD)
    for row in range(3):
        expected = naive_convex(DENSE[row], SPARSE[row], weight, normalisation, floor)
        assert fused_BU[row].tolist() == pytest.approx(expected, abs=1e-6)
    assert not torch.isnan(fused_BU).any()
    # what travels with the hits gives the same scores again, for any part of the candidates
    kept = torch.tensor([[1, 4], [0, 3], [2, 0]])
    part = FusionInputs(inputs.sparse_BK.gather(1, kept), inputs.dense_shift_B1, inputs.dense_scale_B1)
    assert torch.equal(fusion.live(DENSE_BU.gather(1, kept), part, QUERIES_BD), fused_BU.gather(1, kept))


@given(pairs=scores)
def test_fused_scores_lie_in_the_unit_interval(pairs):
    dense, sparse = (torch.tensor([list(side)]) for side in zip(*pairs, strict=True))
    for fusion in (ReciprocalRankFusion(), ConvexFusion(weight=0.4), ConvexFusion(weight=0.4, normalisation="min_max")):
        fused, _ = fusion.fuse(dense, sparse, torch.zeros(1, 2))
        assert bool(((fused >= -1e-6) & (fused <= 1 + 1e-6)).all())


def test_equal_scores_make_no_noise_of_rounding():
    """The mean of equal numbers differs from them by rounding, which a z-score would blow up to ±1."""
    level = torch.full((1, 7), 0.1)
    for normalisation in ("min_max", "z_score"):
        fused, _ = ConvexFusion(normalisation=normalisation).fuse(level, level, torch.zeros(1, 2))
        assert torch.equal(fused, torch.zeros(1, 7))


def test_no_candidate_at_all_stays_none():
    nothing = torch.full((1, 3), -INF)
    for fusion in (
        ReciprocalRankFusion(),
        ConvexFusion(),
        ConvexFusion(normalisation="z_score"),
        GatedFusion(dimension=2),
    ):
        fused, _ = fusion.fuse(nothing, nothing, torch.ones(1, 2))
        assert torch.equal(fused, nothing)


def test_gradient_flows_through_live_similarities_and_not_through_the_constants():
    live_BU = DENSE_BU.clone().requires_grad_()
    fusion = ConvexFusion(weight=0.3, dense_floor=-1.0)
    _, inputs = fusion.fuse(live_BU, SPARSE_BU, QUERIES_BD)
    assert not any(value.requires_grad for value in (inputs.sparse_BK, inputs.dense_shift_B1, inputs.dense_scale_B1))
    fusion.live(live_BU, inputs, QUERIES_BD)[live_BU > -INF].sum().backward()
    expected_BU = (0.3 / inputs.dense_scale_B1).expand(3, 5).masked_fill(live_BU == -INF, 0.0)
    torch.testing.assert_close(live_BU.grad, expected_BU)


def test_a_score_below_its_theoretical_minimum_is_refused():
    with pytest.raises(ConfigError, match=r"at least -1.0, their theoretical minimum, came -7.5.* vectors of length 1"):
        ConvexFusion(dense_floor=-1.0).fuse(torch.tensor([[75.0, -7.5]]), torch.zeros(1, 2), torch.zeros(1, 2))


# ---------------------------------------------------------------------- the gate


@pytest.mark.parametrize("hidden", [None, 4])
def test_the_gate_starts_even_and_follows_its_own_linear_maps(hidden):
    fusion = GatedFusion(dimension=6, hidden=hidden)
    assert torch.equal(fusion.weights(QUERIES_BD), torch.full((3, 1), 0.5))
    even, _ = ConvexFusion(weight=0.5).fuse(DENSE_BU, SPARSE_BU, QUERIES_BD)
    torch.testing.assert_close(fusion.fuse(DENSE_BU, SPARSE_BU, QUERIES_BD)[0], even)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    state = dict(fusion.gate.state_dict())
    weights = fusion.weights(QUERIES_BD).detach()
    for row in range(3):
        query = QUERIES_BD[row] / (QUERIES_BD[row] ** 2).mean() ** 0.5
        if hidden is None:
            gated = float((query * state["weight"][0]).sum() + state["bias"])
        else:
            inner = [
                math.tanh(float((query * w).sum() + b)) for w, b in zip(state["0.weight"], state["0.bias"], strict=True)
            ]
            gated = sum(i * float(w) for i, w in zip(inner, state["2.weight"][0], strict=True)) + float(state["2.bias"])
        weight = 1 / (1 + math.exp(-gated))
        assert float(weights[row]) == pytest.approx(weight, abs=1e-5)
        expected = naive_convex(DENSE[row], SPARSE[row], weight, "theoretical", None)
        fused_BU, _ = fusion.fuse(DENSE_BU, SPARSE_BU, QUERIES_BD)
        assert fused_BU[row].tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(fusion.weights(100 * QUERIES_BD), fusion.weights(QUERIES_BD))


def test_the_gate_learns_which_score_to_trust():
    """Where q[0] > 0 words know the right passage, elsewhere vectors do; chance is 1 of 5."""
    generator = torch.Generator().manual_seed(0)
    num, places = 400, 5
    queries = torch.randn(num, 6, generator=generator)
    right = torch.randint(places, (num,), generator=generator)
    noise = torch.rand(2, num, places, generator=generator)
    by_words = (queries[:, 0] > 0)[:, None]
    marked = torch.nn.functional.one_hot(right, places).bool()
    dense = torch.where(marked & ~by_words, 2.0, noise[0])
    sparse = torch.where(marked & by_words, 2.0, noise[1])
    torch.manual_seed(0)
    fusion = GatedFusion(dimension=6)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.1)

    def accuracy():
        return float((fusion.fuse(dense, sparse, queries)[0].argmax(dim=1) == right).float().mean())

    even = accuracy()
    for _ in range(60):
        _, inputs = fusion.fuse(dense, sparse, queries)
        loss = -(fusion.live(dense, inputs, queries) / 0.1).log_softmax(dim=1)[marked].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() > max(even, 0.9)
    weights = fusion.weights(queries)[:, 0]
    assert weights[queries[:, 0] > 0.5].mean() < 0.2
    assert weights[queries[:, 0] < -0.5].mean() > 0.8


def test_the_gate_takes_the_query_vector_as_a_constant():
    queries = QUERIES_BD.clone().requires_grad_()
    fusion = GatedFusion(dimension=6)
    fusion.weights(queries).sum().backward()
    assert queries.grad is None
    assert fusion.gate.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------- what is said of them


def test_each_fusion_says_what_it_teaches():
    both = ("query_encoder", "passage_encoder")
    assert ReciprocalRankFusion().gradient_to == ConvexFusion(weight=0.0).gradient_to == ()
    assert ConvexFusion(weight=0.1).gradient_to == both
    assert GatedFusion(dimension=2).gradient_to == (*both, "fusion")
    assert not list(ReciprocalRankFusion().parameters())
    assert not list(ConvexFusion().parameters())


@pytest.mark.parametrize(
    "fusion",
    [
        ReciprocalRankFusion(k=7),
        ConvexFusion(weight=0.2, normalisation="min_max"),
        ConvexFusion(weight=0.2, dense_floor=-1.0),
        GatedFusion(dimension=3, hidden=5, normalisation="z_score"),
    ],
)
def test_settings_rebuild_the_fusion(fusion):
    again = fusion_of(fusion.settings())
    assert type(again) is type(fusion)
    assert again.settings() == fusion.settings()
    assert again.state_dict().keys() == fusion.state_dict().keys()


@pytest.mark.parametrize("settings", [{"kind": "mean"}, {}, {"kind": "rrf", "weight": 0.5}])
def test_settings_of_no_fusion_are_refused(settings):
    with pytest.raises(CheckpointError, match="fusion: expected one of rrf, convex, gate with its settings, came"):
        fusion_of(settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReciprocalRankFusion(k=-1), "k of at least 0, came -1"),
        (lambda: ConvexFusion(weight=1.1), r"weight from 0 \(sparse\) to 1 \(dense\), came 1.1"),
        (lambda: ConvexFusion(weight=float("nan")), "weight from 0 .* came nan"),
        (
            lambda: ConvexFusion(normalisation="min_max", dense_floor=-1.0),
            "dense_floor belongs to .* with min_max",
        ),
        (lambda: GatedFusion(dimension=0), "positive sizes, came dimension 0"),
        (lambda: GatedFusion(dimension=2, hidden=0), "positive sizes, .* hidden 0"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ConfigError, match="expected one of theoretical, min_max, z_score, came 'softmax'"):
        check_normalisation("softmax")
    with pytest.raises(ConfigError, match="came 'softmax'"):
        inspect.unwrap(shift_and_scale)(DENSE_BU, "softmax")


def test_a_weight_of_0_times_nothing_is_no_nan():
    inputs = FusionInputs(torch.tensor([[0.5, -INF]]), torch.zeros(1, 1), torch.ones(1, 1))
    fused = convex_combination(torch.tensor([[0.3, -INF]]), inputs, torch.zeros(1, 1))
    assert fused.tolist() == [[0.5, -INF]]
    moved = inputs.to("meta")
    assert moved.sparse_BK.device.type == moved.dense_scale_B1.device.type == "meta"
