"""Every route through the operations: the number of GEMMs it may take, and gradients equal to autograd in float64."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats
from tests.losses.cases import CASES, create
from tests.ops.problems import CountGemms, EntropyPairs, H, Problem, V, relative_error, words

PLENTY = 1 << 24
# bytes of a float64 row of logits, and of a row in flight beside it
ROW = 8 * V + 32 * H
TOLERANCE = 1e-11

HEAD_FROZEN = frozenset({"weight", "bias"})
WEIGHT_FROZEN = frozenset({"weight"})


def check_gradients(problem: Problem, value: torch.Tensor, want: torch.Tensor) -> None:
    got = torch.autograd.grad(value, problem.leaves)
    for name, mine, truth in zip(
        [n for n, t in problem.tensors.items() if t.requires_grad],
        got,
        torch.autograd.grad(want, problem.leaves),
        strict=True,
    ):
        assert relative_error(mine, truth) <= TOLERANCE, name


@pytest.mark.pairwise
@pytest.mark.parametrize("frozen", [frozenset(), HEAD_FROZEN, WEIGHT_FROZEN, frozenset({"hidden"})], ids=words)
@pytest.mark.parametrize("scratch", [0, 12 * ROW, PLENTY])
@pytest.mark.parametrize("case", [*CASES, "entropy-pairs"])
def test_gradients_equal_autograd(case, scratch, frozen):
    problem = Problem(EntropyPairs() if case == "entropy-pairs" else create(case), frozen)
    found = linear_loss(
        *problem.arguments(), problem.loss, **problem.options(), scratch_bytes=scratch, **problem.side_inputs
    )
    want = problem.plain()
    torch.testing.assert_close(found.loss, want, rtol=1e-11, atol=1e-12)
    check_gradients(problem, found.loss, want)


# loss, sequences, frozen, scratch bytes, GEMMs at least and at most
ROUTES = {
    "whole": ("sigmoid", 6, frozenset(), PLENTY, 3, 3),
    "chunks of pairs": ("sigmoid", 6, frozenset(), 20 * ROW, 3, 3),
    "chunks of tokens": ("dapo", 6, frozenset(), 7 * ROW, 3, 3),
    "chunks of tokens, entropy": ("dapo-all", 6, frozenset(), 7 * ROW, 3, 3),
    "deferred": ("sigmoid", 2, frozenset(), 7 * ROW, 3, 3),
    "deferred, one sequence": ("kto", 1, frozenset(), 3 * ROW, 3, 3),
    "kept tiles": ("sigmoid", 6, frozenset(), 6 * ROW, 3.2, 3.6),
    "recompute": ("sigmoid", 6, frozenset(), 0, 4, 4),
    "recompute, entropy": ("entropy-pairs", 6, frozenset(), 0, 4, 4),
    "frozen": ("sigmoid", 6, HEAD_FROZEN, PLENTY, 2, 2),
    "frozen, over budget": ("sigmoid", 6, HEAD_FROZEN, 0, 2, 2),
    "frozen, trainable bias": ("sigmoid", 6, WEIGHT_FROZEN, PLENTY, 2, 2),
    "frozen, trainable bias, recompute": ("sigmoid", 6, WEIGHT_FROZEN, 0, 3, 3),
    "frozen, entropy": ("entropy-pairs", 6, HEAD_FROZEN, PLENTY, 2, 2),
    "frozen, entropy, recompute": ("entropy-pairs", 6, HEAD_FROZEN, 0, 3, 3),
    "hidden detached": ("sigmoid", 6, frozenset({"hidden"}), PLENTY, 2, 2),
}


@pytest.mark.parametrize("softcap", [None, 12.0])
@pytest.mark.parametrize("route", ROUTES)
def test_gemms_of_linear_loss(route, softcap):
    case, batch, frozen, scratch, least, most = ROUTES[route]
    loss = EntropyPairs() if case == "entropy-pairs" else create(case)
    problem = Problem(loss, frozen, softcap, batch)
    with CountGemms(problem.labels) as count:
        found = linear_loss(
            *problem.arguments(), loss, **problem.options(), scratch_bytes=scratch, **problem.side_inputs
        )
        found.loss.backward()
    assert least <= count.gemms <= most
    gradients = {name: t.grad for name, t in problem.tensors.items()}
    assert {name for name, g in gradients.items() if g is None} == set(frozen)
    want = torch.autograd.grad(problem.plain(), problem.leaves)
    for leaf, truth in zip(problem.leaves, want, strict=True):
        assert relative_error(leaf.grad, truth) <= TOLERANCE


def test_without_gradient_only_one_gemm_runs():
    problem = Problem(losses.create("sigmoid"))
    with CountGemms(problem.labels) as count, torch.no_grad():
        found = linear_loss(*problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs)
    assert count.gemms == 1
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, problem.plain().detach())


# outputs whose gradient arrives, frozen, scratch bytes, GEMMs
STATS_ROUTES = {
    "kept": (("logp",), frozenset(), PLENTY, 3, 3),
    "some kept": (("logp",), frozenset(), 20 * ROW, 3.2, 3.8),
    "recompute": (("logp",), frozenset(), 0, 4, 4),
    "frozen": (("logp",), HEAD_FROZEN, 0, 2, 2),
    "frozen, trainable bias": (("logp",), WEIGHT_FROZEN, PLENTY, 2, 2),
    "entropy": (("logp", "entropy", "lse"), frozenset(), PLENTY, 4, 4),
    "entropy alone": (("entropy",), frozenset(), 0, 4, 4),
    "entropy, frozen": (("logp", "entropy"), HEAD_FROZEN, PLENTY, 4, 4),
}


@pytest.mark.parametrize("route", STATS_ROUTES)
def test_linear_token_stats(route):
    """All statistics are asked for, as trainers do for logging; gradients arrive only through those of the route."""
    through, frozen, scratch, least, most = STATS_ROUTES[route]
    problem = Problem(losses.create("sft"), frozen)
    truth, keep = problem.stats(), problem.labels >= 0
    weights = {name: torch.randn(problem.labels.shape, dtype=torch.float64) for name in through}
    with CountGemms(problem.labels) as count:
        found = linear_token_stats(
            *problem.arguments(), outputs=tuple(truth.present()), scratch_bytes=scratch, **problem.options()
        )
        sum((weights[name] * getattr(found, name)).sum() for name in through).backward()
    assert least <= count.gemms <= most
    for name, want in truth.present().items():
        got = getattr(found, name)
        assert got.requires_grad == (name in ("logp", "entropy", "lse"))
        torch.testing.assert_close(got, torch.where(keep, want, torch.zeros_like(want)), rtol=1e-11, atol=1e-12)
    want = sum((weights[name] * keep * getattr(truth, name)).sum() for name in through)
    for leaf, grad in zip(problem.leaves, torch.autograd.grad(want, problem.leaves), strict=True):
        assert relative_error(leaf.grad, grad) <= TOLERANCE


@pytest.mark.parametrize("scratch", [0, pytest.param(2 * ROW, marks=pytest.mark.nightly), PLENTY])
def test_gradcheck_of_statistics(scratch):
    problem = Problem(EntropyPairs(), batch=2, length=3)

    def stats(hidden, weight, bias):
        outputs = ("logp", "entropy", "lse")
        found = linear_token_stats(
            hidden, weight, problem.labels, bias=bias, outputs=outputs, **problem.transform, scratch_bytes=scratch
        )
        return tuple(getattr(found, name) for name in outputs)

    assert torch.autograd.gradcheck(stats, problem.leaves)


@pytest.mark.parametrize("name", ["ipo", "kto", "ppo"])
def test_gradient_is_the_derivative_of_the_value(name):
    """In a random direction; gradcheck itself asks for a second backward, which linear_loss refuses."""
    loss = losses.create(name, entropy_coef=0.1) if name == "ppo" else losses.create(name)
    problem = Problem(loss, batch=2, length=4)

    def value(*leaves):
        hidden, weight, bias = leaves
        return linear_loss(
            hidden, weight, problem.labels, loss, bias=bias, **problem.transform, **problem.side_inputs
        ).loss

    direction = [torch.randn_like(t) for t in problem.leaves]
    value(*problem.leaves).backward()
    slope = sum((t.grad * d).sum() for t, d in zip(problem.leaves, direction, strict=True)).item()
    step = 1e-5
    with torch.no_grad():
        ahead = value(*(t + step * d for t, d in zip(problem.leaves, direction, strict=True)))
        behind = value(*(t - step * d for t, d in zip(problem.leaves, direction, strict=True)))
    assert slope == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-6)
