"""The coefficient tables of the losses' papers, written out by hand: k = -dL/dlogp, the update direction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch import sigmoid as s

from fused_po import losses
from fused_po.ops.batches import call_batch
from fused_po.ops.coefficients import coefficients
from tests.losses.cases import make_batch

LENGTHS = [5, 2, 3, 4]


def pairs(stats, batch) -> tuple[Tensor, ...]:
    """Sums a, d and log-ratios u, v of chosen and rejected, (P,) each."""
    a, d = batch.sum_per_sequence(stats.logp).chunk(2)
    ref_a, ref_d = batch.sequence("ref_logp").chunk(2) if "ref_logp" in batch.per_sequence else (a, d)
    return a, d, a - ref_a, d - ref_d


def check(loss, stats, batch, chosen: Tensor, rejected: Tensor) -> None:
    """k per sequence over the number of pairs equals -c of every token."""
    _, triple = coefficients(loss, stats, batch)
    want = batch.spread(torch.cat([chosen, rejected]) / batch.num_pairs)
    torch.testing.assert_close(-triple.logp, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_sigmoid(beta):
    loss = losses.create("sigmoid", beta=beta)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, _, u, v = pairs(stats, batch)
    k = beta * s(-beta * (u - v))
    check(loss, stats, batch, k, -k)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5])
def test_conservative(q):
    loss = losses.create("conservative", beta=0.4, label_smoothing=q)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, _, u, v = pairs(stats, batch)
    k = 0.4 * (1 - q - s(0.4 * (u - v)))
    check(loss, stats, batch, k, -k)


def test_hinge():
    loss = losses.create("hinge", beta=2.0)
    stats, batch, _ = make_batch(loss, [5, 2, 3, 3, 4, 2, 2, 1])
    _, _, u, v = pairs(stats, batch)
    active = (2.0 * (u - v) < 1).double()
    assert 0 < active.sum() < 4
    check(loss, stats, batch, 2.0 * active, -2.0 * active)


def test_ipo():
    loss = losses.create("ipo", beta=0.4)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, _, u, v = pairs(stats, batch)
    plus, minus = batch.lengths.chunk(2)
    e = u / plus - v / minus - 1 / (2 * 0.4)
    check(loss, stats, batch, -2 * e / plus, 2 * e / minus)


def test_simpo():
    loss = losses.create("simpo", beta=2.0, simpo_gamma=0.8)
    stats, batch, _ = make_batch(loss, LENGTHS)
    a, d, _, _ = pairs(stats, batch)
    plus, minus = batch.lengths.chunk(2)
    k = 2.0 * s(-2.0 * (a / plus - d / minus - 0.8 / 2.0))
    check(loss, stats, batch, k / plus, -k / minus)


def test_kto():
    loss = losses.create("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    stats, batch, _ = make_batch(loss, LENGTHS)
    u = batch.sum_per_sequence(stats.logp) - batch.sequence("ref_logp")
    x = 0.3 * (u - batch.scalar("kl"))
    slope = 0.3 * s(x) * s(-x)
    k = torch.where(batch.sequence("desirable"), 1.2 * slope, -0.8 * slope)
    _, triple = coefficients(loss, stats, batch)
    torch.testing.assert_close(-triple.logp, batch.spread(k / batch.num_sequences), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "extra", "top"),
    [("ppo", {}, torch.inf), ("ppo", {"dual_clip": 1.4}, 1.4), ("dapo", {}, torch.inf), ("dapo", {"delta": 1.4}, 1.4)],
)
def test_clipped(name, extra, top):
    loss = losses.create(name, epsilon=0.1, epsilon_high=0.2, **extra)
    stats, batch, _ = make_batch(loss, [40, 30])
    ratio = (stats.logp - batch.token("old_logp")).exp()
    advantage = batch.token("advantage")
    up = (advantage > 0) & (ratio <= 1.2)
    down = (advantage < 0) & (ratio >= 0.9) & (ratio <= top)
    assert up.any() and down.any() and not (up | down).all()
    weight = batch.token("importance_weight") * batch.token("row_weight") / batch.num_tokens
    _, triple = coefficients(loss, stats, batch)
    torch.testing.assert_close(-triple.logp, ratio * advantage * (up | down) * weight, rtol=1e-12, atol=1e-16)


def test_kl_penalty_and_entropy_bonus():
    """k3 with weight q adds -q (1 - e^{ref - logp}); the entropy's coefficient is -entropy_coef / tokens."""
    base = losses.create("ppo")
    loss = losses.create("ppo", beta=0.2, entropy_coef=0.03)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, plain = coefficients(base, stats, batch)
    _, triple = coefficients(loss, stats, batch)
    want = -0.2 * (1 - (batch.token("ref_logp") - stats.logp).exp()) / batch.num_tokens
    torch.testing.assert_close(-(triple.logp - plain.logp), want, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(triple.entropy, torch.full_like(triple.entropy, -0.03) / batch.num_tokens)


def test_without_old_logp_the_ratio_is_one():
    loss = losses.create("dapo")
    stats, batch, _ = make_batch(loss, LENGTHS)
    per_token = {name: v for name, v in batch.per_token.items() if name == "advantage"}
    value, triple = coefficients(
        loss, stats, type(batch)(**{**vars(batch), "per_token": per_token, "per_sequence": {}})
    )
    torch.testing.assert_close(-triple.logp, batch.token("advantage") / batch.num_tokens)
    torch.testing.assert_close(value, -batch.mean_tokens(batch.token("advantage")))


def test_sft_learns_all_or_the_chosen_half():
    stats, batch, _ = make_batch(losses.create("sft"), LENGTHS)
    batch = type(batch)(**{**vars(batch), "per_token": {}})
    _, triple = coefficients(losses.create("sft"), stats, batch)
    torch.testing.assert_close(-triple.logp, torch.full_like(triple.logp, 1 / sum(LENGTHS)))
    _, triple = coefficients(losses.create("sft", paired=True), stats, batch)
    torch.testing.assert_close(-triple.logp, batch.chosen.double() / (LENGTHS[0] + LENGTHS[1]))


B = 0.4
SIDES = {
    "robust": (
        {"label_smoothing": 0.2},
        lambda u, v: B * (0.8 * s(-B * (u - v)) + 0.2 * s(B * (u - v))) / 0.6,
        lambda u, v: -B * (0.8 * s(-B * (u - v)) + 0.2 * s(B * (u - v))) / 0.6,
    ),
    "exo_pair": (
        {"label_smoothing": 0.2},
        lambda u, v: -B * s(B * (u - v)) * s(-B * (u - v)) * (B * (u - v) - math.log(4.0)),
        lambda u, v: B * s(B * (u - v)) * s(-B * (u - v)) * (B * (u - v) - math.log(4.0)),
    ),
    "nca_pair": ({}, lambda u, v: B * (s(-B * u) - s(B * u) / 2), lambda u, v: -B * s(B * v) / 2),
    "bco_pair": ({}, lambda u, v: B * s(-(B * u - 0.1)), lambda u, v: -B * s(B * v - 0.1)),
    "sppo_hard": ({}, lambda u, v: -2 * (u - 1 / (2 * B)), lambda u, v: -2 * (v + 1 / (2 * B))),
    "apo_zero": ({}, lambda u, v: B * s(B * u) * s(-B * u), lambda u, v: -B * s(B * v) * s(-B * v)),
    "apo_down": (
        {},
        lambda u, v: -B * s(B * u) * s(-B * u) + B * s(B * (u - v)) * s(-B * (u - v)),
        lambda u, v: -B * s(B * (u - v)) * s(-B * (u - v)),
    ),
    "cal_dpo": (
        {},
        lambda u, v: s(-(u - v)) + (1 / (2 * B) - u),
        lambda u, v: -s(-(u - v)) - (1 / (2 * B) + v),
    ),
    "dpop": (
        {"dpop_lambda": 5.0},
        lambda u, v: B * s(-B * (u - v - 5 * (-u).relu())) * (1 + 5 * (u < 0)),
        lambda u, v: -B * s(-B * (u - v - 5 * (-u).relu())),
    ),
}


@pytest.mark.parametrize("name", SIDES)
def test_table_of_sides(name):
    extra, chosen, rejected = SIDES[name]
    loss = losses.create(name, beta=B, **extra)
    stats, batch, _ = make_batch(loss, [5, 2, 3, 3, 4, 2])
    _, _, u, v = pairs(stats, batch)
    assert (u > 0).any() and (u < 0).any()
    check(loss, stats, batch, chosen(u, v), rejected(u, v))


def test_tokens_beyond_the_shorter_answer_weigh_ld_alpha():
    loss = losses.create("sigmoid", beta=B, ld_alpha=0.3)
    stats, batch, _ = make_batch(loss, [5, 2, 3, 4])
    weight = torch.tensor([1, 1, 1, 0.3, 0.3, 1, 1, 1, 1, 1, 1, 1, 0.3, 0.3], dtype=torch.float64)
    u, v = batch.sum_per_sequence(weight * (stats.logp - batch.token("ref_logp"))).chunk(2)
    k = (B * s(-B * (u - v))).repeat(2) * torch.tensor([1.0, 1.0, -1.0, -1.0])
    _, triple = coefficients(loss, stats, batch)
    torch.testing.assert_close(-triple.logp, batch.spread(k) * weight / batch.num_pairs, rtol=1e-12, atol=0)


def test_discopop():
    loss = losses.create("discopop", beta=B, discopop_tau=0.3)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, _, u, v = pairs(stats, batch)
    z = B * (u - v)
    m = s(z / 0.3)
    dz = -s(-z) * (1 - m) - (-z).exp() * m + m * (1 - m) / 0.3 * ((-z).exp() - torch.nn.functional.softplus(-z))
    check(loss, stats, batch, -B * dz, B * dz)


def test_orpo():
    loss = losses.create("orpo", beta=0.7)
    stats, batch, _ = make_batch(loss, LENGTHS)
    batch = replace(batch, per_token={})
    plus, minus = batch.lengths.chunk(2)
    mean_plus, mean_minus = batch.mean_per_sequence(stats.logp).chunk(2)
    o = mean_plus - mean_minus - torch.log1p(-mean_plus.exp()) + torch.log1p(-mean_minus.exp())
    chosen = 0.7 * s(-o) / (1 - mean_plus.exp()) / plus + batch.num_pairs / batch.num_chosen_tokens
    check(loss, stats, batch, chosen, -0.7 * s(-o) / (1 - mean_minus.exp()) / minus)


def test_alphapo():
    """The slope of (1 - e^{-alpha x}) / alpha is e^{-alpha x}."""
    loss = losses.create("alphapo", beta=2.0, simpo_gamma=0.8, alpha=0.25)
    stats, batch, _ = make_batch(loss, LENGTHS)
    x, y = batch.mean_per_sequence(stats.logp).chunk(2)
    plus, minus = batch.lengths.chunk(2)
    k = 2.0 * s(-(2.0 * ((-0.25 * y).exp() - (-0.25 * x).exp()) / 0.25 - 0.8))
    check(loss, stats, batch, k * (-0.25 * x).exp() / plus, -k * (-0.25 * y).exp() / minus)


def test_beta_dpo():
    loss = losses.create("beta_dpo", beta=0.3, beta_alpha=0.6, kept=0.5)
    stats, batch, _ = make_batch(loss, [5, 2, 3, 3, 4, 2, 2, 1])
    _, _, u, v = pairs(stats, batch)
    reward = 0.3 * (u - v)
    kept = torch.zeros(4, dtype=torch.bool)
    kept[(reward - 0.1).abs().argsort()[:2]] = True
    beta = 0.3 * (1 + 0.6 * (reward[kept].mean() - 0.1))
    k = torch.where(kept, 2 * beta * s(-beta * (u - v)), 0.0)
    check(loss, stats, batch, k, -k)


def policy_case(name: str, lengths=(40, 30), **hyperparameters):
    """A loss, its batch, ratio, advantage and the weight of each token in a mean over tokens."""
    loss = losses.create(name, **hyperparameters)
    stats, batch, _ = make_batch(loss, list(lengths))
    old = batch.token("old_logp")
    ratio = torch.ones_like(stats.logp) if old is None else (stats.logp - old).exp()
    weight = batch.token("importance_weight") * batch.token("row_weight")
    _, triple = coefficients(loss, stats, batch)
    return -triple.logp, batch, ratio, batch.token("advantage"), weight


# k of a token over its weight / tokens, from ratio and advantage
POLICY = {
    "gpg": ({}, lambda r, a: a),
    "cispo": ({"epsilon_high": 1.1}, lambda r, a: r.clamp(max=1.1) * a),
    "cispo_verl": ({"epsilon": 0.1}, lambda r, a: r.clamp(0.9, 1.1) * a),
    "aspo": (
        {"epsilon": 0.2, "dual_clip": 1.3},
        lambda r, a: torch.where(
            a > 0, (1 / r).clamp(max=1.3) * a * (r <= 1.2), r.clamp(max=1.3) * a * (r >= 0.8)
        ),
    ),
    "psr": ({}, lambda r, a: (a > 0).double()),
    "nsr": ({}, lambda r, a: -(a < 0).double()),
    "w_reinforce": ({}, lambda r, a: torch.where(a > 0, 0.1 * torch.ones_like(a), -1.0)),
    "reinforce_plus_plus": ({}, lambda r, a: r * a * torch.where(a > 0, r <= 1.2, r >= 0.8)),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICY)
def test_table_of_policy_losses(name):
    extra, slope = POLICY[name]
    k, batch, ratio, advantage, weight = policy_case(name, **extra)
    torch.testing.assert_close(k, slope(ratio, advantage) * weight / batch.num_tokens, rtol=1e-12, atol=1e-16)


def test_sapo():
    k, batch, ratio, advantage, weight = policy_case("sapo")
    tau = torch.where(advantage > 0, 1.0, 1.05 * torch.ones_like(advantage))
    gate = s(tau * (ratio - 1))
    want = 4 * advantage * ratio * gate * (1 - gate) * weight / batch.token_lengths / 2
    torch.testing.assert_close(k, want, rtol=1e-12, atol=1e-16)


def test_topr_and_asymre():
    k, batch, ratio, advantage, weight = policy_case("topr", (6, 5, 4))
    whole = batch.spread(batch.sum_per_sequence(ratio.log()).exp())
    assert (whole < 1).any() and (whole > 1).any()
    taper = torch.where(advantage >= 0, 1.0, whole.clamp(max=1.0))
    torch.testing.assert_close(k, taper * advantage * weight / 3, rtol=1e-12, atol=1e-16)
    k, batch, _, advantage, weight = policy_case("asymre", (6, 5, 4), delta_v=-0.3)
    torch.testing.assert_close(k, (advantage + 0.3) * weight / 3, rtol=1e-12, atol=1e-16)


def test_gspo_token_gives_each_token_its_own_advantage():
    k, batch, ratio, advantage, weight = policy_case("gspo_token", (6, 5), epsilon=0.9, epsilon_high=0.9)
    mean = batch.spread(batch.mean_per_sequence(ratio.log()).exp())
    torch.testing.assert_close(k, mean * advantage * weight / batch.token_lengths / 2, rtol=1e-12, atol=1e-16)


def test_covariance_losses_restrain_the_right_tokens():
    k, _, ratio, advantage, weight = policy_case("kl_cov", kl_cov_ratio=0.1, ppo_kl_coef=0.5)
    stats = make_batch(losses.create("kl_cov"), [40, 30])[0]
    covariance = (advantage - advantage.mean()) * (stats.logp - stats.logp.mean())
    largest = torch.zeros(70, dtype=torch.bool)
    largest[covariance.argsort(descending=True)[:7]] = True
    want = (ratio * advantage - torch.where(largest, 0.5 * ratio.log().sign(), 0.0)) * weight / 70
    torch.testing.assert_close(k, want, rtol=1e-12, atol=1e-16)
    bounds = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0, "epsilon": 5.0}
    found = [policy_case("clip_cov", seed=seed, **bounds)[0] for seed in (0, 1)]
    candidates = (covariance > 0.2) & (covariance < 1.0)
    assert candidates.sum() > 7
    for k in found:
        assert (k == 0).sum() == 7 and candidates[k == 0].all()
    assert not torch.equal(found[0] == 0, found[1] == 0)


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [("k1", torch.ones_like), ("k2", lambda d: d), ("k3", lambda d: 1 - (-d).exp())],
)
def test_kl_estimators(estimator, slope):
    loss, base = losses.create("ppo", beta=0.2, kl_estimator=estimator), losses.create("ppo")
    stats, batch, _ = make_batch(loss, LENGTHS)
    difference = coefficients(loss, stats, batch)[1].logp - coefficients(base, stats, batch)[1].logp
    drift = stats.logp - batch.token("ref_logp")
    torch.testing.assert_close(difference, 0.2 * slope(drift) / batch.num_tokens, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_aggregation(mode):
    loss = losses.create("gpg", loss_agg_mode=mode)
    stats, batch, _ = make_batch(loss, LENGTHS)
    weight = batch.token("importance_weight") * batch.token("row_weight") * batch.token("advantage")
    divisor = {
        "token-mean": batch.num_tokens,
        "seq-mean-token-mean": batch.token_lengths * len(LENGTHS),
        "seq-mean-token-sum": len(LENGTHS),
    }[mode]
    _, triple = coefficients(loss, stats, batch)
    torch.testing.assert_close(-triple.logp, weight / divisor, rtol=1e-12, atol=1e-16)


def test_given_normalisers_are_taken_as_they_are():
    """Half of a gradient accumulation gives half of the sum, whatever the loss is a mean of."""
    torch.manual_seed(0)
    for name in ("dapo", "bnpo", "grpo", "dr_grpo", "sigmoid", "orpo", "kto"):
        loss = losses.create(name)
        stats, batch, layout = make_batch(loss, LENGTHS)
        inputs = {**batch.per_token, **batch.per_sequence, **batch.scalars}
        value, _ = coefficients(loss, stats, batch)
        dense = {
            key: layout.fill(v) if key in batch.per_token and key not in batch.per_sequence else v
            for key, v in inputs.items()
        }
        given = call_batch(layout, dense, 2 * sum(LENGTHS), 2 * len(LENGTHS), torch.float64)
        halved, _ = coefficients(loss, stats, given)
        torch.testing.assert_close(halved, value / 2)
