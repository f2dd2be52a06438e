"""Rows whose coefficients are known to be 0 take part in GEMM 1 only, and change nothing."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses, splits
from fused_po.ops import linear_loss
from tests.ops.problems import CountGemms, Problem, words
from tests.ops.test_routes import HEAD_FROZEN, PLENTY, ROW, WEIGHT_FROZEN, check_gradients

FROZEN = [frozenset(), HEAD_FROZEN, WEIGHT_FROZEN, frozenset({"hidden"})]


def without_advantage(problem: Problem, sequences: list[int]) -> float:
    """Make some sequences worthless; the share of the loss tokens that are left."""
    problem.side_inputs["advantage"] = torch.tensor([0.7, -1.2, 0.4, -0.3, 1.1, -0.8], dtype=torch.float64)
    problem.side_inputs["advantage"][sequences] = 0.0
    kept = (problem.labels >= 0).sum(1).double()
    share = kept.clone()
    share[sequences] = 0.0
    return float(share.sum() / kept.sum())


def call(problem: Problem, **options):
    return linear_loss(*problem.arguments(), problem.loss, **problem.options(), **options, **problem.side_inputs)


@pytest.mark.pairwise
@pytest.mark.parametrize("frozen", FROZEN, ids=words)
@pytest.mark.parametrize("scratch", [0, 7 * ROW, PLENTY])
@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("sequences", [[1, 4], [0, 1, 2, 3, 4, 5]], ids=["some", "all"])
def test_advantages_of_zero(name, scratch, frozen, sequences):
    problem = Problem(losses.create(name, epsilon=0.5, epsilon_high=0.5), frozen)
    without_advantage(problem, sequences)
    found, want = call(problem, scratch_bytes=scratch), problem.plain()
    torch.testing.assert_close(found.loss, want, rtol=1e-11, atol=1e-12)
    kept = problem.labels >= 0
    torch.testing.assert_close(found.stats.logp[kept], problem.stats().logp[kept], rtol=1e-11, atol=1e-12)
    check_gradients(problem, found.loss, want)


@pytest.mark.pairwise
@pytest.mark.parametrize("split", [splits.positive_only(), splits.negative_only()], ids=["positive", "negative"])
@pytest.mark.parametrize("scratch", [0, 20 * ROW, PLENTY])
@pytest.mark.parametrize("frozen", FROZEN, ids=words)
def test_a_side_that_counts_nothing(split, scratch, frozen):
    """Against the same split in a form whose zero is not known ahead."""
    problem = Problem(losses.create("sigmoid", beta=0.3), frozen)
    found = call(problem, scratch_bytes=scratch, split=split)
    hidden_zero = splits.Split(1.0, 1.0, by="role", reweight=lambda w: w * _sides(w, split.weights), population="batch")
    want = call(problem, scratch_bytes=PLENTY, split=hidden_zero)
    torch.testing.assert_close(found.loss, want.loss, rtol=1e-12, atol=0)
    got = torch.autograd.grad(found.loss, problem.leaves)
    for mine, truth in zip(got, torch.autograd.grad(want.loss, problem.leaves), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-14)
    assert any(float(g.abs().sum()) > 0 for g in got)


def _sides(weights: torch.Tensor, sides: tuple[float, float]) -> torch.Tensor:
    half = weights.shape[0] // 2
    return torch.cat([weights.new_full((half,), side) for side in sides])


@pytest.mark.parametrize(
    ("frozen", "scratch", "forward", "backward"),
    [(frozenset(), PLENTY, 1, 2), (HEAD_FROZEN, PLENTY, 1, 1), (HEAD_FROZEN, 0, 1, 1), (frozenset(), 0, 1, 3)],
    ids=["trained", "frozen", "frozen, no budget", "recompute"],
)
def test_gemms_are_those_of_the_rows_with_a_gradient(frozen, scratch, forward, backward):
    loss = losses.create("gspo")
    problem = Problem(loss, frozen)
    share = without_advantage(problem, [1, 4])
    with CountGemms(problem.labels) as count:
        call(problem, scratch_bytes=scratch).loss.backward()
    assert count.gemms == pytest.approx(forward + share * backward, rel=1e-9)
    without_advantage(problem, [0, 1, 2, 3, 4, 5])
    with CountGemms(problem.labels) as count:
        call(problem, scratch_bytes=scratch).loss.backward()
    assert count.gemms == pytest.approx(1, rel=1e-9)


def test_a_penalty_keeps_rows_without_advantage():
    problem = Problem(losses.create("dapo", beta=0.1))
    without_advantage(problem, [1, 4])
    with CountGemms(problem.labels) as count:
        found = call(problem, scratch_bytes=PLENTY)
        found.loss.backward()
    assert count.gemms == pytest.approx(3, rel=1e-9)
    assert float(problem.tensors["hidden"].grad[1].abs().sum()) > 0


def test_half_precision_and_temperatures():
    """The order of rows reaches every side: temperatures, labels, hidden states, float16's scale."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = Problem(losses.create("dapo"), dtype=dtype, softcap=None)
        without_advantage(problem, [0, 3])
        problem.temperature = problem.temperature.float()
        found = call(problem, scratch_bytes=PLENTY)
        got = torch.autograd.grad(found.loss, problem.leaves)
        # a tiny advantage is not known to be nothing
        problem.side_inputs["advantage"][[0, 3]] = 1e-30
        want = torch.autograd.grad(call(problem, scratch_bytes=PLENTY).loss, problem.leaves)
        for mine, other in zip(got, want, strict=True):
            scale = float(other.abs().max())
            assert float((mine.double() - other.double()).abs().max()) <= 4 * torch.finfo(dtype).eps * scale
