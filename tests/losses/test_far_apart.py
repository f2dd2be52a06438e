"""Policies that lie far apart: exponentials that would explode or cancel, and log-probs of -inf."""

from __future__ import annotations

import math

import pytest
import torch

from fused_po import linear_loss, losses

TOKEN_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "gmpo", "gspo_token")
INF = math.inf


def one_token(loss: losses.Loss, gap: float, dtype: torch.dtype = torch.float64, **side: float):
    """Loss and dL/dh of one token with log-prob -gap (to rounding) under the head [[-gap], [0]] and h = 1."""
    hidden = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[-gap], [0.0]], dtype=dtype)
    given = {name: torch.full((1, 1), value, dtype=dtype) for name, value in side.items()}
    found = linear_loss(hidden, weight, torch.zeros(1, 1, dtype=torch.int64), loss, **given)
    found.loss.backward()
    return found.loss.item(), hidden.grad.item()


def with_kl(name: str, **named: object) -> losses.Loss:
    named = {"beta": 0.04, "use_bias_correction_kl": True, **named}
    return losses.create(name, **named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.1, 1.0, 10.0, 20.0, 25.0, 60.0, 81.0, 100.0, 700.0])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_the_slope_of_a_kl_penalty_times_the_ratio(name, gap, dtype):
    """d(r k3)/dlogp = -r (log pi_ref - log pi), at r = 1."""
    loss = with_kl(name) if name != "dr_grpo" else with_kl(name, max_completion_length=1)
    _, slope = one_token(loss, gap, dtype, advantage=0.0, ref_logp=0.0)
    rejected = 1.0 / (1.0 + math.exp(-gap))  # 1 - p_y
    distance = gap + math.log1p(math.exp(-gap))
    assert slope == pytest.approx(0.04 * distance * gap * rejected, rel=4 * torch.finfo(dtype).eps * (1 + gap) ** 0.5)


@pytest.mark.parametrize("old", [-70.0, -3.0, -0.5])
def test_the_ratio_weighs_the_slope(old):
    _, slope = one_token(with_kl("dapo"), 30.0, advantage=0.0, ref_logp=0.0, old_logp=old)
    assert slope == pytest.approx(0.04 * math.exp(-30.0 - old) * 30.0 * 30.0, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", ["dapo", "gspo_token"])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_a_token_that_the_sampler_could_not_draw(name, estimator, level, dtype, advantage):
    """It says nothing: the penalty is 0, the surrogate constant at r = e^80."""
    loss = with_kl(name, kl_estimator=estimator, importance_sampling_level=level)
    for old in (-INF, -1e4):
        value, slope = one_token(loss, 5.0, dtype, advantage=advantage, ref_logp=-1.0, old_logp=old)
        assert slope == 0.0
        clipped = 1.0 + loss.upper if advantage > 0 else math.exp(80.0)
        assert value == pytest.approx(-advantage * clipped, rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reference", [-INF, INF])
def test_a_reference_without_a_finite_log_prob(estimator, weighted, reference):
    loss = losses.create("dapo", beta=0.04, kl_estimator=estimator, use_bias_correction_kl=weighted)
    value, slope = one_token(loss, 5.0, torch.float32, advantage=0.0, ref_logp=reference)
    assert slope == 0.0
    sign = 1.0 if reference < 0 else -1.0
    unweighted = {"k1": sign * 1e15, "k2": 0.5e30, "k3": 1e15 if reference < 0 else math.expm1(80.0) - 80.0}
    assert value == pytest.approx(0.0 if weighted else 0.04 * unweighted[estimator], rel=1e-6)


@pytest.mark.parametrize("gap", [-300.0, -81.0, -20.0, 20.0, 79.0, 81.0, 300.0])
def test_an_unweighted_penalty(gap):
    """k1 and k2 whatever the distance, k3 up to e^80."""
    slopes = {"k1": 1.0, "k2": gap, "k3": -math.expm1(-gap) if gap > -80.0 else 0.0}
    for estimator, want in slopes.items():
        loss = losses.create("ppo", beta=1.0, kl_estimator=estimator)
        _, slope = one_token(loss, 30.0, advantage=0.0, ref_logp=-30.0 - gap)
        assert slope == pytest.approx(-30.0 * want, rel=1e-9)


def test_kl_cov_measures_any_distance():
    loss = losses.create("kl_cov", kl_cov_ratio=1.0, ppo_kl_coef=0.5)
    value, slope = one_token(loss, 30.0, advantage=0.0, old_logp=-200.0)
    assert value == pytest.approx(0.5 * 170.0) and slope == pytest.approx(-30.0 * 0.5)


@pytest.mark.parametrize("name", ["ipo", "sppo_hard", "cal_dpo", "sigmoid", "dpop", "aot", "bco_pair", "kto", "bco"])
def test_a_reference_that_gives_an_answer_no_probability(name):
    """An infinite log-ratio counts as 1e15, whose square float32 holds."""
    loss = losses.create(name)
    hidden = torch.randn(2, 2, 3, requires_grad=True)
    side = {"ref_logp": torch.tensor([-INF, -1.0]), "desirable": torch.tensor([True, False]), "kl": 0.1}
    given = {key: value for key, value in side.items() if key in loss.needs}
    found = linear_loss(hidden, torch.randn(5, 3), torch.randint(0, 5, (2, 2)), loss, **given)
    found.loss.backward()
    assert found.loss.isfinite() and hidden.grad.isfinite().all() and (hidden.grad[0] == 0).all()
