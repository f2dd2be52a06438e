"""Learning dynamics on a small model: every number against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from fused_po import Split, losses, stats_loss
from fused_po.diagnostics import Examples, learning_dynamics
from fused_po.diagnostics.dynamics import _histogram
from tests.losses.cases import create
from tests.test_alignment import Policy, examples, stats_of
from tests.test_checkpoints import DATA, LOSS, tiny


def dynamics(loss, batches=None, **options):
    return learning_dynamics(Policy(), batches or [examples(loss, 1)], loss, stats=stats_of, **options)


def test_log_probs_and_squeezing_are_those_of_the_two_sides():
    loss = losses.create("sigmoid")
    data, model = examples(loss, 1), Policy()
    found = dynamics(loss, [data])
    log_p = model(data.inputs["tokens"]).log_softmax(-1)
    keep = data.labels >= 0
    logp = log_p.gather(-1, data.labels.clamp_min(0)[..., None])[..., 0]
    top = log_p.argmax(-1) == data.labels
    for side, rows in (("positive", slice(0, 3)), ("negative", slice(3, 6))):
        kept = keep[rows]
        assert found.logp[side] == pytest.approx((logp[rows] * kept).sum(1).mean().item())
        assert found.token_logp[side] == pytest.approx(logp[rows][kept].mean().item())
        assert found.max_prob[side] == pytest.approx(log_p.exp().amax(-1)[rows][kept].mean().item())
        assert found.is_top1[side] == pytest.approx(top[rows][kept].double().mean().item())


@pytest.mark.parametrize("case", ["sigmoid", "ppo-all", "kto"])
def test_offset_is_that_of_the_gradients(case):
    loss, data = create(case), examples(create(case), 1)
    found = dynamics(loss, [data])
    parts = {}
    for side, split in (("positive", (1.0, 0.0)), ("negative", (0.0, 1.0)), ("rest", (0.0, 0.0))):
        model = Policy()
        stats = stats_of(model, data.inputs, data.labels, loss.statistics)
        stats_loss(stats, data.labels, loss, split=Split(*split), **data.side_inputs).loss.backward()
        parts[side] = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])
    first, second = parts["positive"] - parts["rest"], parts["negative"] - parts["rest"]
    assert found.offset_norms["positive"] == pytest.approx(first.norm().item(), rel=1e-6)
    assert found.offset_norms["negative"] == pytest.approx(second.norm().item(), rel=1e-6)
    assert found.offset_cosine == pytest.approx(torch.cosine_similarity(first, second, 0).item(), abs=1e-6)


def test_histograms_hold_every_coefficient_on_its_side():
    loss = losses.create("sigmoid")
    data = examples(loss, 1)
    found = dynamics(loss, [data], bins=7)
    for side, rows in (("positive", slice(0, 3)), ("negative", slice(3, 6))):
        histogram = found.coefficients[side]
        assert histogram.edges.shape == (8,) and histogram.counts.sum() == (data.labels[rows] >= 0).sum()
    # DPO raises what was chosen and lowers what was rejected
    assert (found.coefficients["positive"].edges > 0).all()
    assert (found.coefficients["negative"].edges < 0).all()


def test_a_histogram_of_values_that_are_nearly_alike_has_edges_of_its_own():
    for values in ([0.1, 0.1 + 1e-17, 0.1 - 1e-16], [0.0, 0.0], [-1e20, -1e20], [1e-12], [3.0, 3.0 + 1e-12]):
        histogram = _histogram(torch.tensor(values, dtype=torch.float64), 40)
        assert histogram.counts.sum() == len(values)
        assert (histogram.edges.diff() > 0).all()
        assert histogram.edges[0] <= min(values) and max(values) <= histogram.edges[-1]
        assert "2 values" in repr(histogram) or len(values) != 2


def test_a_side_without_tokens_is_nan():
    loss = losses.create("sigmoid")
    data = examples(loss, 1)
    data.labels[3:] = -100
    found = dynamics(loss, [data])
    assert math.isnan(found.logp["negative"]) and math.isnan(found.max_prob["negative"])
    assert math.isnan(found.offset_cosine)
    assert set(found.flat()) >= {"logp/positive", "max_prob/negative", "offset_cosine"}


def test_the_model_is_left_as_it_was():
    model, loss = Policy(), losses.create("sigmoid")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learning_dynamics(model, [examples(loss, 1)], loss, stats=stats_of)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_bad_input_is_refused():
    loss = losses.create("sigmoid")
    data = examples(loss, 1)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        dynamics(loss, [data], bins=0)
    with pytest.raises(ValueError, match="holds no loss token"):
        dynamics(loss, [Examples(data.inputs, torch.full_like(data.labels, -100), data.side_inputs)])
    with pytest.raises(ValueError, match="ref_logp"):
        dynamics(loss, [Examples(data.inputs, data.labels)])
    with pytest.raises(ValueError, match="requires a gradient"):
        learning_dynamics(Policy().requires_grad_(False), [data], loss, stats=stats_of)


def test_halves_are_summed_in_single_precision():
    """The same batch many times over has the gradient of one."""
    model, batches, loss = tiny(0).bfloat16(), DATA[:1], LOSS
    once = learning_dynamics(model, batches, loss)
    often = learning_dynamics(model, batches * 300, loss)
    for side, length in once.offset_norms.items():
        assert often.offset_norms[side] == pytest.approx(length, rel=1e-2)
    assert often.offset_cosine == pytest.approx(once.offset_cosine, abs=1e-2)
