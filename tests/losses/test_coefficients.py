"""The coefficient tables of the losses' papers, written out by hand: k = -dL/dlogp, the update direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import sigmoid as s

from fused_po import losses
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
