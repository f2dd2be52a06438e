"""What callers may rely on beside the numbers: shapes, masks, normalisers, plans, packing, repeated use."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import fields

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats, make_plan, token_stats
from fused_po.stats import STATISTICS, Stats
from tests.losses.cases import CASES, create
from tests.ops.problems import EntropyPairs, H, Problem, V, relative_error


def run(problem: Problem, **options):
    return linear_loss(*problem.arguments(), problem.loss, **{**problem.options(), **problem.side_inputs, **options})


def test_all_rows_masked_is_zero_and_connected():
    for case in CASES:
        problem = Problem(create(case))
        problem.labels.fill_(-100)
        found = run(problem)
        assert found.loss == 0
        found.loss.backward()
        assert all((t.grad == 0).all() for t in problem.leaves)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_rows(shape):
    hidden = torch.randn(*shape, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    loss = linear_loss(hidden, weight, labels, losses.create("sft")).loss
    assert loss == 0
    loss.backward()
    assert hidden.grad.shape == hidden.shape and (weight.grad == 0).all()
    stats = linear_token_stats(hidden, weight, labels, outputs=("logp", "entropy"))
    assert stats.logp.shape == shape and stats.entropy.requires_grad
    stats.logp.sum().backward()
    logits = torch.randn(*shape, V, requires_grad=True)
    token_stats(logits, labels).logp.sum().backward()
    assert logits.grad.shape == logits.shape


def test_nan_stays_in_its_row():
    problem = Problem(losses.create("sft"), masked=0.0)
    with torch.no_grad():
        problem.tensors["hidden"][1, 2] = torch.nan
    for stats in (
        linear_token_stats(*problem.arguments(), outputs=("logp", "entropy", "lse", "log_sum_sq_probs")),
        token_stats(problem.logits(), problem.labels, outputs=("logp", "entropy", "lse", "log_sum_sq_probs")),
    ):
        for value in stats.present().values():
            assert value[1, 2].isnan()
            assert value.isnan().sum() == 1
    hidden, weight, labels = problem.arguments()
    frozen = linear_loss(hidden, weight.detach(), labels, problem.loss)
    frozen.loss.backward()
    assert hidden.grad.isnan().any(-1).sum() == 1


def test_nan_in_one_pair_leaves_the_others():
    problem = Problem(losses.create("sigmoid"), frozenset({"weight", "bias"}), masked=0.0)
    with torch.no_grad():
        problem.tensors["hidden"][1, 2] = torch.nan
    run(problem).loss.backward()
    rows = problem.tensors["hidden"].grad.isnan().any(-1).any(-1)
    # sequence 1 and its rejected partner 1 + B/2
    assert rows.nonzero().flatten().tolist() == [1, 4]


def test_ignored_rows_may_hold_anything():
    for case in ("sigmoid", "dapo-all"):
        problem, twin = Problem(create(case)), Problem(create(case))
        with torch.no_grad():
            twin.tensors["hidden"][twin.labels < 0] = torch.nan
        a, b = run(problem), run(twin)
        a.loss.backward()
        b.loss.backward()
        assert torch.equal(a.loss, b.loss)
        for x, y in zip(problem.leaves, twin.leaves, strict=True):
            assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("case", ["sigmoid", "kto", "dapo-all", "sft-paired"])
def test_packed_equals_padded(case):
    problem = Problem(create(case))
    padded = run(problem)
    want = torch.autograd.grad(padded.loss, problem.leaves)
    # drop a different number of trailing positions of each sequence, none of which carries loss
    keep = torch.arange(problem.length) < torch.tensor([9, 7, 9, 8, 9, 6]).unsqueeze(1)
    keep |= problem.labels >= 0
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    pack = {n: v[keep] if v.shape == keep.shape else v for n, v in problem.side_inputs.items()}
    hidden, weight, labels = problem.arguments()
    options = {**problem.options(), "temperature": problem.temperature[keep]}
    packed = linear_loss(hidden[keep], weight, labels[keep], problem.loss, cu_seqlens=cu_seqlens, **options, **pack)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-12, atol=0)
    for got, truth in zip(torch.autograd.grad(packed.loss, problem.leaves), want, strict=True):
        assert relative_error(got, truth) < 1e-12
    assert packed.stats.logp.shape == labels[keep].shape


def test_temperature_may_be_per_sequence():
    problem = Problem(losses.create("sigmoid"))
    per_sequence = torch.rand(6, dtype=torch.float64) + 0.5
    spread = per_sequence.unsqueeze(1).expand(problem.labels.shape)
    a, b = run(problem, temperature=per_sequence), run(problem, temperature=spread)
    assert torch.equal(a.loss, b.loss)
    flat = {"cu_seqlens": torch.arange(0, 55, 9)}
    hidden, weight, labels = problem.arguments()
    options = {**problem.options(), "temperature": per_sequence}
    c = linear_loss(
        hidden.flatten(0, 1), weight, labels.flatten(), problem.loss, **options, **flat, **problem.side_inputs
    )
    torch.testing.assert_close(c.loss, a.loss)


def test_padded_head_rows_have_no_probability_and_no_gradient():
    problem = Problem(losses.create("sigmoid"))
    hidden, weight, labels = problem.arguments()
    wide = torch.cat([weight.detach(), torch.full((3, H), 9.0, dtype=torch.float64)]).requires_grad_()
    bias = torch.cat([problem.tensors["bias"].detach(), torch.ones(3, dtype=torch.float64)]).requires_grad_()
    options = {**problem.options(), "bias": bias}
    found = linear_loss(hidden, wide, labels, problem.loss, vocab_size=V, **options, **problem.side_inputs)
    want = run(problem)
    torch.testing.assert_close(found.loss, want.loss)
    found.loss.backward()
    dw = wide.grad.clone()
    want.loss.backward()
    assert (dw[V:] == 0).all() and (bias.grad[V:] == 0).all()
    torch.testing.assert_close(dw[:V], weight.grad)


def test_normalisers_given_are_taken():
    problem = Problem(create("dapo"))
    tokens = int((problem.labels >= 0).sum())
    torch.testing.assert_close(run(problem, num_items=4 * tokens).loss * 4, run(problem).loss)
    torch.testing.assert_close(run(problem, num_items=torch.tensor(tokens)).loss, run(problem).loss)
    pairs = Problem(create("sigmoid"))
    torch.testing.assert_close(run(pairs, num_sequences=24).loss * 4, run(pairs).loss)


def test_a_plan_can_be_made_before():
    problem = Problem(create("sigmoid"))
    want = run(problem)
    plan = make_plan(problem.labels)
    assert torch.equal(run(problem, plan=plan).loss, want.loss)
    other = make_plan(problem.labels[:, :4])
    with pytest.raises(ValueError, match="the plan is of 24 labels"):
        run(problem, plan=other)


def test_statistics_come_in_the_shape_of_labels_with_zero_where_ignored():
    problem = Problem(EntropyPairs())
    found = run(problem).stats
    truth, keep = problem.stats(), problem.labels >= 0
    assert {f.name for f in fields(Stats) if getattr(found, f.name) is not None} == problem.loss.needs
    for name, value in found.present().items():
        assert not value.requires_grad
        torch.testing.assert_close(value, torch.where(keep, getattr(truth, name), 0.0).detach())


def test_metrics_are_those_of_the_whole_call():
    problem = Problem(create("sigmoid"))
    logp = torch.where(problem.labels >= 0, problem.stats().logp, 0.0).sum(1).detach()
    rewards = 0.1 * (logp - problem.side_inputs["ref_logp"])
    for scratch in (0, 1 << 20):
        metrics = run(problem, scratch_bytes=scratch).metrics
        torch.testing.assert_close(metrics["rewards/chosen"], rewards[:3].mean())
        torch.testing.assert_close(metrics["rewards/margins"], (rewards[:3] - rewards[3:]).mean())
        torch.testing.assert_close(metrics["rewards/accuracies"], (rewards[:3] > rewards[3:]).double().mean())
        torch.testing.assert_close(metrics["logps/rejected"], logp[3:].mean())
        assert not any(value.requires_grad for value in metrics.values())


def test_gradient_scales_with_grad_output():
    problem = Problem(create("dapo-all"))
    want = torch.autograd.grad(run(problem).loss, problem.leaves)
    got = torch.autograd.grad(run(problem).loss * -3.0, problem.leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, -3.0 * b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("scratch", [0, 1 << 20], ids=["chunks", "waiting"])
def test_a_second_backward_raises(scratch, offloads):
    """Also where saved tensors come back as copies, which tell nothing of the first; the first stays as it was."""
    problem = Problem(create("sigmoid"))
    with torch.autograd.graph.save_on_cpu() if offloads else contextlib.nullcontext():
        loss = run(problem, scratch_bytes=scratch).loss
    first = torch.autograd.grad(2.0 * loss, problem.leaves, retain_graph=True)
    copies = [grad.clone() for grad in first]
    with pytest.raises(RuntimeError, match="linear_loss makes its gradient once"):
        torch.autograd.grad(loss, problem.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_statistics_can_be_differentiated_twice_over():
    """linear_token_stats keeps its graph usable: two losses on top of one call."""
    for frozen in (frozenset(), frozenset({"weight", "bias"})):
        problem = Problem(create("sft"), frozen)
        stats = linear_token_stats(*problem.arguments(), outputs=("logp", "entropy"), **problem.options())
        first = torch.autograd.grad(stats.logp.sum(), problem.leaves, retain_graph=True)
        torch.autograd.grad(stats.entropy.sum(), problem.leaves, retain_graph=True)
        again = torch.autograd.grad(stats.logp.sum(), problem.leaves)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_second_derivatives_are_refused():
    problem = Problem(create("sft"))
    stats = linear_token_stats(*problem.arguments(), **problem.options())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(stats.logp.sum(), problem.leaves, create_graph=True)


def test_checkpointing_warns_and_offloading_works():
    problem = Problem(create("sigmoid"))
    want = torch.autograd.grad(run(problem).loss, problem.leaves)
    with pytest.warns(UserWarning, match="inside activation checkpointing"):
        loss = checkpoint(lambda *_: run(problem).loss, *problem.leaves, use_reentrant=False)
        again = torch.autograd.grad(loss, problem.leaves)
    for a, b in zip(again, want, strict=True):
        assert torch.equal(a, b)
    with torch.autograd.graph.save_on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = run(problem).loss
    for a, b in zip(torch.autograd.grad(loss, problem.leaves), want, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_alone():
    problem = Problem(create("dapo-all"))
    before = [t.detach().clone() for t in (*problem.leaves, *problem.side_inputs.values(), problem.labels)]
    run(problem).loss.backward()
    after = [*problem.leaves, *problem.side_inputs.values(), problem.labels]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    logits = problem.logits().detach().requires_grad_()
    copy = logits.detach().clone()
    token_stats(logits, problem.labels).logp.sum().backward()
    assert torch.equal(logits, copy)


@pytest.mark.parametrize("inplace", [False, True])
def test_token_stats_of_a_shifted_slice(inplace):
    """``logits[:, :-1]`` is not contiguous across sequences; every output and gradient, in place or not."""
    problem = Problem(create("sft"))
    outputs = STATISTICS
    leaf = torch.randn(6, 10, V, dtype=torch.float64, requires_grad=True)
    truth_leaf = leaf.detach().clone().requires_grad_()
    logits = leaf * 1.0
    found = token_stats(logits[:, :-1], problem.labels, outputs=outputs, inplace=inplace, **problem.transform)
    problem.logits = lambda: truth_leaf[:, :-1]
    truth, keep = problem.stats(), problem.labels >= 0
    for name in outputs:
        want = getattr(truth, name)
        torch.testing.assert_close(getattr(found, name), torch.where(keep, want, torch.zeros_like(want)))
    weights = torch.randn(3, *keep.shape, dtype=torch.float64)
    (weights[0] * found.logp + weights[1] * found.entropy + weights[2] * found.lse).sum().backward()
    (keep * (weights[0] * truth.logp + weights[1] * truth.entropy + weights[2] * truth.lse)).sum().backward()
    assert relative_error(leaf.grad, truth_leaf.grad) < 1e-12
