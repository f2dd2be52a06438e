"""What torch takes for a default dtype or device is nobody's concern: results are the same bits."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats, make_plan, stats_loss
from tests.losses.cases import CASES, create
from tests.ops.problems import Problem, relative_error


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def call(problem: Problem, **options):
    found = linear_loss(*problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs, **options)
    return (found.loss.detach(), *torch.autograd.grad(found.loss, problem.leaves), *found.metrics.values())


@pytest.mark.pairwise
@pytest.mark.parametrize("scratch", [0, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_another_default_dtype(case, scratch, default_dtype):
    problem = Problem(create(case), batch=4, length=5)
    want = call(problem, scratch_bytes=scratch)
    torch.set_default_dtype(default_dtype)
    for got, same in zip(call(problem, scratch_bytes=scratch), want, strict=True):
        torch.testing.assert_close(got, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["simpo", "ipo", "sigmoid_norm", "sigmoid", "kto", "cpo"])
def test_a_horizon_that_does_not_fit_keeps_its_digits(name):
    """Its coefficients are a scalar times a pattern, in float64 for float64: 1 / 3 and 1 / 7 are in it."""
    loss = losses.create(name, cpo_alpha=0.0) if name == "cpo" else losses.create(name)
    problem = Problem(loss, batch=2, length=7, masked=0.0)
    problem.labels[0, 3:] = -100
    if name == "kto":
        # one sequence is a horizon
        problem = Problem(loss, batch=1, length=7, masked=0.0)
    want = torch.autograd.grad(problem.plain(), problem.leaves)
    for got, truth in zip(call(problem, scratch_bytes=0)[1:4], want, strict=True):
        assert relative_error(got, truth) <= 1e-13


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("layout", "case"),
    [(layout, case) for layout in ("padded", "packed") for case in ("sigmoid", "dapo-all", "kto", "sft", "aot", "ppo")]
    + [("one sequence", case) for case in ("dapo-all", "kto", "sft", "ppo")],
)
def test_a_default_device_elsewhere(case, layout, planned):
    """Nothing that is made on the way may land there; "meta" stands for a GPU."""
    problem = Problem(create(case), batch=2, length=5)
    hidden, weight, labels = problem.arguments()
    inputs = dict(problem.side_inputs)
    bounds, options = None, {"bias": problem.tensors["bias"]}
    if layout != "padded":
        hidden, labels = hidden.reshape(10, -1), labels.reshape(10)
        inputs = {name: v.reshape(10) if v.ndim == 2 else v for name, v in inputs.items()}
        bounds = torch.tensor([0, 5, 10])
    if layout == "one sequence":
        bounds = None
        inputs = {name: v[:1] if v.shape == (2,) else v for name, v in inputs.items()}
    with torch.device("meta"):
        call = {"cu_seqlens": bounds} if bounds is not None else {}
        if planned:
            call["plan"] = make_plan(labels, **call)
        found = linear_loss(hidden, weight, labels, problem.loss, **options, **call, **inputs)
        stats = linear_token_stats(hidden, weight, labels, outputs=problem.loss.statistics, **options)
        other = stats_loss(stats, labels, problem.loss, **call, **inputs)
        assert found.loss.device.type == "cpu"
        torch.testing.assert_close(found.loss, other.loss)
        found.loss.backward()
