"""Where plans, budgets and modes meet: masked plans, budgets under a row, inference, odd strides, bad plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_po import Split, losses, splits, stats_loss
from fused_po.diagnostics import peak_memory
from fused_po.ops import linear_loss, linear_token_stats, make_plan, token_stats
from fused_po.ops.coefficients import coefficients
from fused_po.ops.planning import static_plan
from fused_po.stats import Stats
from tests.interpreted import skip_unless_interpreted
from tests.losses.cases import create, make_batch
from tests.ops.problems import Problem, relative_error


@pytest.mark.parametrize("case, batch", [("sigmoid", 2), ("sigmoid-ld", 2), ("hinge", 2), ("kto", 1), ("ipo", 2)])
def test_a_masked_horizon_that_does_not_fit(case, batch):
    """Its coefficients are a scalar times a pattern over the rows that carry loss alone."""
    loss = losses.create("sigmoid", ld_alpha=0.4) if case == "sigmoid-ld" else losses.create(case)
    problem = Problem(loss, batch=batch, masked=0.4)
    found = linear_loss(
        *problem.arguments(),
        loss,
        **problem.options(),
        **problem.side_inputs,
        scratch_bytes=0,
        plan=static_plan(problem.labels, False),
    )
    want = problem.plain()
    got = torch.autograd.grad(found.loss, problem.leaves)
    for mine, truth in zip(got, torch.autograd.grad(want, problem.leaves), strict=True):
        assert relative_error(mine, truth) <= 1e-11


def test_a_masked_horizon_without_loss_has_no_gradient():
    problem = Problem(losses.create("sigmoid"), batch=2, masked=1.0)
    found = linear_loss(
        *problem.arguments(),
        problem.loss,
        **problem.options(),
        **problem.side_inputs,
        scratch_bytes=0,
        plan=static_plan(problem.labels, False),
    )
    assert all((grad == 0).all() for grad in torch.autograd.grad(found.loss, problem.leaves))


@pytest.mark.parametrize("scratch", [0, 1 << 20])
def test_hidden_states_of_masked_positions_are_not_read(scratch):
    problem = Problem(losses.create("sigmoid"), batch=2)
    with torch.no_grad():
        problem.tensors["hidden"][problem.labels < 0] = torch.nan
    found = linear_loss(
        *problem.arguments(),
        problem.loss,
        **problem.options(),
        **problem.side_inputs,
        scratch_bytes=scratch,
        plan=static_plan(problem.labels, False),
    )
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.loss, problem.leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case, batch", [("sigmoid", 2), ("dapo-all", 4), ("nca_pair", 2)])
def test_a_budget_of_nothing_is_one_row(dtype, case, batch):
    problem = Problem(create(case), batch=batch, dtype=dtype)
    found = linear_loss(*problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs, scratch_bytes=0)
    found.loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in problem.leaves)
    linear_token_stats(*problem.arguments(), **problem.options(), scratch_bytes=0).logp.sum().backward()


@pytest.mark.parametrize("case", ["sigmoid", "dapo-all", "kto"])
def test_inference_mode(case):
    problem = Problem(create(case))
    want = linear_loss(*problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs)
    with torch.inference_mode():
        found = linear_loss(*problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs)
        stats = token_stats(problem.logits(), problem.labels, outputs=problem.loss.statistics, **problem.transform)
        alone = stats_loss(stats, problem.labels, problem.loss, **problem.side_inputs)
    torch.testing.assert_close(found.loss, want.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone.loss, want.loss.detach(), rtol=1e-11, atol=1e-12)
    assert not found.loss.requires_grad and found.metrics.keys() == want.metrics.keys()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_labels_with_strides(backend):
    if backend == "triton":
        skip_unless_interpreted()
    torch.manual_seed(0)
    logits = torch.randn(5, 23)
    pairs = torch.randint(0, 23, (5, 3))
    for labels in (pairs[:, 1], pairs[:1, 0].expand(5)):
        found = token_stats(logits, labels, backend=backend).logp
        torch.testing.assert_close(found, logits.log_softmax(-1).gather(1, labels[:, None])[:, 0])


def test_plans_of_other_sequences_are_refused():
    problem = Problem(losses.create("sigmoid"), batch=4, length=6, masked=0.0)
    hidden, weight, labels = problem.arguments()
    flat = {"hidden": hidden.reshape(2, 12, -1), "labels": labels.reshape(2, 12)}
    with pytest.raises(ValueError, match="the plan is of 2 sequences"):
        linear_loss(
            hidden, weight, labels, problem.loss, plan=make_plan(flat["labels"]), ref_logp=torch.zeros(4).double()
        )
    moved = labels.clone()
    moved[0, 0], labels[1, 0] = -100, -100
    with pytest.raises(ValueError, match="other loss tokens"):
        linear_loss(hidden, weight, labels, problem.loss, plan=make_plan(moved), ref_logp=torch.zeros(4).double())
    bounds = torch.tensor([0, 12, 24])
    packed = hidden.reshape(24, -1), weight, labels.reshape(24)
    with pytest.raises(ValueError, match="the plan is of 2 sequences"):
        linear_loss(
            *packed,
            problem.loss,
            plan=make_plan(packed[2], cu_seqlens=bounds),
            cu_seqlens=torch.tensor([0, 6, 12, 24]),
            ref_logp=torch.zeros(3).double(),
        )
    with pytest.raises(ValueError, match="cu_seqlens goes with packed labels"):
        make_plan(labels, cu_seqlens=bounds)


def test_a_number_to_divide_by_is_taken_as_it_is():
    problem = Problem(losses.create("dapo"), masked=0.0)
    arguments = (*problem.arguments(), problem.loss)
    one = linear_loss(*arguments, **problem.options(), **problem.side_inputs, num_items=1).loss
    for half in (0.5, torch.tensor(0.5)):
        found = linear_loss(*arguments, **problem.options(), **problem.side_inputs, num_items=half).loss
        torch.testing.assert_close(found, 2 * one, rtol=1e-12, atol=0)
    none = linear_loss(*arguments, **problem.options(), **problem.side_inputs, num_items=torch.tensor(0)).loss
    assert torch.equal(none, one)


def test_other_arguments_of_another_type_are_refused():
    problem = Problem(losses.create("sigmoid"))
    arguments, inputs = (*problem.arguments(), problem.loss), problem.side_inputs
    with pytest.raises(ValueError, match=r"split must be a fused_po\.Split"):
        linear_loss(*arguments, split="positive_only", **inputs)
    with pytest.raises(ValueError, match="bias must be a tensor"):
        linear_loss(*arguments, bias=True, **inputs)
    hidden, weight, labels = problem.arguments()
    with pytest.raises(ValueError, match="cu_seqlens must be a tensor"):
        linear_loss(hidden.reshape(-1, 16), weight, labels.reshape(-1), problem.loss, cu_seqlens=[0, 54], **inputs)
    with pytest.raises(ValueError, match="labels must be int64"):
        stats_loss(token_stats(problem.logits(), labels), labels.double(), problem.loss, **inputs)


def test_half_precision_statistics_leave_side_inputs_their_digits():
    logp = torch.tensor([[-1.0], [-2.0]], dtype=torch.bfloat16)
    labels, reference = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[-1.001], [-2.0]])
    loss = losses.create("sigmoid", beta=10.0)
    found = stats_loss(Stats(logp=logp), labels, loss, ref_logp=reference).loss
    assert found.item() == pytest.approx(-torch.tensor(0.01).sigmoid().log().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "ppo", "kto"])
def test_thirds_of_a_population_of_one_are_refused(name):
    problem = Problem(losses.create(name))
    split = Split(reweight="tertiles", tertile_gains=(1.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="has no thirds"):
        linear_loss(*problem.arguments(), problem.loss, split=split, **problem.side_inputs)


@pytest.mark.parametrize("split", [splits.no_reweighting("horizon"), Split(reweight="power"), Split(reweight="clip")])
def test_every_reweighting_runs_on_a_loss_of_tokens(split):
    problem = Problem(losses.create("gpg"))
    found = linear_loss(*problem.arguments(), problem.loss, split=split, **problem.options(), **problem.side_inputs)
    found.loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in problem.leaves)


def test_a_reweighting_of_another_shape_is_refused():
    problem = Problem(losses.create("sigmoid"))
    split = Split(reweight=lambda weights: weights.mean())
    with pytest.raises(ValueError, match="reweight must return weights"):
        linear_loss(*problem.arguments(), problem.loss, split=split, **problem.side_inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("operation", ["linear_loss", "linear_token_stats"])
def test_a_slice_of_hidden_states_is_not_copied(operation, frozen, masked):
    """``hidden[:, :-1]``: the same bits as of a copy, and a peak without one."""
    batch, length, width, vocab = 2, 257, 512, 64
    torch.manual_seed(0)
    whole = torch.randn(batch, length + 1, width)
    weight = torch.randn(vocab, width, requires_grad=not frozen)
    labels = torch.randint(0, vocab, (batch, length))
    if masked:
        labels[:, 5:40] = -100

    def call(hidden):
        if operation == "linear_loss":
            side = {"ref_logp": torch.zeros(batch)}
            return linear_loss(hidden, weight, labels, losses.create("sigmoid"), scratch_bytes=1 << 18, **side).loss
        return linear_token_stats(hidden, weight, labels, scratch_bytes=1 << 18).logp.square().sum()

    def gradients(hidden):
        hidden = hidden.detach().requires_grad_()
        value = call(hidden)
        return value, *torch.autograd.grad(value, [hidden] if frozen else [hidden, weight])

    sliced = whole[:, :-1]
    for mine, want in zip(gradients(sliced), gradients(sliced.contiguous()), strict=True):
        assert torch.equal(mine, want)
    copy = batch * length * width * 4
    contiguous = sliced.contiguous()
    peak, least = (peak_memory(lambda given=given: call(given), "cpu") for given in (sliced, contiguous))
    assert peak < least + copy // 4


def test_a_coefficient_beyond_float32_is_its_largest_number():
    """Infinity times the 0 of a gradient tile would be NaN."""
    loss = losses.create("sigmoid", beta=10.0, f_divergence_type="forward_kl")
    stats, batch, _ = make_batch(loss, [2, 2])
    # of the chosen answer an exponential below its bound, times beta
    reference = batch.sum_per_sequence(stats.logp) + torch.tensor([88.0, 0.0])
    behind = replace(batch, per_sequence={"ref_logp": reference})
    narrow = Stats(**{name: v if v.dtype == torch.bool else v.float() for name, v in stats.present().items()})
    largest = torch.finfo(torch.float32).max
    exact, found = (coefficients(loss, each, behind)[1].logp for each in (stats, narrow))
    assert (exact[:2] < -largest).all() and (found[:2] == -largest).all()
    assert found.isfinite().all()
